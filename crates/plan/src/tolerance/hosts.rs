//! The state of every host, and the steps from silence to proof (DESIGN.md section 4).

use crate::work::{Work, host_ref};
use haven_model::{Action, LostSession, Name, Observations, ProofKind, Snapshot};
use std::{collections::BTreeMap, fmt};

/// What is known of a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostState {
    /// It has no open session yet, or its agent has not reported in it.
    Joining,
    /// It runs VMs.
    Online,
    /// It runs VMs and takes no new ones.
    Cordoned,
    /// It votes, and runs nothing on purpose.
    Witness,
    /// It is being emptied: it runs VMs that are to leave it, and takes no new ones.
    Draining,
    /// It was emptied and takes no new VMs.
    Drained,
    /// A majority of its watchers does not hear it. Proves nothing.
    Suspected,
    /// Its lease record has stood unchanged for so many milliseconds, longer than a renewal takes.
    Silent(u64),
    /// Its session was closed under a proof.
    Lost(ProofKind),
}

impl fmt::Display for HostState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            HostState::Joining => f.write_str("joining"),
            HostState::Online => f.write_str("online"),
            HostState::Cordoned => f.write_str("cordoned"),
            HostState::Witness => f.write_str("witness"),
            HostState::Draining => f.write_str("draining"),
            HostState::Drained => f.write_str("drained"),
            HostState::Suspected => f.write_str("suspected"),
            HostState::Silent(ms) => write!(f, "silent for {:.1} s", *ms as f64 / 1000.0),
            HostState::Lost(proof) => write!(f, "lost ({proof})"),
        }
    }
}

impl HostState {
    /// Whether new VMs may be placed there.
    #[must_use]
    pub fn usable(self) -> bool {
        self == HostState::Online
    }

    /// Whether what runs there runs on, as far as is known.
    #[must_use]
    pub fn well(self) -> bool {
        matches!(
            self,
            HostState::Online
                | HostState::Cordoned
                | HostState::Witness
                | HostState::Draining
                | HostState::Drained
        )
    }
}

/// The state of every host.
#[must_use]
pub fn host_states(snapshot: &Snapshot, seen: &Observations) -> BTreeMap<Name, HostState> {
    snapshot.hosts.keys().map(|host| (host.clone(), state_of(snapshot, seen, host))).collect()
}

fn state_of(snapshot: &Snapshot, seen: &Observations, host: &Name) -> HostState {
    let Some(lease) = snapshot.leases.get(host) else {
        return HostState::Joining;
    };
    if lease.closed {
        return match snapshot.lost.get(host) {
            Some(lost) if lost.session == lease.session => HostState::Lost(lost.proof),
            _ => HostState::Joining,
        };
    }
    if seen.suspected.contains(host) {
        return HostState::Suspected;
    }
    let timers = &snapshot.cluster_spec().timers;
    if let Some(age) = seen.leases.get(host)
        && age.unchanged_ms >= timers.manager.0
    {
        return HostState::Silent(age.unchanged_ms);
    }
    if snapshot.host_status.get(host).is_none_or(|status| status.session != lease.session) {
        return HostState::Joining;
    }
    let object = &snapshot.hosts[host];
    if super::drain::stands(snapshot, host).is_some() {
        // One that cannot be read may be there.
        let unread = snapshot.unreadable_under("placement/vm/").is_some();
        let holds = super::drain::held(snapshot, host).next().is_some();
        let empty = super::drain::left(snapshot, host).next().is_none() && !unread && !holds;
        if empty { HostState::Drained } else { HostState::Draining }
    } else if object.spec.witness {
        HostState::Witness
    } else if object.spec.cordoned
        || object.meta.deleting
        || snapshot.unreadable.contains_key(&format!("drains/{host}"))
    {
        HostState::Cordoned
    } else {
        HostState::Online
    }
}

/// Seeks a proof for every host that is silent, and closes the session of those that have one.
pub(crate) fn fence(work: &mut Work<'_>) {
    let policy = work.snapshot.cluster_spec().fencing.clone();
    let open: Vec<(Name, u64, i64)> = work
        .snapshot
        .leases
        .iter()
        .filter(|(host, lease)| !lease.closed && work.snapshot.hosts.contains_key(*host))
        .map(|(host, lease)| (host.clone(), lease.session, lease.revision))
        .collect();
    for (host, session, revision) in open {
        if policy.contains(&ProofKind::PoweredOff) && by_power(work, &host, session, revision) {
            continue;
        }
        if policy.contains(&ProofKind::LeaseExpired) {
            by_lease(work, &host, session);
        }
    }
}

