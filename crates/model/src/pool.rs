//! Pools: where volumes live.

use crate::{name::Name, units::Bytes, volume::FEWEST_REPLICAS};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Which engine keeps the volumes of a pool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum PoolDriverKind {
    /// A directory of each host for itself: a disk dies with its host.
    #[default]
    Local,
    /// One directory mounted on every host: a disk outlives a host as long as its filer does.
    Shared,
    /// A directory of each host: every disk is on several hosts at once, and outlives each of them.
    Mirrored,
}

/// What is wanted of a pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PoolSpec {
    /// The engine.
    pub driver: PoolDriverKind,
    /// The directory on every host.
    pub path: String,
    /// On how many hosts each disk of a mirrored pool is: 2 or 3; 2 unless it is said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replicas: Option<u32>,
}

impl PoolSpec {
    /// A pool of this kind in this directory, with what is usual.
    #[must_use]
    pub fn new(driver: PoolDriverKind, path: impl Into<String>) -> Self {
        Self { driver, path: path.into(), replicas: None }
    }
    /// On how many hosts each of its disks is.
    #[must_use]
    pub fn copies(&self) -> usize {
        match self.driver {
            PoolDriverKind::Local | PoolDriverKind::Shared => 1,
            PoolDriverKind::Mirrored => self.replicas.unwrap_or(FEWEST_REPLICAS) as usize,
        }
    }
}

/// The room of one pool on one host, as its file system tells.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct PoolRoom {
    /// What is taken and what is free, without what is kept back for root.
    pub total: Bytes,
    /// What may be written yet.
    pub free: Bytes,
    /// What the pool's own files take.
    pub used: Bytes,
}

impl PoolRoom {
    /// How full the file system is, per cent.
    #[must_use]
    pub fn full(&self) -> u64 {
        let taken = self.total.0.saturating_sub(self.free.0);
        (taken.saturating_mul(100)).checked_div(self.total.0).unwrap_or(0)
    }
}

/// The room that a host has in pools.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct HostRooms {
    /// The session of the host that says so.
    pub session: u64,
    /// By pool; one that cannot be looked at, or is not there yet, is not named.
    pub pools: BTreeMap<Name, PoolRoom>,
}

impl HostRooms {
    /// Whether it differs from what was told before by so much that somebody would want to know.
    #[must_use]
    pub fn differs(&self, before: &Self) -> bool {
        // A hundredth of the pool.
        let far = |now: Bytes, before: Bytes, of: Bytes| now.0.abs_diff(before.0) > of.0 / 100;
        self.session != before.session
            || !self.pools.keys().eq(before.pools.keys())
            || self.pools.iter().any(|(pool, now)| {
                let then = &before.pools[pool];
                now.total != then.total
                    || now.full() != then.full()
                    || far(now.free, then.free, now.total)
                    || far(now.used, then.used, now.total)
            })
    }
}

#[cfg(test)]
mod tests {
    use super::{HostRooms, PoolRoom};
    use crate::units::Bytes;

    #[test]
    fn what_nobody_would_want_to_know_is_not_told_again() {
        let rooms = |total, free, used| HostRooms {
            session: 1,
            pools: [(
                "fast".parse().unwrap(),
                PoolRoom { total: Bytes(total), free: Bytes(free), used: Bytes(used) },
            )]
            .into(),
        };
        let before = rooms(10_000, 4_050, 1_000);
        assert!(!rooms(10_000, 4_010, 1_040).differs(&before));
        assert!(rooms(10_000, 4_050, 1_200).differs(&before));
        assert!(rooms(10_000, 3_900, 1_000).differs(&before), "another per cent");
        assert!(rooms(20_000, 14_050, 1_000).differs(&before));
        assert!(HostRooms { session: 2, ..before.clone() }.differs(&before));
        assert!(HostRooms { pools: Default::default(), ..before.clone() }.differs(&before));
        assert_eq!(before.pools["fast"].full(), 59);
        assert_eq!(PoolRoom::default().full(), 0);
    }
}
