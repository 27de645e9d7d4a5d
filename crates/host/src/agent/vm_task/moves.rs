//! The part of a VM's task that moves it live, on both hosts (docs/decisions/0011-live-migration.md).
//!
//! ```text
//!   old host:  Preparing ─► Copying ─► Stopped ══ change of owner ══► (Following ─►) HandedOver, or Gone
//!   new host:  Preparing ─► Listening ═══════════ change of owner ══► lets it run, or starts it anew
//!              └── either: Failed, before the change only ──┘
//! ```
//!
//! What a side says before the change compares the placement that began the attempt, and the change compares what both
//! sides said last. So once `Failed` stands in the store there is no change, and the old host may run the guest on; and
//! once the change stands, the old host only ends its process. The new host does nothing with its own process before
//! the old one has said that it can run the guest no more, or was proven lost.

use super::VmTask;
use crate::{
    agent::{
        tunnel::Load,
        vm_start::{Incoming, Preparation, StartFailure},
        vm_step::Wanted,
        wanted,
    },
    vm::migration::{Copy, DisksSent, Transfer},
};
use haven_model::{
    Handover, MigrationPhase, MigrationStatus, MovingTo, Placement, Snapshot, Versioned, VmPhase,
    keys, migration::Progress, vm::DISKS,
};
use haven_store::{
    clock::Mono,
    raw::{Compare, Op},
};
use std::{sync::Arc, time::Duration};

/// How the disks are that go along with a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Disks {
    /// There are none.
    None,
    /// So many are being sent; the memory has not begun.
    Going(usize),
    /// So many have a copy that follows what the guest writes.
    Follow(usize),
    /// The guest is stopped, and all that it has written is there.
    There,
}

/// How often a copy is looked at; what it comes to is told by events.
pub(super) const WATCH: Duration = Duration::from_millis(200);
/// How often its figures are told.
pub(super) const TELL: Duration = Duration::from_millis(500);
/// How often the end of a handover is looked at.
const AT_ONCE: Duration = Duration::from_millis(5);
/// How long what is left of a guest may take to be sent. It is stopped meanwhile.
const HANDOVER: Duration = Duration::from_secs(10);
/// How long a sender of memory that follows may send nothing: nobody takes it.
const STALLED: Duration = Duration::from_secs(10);
/// How long after the word of the sender, that all has come, its own process may take to see it.
const SEES: Duration = Duration::from_secs(2);
/// Rounds over the memory, after which a guest whose memory may follow goes over.
const ROUNDS: u64 = 2;
/// Why a guest whose memory followed is started anew.
pub(super) const LOST: &str =
    "not all of its memory had come from the host that had it before, so it starts anew";
/// The pause after the store did not take what was told.
const AGAIN: Duration = Duration::from_millis(50);

/// A copy that this host sends.
#[derive(Clone, Debug)]
pub(super) struct Outgoing {
    /// The attempt; 0 when an earlier daemon began it.
    attempt: i64,
    /// It was told that the guest is stopped.
    stopped: bool,
    /// Since when what is left is being sent.
    handing: Option<Mono>,
    /// When its figures were told last.
    pub(super) told: Mono,
    /// How the disks are that go along.
    pub(super) disks: Disks,
    /// The revision of the word by which its taker listens.
    heard: Option<i64>,
    /// It was told to go over although memory is left.
    postcopy: bool,
    /// It was told that memory follows; how much was sent then, and when that was more than before.
    sent: Option<(u64, Mono)>,
    /// All of it is there.
    whole: bool,
}

impl Outgoing {
    fn of(attempt: i64, now: Mono) -> Self {
        let (disks, heard, sent) = (Disks::None, None, None);
        let (stopped, postcopy, whole) = (false, false, false);
        Self { attempt, stopped, handing: None, told: now, disks, heard, postcopy, sent, whole }
    }
}

/// A guest that runs here and whose memory is not all here.
#[derive(Clone, Debug)]
pub(super) struct Following {
    /// The attempt by which it came; 0 when an earlier daemon let it run.
    attempt: i64,
    /// Since when nobody says any more that something is yet to come.
    alone: Option<Mono>,
}

