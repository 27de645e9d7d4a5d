//! The cluster itself: its timers, its fencing policy, its manager.

use crate::{error::ModelError, name::Name, units::Millis};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::fmt;

/// Evidence that a lost host can no longer run a VM.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum ProofKind {
    /// Its renewal record stood unchanged for `T`, so its guard's deadline has passed.
    LeaseExpired,
    /// Its power was read as off after a fence command.
    PoweredOff,
}
impl fmt::Display for ProofKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ProofKind::LeaseExpired => "lease-expired",
            ProofKind::PoweredOff => "powered-off",
        })
    }
}

/// All timers on which the safety and the speed of a failover rest (DESIGN.md section 4).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub struct Timers {
    /// `T`: a record unchanged for so long has expired.
    pub lease: Millis,
    /// `D`: the guard stops a host's VMs so long after the last acknowledged renewal was sent.
    pub guard: Millis,
    /// How often a host renews.
    pub renew: Millis,
    /// A manager whose host's record is unchanged for so long is replaced.
    pub manager: Millis,
    /// How often hosts send each other a heartbeat.
    pub heartbeat: Millis,
    /// A host unheard for so long is suspected.
    pub suspect: Millis,
    /// The least that `T` must exceed `D` by: what clock rates and the guard's own latency may cost.
    pub margin: Millis,
}

impl Default for Timers {
    fn default() -> Self {
        Self {
            lease: Millis(5000),
            guard: Millis(4400),
            renew: Millis(500),
            manager: Millis(1500),
            heartbeat: Millis(200),
            suspect: Millis(1000),
            margin: Millis(400),
        }
    }
}

/// The longest election of etcd with the settings Haven gives it, milliseconds.
pub const ETCD_WORST_ELECTION_MS: u64 = 2000;

impl Timers {
    /// Checks the rules of DESIGN.md section 4.
    ///
    /// # Errors
    /// [`ModelError::UnsafeTimers`] names the broken rule and the figures.
    pub fn check(&self) -> Result<(), ModelError> {
        let unsafe_because = |why: String| Err(ModelError::UnsafeTimers { why });
        if self.guard.0 + self.margin.0 > self.lease.0 {
            return unsafe_because(format!(
                "guard ({}) + margin ({}) must not exceed lease ({})",
                self.guard, self.margin, self.lease
            ));
        }
        if self.margin.0 * 20 < self.lease.0 {
            return unsafe_because(format!(
                "margin ({}) must be at least a twentieth of lease ({}), for clocks that run unevenly",
                self.margin, self.lease
            ));
        }
        if self.renew.0 == 0 || self.renew.0 * 5 > self.guard.0 {
            return unsafe_because(format!(
                "renew ({}) must happen at least 5 times within guard ({})",
                self.renew, self.guard
            ));
        }
        if self.guard.0 < 2 * ETCD_WORST_ELECTION_MS {
            return unsafe_because(format!(
                "guard ({}) must be at least twice the store's worst election ({ETCD_WORST_ELECTION_MS}ms)",
                self.guard
            ));
        }
        if self.manager.0 < 2 * self.renew.0 || self.suspect.0 < 3 * self.heartbeat.0 {
            return unsafe_because(
                "manager must be at least 2 renewals and suspect at least 3 heartbeats".into(),
            );
        }
        Ok(())
    }
}

/// What is wanted of the cluster as a whole.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ClusterSpec {
    /// Its name.
    pub name: String,
    /// All timers.
    #[serde(default)]
    pub timers: Timers,
    /// Which proofs suffice to recover the VMs of a lost host; whichever comes first.
    #[serde(default = "default_fencing")]
    pub fencing: Vec<ProofKind>,
    /// How many hosts run a member of the store: 1, 3 or 5.
    #[serde(default = "default_voters")]
    pub voters: u32,
    /// A voter whose host is lost for so long is replaced by another host.
    #[serde(default = "default_replace_voter_after")]
    pub replace_voter_after: Millis,
}

fn default_fencing() -> Vec<ProofKind> {
    vec![ProofKind::PoweredOff, ProofKind::LeaseExpired]
}
fn default_voters() -> u32 {
    3
}
fn default_replace_voter_after() -> Millis {
    Millis(600_000)
}

impl Default for ClusterSpec {
    fn default() -> Self {
        Self {
            name: "haven".into(),
            timers: Timers::default(),
            fencing: default_fencing(),
            voters: default_voters(),
            replace_voter_after: default_replace_voter_after(),
        }
    }
}

/// Who manages. Every commit of a manager compares the revision of this record, so a replaced one commits nothing.
/// Whether its holder lives is judged by the holder's own renewal record, with the shorter `timers.manager`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ManagerRecord {
    /// Counts managers.
    pub term: u64,
    /// The host whose daemon manages.
    pub holder: Name,
    /// The session of that host in which it took the lease.
    pub session: u64,
}
