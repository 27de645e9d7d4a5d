//! Compares the replicas of volumes whose VMs are placed here, when somebody asks for it, and has those that differ copied anew if
//! that was asked, too.
//!
//! Each host hashes its own pieces; only the hashes are sent. How far it is stands in the record, so that whoever has the VM
//! later goes on from there.

use super::{Owner, name};
use crate::{
    agent::{AgentParts, storage::StorageFailure},
    storage::mirrored::{
        compare::{Comparison, Differing},
        pieces::{Hash, PIECE},
    },
};
use futures::future::try_join_all;
use haven_model::{
    Bytes, Name, ObjectRef, Severity, Snapshot, keys,
    object::Kind,
    volume::{Volume, VolumeCheck, VolumeRef},
};
use haven_store::{
    clock::Mono,
    raw::{Compare, Op},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};
use tokio_util::sync::CancellationToken;

/// Pieces that are looked at in one go: 16 MiB.
const WINDOW: u64 = 256;
/// How often it is told how far it is.
const TELL: Duration = Duration::from_secs(1);
/// Between two looks at pieces that differ.
const LOOK: Duration = Duration::from_millis(500);
/// How long pieces may change all the time.
const CHANGES: Duration = Duration::from_secs(15);
/// How often a host is asked that does not answer, and the pause between.
const TRIES: u32 = 10;
const AGAIN: Duration = Duration::from_secs(1);
/// A replica that differs in so many pieces is not looked at any further.
const ENOUGH: u64 = 256;
/// So many places are named.
const NAMED: usize = 8;

/// Compares until `cancel`.
pub async fn run(parts: Arc<AgentParts>, cancel: CancellationToken) {
    let mut live = parts.live.clone();
    while !cancel.is_cancelled() {
        let now = Arc::clone(&live.borrow_and_update());
        if let Some(of) = due(&parts, &now) {
            tokio::select! {
                biased;
                () = cancel.cancelled() => return,
                () = Check::of(&parts, of).run() => {}
            }
            // Nothing is begun anew on what was read before the last word of it.
            tokio::select! {
                () = cancel.cancelled() => {}
                () = parts.clock.sleep(AGAIN) => {}
            }
            continue;
        }
        tokio::select! {
            biased;
            () = cancel.cancelled() => {}
            changed = live.changed() => if changed.is_err() { return },
        }
    }
}

fn due(parts: &AgentParts, now: &Snapshot) -> Option<VolumeRef> {
    parts.current_session()?;
    let here = |of: &VolumeRef| now.placements.get(&of.vm).is_some_and(|p| p.host == parts.me);
    let mut due = now.checks.iter().filter(|(of, check)| check.outcome.is_none() && here(of));
    due.next().map(|(of, _)| of.clone())
}

/// One comparison, as long as it is this host's.
struct Check<'a> {
    parts: &'a AgentParts,
    of: VolumeRef,
    comparison: Comparison,
    told: Mono,
}

/// It is not this host's any more, or nobody wants it any more, or the store did not take a word of it.
struct Over;

/// What a window comes to.
enum Window {
    /// It is compared, and so many pieces of it are there.
    Done(u64),
    /// There is nothing to compare with.
    Alone,
    /// A host does not tell; why.
    Fails(String),
}

impl<'a> Check<'a> {
    fn of(parts: &'a AgentParts, of: VolumeRef) -> Self {
        Self { parts, of, comparison: Comparison::default(), told: parts.clock.now() }
    }

    async fn run(mut self) {
        let Some((mut check, mut revision)) = self.wanted() else { return };
        tracing::info!(volume = %self.of, "its replicas are compared");
        loop {
            let begun = self.parts.clock.now();
            let Ok(window) = self.window(&mut check).await else { return };
            let (well, message) = match window {
                Window::Alone => {
                    (false, "no other host has all of it, so there is nothing to compare".into())
                }
                Window::Fails(why) => (false, why),
                Window::Done(pieces) => {
                    check.done = Bytes(check.done.0 + pieces * PIECE);
                    if pieces == WINDOW {
                        let now = self.parts.clock.now();
                        if now.since(self.told) >= TELL {
                            let Ok(next) = self.tell(&check, revision, None).await else { return };
                            (revision, self.told) = (next, now);
                        }
                        // Guests have the other half of the disk.
                        self.parts.clock.sleep(now.since(begun)).await;
                        continue;
                    }
                    match self.end(&check).await {
                        Ok(end) => end,
                        Err(Over) => return,
                    }
                }
            };
            let severity = if well { Severity::Info } else { Severity::Warning };
            let event =
                format!("the replicas of the disk `{}` were compared: {message}", self.of.disk);
            let object = ObjectRef::new(Kind::Vm, self.of.vm.clone());
            let event = self.parts.event(&object, severity, event);
            let ended = check.ended((self.parts.wall_ms)(), well, message);
            let _ = self.tell(&ended, revision, Some(event)).await;
            return;
        }
    }