impl VmTask {
    /// A copy of its guest is sent.
    pub(super) fn is_sent(&self) -> bool {
        self.outgoing.is_some()
    }

    fn my_placement(&self, snapshot: &Snapshot) -> Option<Versioned<Placement>> {
        snapshot.placements.get(&self.vm).cloned()
    }

    /// What this host said last of an attempt, as the store has it.
    fn said(&self, snapshot: &Snapshot, attempt: i64) -> Option<Versioned<MigrationStatus>> {
        snapshot.migration_told(&self.vm, &self.parts.me, attempt).cloned()
    }

    /// Says how far this side of an attempt is, while the placement has `revision`; true when it stands.
    async fn say(&mut self, revision: i64, status: MigrationStatus) -> bool {
        let phase = status.phase;
        let (live, me) = (Arc::clone(&self.parts.live.borrow()), &self.parts.me);
        let key = keys::migration_status(&self.vm, me);
        let there = live.migration_status.get(&self.vm).and_then(|hosts| hosts.get(me));
        let mut compare = vec![Compare::ModRevision(keys::placement(&self.vm), revision)];
        compare.extend(self.said.compare(&live, key.clone(), there.map(|said| said.revision)));
        let value = serde_json::to_vec(&status).expect("a status is plain data");
        match self.parts.store.txn(compare, vec![Op::Put(key, value.into())]).await {
            Ok(outcome) if outcome.succeeded => {
                self.said.written(outcome.revision);
                tracing::debug!(vm = %self.vm, ?phase, "said");
                true
            }
            Ok(_) => {
                tracing::debug!(vm = %self.vm, ?phase, "its placement has changed meanwhile, or what was said before was written late");
                self.look_again(AGAIN);
                false
            }
            Err(error) => {
                tracing::debug!(vm = %self.vm, ?phase, %error, "its migration status could not be written");
                self.look_again(AGAIN);
                false
            }
        }
    }

    fn status(&self, attempt: i64, phase: MigrationPhase) -> Option<MigrationStatus> {
        let session = self.parts.current_session()?.number;
        let (progress, machine, message) = (None, None, String::new());
        let heard = self.outgoing.as_ref().and_then(|copy| copy.heard);
        Some(MigrationStatus {
            attempt,
            session,
            phase,
            progress,
            machine,
            ports: false,
            disks: None,
            heard,
            message,
        })
    }

    /// Says that an attempt did not work out; true when that stands, so that the owner cannot change by it any more.
    async fn withdraw(&mut self, attempt: i64, why: &str) -> bool {
        let Some(mut status) = self.status(attempt, MigrationPhase::Failed) else { return false };
        tracing::warn!(vm = %self.vm, why, "it is not moved");
        why.clone_into(&mut status.message);
        self.say(attempt, status).await
    }

    /// Ends a copy that this host sends; the guest runs on here.
    async fn end_copy(&mut self) -> bool {
        // Cut first, so that what QEMU still waits for on a wire that hangs fails at once.
        self.parts.tunnel.close(self.vm.as_str());
        if self.running.is_some()
            && let Err(error) = self.parts.vms.take_back(self.vm.as_str()).await
        {
            self.failed("end the copy of", &error);
            return false;
        }
        self.outgoing = None;
        true
    }

    /// Brings an attempt to its end, before the guest is stopped, reset or started anew here; true when there is none.
    pub(super) async fn stays_here(&mut self, snapshot: &Snapshot, why: &str) -> bool {
        let Some(placement) = self.my_placement(snapshot) else { return true };
        let withdrawn = || {
            let said = self.said(snapshot, placement.revision);
            said.is_some_and(|said| said.phase == MigrationPhase::Failed)
        };
        if placement.moving_to.is_some()
            && !withdrawn()
            && !self.withdraw(placement.revision, why).await
        {
            // Not at once: without a session nothing can be said.
            self.look_again(AGAIN);
            return false;
        }
        self.outgoing.is_none() || self.end_copy().await
    }

