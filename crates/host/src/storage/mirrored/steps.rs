//! What a host does about a mirrored volume next. Synchronous and pure: what is known goes in, one step comes out.
//!
//! Whoever carries a step out writes the record over the one that was read, over the placement that made it the owner, and
//! over its own open session. On these comparisons all of this rests: an owner that has lost its place changes nothing.

use crate::vm::mirrors::{Catching, DiskMirror, Print};
use haven_model::{
    Name,
    volume::{Based, ReplicaState, Volume},
};
use std::collections::{BTreeMap, BTreeSet};

/// What is known of another host's replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Other {
    /// It is served to this run.
    Serves(u64),
    /// It is not heard any more.
    Gone,
}

/// What the owner does before its VM's process may open the volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Open {
    /// Nothing: the replica here may lack writes.
    NotHere,
    /// Writes this record, and looks again.
    Write(Volume),
    /// Waits until these serve its run.
    Wait(BTreeSet<Name>),
    /// Opens its own replica and these, and acknowledges what all of them have.
    With(BTreeSet<Name>),
}

/// The owner's next step. `begun` is the run that this daemon has begun and not opened yet: what it read as clean then is
/// still so.
#[must_use]
pub fn open(
    volume: &Volume,
    me: &Name,
    begun: Option<u64>,
    others: &BTreeMap<Name, Other>,
) -> Open {
    if !volume.counts(me) {
        return Open::NotHere;
    }
    let counted: BTreeSet<&Name> = volume.counted().filter(|host| *host != me).collect();
    let wait_for = |run: u64| -> BTreeSet<Name> {
        let serves = |host: &&&Name| others.get(**host) != Some(&Other::Serves(run));
        counted.iter().filter(serves).map(|host| (*host).clone()).collect()
    };
    let gone: Vec<&Name> =
        counted.iter().copied().filter(|host| others.get(*host) == Some(&Other::Gone)).collect();
    // Nobody has opened it: each makes its own, and none may be made once somebody has.
    if volume.run == 0 {
        if !gone.is_empty() {
            return Open::Write(volume.without(gone));
        }
        let waits = wait_for(0);
        if !waits.is_empty() {
            return Open::Wait(waits);
        }
    }
    // The number of a run that is nobody's may be that which this daemon was about to begin.
    if volume.run == 0 || volume.shut || begun != Some(volume.run) {
        // What the one before had under way may be on some and not on others. The one here is as good as any, and is
        // what the guest sees from now on.
        let mut known = if volume.clean { volume.clone() } else { volume.without(counted) };
        // Who was taken in by the process before is not by this one.
        let others = known.replicas.values_mut();
        others
            .filter(|state| **state == ReplicaState::Returning)
            .for_each(|state| *state = ReplicaState::Stale);
        return Open::Write(Volume { clean: false, run: volume.run + 1, shut: false, ..known });
    }
    if !gone.is_empty() {
        return Open::Write(volume.without(gone));
    }
    let waits = wait_for(volume.run);
    if !waits.is_empty() {
        return Open::Wait(waits);
    }
    Open::With(counted.into_iter().cloned().collect())
}

/// The next step of an owner whose VM came to it while it ran, before its guest runs here. That stood still when it went
/// over, with nothing under way and on all that count the same; so all of them stay.
#[must_use]
pub fn arrive(
    volume: &Volume,
    me: &Name,
    begun: Option<u64>,
    others: &BTreeMap<Name, Other>,
) -> Open {
    let same = volume.clean || begun.is_none() && !volume.shut;
    let same = Volume { clean: same, ..volume.clone() };
    open(&same, me, begun, others)
}

/// Why the guest of a process may not go over as its mirrored disk is: not all that count have all that was written, or one is
/// being brought up to that.
#[must_use]
pub fn unlike(volume: &Volume, me: &Name, disk: &DiskMirror, around: &Around) -> Option<String> {
    if volume.shut {
        return Some("it was shut to this host".into());
    }
    let mut others = volume.counted().filter(|host| *host != me);
    if let Some(lost) = others.find(|host| fails(disk, around, host)) {
        return Some(format!("its replica on {lost} has just failed"));
    }
    // What the disk of this host does not take is in the guest's hand, and goes with it.
    let copied = disk.linked.iter().find(|(_, linked)| linked.catching != Catching::Not);
    copied.map(|(host, _)| {
        format!("its replica on {host} is being brought up to what the others have")
    })
}

/// The record with which an owner goes on after replicas broke away from it. Until it stands nothing is acknowledged.
#[must_use]
pub fn degraded(volume: &Volume, broken: &BTreeSet<Name>) -> Volume {
    volume.without(broken)
}

/// The record after the owner's process has ended by itself and has brought all to the disks of all that it had open. Nothing when
/// others are counted by now.
#[must_use]
pub fn closed(volume: &Volume, me: &Name, with: &BTreeSet<Name>) -> Option<Volume> {
    let counted: BTreeSet<&Name> = volume.counted().filter(|host| *host != me).collect();
    let same = volume.counts(me) && counted == with.iter().collect();
    (same && !volume.clean && !volume.shut).then(|| Volume { clean: true, ..volume.clone() })
}