    /// What is wanted of this host; nothing any more when somebody has taken it back, or the VM is elsewhere.
    fn wanted(&self) -> Option<(VolumeCheck, i64)> {
        let now = self.parts.live.borrow();
        self.parts.current_session()?;
        now.placements.get(&self.of.vm).filter(|placed| placed.host == self.parts.me)?;
        let check = now.checks.get(&self.of).filter(|check| check.outcome.is_none())?;
        Some(((*check.value).clone(), check.revision))
    }

    /// Writes the record over the one that this wrote last.
    async fn tell(&self, check: &VolumeCheck, over: i64, event: Option<Op>) -> Result<i64, Over> {
        let key = keys::check(&self.of);
        let value = serde_json::to_vec(check).expect("a record is plain data");
        let mut ops = vec![Op::Put(key.clone(), value.into())];
        ops.extend(event);
        match self.parts.store.txn(vec![Compare::ModRevision(key, over)], ops).await {
            Ok(outcome) if outcome.succeeded => Ok(outcome.revision),
            Ok(_) => Err(Over),
            Err(error) => {
                tracing::debug!(volume = %self.of, %error, "how far its comparison is could not be written");
                Err(Over)
            }
        }
    }

    /// Compares the next pieces.
    async fn window(&mut self, check: &mut VolumeCheck) -> Result<Window, Over> {
        let from = check.done.0 / PIECE;
        let begun = self.parts.clock.now();
        let mut failures = 0;
        loop {
            if self.wanted().is_none_or(|(now, _)| now.id != check.id) {
                return Err(Over);
            }
            let live = Arc::clone(&self.parts.live.borrow());
            let volume = live.volumes.get(&self.of).ok_or(Over)?;
            // Each host makes its replica what it was before it is opened, and not all have.
            if volume.based.as_ref().is_some_and(|based| based.run == volume.run) {
                let why = "it was made what it was in a snapshot, and its VM has not run since; start that first";
                return Ok(Window::Fails(why.into()));
            }
            let others: Vec<Name> =
                volume.counted().filter(|host| **host != self.parts.me).cloned().collect();
            if others.is_empty() || !volume.counts(&self.parts.me) {
                return Ok(Window::Alone);
            }
            let differs = |host: &Name| check.differs.get(host).map_or(0, |differs| differs.pieces);
            let asked = others.into_iter().filter(|host| differs(host) < ENOUGH).collect();
            let (mine, there) = match self.hashes(asked, from).await {
                Ok(hashes) => hashes,
                Err(failure) => {
                    failures += 1;
                    if failures >= TRIES {
                        return Ok(Window::Fails(failure.what));
                    }
                    self.parts.clock.sleep(AGAIN).await;
                    continue;
                }
            };
            let now = self.parts.clock.now();
            for found in self.comparison.look(now, from, &mine, &there) {
                note(check, &found);
            }
            if now.since(begun) >= CHANGES {
                self.comparison.leave();
            }
            if !self.comparison.is_open() {
                return Ok(Window::Done(mine.len() as u64));
            }
            self.parts.clock.sleep(LOOK).await;
        }
    }

    async fn hashes(
        &self,
        others: Vec<Name>,
        from: u64,
    ) -> Result<(Vec<Hash>, BTreeMap<Name, Vec<Hash>>), StorageFailure> {
        let pieces = &self.parts.pieces;
        let mine = pieces.hashes(&self.parts.me, &self.of, from, WINDOW).await?;
        let there = others.into_iter().map(async |host| {
            let hashes = pieces.hashes(&host, &self.of, from, WINDOW).await?;
            Ok::<_, StorageFailure>((host, hashes))
        });
        let there: BTreeMap<Name, Vec<Hash>> = try_join_all(there).await?.into_iter().collect();
        if let Some((host, _)) = there.iter().find(|(_, hashes)| hashes.len() != mine.len()) {
            let what =
                format!("the replica on {host} has another size than that on {}", self.parts.me);
            return Err(StorageFailure { what });
        }
        Ok((mine, there))
    }

