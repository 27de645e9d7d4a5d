//! The cluster itself: its timers, its fencing policy, its manager.

use crate::{
    drain::MoveLimits, error::ModelError, load::RebalancePolicy, name::Name, units::Millis,
};
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
    /// All disks of a VM are shut to what opened them there. Says nothing of the host, and is taken only for VMs with
    /// `isolation: keep`: their copy there may go on for a moment, and can write nothing.
    StorageFenced,
}
impl fmt::Display for ProofKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ProofKind::LeaseExpired => "lease-expired",
            ProofKind::PoweredOff => "powered-off",
            ProofKind::StorageFenced => "storage-fenced",
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
/// The longest lease that is taken: a host that dies is missed for so long.
pub const LONGEST_LEASE: Millis = Millis(600_000);
/// The shortest time between heartbeats.
pub const SHORTEST_HEARTBEAT: Millis = Millis(20);

impl Timers {
    /// Checks the rules of DESIGN.md section 4.
    ///
    /// # Errors
    /// [`ModelError::UnsafeTimers`] names the broken rule and the figures.
    pub fn check(&self) -> Result<(), ModelError> {
        let broken = self.lease_rules().or_else(|| self.suspicion_rules());
        broken.map_or(Ok(()), |why| Err(ModelError::UnsafeTimers { why }))
    }

    /// The rules on which it rests that no VM runs twice.
    fn lease_rules(&self) -> Option<String> {
        if self.lease > LONGEST_LEASE {
            return Some(format!(
                "lease ({}) must not exceed {LONGEST_LEASE}: no VM of a dead host starts elsewhere before it has passed",
                self.lease
            ));
        }
        if self.guard.0.saturating_add(self.margin.0) > self.lease.0 {
            return Some(format!(
                "guard ({}) + margin ({}) must not exceed lease ({})",
                self.guard, self.margin, self.lease
            ));
        }
        if self.margin.0 * 20 < self.lease.0 {
            return Some(format!(
                "margin ({}) must be at least a twentieth of lease ({}), for clocks that run unevenly",
                self.margin, self.lease
            ));
        }
        if self.renew.0 == 0 || self.renew.0.saturating_mul(5) > self.guard.0 {
            return Some(format!(
                "renew ({}) must happen at least 5 times within guard ({})",
                self.renew, self.guard
            ));
        }
        if self.guard.0 < 2 * ETCD_WORST_ELECTION_MS {
            return Some(format!(
                "guard ({}) must be at least twice the store's worst election ({ETCD_WORST_ELECTION_MS}ms)",
                self.guard
            ));
        }
        None
    }

    /// The rules for what notices sooner than the lease and proves nothing.
    fn suspicion_rules(&self) -> Option<String> {
        let (renew, lease) = (self.renew, self.lease);
        if self.manager.0 < 2 * renew.0 || self.manager > lease {
            return Some(format!(
                "manager ({}) must be at least 2 renewals (renew is {renew}) and at most lease ({lease})",
                self.manager
            ));
        }
        if self.heartbeat < SHORTEST_HEARTBEAT {
            return Some(format!(
                "heartbeat ({}) must be at least {SHORTEST_HEARTBEAT}",
                self.heartbeat
            ));
        }
        if self.suspect.0 < self.heartbeat.0.saturating_mul(3) || self.suspect > lease {
            return Some(format!(
                "suspect ({}) must be at least 3 heartbeats (heartbeat is {}) and at most lease ({lease})",
                self.suspect, self.heartbeat
            ));
        }
        None
    }

    /// The `T` that a renewal record must carry when its host's guard may hold out for `left_ms` more: `lease`, or
    /// longer while an older, longer deadline is left. What it exceeds the deadline by keeps the proportion of these
    /// timers, and is never less than their margin.
    #[must_use]
    pub fn ttl_ms(&self, left_ms: u64) -> u64 {
        let (lease, guard) = (self.lease.0.min(LONGEST_LEASE.0), self.guard.0.max(1));
        let in_proportion = left_ms.saturating_mul(lease.saturating_sub(guard)).div_ceil(guard);
        let margin = self.margin.0.max(in_proportion).max(left_ms.div_ceil(19));
        lease.max(left_ms.saturating_add(margin))
    }
}