/// The record with which a volume that nobody has open holds again what it was, of which these hosts have a copy. From then on
/// those count, whatever their replicas lacked before, and no other. The run is nobody's, so that whoever opens it begins another
/// one.
///
/// Nothing when this host has no such copy, or nobody has ever opened it.
#[must_use]
pub fn reverted(volume: &Volume, me: &Name, copy: &str, copies: &[Name]) -> Option<Volume> {
    if volume.run == 0 || !volume.replicas.contains_key(me) || !copies.contains(me) {
        return None;
    }
    // A start that was given up may have shut a replica to all runs before the next one.
    let run = volume.run + 2;
    let replicas = volume.replicas.keys().map(|host| {
        let state = match copies.contains(host) {
            true => ReplicaState::Counted,
            false => ReplicaState::Stale,
        };
        (host.clone(), state)
    });
    let replicas = replicas.collect();
    let based = Some(Based { copy: copy.to_owned(), run });
    Some(Volume { run, replicas, clean: true, shut: true, based, ..volume.clone() })
}

/// Whether a volume was made to hold what this copy does and was not opened since.
#[must_use]
pub fn is_reverted(volume: &Volume, copy: &str) -> bool {
    let based = volume.based.as_ref();
    volume.shut && based.is_some_and(|of| of.run == volume.run && of.copy == copy)
}

/// What a host with a replica lets others do to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Serve {
    /// The process of this run, and none of an earlier one.
    To(u64),
    /// Nobody: it is the owner's own, and what it does next is of this run or a later one.
    Own(u64),
}

/// By the host on which the volume's VM is placed.
#[must_use]
pub fn serve(volume: &Volume, me: &Name, owner: &Name) -> Serve {
    if me == owner { Serve::Own(volume.run) } else { Serve::To(volume.run) }
}

/// What an owner does about a disk that its process has open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Keep {
    /// Nothing.
    Well,
    /// Ends the process: it was shut out while this host was not heard, and can write no more. What counts is no more its to say.
    End,
    /// Ends the connections to these, which are silent: the guest must not wait for them.
    Cut(BTreeSet<Name>),
    /// Notes for these, which count no more, what is written from now on, and writes this record.
    Write(BTreeSet<Name>, Volume),
    /// Goes on without this one, which does not count, and of which no word that it does can be under way.
    LeaveOut(Name),
    /// Lets the guest try anew what failed: all that it has open are well.
    GoOn,
    /// Forgets the copy to this one, which counts by now.
    Settle(Name),
    /// Writes this record: this one has all that was written, and no write succeeds without it.
    Count(Name, Volume),
    /// Takes this one in again, as it is served now.
    TakeIn(Name),
}

/// What is known of other hosts while a process runs.
#[derive(Clone, Debug, Default)]
pub struct Around {
    /// By host, which process serves its replica to this run.
    pub served: BTreeMap<Name, Print>,
    /// With whom this host cannot speak.
    pub silent: BTreeSet<Name>,
    /// Its guest is about to go elsewhere, which nothing may hold up that can wait.
    pub leaves: bool,
}

/// Whether a process does not have a host's replica open, as that is served now.
fn fails(disk: &DiskMirror, around: &Around, host: &Name) -> bool {
    disk.linked.get(host).is_none_or(|linked| {
        let another = around.served.get(host).is_some_and(|now| *now != linked.print);
        linked.broken || another || matches!(linked.catching, Catching::Broke(_))
    })
}

/// The owner's next step while its process runs. What stops its guest comes first.
#[must_use]
pub fn keep(volume: &Volume, me: &Name, disk: &DiskMirror, around: &Around) -> Keep {
    if volume.shut {
        return Keep::End;
    }
    let silent = |host: &Name| around.silent.contains(host);
    let cut: BTreeSet<Name> = disk
        .linked
        .iter()
        .filter(|(host, linked)| !linked.broken && silent(host))
        .map(|(host, _)| host.clone())
        .collect();
    if !cut.is_empty() {
        return Keep::Cut(cut);
    }
    let fails = |host: &Name| fails(disk, around, host);
    let lost: BTreeSet<Name> =
        volume.counted().filter(|host| *host != me && fails(host)).cloned().collect();
    if !lost.is_empty() {
        let record = degraded(volume, &lost);
        return Keep::Write(lost, record);
    }
    for (host, linked) in &disk.linked {
        // A copy that was not begun, or that a daemon before has dropped half-way.
        let idle = !volume.counts(host) && linked.catching == Catching::Not;
        match volume.replicas.get(host) {
            None | Some(ReplicaState::Stale) => return Keep::LeaveOut(host.clone()),
            Some(ReplicaState::Returning) if fails(host) || idle => {
                return Keep::Write(BTreeSet::new(), volume.with(host, ReplicaState::Stale));
            }
            Some(_) => {}
        }
    }
    if disk.stopped {
        return Keep::GoOn;
    }
    let done = disk.linked.iter().find(|(_, linked)| linked.catching == Catching::Done);
    if let Some((host, _)) = done {
        return match volume.counts(host) {
            true => Keep::Settle(host.clone()),
            false => Keep::Count(host.clone(), volume.with(host, ReplicaState::Counted)),
        };
    }
    for (host, state) in volume.replicas.iter().filter(|(host, _)| *host != me) {
        if disk.linked.contains_key(host) {
            continue;
        }
        let back = !silent(host) && around.served.contains_key(host) && !around.leaves;
        let says = |state| Keep::Write(BTreeSet::new(), volume.with(host, state));
        match (state, back) {
            (ReplicaState::Stale, true) => return says(ReplicaState::Returning),
            (ReplicaState::Returning, true) => return Keep::TakeIn(host.clone()),
            (ReplicaState::Returning, false) => return says(ReplicaState::Stale),
            _ => {}
        }
    }
    Keep::Well
}
