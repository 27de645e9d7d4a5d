//! What a host does about a mirrored volume next. Synchronous and pure: what is known goes in, one step comes out.
//!
//! Whoever carries a step out writes the record over the one that was read, over the placement that made it the owner, and
//! over its own open session. On these comparisons all of this rests: an owner that has lost its place changes nothing.

use haven_model::{Name, volume::Volume};
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
    if begun != Some(volume.run) {
        // What the one before had under way may be on some and not on others. The one here is as good as any, and is
        // what the guest sees from now on.
        let known = if volume.clean { volume.clone() } else { volume.without(counted) };
        return Open::Write(Volume { clean: false, run: volume.run + 1, ..known });
    }
    let gone: Vec<&Name> =
        counted.iter().copied().filter(|host| others.get(*host) == Some(&Other::Gone)).collect();
    if !gone.is_empty() {
        return Open::Write(volume.without(gone));
    }
    let serves = |host: &&&Name| others.get(**host) != Some(&Other::Serves(volume.run));
    let waits: BTreeSet<Name> = counted.iter().filter(serves).map(|host| (*host).clone()).collect();
    if !waits.is_empty() {
        return Open::Wait(waits);
    }
    Open::With(counted.into_iter().cloned().collect())
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
    (same && !volume.clean).then(|| Volume { clean: true, ..volume.clone() })
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