/// True when the session is closed by this.
fn by_power(work: &mut Work<'_>, host: &Name, session: u64, revision: i64) -> bool {
    if work.seen.powered_off.get(host) == Some(&session) {
        let reason = format!("{host} is lost: its power was read as off (proof powered-off)");
        close(work, host, session, revision, ProofKind::PoweredOff, reason);
        return true;
    }
    let has_power = work.snapshot.hosts.get(host).is_some_and(|h| h.spec.power.is_some());
    // Nothing is to be recovered from one that was emptied, and most such are restarted. Where only its power proves that
    // it is lost, that is sought all the same, but not while it is worked on.
    let by_lease = work.snapshot.cluster_spec().fencing.contains(&ProofKind::LeaseExpired);
    let worked_on = work.snapshot.maintenance.as_ref().is_some_and(|of| of.works_on(host));
    let emptied = super::drain::emptied(work.snapshot, host) && (by_lease || worked_on);
    if has_power && !emptied && work.seen.suspected.contains(host) {
        seek_power(work, host, session, revision);
    }
    false
}

/// Asks for the power of a suspected host, and cuts it once it has been silent for long.
fn seek_power(work: &mut Work<'_>, host: &Name, session: u64, revision: i64) {
    // A host that renews lives, whatever its heartbeats say: one that has just come back is not heard yet. And a
    // daemon that is being restarted, by an upgrade say, is neither heard nor renews, and has done nothing wrong: it is
    // given half of the lease's time before its whole host goes down for it. One that is off already loses nothing by
    // being asked for sooner.
    // Its own record says how long that is, as for the proof: it may not live by a change of the timers yet.
    let age = work.seen.leases.get(host).filter(|age| age.revision == revision);
    let unchanged_ms = age.map_or(0, |age| age.unchanged_ms);
    let missed_ms = work.snapshot.leases.get(host).map_or(0, |lease| lease.ttl_ms) / 2;
    let read_ms = (2 * work.timers.renew.0).min(missed_ms);
    if unchanged_ms < read_ms {
        return work.wake(read_ms - unchanged_ms);
    }
    if unchanged_ms < missed_ms {
        work.wake(missed_ms - unchanged_ms);
        let reason = format!("{host} is suspected: reading whether it is off already");
        let action = Action::ReadPower { host: host.clone(), session };
        return work.act(host_ref(host), reason, action);
    }
    let reason = format!("{host} is suspected: switching it off to have a proof");
    work.act(host_ref(host), reason, Action::PowerOff { host: host.clone(), session });
}

fn by_lease(work: &mut Work<'_>, host: &Name, session: u64) {
    let (Some(age), Some(lease)) =
        (work.seen.leases.get(host).copied(), work.snapshot.leases.get(host))
    else {
        return;
    };
    if age.revision != lease.revision {
        // The age is of a renewal that this snapshot does not show yet, and each states its own `T`.
        return work.wake(5);
    }
    let lease_ms = lease.ttl_ms;
    if age.unchanged_ms < lease_ms {
        // Only a record that misses renewals is worth waking for; a live one changes long before.
        if age.unchanged_ms >= 2 * work.timers.renew.0 {
            work.wake(lease_ms - age.unchanged_ms);
        }
    } else if !age.confirmed {
        let reason =
            format!("{host} has not renewed for {lease_ms} ms: reading its record once more");
        let action = Action::ConfirmLease { host: host.clone(), revision: age.revision };
        work.act(host_ref(host), reason, action);
    } else {
        let reason = format!(
            "{host} is lost: its lease was not renewed for {:.1} s, so its guard has stopped its VMs (proof lease-expired)",
            age.unchanged_ms as f64 / 1000.0
        );
        close(work, host, session, age.revision, ProofKind::LeaseExpired, reason);
    }
}

fn close(
    work: &mut Work<'_>,
    host: &Name,
    session: u64,
    revision: i64,
    proof: ProofKind,
    reason: String,
) {
    // Nothing runs on by a promise where there is no power.
    let by_lease = proof == ProofKind::LeaseExpired;
    if let Some(ms) = work.seen.promised.get(host).filter(|_| by_lease) {
        let why = format!(
            "waiting: {host} is not taken for lost within the next {:.1} s: the store was stuck, and hosts that all others answered may run on without it for a moment",
            *ms as f64 / 1000.0
        );
        work.wait(host_ref(host), why);
        return work.wake(*ms);
    }
    let unchanged = work.seen.leases.get(host).map_or(0, |age| age.unchanged_ms);
    let lost = LostSession {
        session,
        proof,
        at_ms: work.seen.now_ms,
        last_heard_ms: work.seen.now_ms - i64::try_from(unchanged).unwrap_or(0),
        incident: crate::monitor::incidents::next_number(work),
    };
    work.act(
        host_ref(host),
        reason,
        Action::CloseSession { host: host.clone(), lease_revision: revision, lost },
    );
}