    /// The owner's side of a move, while its guest runs.
    pub(super) async fn send_away(&mut self, snapshot: &Snapshot) {
        let Some(placement) = self.my_placement(snapshot) else { return };
        let attempt = placement.moving_to.as_ref().map(|_| placement.revision);
        match (attempt, self.outgoing.clone()) {
            (None, None) => {}
            // No change of owner can come of it: that would need what this host has not said of a later attempt.
            (None, Some(_)) => _ = self.end_copy().await,
            (Some(attempt), Some(copy)) if copy.attempt != attempt => {
                let why = "the daemon of its host was started anew meanwhile";
                if self.withdraw(attempt, why).await {
                    self.end_copy().await;
                }
            }
            (Some(attempt), None) => self.begin_copy(snapshot, &placement, attempt).await,
            (Some(attempt), Some(copy)) => match copy.disks {
                Disks::Going(_) => self.watch_disks(&placement, attempt, copy).await,
                _ => self.watch_copy(attempt, copy).await,
            },
        }
    }

    async fn begin_copy(&mut self, snapshot: &Snapshot, placement: &Placement, attempt: i64) {
        let Some(to) = placement.moving_to.clone() else { return };
        match self.said(snapshot, attempt).map(|said| said.phase) {
            None => {
                let machine = match self.parts.vms.machine(self.vm.as_str()).await {
                    Ok(machine) => machine,
                    Err(error) => return self.failed("ask for the machine type of", &error),
                };
                let Some(mut status) = self.status(attempt, MigrationPhase::Preparing) else {
                    return;
                };
                let has = match self.parts.vms.has(self.vm.as_str()).await {
                    Ok(has) => has,
                    Err(error) => return self.failed("ask for the disks of", &error),
                };
                status.machine = Some(machine);
                status.ports = has.ports;
                status.disks = Some(has.named).filter(|named| !named.is_empty());
                self.say(attempt, status).await;
            }
            Some(MigrationPhase::Preparing) => {
                let listens = snapshot
                    .migration_told(&self.vm, &to.host, attempt)
                    .filter(|told| told.phase == MigrationPhase::Listening);
                let Some(heard) = listens.map(|told| told.revision) else { return };
                if let Err(why) = self.send(snapshot, placement, attempt, heard).await {
                    // First: QEMU may wait for who does not answer behind it.
                    self.parts.tunnel.close(self.vm.as_str());
                    self.withdraw(attempt, &why).await;
                }
            }
            Some(MigrationPhase::Failed) => {}
            Some(_) => {
                self.withdraw(attempt, "its copy was lost with the daemon of its host").await;
            }
        }
    }

    /// Begins to send.
    async fn send(
        &mut self,
        snapshot: &Snapshot,
        placement: &Placement,
        attempt: i64,
        heard: i64,
    ) -> Result<(), String> {
        let Some(to) = &placement.moving_to else { return Ok(()) };
        if let Some(why) = self.replicas_differ().await {
            return Err(why);
        }
        let Some(status) = self.status(attempt, MigrationPhase::Copying) else { return Ok(()) };
        // Said first: a daemon that comes after this one then knows that a copy may be under way.
        if !self.say(attempt, status).await {
            return Ok(());
        }
        let now = self.parts.clock.now();
        let places = self.disks_of_this_host(snapshot).await?;
        let copy = Outgoing { heard: Some(heard), ..Outgoing::of(attempt, now) };
        if places.is_empty() {
            return self.send_memory(placement, to, copy).await;
        }
        let going = Disks::Going(places.len());
        self.outgoing = Some(Outgoing { disks: going, ..copy });
        self.send_disks(placement, to, &places).await
    }

