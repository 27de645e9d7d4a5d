//! What to do about the store's members next. Pure, so that every host finds the same answer.
//!
//! A cluster wants 1, 3 or 5 voters. The manager removes the member of a host that is lost for long, or that is no
//! host of the cluster any more, and one that has not answered for long though its host is there; the first host
//! without a member then adds its own; a host whose member was removed while it was away forgets its data.

use haven_model::{HostSpec, HostStatus, Name, Snapshot, Versioned, object::Stored};
use haven_store::server::{self, Member};
use std::collections::BTreeMap;

/// What this host should do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing.
    Rest,
    /// Run the learner that was added for this host: its daemon ended before it had noted that.
    Begin,
    /// Let this host's learner vote.
    Promote(u64),
    /// Take a member out, for the reason given.
    Remove {
        /// Which.
        id: u64,
        /// A sentence.
        why: String,
    },
    /// Add a member on this host.
    Add,
    /// This host's member was removed while it was away: its data is of no use.
    Forget,
}

/// What this host sees.
#[derive(Clone, Copy, Debug)]
pub struct Seen<'a> {
    /// This host.
    pub me: &'a Name,
    /// Its address.
    pub my_url: &'a str,
    /// It runs a member, as far as it knows.
    pub runs_one: bool,
    /// The store's members.
    pub members: &'a [Member],
    /// How long members have not answered though their hosts are there, by id, milliseconds.
    pub silent_ms: &'a BTreeMap<u64, i64>,
    /// The cluster.
    pub snapshot: &'a Snapshot,
    /// Wall clock, milliseconds since 1970.
    pub now_ms: i64,
}

/// Decides.
#[must_use]
pub fn next(seen: &Seen<'_>) -> Step {
    let mine = seen.members.iter().find(|member| member.peer_url == seen.my_url);
    match mine {
        Some(member) if member.learner && !seen.runs_one => return Step::Begin,
        Some(member) if member.learner => return Step::Promote(member.id),
        None if seen.runs_one => return Step::Forget,
        _ => {}
    }
    let candidate = candidate(seen);
    let manages = seen.snapshot.manager.as_ref().is_some_and(|m| m.holder == *seen.me);
    if manages && let Some(step) = removal(seen, candidate) {
        return step;
    }
    let wanted = seen.snapshot.cluster_spec().voters as usize;
    let settled = seen.members.iter().all(|member| !member.learner);
    if mine.is_none() && seen.members.len() < wanted && settled && candidate == Some(seen.me) {
        return Step::Add;
    }
    Step::Rest
}

fn url_of(host: &Versioned<Stored<HostSpec>>) -> String {
    server::peer_url(host.spec.address)
}

/// The first host by name that could run another member; a witness only where hosts that run VMs are too few, and one
/// on which a member failed only if there is no other.
fn candidate<'a>(seen: &Seen<'a>) -> Option<&'a Name> {
    let snapshot = seen.snapshot;
    let able = |(name, host): &(&'a Name, &Versioned<Stored<HostSpec>>)| {
        let has_one = seen.members.iter().any(|member| member.peer_url == url_of(host));
        let online = snapshot.leases.get(*name).is_some_and(|lease| {
            let status = snapshot.host_status.get(*name);
            !lease.closed && status.is_some_and(|status| status.session == lease.session)
        });
        !has_one && online && !host.spec.cordoned && !host.meta.deleting
    };
    let failed = |name: &Name| snapshot.host_status.get(name).is_some_and(|s| s.etcd_silent);
    let able = snapshot.hosts.iter().filter(able).map(|(name, _)| name);
    able.min_by_key(|name| (failed(name), snapshot.hosts[*name].spec.witness, *name))
}

fn removal(seen: &Seen<'_>, candidate: Option<&Name>) -> Option<Step> {
    let snapshot = seen.snapshot;
    let patience_ms = i64::try_from(snapshot.cluster_spec().replace_voter_after.0).ok()?;
    for member in seen.members {
        let host = snapshot.hosts.iter().find(|(_, host)| url_of(host) == member.peer_url);
        let why = match host {
            None => format!("{} is no host of this cluster any more", member.name),
            Some((name, _)) => {
                let lost = snapshot.lost.get(name).filter(|lost| {
                    let lease = snapshot.leases.get(name);
                    lease.is_some_and(|l| l.closed && l.session == lost.session)
                });
                let gone_ms = lost.map_or(0, |lost| seen.now_ms - lost.at_ms);
                let silent_ms = seen.silent_ms.get(&member.id).copied().unwrap_or(0);
                if member.learner && lost.is_some() {
                    // It has no vote yet, and as long as it learns nobody else can begin.
                    let why = format!("{name} was lost before its member could vote");
                    return Some(Step::Remove { id: member.id, why });
                }
                if silent_ms > patience_ms {
                    let next = candidate.unwrap_or(name);
                    let why = format!(
                        "the member on {name} has not answered for {} s; one on {next} begins anew",
                        silent_ms / 1000
                    );
                    return Some(Step::Remove { id: member.id, why });
                }
                if gone_ms <= patience_ms {
                    continue;
                }
                // With nobody to take its place the old member does no harm and may come back.
                let Some(candidate) = candidate else { continue };
                format!("{name} is lost for {} s; {candidate} takes its vote", gone_ms / 1000)
            }
        };
        return Some(Step::Remove { id: member.id, why });
    }
    None
}

/// The statuses of lost hosts that name members which the store no longer has.
pub fn outdated<'a>(
    members: &'a [Member],
    snapshot: &'a Snapshot,
) -> impl Iterator<Item = (&'a Name, &'a Versioned<HostStatus>)> {
    snapshot.host_status.iter().filter(|(name, status)| {
        let lost = snapshot.leases.get(*name).is_none_or(|lease| lease.closed);
        let gone = |id| members.iter().all(|member| member.id != id);
        lost && status.etcd_member.is_some_and(gone)
    })
}