/// What becomes of a change after which the memory kept for the loss of hosts would not be there any more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum AdmissionPolicy {
    /// It is made, and nobody is told.
    Off,
    /// It is made, and whoever asked for it is told.
    Warn,
    /// It is not made.
    #[default]
    Refuse,
}

/// The most hosts for whose loss memory can be kept.
pub const MOST_RESERVED_HOSTS: u32 = 3;

/// What is wanted of the cluster as a whole.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
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
    /// How many VMs may be moved at once.
    #[serde(default)]
    pub moves: MoveLimits,
    /// What becomes of a change that would use up what is kept for the loss of hosts.
    #[serde(default)]
    pub admission: AdmissionPolicy,
    /// The loss of so many hosts, the worst ones, is kept memory for; absent: 1 with three or more hosts, else 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reserved_hosts: Option<u32>,
    /// What becomes of loads that are uneven.
    #[serde(default)]
    pub rebalance: RebalancePolicy,
    /// The time over which loads are measured for that: at least 10 s.
    #[serde(default = "default_rebalance_window")]
    pub rebalance_window: Millis,
    /// How long a host is lost until what it had of mirrored disks is made anew on another one.
    #[serde(default = "default_rebuild_after")]
    pub rebuild_after: Millis,
}

/// The shortest time over which loads are measured.
pub const SHORTEST_WINDOW: Millis = Millis(10_000);

fn default_rebuild_after() -> Millis {
    Millis(600_000)
}
fn default_rebalance_window() -> Millis {
    Millis(300_000)
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
            moves: MoveLimits::default(),
            admission: AdmissionPolicy::default(),
            reserved_hosts: None,
            rebalance: RebalancePolicy::default(),
            rebuild_after: default_rebuild_after(),
            rebalance_window: default_rebalance_window(),
        }
    }
}

impl ClusterSpec {
    /// The loss of how many hosts, of a cluster of so many, memory is kept for.
    #[must_use]
    pub fn reserved_hosts(&self, hosts: usize) -> usize {
        self.reserved_hosts.map_or(usize::from(hosts >= 3), |reserved| reserved as usize)
    }