    /// Begins to send the memory; what disks go along are as good as on the other side.
    pub(super) async fn send_memory(
        &mut self,
        placement: &Placement,
        to: &MovingTo,
        copy: Outgoing,
    ) -> Result<(), String> {
        let vm = self.vm.as_str();
        let (uid, host) = (placement.unix_uid(), &to.host);
        let socket = self.parts.tunnel.open(vm, uid, host, Load::Memory).await;
        let socket = socket.map_err(|error| crate::agent::chain(&error))?;
        self.outgoing = Some(copy);
        let sent = self.parts.vms.send(self.vm.as_str(), &socket, &to.options).await;
        self.look_again(WATCH);
        sent.map_err(|error| crate::agent::chain(&error))
    }

    async fn watch_copy(&mut self, attempt: i64, copy: Outgoing) {
        if let Disks::Follow(count) = copy.disks
            && let Some(why) = self.disks_broke(count).await
        {
            return self.give_back(attempt, &why).await;
        }
        let mut silent = self.parts.heard.silent.clone();
        silent.borrow_and_update();
        let transfer = tokio::select! {
            transfer = self.parts.vms.transfer(self.vm.as_str()) => match transfer {
                Ok(transfer) => transfer,
                Err(error) => return self.failed("look at the copy of", &error),
            },
            // QEMU may wait for a replica there, and answer nobody until that is cut off.
            Ok(()) = silent.changed() => return self.look_again(Duration::ZERO),
        };
        let now = self.parts.clock.now();
        match transfer.copy {
            Copy::Active => {
                self.look_again(WATCH);
                if !copy.postcopy && self.may_follow() && transfer.progress.rounds >= ROUNDS {
                    match self.parts.vms.start_postcopy(self.vm.as_str()).await {
                        Ok(()) => self.outgoing = Some(Outgoing { postcopy: true, ..copy }),
                        Err(error) => self.failed("let the memory follow of", &error),
                    }
                } else if now.since(copy.told) >= TELL {
                    self.outgoing = Some(Outgoing { told: now, ..copy });
                    self.tell_copy(attempt, MigrationPhase::Copying, transfer.progress).await;
                }
            }
            Copy::Stopped if copy.stopped => self.look_again(WATCH),
            Copy::Stopped if matches!(copy.disks, Disks::Follow(_)) => {
                self.finish_disks(attempt, copy).await;
            }
            Copy::Stopped if let Some(why) = self.replicas_differ().await => {
                self.give_back(attempt, &why).await;
            }
            Copy::Stopped => {
                if self.tell_copy(attempt, MigrationPhase::Stopped, transfer.progress).await {
                    self.outgoing = Some(Outgoing { stopped: true, ..copy });
                    self.look_again(WATCH);
                }
            }
            Copy::Broken(why) => {
                self.give_back(attempt, &format!("the copy broke: {why}")).await;
            }
            Copy::None | Copy::Following | Copy::Torn | Copy::Whole => {
                self.give_back(attempt, "QEMU knows of no copy that waits").await;
            }
        }
    }

    /// The attempt did not work out: once that stands, the guest runs on here.
    pub(super) async fn give_back(&mut self, attempt: i64, why: &str) {
        if self.withdraw(attempt, why).await {
            self.end_copy().await;
        }
    }

    /// Whether it was asked that its memory may follow it.
    fn may_follow(&self) -> bool {
        let live = self.parts.live.borrow();
        let to = live.placements.get(&self.vm).and_then(|placement| placement.moving_to.as_ref());
        to.is_some_and(|to| to.options.postcopy)
    }

    pub(super) async fn tell_copy(
        &mut self,
        attempt: i64,
        phase: MigrationPhase,
        progress: Progress,
    ) -> bool {
        let Some(mut status) = self.status(attempt, phase) else { return false };
        status.progress = Some(progress);
        self.say(attempt, status).await
    }