    /// All of it is compared: what came of it, after what differs was given up if that was asked.
    async fn end(&self, check: &VolumeCheck) -> Result<(bool, String), Over> {
        let live = Arc::clone(&self.parts.live.borrow());
        let volume = live.volumes.get(&self.of).ok_or(Over)?;
        let me = &self.parts.me;
        let left: Vec<&Name> = volume.replicas.keys().filter(|host| !volume.counts(host)).collect();
        let rest = match left.as_slice() {
            [] => String::new(),
            hosts => format!(
                "; not compared: {}, which lacks something and is copied to",
                hosts.iter().map(|host| host.as_str()).collect::<Vec<_>>().join(" and ")
            ),
        };
        if check.differs.is_empty() {
            let hosts: Vec<&str> = volume.counted().map(Name::as_str).collect();
            return Ok((true, format!("all of it is the same on {}{rest}", hosts.join(" and "))));
        }
        let differ = words(check, me);
        if check.alone > 0 {
            let to = check.differs.keys().next().map_or("", Name::as_str);
            let (vm, disk) = (&self.of.vm, &self.of.disk);
            let message = format!(
                "{differ}; in {} of them all others are the same, so the replica on {me} is the bad one: `haven vm migrate {vm} --to {to}`, then `haven volume check {vm}.{disk} --repair`{rest}",
                check.alone
            );
            return Ok((false, message));
        }
        if !check.repair {
            let (vm, disk) = (&self.of.vm, &self.of.disk);
            let message = format!(
                "{differ}; its guest reads the replica on {me}. `haven volume check {vm}.{disk} --repair` has the others copied anew from it; if it is the bad one, move the VM to the other host first (`haven vm migrate {vm}`){rest}"
            );
            return Ok((false, message));
        }
        let given_up = self.give_up(&live, volume, check.differs.keys().cloned().collect()).await?;
        let when = match live
            .told_of(&self.of.vm)
            .is_some_and(|told| told.phase == haven_model::VmPhase::Running)
        {
            true => "are copied anew from it",
            false => "are copied anew from it once the VM runs",
        };
        let hosts: Vec<&str> = given_up.iter().map(Name::as_str).collect();
        Ok((true, format!("{differ}; those on {} {when}{rest}", hosts.join(" and "))))
    }

    /// Counts these no more: what they have is not to be believed, and all of them is copied anew.
    async fn give_up(
        &self,
        live: &Snapshot,
        volume: &Volume,
        hosts: BTreeSet<Name>,
    ) -> Result<BTreeSet<Name>, Over> {
        let session = self.parts.current_session().ok_or(Over)?;
        let placed = live.placements.get(&self.of.vm).ok_or(Over)?;
        let owner = Owner { epoch: placed.epoch, session: session.number };
        let record = volume.without(&hosts);
        match owner.write(self.parts, live, &self.of, &record).await {
            Ok(Some(_)) => {
                tracing::warn!(
                    volume = name(&self.of, volume).to_string(),
                    ?hosts,
                    "replicas that differ are given up"
                );
                Ok(hosts)
            }
            Ok(None) | Err(_) => Err(Over),
        }
    }
}

/// Puts a piece that differs into the record.
fn note(check: &mut VolumeCheck, found: &Differing) {
    for host in &found.on {
        let differs = check.differs.entry(host.clone()).or_default();
        differs.pieces += 1;
        if differs.first.len() < NAMED {
            differs.first.push(found.piece * PIECE);
        }
    }
    check.alone += u64::from(found.alone);
}

/// What differs, in words.
fn words(check: &VolumeCheck, me: &Name) -> String {
    let of = |(host, differs): (&Name, &haven_model::volume::Differs)| {
        let (least, plural) = match differs.pieces {
            1 => ("", ""),
            ENOUGH.. => ("at least ", "s"),
            _ => ("", "s"),
        };
        let at: Vec<String> = differs.first.iter().map(ToString::to_string).collect();
        format!(
            "the replica on {host} differs from that on {me} in {least}{} piece{plural} of 64 KiB (at byte {})",
            differs.pieces,
            at.join(", ")
        )
    };
    check.differs.iter().map(of).collect::<Vec<_>>().join("; ")
}