    /// Everything that is wrong with it, one sentence each.
    #[must_use]
    pub fn problems(&self) -> Vec<String> {
        let mut problems: Vec<String> =
            self.timers.check().err().map(|error| error.to_string()).into_iter().collect();
        if self.name.trim().is_empty() {
            problems.push("`name` is empty: give the cluster one".into());
        }
        if self.fencing.is_empty() {
            problems.push(
                "`fencing` is empty, so that no VM of a lost host would ever start elsewhere: \
                 write lease-expired, powered-off or both"
                    .into(),
            );
        }
        if self.fencing == [ProofKind::StorageFenced] {
            problems.push(
                "`fencing` is storage-fenced alone, which proves nothing of VMs without mirrored disks: \
                 write lease-expired or powered-off beside it"
                    .into(),
            );
        }
        if ![1, 3, 5].contains(&self.voters) {
            problems.push(format!("`voters` is {}: write 1, 3 or 5", self.voters));
        }
        if self.replace_voter_after.0 < 10_000 {
            problems.push(format!(
                "`replaceVoterAfter` is {}: a host that only restarts must not lose its place, so write at least 10s",
                self.replace_voter_after
            ));
        }
        if self.moves.per_host == 0 || self.moves.cluster == 0 {
            problems.push(
                "`moves` has a 0, so that no VM could ever be moved: write at least 1 for \
                 `perHost` and `cluster`"
                    .into(),
            );
        }
        if self.reserved_hosts.is_some_and(|hosts| hosts > MOST_RESERVED_HOSTS) {
            problems.push(format!(
                "`reservedHosts` is {}: write 0 to {MOST_RESERVED_HOSTS}, or leave it out",
                self.reserved_hosts.unwrap_or(0)
            ));
        }
        if self.rebalance_window < SHORTEST_WINDOW {
            problems.push(format!(
                "`rebalanceWindow` is {}: write at least {SHORTEST_WINDOW}, so that no mere moment of work moves a VM",
                self.rebalance_window
            ));
        }
        problems
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

#[cfg(test)]
mod tests {
    use super::{ClusterSpec, Millis, Timers};

    fn refused(change: impl Fn(&mut Timers)) -> String {
        let mut timers = Timers::default();
        change(&mut timers);
        timers.check().map_or_else(|error| error.to_string(), |()| "taken".into())
    }

    #[test]
    fn timers_that_contradict_each_other_are_refused_with_the_rule_and_the_figures() {
        assert_eq!(refused(|_| ()), "taken");
        assert!(refused(|t| t.lease = Millis(4700)).contains("guard (4400ms) + margin (400ms)"));
        assert!(refused(|t| t.margin = Millis(100)).contains("a twentieth of lease (5s)"));
        assert!(refused(|t| t.renew = Millis(2000)).contains("at least 5 times within guard"));
        assert!(refused(|t| t.renew = Millis(0)).contains("at least 5 times within guard"));
        assert!(refused(|t| t.guard = Millis(3000)).contains("worst election"));
        assert!(refused(|t| t.suspect = Millis(6000)).contains("at most lease (5s)"));
        assert!(refused(|t| t.suspect = Millis(500)).contains("at least 3 heartbeats"));
        assert!(refused(|t| t.heartbeat = Millis(1)).contains("at least 20ms"));
        assert!(refused(|t| t.manager = Millis(900)).contains("at least 2 renewals"));
        assert!(refused(|t| t.manager = Millis(9000)).contains("at most lease (5s)"));
        assert!(refused(|t| t.lease = Millis(u64::MAX)).contains("must not exceed 10m"));
        assert!(refused(|t| t.guard = Millis(u64::MAX)).contains("must not exceed lease"));
    }

    #[test]
    fn a_record_outlasts_every_deadline_that_is_left() {
        let timers = Timers::default();
        assert_eq!(timers.ttl_ms(timers.guard.0), timers.lease.0, "its own deadline costs nothing");
        assert_eq!(timers.ttl_ms(0), timers.lease.0);
        for left in [4_500, 10_000, 60_000, 600_000] {
            let ttl = timers.ttl_ms(left);
            assert!(ttl * 44 >= left * 50, "{left} ms left, {ttl} ms stated");
        }
        assert!(timers.ttl_ms(u64::MAX) == u64::MAX);
    }

    #[test]
    fn a_spec_that_would_never_recover_anything_is_refused() {
        assert!(ClusterSpec::default().problems().is_empty());
        let spec = ClusterSpec {
            fencing: vec![],
            voters: 2,
            reserved_hosts: Some(4),
            rebalance_window: Millis(1000),
            ..ClusterSpec::default()
        };
        let problems = spec.problems().join("\n");
        assert!(problems.contains("`fencing` is empty") && problems.contains("`voters` is 2"));
        assert!(problems.contains("`reservedHosts` is 4: write 0 to 3"));
        assert!(problems.contains("`rebalanceWindow` is 1s: write at least 10s"));
    }

    #[test]
    fn one_loss_is_kept_memory_for_once_there_are_three_hosts() {
        let spec = ClusterSpec::default();
        assert_eq!([1, 2, 3, 100].map(|hosts| spec.reserved_hosts(hosts)), [0, 0, 1, 1]);
        let spec = ClusterSpec { reserved_hosts: Some(2), ..spec };
        assert_eq!(spec.reserved_hosts(2), 2);
    }
}