    /// The side of the owner before, after the change: what is left is sent, and the process ends.
    pub(super) async fn hand_over(&mut self, snapshot: &Snapshot, attempt: i64) {
        tracing::debug!(vm = %self.vm, "its owner has changed");
        if self.running.is_none() {
            self.say_ended(snapshot, attempt, MigrationPhase::Gone, None).await;
            return;
        }
        let copy = self.outgoing.clone().filter(|copy| copy.attempt == attempt);
        let now = self.parts.clock.now();
        if let Some(copy) = &copy
            && copy.handing.is_none()
        {
            self.outgoing = Some(Outgoing { handing: Some(now), ..copy.clone() });
            if let Err(error) = self.parts.vms.hand_over(self.vm.as_str()).await {
                tracing::warn!(vm = %self.vm, why = crate::agent::chain(&error), "it cannot be handed over");
                return self.end_process().await;
            }
            return self.look_again(AT_ONCE);
        }
        let transfer = self.parts.vms.transfer(self.vm.as_str()).await;
        let since = copy.as_ref().and_then(|copy| copy.handing);
        match transfer {
            Ok(transfer) if transfer.copy == Copy::Whole => {
                let progress = Some(transfer.progress);
                self.let_disks_go().await;
                if let Some(copy) = &mut self.outgoing {
                    copy.whole = true;
                }
                self.say_ended(snapshot, attempt, MigrationPhase::HandedOver, progress).await;
            }
            Ok(transfer) if transfer.copy == Copy::Following && copy.is_some() => {
                self.send_on(snapshot, attempt, transfer.progress).await;
            }
            Ok(transfer)
                if matches!(transfer.copy, Copy::Active | Copy::Stopped)
                    && since.is_some_and(|since| now.since(since) < HANDOVER) =>
            {
                self.look_again(AT_ONCE);
            }
            // It may run the guest on by itself: its end comes before all else.
            other => {
                tracing::warn!(vm = %self.vm, ?other, "its copy broke while it was handed over; it is ended here");
                self.end_process().await;
            }
        }
    }

    /// Ends its process at once; one whose guest is elsewhere, all of it, does no harm and may close its disks first.
    pub(super) async fn close_or_kill(&mut self) {
        if self.outgoing.as_ref().is_some_and(|copy| copy.whole)
            && let Err(error) = self.parts.vms.close(self.vm.as_str()).await
        {
            tracing::debug!(vm = %self.vm, why = crate::agent::chain(&error), "it does not end by itself");
        }
        self.kill().await;
    }

    /// What the guest needs of its memory is sent after it. This process can run it no more, and is of use as long as it
    /// sends.
    async fn send_on(&mut self, snapshot: &Snapshot, attempt: i64, progress: Progress) {
        let Some(copy) = self.outgoing.clone() else { return };
        let now = self.parts.clock.now();
        self.look_again(WATCH);
        let (sent, since) = copy.sent.unwrap_or((0, now));
        if progress.sent <= sent && now.since(since) >= STALLED {
            tracing::warn!(vm = %self.vm, "its memory cannot be sent on: nobody takes it");
            return self.end_process().await;
        }
        let moved = if progress.sent > sent { (progress.sent, now) } else { (sent, since) };
        if copy.sent.is_none() {
            self.let_disks_go().await;
        }
        let told = if copy.sent.is_none() || now.since(copy.told) >= TELL {
            let phase = MigrationPhase::Following;
            if !self.say_ended(snapshot, attempt, phase, Some(progress)).await {
                return;
            }
            now
        } else {
            copy.told
        };
        self.outgoing = Some(Outgoing { sent: Some(moved), told, ..copy });
    }

    /// It is to start elsewhere: its guest ends here first, and with it a copy that an earlier attempt left.
    pub(super) async fn leave(&mut self, snapshot: &Snapshot) {
        if self.outgoing.is_none() || self.end_copy().await {
            self.stop(snapshot).await;
        }
    }

