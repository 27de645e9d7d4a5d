//! What hosts measure of the work on them, for balancing it (docs/decisions/0019-rebalancing.md).

use crate::{
    name::Name,
    units::{Bytes, Millis},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, fmt};

/// What becomes of loads that are uneven.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum RebalancePolicy {
    /// Nothing is measured and nothing is moved.
    Off,
    /// Which moves would help is told, and nothing is moved.
    #[default]
    Advise,
    /// VMs are moved, one at a time.
    Auto,
}

impl fmt::Display for RebalancePolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            RebalancePolicy::Off => "off",
            RebalancePolicy::Advise => "advise",
            RebalancePolicy::Auto => "auto",
        })
    }
}

/// For how much of the time some work on a host stood still for want of something (PSI, "some"), thousandths.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "camelCase", default)]
pub struct Pressure {
    /// A CPU.
    pub cpu: u32,
    /// Memory.
    pub memory: u32,
}

/// What a VM takes of its host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct VmLoad {
    /// CPU time, thousandths of one CPU.
    pub cpu: u32,
    /// Memory of its process that is in use.
    pub memory: Bytes,
    /// The time over which this was measured: it ends now, and is shorter than asked for while the VM is new there.
    pub over: Millis,
}

/// What a host measured.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct HostLoad {
    /// The session of the host that says so.
    pub session: u64,
    /// When, wall clock, milliseconds since 1970.
    pub at_ms: i64,
    /// The time over which the pressure was measured.
    pub over: Millis,
    /// How much its work stood still; absent where the kernel does not tell.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pressure: Option<Pressure>,
    /// Its VMs.
    pub vms: BTreeMap<Name, VmLoad>,
}

impl HostLoad {
    /// Whether it differs from what was told before by more than measuring does.
    #[must_use]
    pub fn differs(&self, before: &Self) -> bool {
        let far = |now: u64, before: u64, least: u64| {
            now.abs_diff(before) > least.max(now.max(before) / 20)
        };
        let pressed = |of: &Self| of.pressure.unwrap_or_default();
        let (now, then) = (pressed(self), pressed(before));
        self.session != before.session
            || self.over != before.over
            || far(now.cpu.into(), then.cpu.into(), 20)
            || far(now.memory.into(), then.memory.into(), 20)
            || !self.vms.keys().eq(before.vms.keys())
            || self.vms.iter().any(|(vm, now)| {
                let then = &before.vms[vm];
                now.over != then.over
                    || far(now.cpu.into(), then.cpu.into(), 30)
                    || far(now.memory.0, then.memory.0, 64 << 20)
            })
    }
}

#[cfg(test)]
mod tests {
    use super::{HostLoad, Pressure, VmLoad};
    use crate::units::Millis;

    #[test]
    fn what_only_measuring_changes_is_not_told_again() {
        let load = |cpu: u32, waits: u32, over: u64| HostLoad {
            session: 1,
            pressure: Some(Pressure { cpu: waits, memory: 0 }),
            vms: [("db".parse().unwrap(), VmLoad { cpu, over: Millis(over), ..VmLoad::default() })]
                .into(),
            ..HostLoad::default()
        };
        let before = load(1000, 100, 300_000);
        assert!(!load(1040, 115, 300_000).differs(&before));
        assert!(load(1060, 100, 300_000).differs(&before));
        assert!(load(1000, 130, 300_000).differs(&before));
        assert!(load(1000, 100, 290_000).differs(&before));
        assert!(HostLoad { session: 2, ..before.clone() }.differs(&before));
        assert!(HostLoad { vms: Default::default(), ..before.clone() }.differs(&before));
    }
}