    /// Says that nothing of it runs here. As long as the attempt stands it is not started here again.
    pub(super) async fn say_gone(&mut self, snapshot: &Snapshot, attempt: i64) {
        let said = self.said(snapshot, attempt);
        let Some(status) = self.status(attempt, MigrationPhase::Gone) else { return };
        let now = Some((attempt, status.session));
        if self.said_gone == now || said.is_some_and(|said| said.phase == MigrationPhase::Gone) {
            return;
        }
        // The other host starts it on this word.
        match self.parts.vms.find(self.vm.as_str()).await {
            Ok(None) => {
                if self.say(attempt, status).await {
                    self.said_gone = now;
                }
            }
            Ok(Some(found)) => {
                self.running = Some(found.epoch);
                self.look_again(Duration::ZERO);
            }
            Err(error) => self.failed("look for", &error),
        }
    }

    async fn end_process(&mut self) {
        self.kill().await;
        self.parts.tunnel.close(self.vm.as_str());
        if self.running.is_none() {
            self.outgoing = None;
            self.look_again(Duration::ZERO);
        }
    }

    async fn say_ended(
        &mut self,
        snapshot: &Snapshot,
        attempt: i64,
        phase: MigrationPhase,
        progress: Option<Progress>,
    ) -> bool {
        let Some(placement) = self.my_placement(snapshot) else { return false };
        let Some(mut status) = self.status(attempt, phase) else { return false };
        status.progress = progress;
        if self.outgoing.as_ref().is_some_and(|copy| copy.sent.is_some()) {
            "its memory followed it".clone_into(&mut status.message);
        }
        self.say(placement.revision, status).await
    }

    /// The new host's side: makes ready what the guest needs, and a process that waits for it.
    pub(super) async fn receive(&mut self, snapshot: &Snapshot, attempt: i64, epoch: u64) {
        if self.incoming == Some(attempt) || self.listened(snapshot, attempt) {
            // What was sent to it is gone with it; another one for the same attempt would be taken for it.
            let why = "the process that waited for it ended";
            return self.give_up(attempt, why).await;
        }
        let said = self.said(snapshot, attempt);
        if said.as_ref().is_some_and(|said| said.phase == MigrationPhase::Failed) {
            self.gave_up = Some(attempt);
            return;
        }
        let Some(placement) = self.my_placement(snapshot) else { return };
        let told = snapshot.migration_told(&self.vm, &placement.host, attempt);
        let Some((machine, told)) =
            told.and_then(|of| Some((of.machine.clone()?, of.value.clone())))
        else {
            // The owner says first what its machine is, or has failed.
            return;
        };
        // It may have been changed since the plan looked.
        let changed = snapshot.pending_machine(&self.vm);
        if !changed.is_empty() {
            let why = format!("it was changed since it was started ({})", changed.join(", "));
            return self.give_up(attempt, &why).await;
        }
        let wanted = snapshot.vms.get(&self.vm).and_then(|vm| vm.spec.hardware().remove(DISKS));
        if told.disks.is_some() && told.disks != wanted {
            // With other disks it could not take the guest, and the owner would not hear of that.
            let why = "it has other disks than are wanted of it by now";
            return self.give_up(attempt, why).await;
        }
        let Some(status) = self.status(attempt, MigrationPhase::Preparing) else { return };
        if !self.say(attempt, status).await {
            return;
        }
        match self.make_ready(snapshot, epoch, machine, told.ports).await {
            Some(Ok(())) => {
                self.incoming = Some(attempt);
                self.listening = false;
                self.look_again(Duration::ZERO);
            }
            Some(Err(failure)) => self.give_up(attempt, &failure.0).await,
            None => {}
        }
    }

    /// Whether this host has said that a process waits, in whatever session and by whatever daemon of it.
    fn listened(&self, snapshot: &Snapshot, attempt: i64) -> bool {
        let hosts = snapshot.migration_status.get(&self.vm);
        let said = hosts.and_then(|hosts| hosts.get(&self.parts.me));
        said.is_some_and(|said| said.attempt == attempt && said.phase == MigrationPhase::Listening)
    }

    /// An attempt did not work out here: once that stands, nothing is tried for it any more.
    async fn give_up(&mut self, attempt: i64, why: &str) {
        if self.withdraw(attempt, why).await {
            self.gave_up = Some(attempt);
            self.look_again(Duration::ZERO);
        } else {
            self.look_again(AGAIN);
        }
    }

    async fn make_ready(
        &mut self,
        snapshot: &Snapshot,
        epoch: u64,
        machine: String,
        ports: bool,
    ) -> Option<Result<(), StartFailure>> {
        let session = self.parts.current_session()?;
        let kvm = self.parts.facts.borrow().as_ref().map(|facts| facts.kvm)?;
        let (object, placement) = self.last.clone()?;
        let options = placement.moving_to.as_ref().map(|to| to.options.clone()).unwrap_or_default();
        let preparation = Preparation {
            parts: Arc::clone(&self.parts),
            vm: self.vm.clone(),
            snapshot,
            object,
            placement,
            session: session.number,
            kvm,
            networks: self.networks.clone(),
            incoming: Some(Incoming { epoch, machine, ports, options }),
            begun: self.mirrors.begun(),
        };
        let launch = match self.prepare(snapshot, preparation, session).await? {
            Ok(launch) => launch,
            Err(failure) => return Some(Err(failure)),
        };
        Some(match self.parts.vms.start_incoming(&launch).await {
            Ok(running) => {
                self.running = Some(running.epoch);
                self.hot.begins(ports);
                self.unsure = false;
                Ok(())
            }
            Err(error) => {
                let found = self.parts.vms.find(self.vm.as_str()).await;
                self.unsure = found.is_err();
                if let Ok(found) = found {
                    self.running = found.map(|vm| vm.epoch);
                }
                Err(StartFailure::of(&error))
            }
        })
    }

    /// The new host's side, while its process waits.
    pub(super) async fn attend(&mut self, attempt: i64) {
        if self.incoming != Some(attempt) {
            // It waits for an attempt that is over.
            return self.end_process().await;
        }
        if !self.listening {
            let Some(status) = self.status(attempt, MigrationPhase::Listening) else { return };
            self.listening = self.say(attempt, status).await;
        }
        match self.parts.vms.transfer(self.vm.as_str()).await {
            Ok(transfer) => {
                // `Torn` comes after the change only.
                if let Copy::Broken(why) = transfer.copy {
                    self.give_up(attempt, &format!("the copy broke: {why}")).await;
                }
            }
            Err(error) => self.failed("look at the copy of", &error),
        }
    }

    /// Lets a guest run that was handed over: the owner before can run it no more.
    pub(super) async fn let_run(&mut self, snapshot: &Snapshot) {
        let copy = self.parts.vms.transfer(self.vm.as_str()).await.map(|transfer| transfer.copy);
        match &copy {
            Ok(Copy::Whole | Copy::Following) => {}
            // All was sent, and the last of it is being taken in.
            Ok(Copy::Active) => return self.look_again(AT_ONCE),
            other => {
                tracing::error!(vm = %self.vm, ?other, "it was handed over and is not here");
                return self.end_process().await;
            }
        }
        match self.open_arrived().await {
            Ok(true) => {}
            Ok(false) => return self.look_again(AT_ONCE),
            Err(why) => {
                tracing::error!(vm = %self.vm, %why, "its disks cannot be opened here, so it is started anew");
                return self.end_process().await;
            }
        }
        if let Err(error) = self.parts.vms.let_run(self.vm.as_str()).await {
            self.failed("let run", &error);
            return self.end_process().await;
        }
        tracing::debug!(vm = %self.vm, "it runs on here");
        let attempt = self.incoming.take().unwrap_or_default();
        self.following =
            matches!(copy, Ok(Copy::Following)).then_some(Following { attempt, alone: None });
        if self.following.is_none() {
            self.parts.vms.note_whole(self.vm.as_str()).await;
        }
        self.inherit(snapshot);
        self.report(snapshot, VmPhase::Running, "").await;
    }

    /// The attempt by which the guest that is here came, as long as not all of it is.
    pub(super) fn awaited(&self) -> Option<i64> {
        self.incoming.or(self.following.as_ref().map(|following| following.attempt))
    }

    /// A guest that runs, and part of whose memory is yet to come. Once that cannot come any more, it starts anew.
    pub(super) async fn follow(&mut self, snapshot: &Snapshot, wanted: Wanted) {
        let Some(following) = self.following.clone() else { return };
        let copy = tokio::select! {
            told = self.parts.vms.transfer(self.vm.as_str()) => told.ok().map(|told| told.copy),
            () = self.parts.clock.sleep(SEES) => None,
        };
        let now = self.parts.clock.now();
        let more = matches!(self.handover(snapshot), Handover::Following | Handover::Pending);
        let alone = following.alone.filter(|_| !more).or((!more).then_some(now));
        match copy {
            Some(Copy::Whole) => {
                tracing::debug!(vm = %self.vm, "all of its memory is here");
                self.following = None;
                self.parts.vms.note_whole(self.vm.as_str()).await;
                return self.settled(snapshot, wanted).await;
            }
            // One that waits for its memory may answer nobody.
            Some(Copy::Following) | None if alone.is_none_or(|since| now.since(since) < SEES) => {
                self.following = Some(Following { alone, ..following });
                self.look_again(WATCH);
                return self.settled(snapshot, wanted).await;
            }
            _ => {}
        }
        tracing::warn!(vm = %self.vm, ?copy, "it is ended: {LOST}");
        self.tell(format!("{} on {}: {LOST}", self.vm, self.parts.me)).await;
        self.end_process().await;
    }

    /// The guest is what it was: what its owner before knew of it holds.
    fn inherit(&mut self, snapshot: &Snapshot) {
        let before = snapshot.vm_status.get(&self.vm).filter(|s| s.epoch + 1 == self.epoch);
        let Some(before) = before else { return };
        self.started_ms = before.started_ms;
        self.started_with.clone_from(&before.started_with);
        self.resets = before.resets;
        self.ready = before.ready;
        self.ready_ms = before.ready_ms;
        self.ready_since_ms = before.ready_since_ms;
        self.heard = before.heard;
        // What was not well before is nobody's to wait for.
        self.unproven = self.ready == Some(true);
    }

    /// A copy that the daemon before this one began.
    pub(super) async fn find_copy(&mut self) {
        let found = self.parts.vms.transfer(self.vm.as_str()).await;
        let Ok(Transfer { copy, .. }) = found else {
            self.following = self.may_be_torn().await;
            if self.following.is_some() {
                return;
            }
            // Whatever it sends is not this daemon's: ended once it answers.
            self.outgoing = Some(Outgoing::of(0, self.parts.clock.now()));
            return;
        };
        let disks = self.parts.vms.disks_sent(self.vm.as_str(), 0).await;
        let snapshot = Arc::clone(&self.parts.live.borrow());
        let runs = matches!(wanted::vm(&snapshot, &self.parts.me, &self.vm), Wanted::Run { .. });
        match copy {
            _ if disks.is_ok_and(|disks| disks != DisksSent::none()) => {
                self.outgoing = Some(Outgoing::of(0, self.parts.clock.now()));
            }
            Copy::Active | Copy::Stopped => {
                self.outgoing = Some(Outgoing::of(0, self.parts.clock.now()));
            }
            Copy::Following | Copy::Torn if runs => {
                self.following = Some(Following { attempt: 0, alone: None });
            }
            Copy::Whole => self.parts.vms.note_whole(self.vm.as_str()).await,
            _ => {}
        }
    }

    /// What an earlier daemon let run and what has perhaps not come whole. The move may have been settled since: that
    /// it starts anew does not change its epoch.
    pub(super) async fn may_be_torn(&self) -> Option<Following> {
        let lacks = self.parts.vms.may_lack_memory(self.vm.as_str()).await;
        lacks.then_some(Following { attempt: 0, alone: None })
    }

    /// Whether the wanted attempt has failed here already.
    pub(super) fn has_given_up(&self, wanted: Wanted) -> bool {
        matches!(wanted, Wanted::Receive { attempt, .. } if self.gave_up == Some(attempt))
    }
}
