//! The task that owns one VM on this host, from the moment it is placed here until nothing of it is left.
//!
//! Each turn: read what is wanted, look at what is seen, ask [`super::vm_step`] for the next step, do it. Only this
//! task starts, stops or cleans this VM here (the guard may kill it at any time).

mod backups;
mod clean;
mod clients;
mod copying;
mod disks;
mod ends;
mod hangs;
mod health;
mod hot_disks;
mod mirrors;
mod moves;
mod snapshots;

use super::{
    AgentParts,
    backup::job::Job,
    hang_watch,
    health_watch::{self, Asked},
    lease::Session,
    networks::Networks,
    own_record::OwnRecord,
    vm_start::{Preparation, StartFailure},
    vm_step::{Seen, Step, Wanted, backoff_ms, next},
    wanted,
};
use crate::vm::driver::{Exit, GuestState, VmEvent, VmLaunch};
use haven_model::{
    Handover, MigrationPhase, Name, Placement, Snapshot, Versioned, VmPhase, VmSpec, VmStatus,
    keys, object::Stored, vm::RestartPolicy,
};
use haven_store::{
    clock::Mono,
    raw::{Compare, Op},
};
use std::{collections::BTreeMap, sync::Arc, time::Duration};
use tokio::sync::{broadcast, watch};
use tokio_util::sync::CancellationToken;

/// The net under lost wake-ups.
const NET: Duration = Duration::from_secs(10);
/// The pause before the driver is asked again.
const ASK_AGAIN: Duration = Duration::from_millis(500);
/// How long a process that an earlier daemon left, and that may never have run, may be silent.
const SILENCE: Duration = Duration::from_secs(10);
/// A step of a start that takes longer is told, and again after twice as long, and so on.
const SLOW: Duration = Duration::from_secs(5);
/// The longest pause between two such messages.
const SLOWEST: Duration = Duration::from_secs(300);
/// The pause after a status that the store did not take.
const TOLD_AGAIN: Duration = Duration::from_millis(50);
/// How old the transaction before a start may be.
const FRESH: Duration = Duration::from_secs(1);

struct VmTask {
    parts: Arc<AgentParts>,
    vm: Name,
    networks: watch::Receiver<Networks>,
    running: Option<u64>,
    ended: Option<Exit>,
    /// It ran under this session and epoch when the daemon before this one ended, and runs no more.
    ended_unseen: Option<(u64, u64)>,
    /// What people are told of it while it runs.
    note: String,
    deleted: bool,
    /// The epoch that `ended`, `restarts` and the pauses are about.
    epoch: u64,
    restarts: u32,
    failures: u32,
    /// [`VmStatus::hung`], and when it was found so the last time.
    hung: u32,
    hung_at: Mono,
    /// [`VmStatus::heard`].
    heard: bool,
    /// Since when the process that is there runs.
    runs_since: Option<Mono>,
    /// A process may be there that this task does not know of.
    unsure: bool,
    resets: u64,
    /// [`VmSpec::hardware`] of the process that runs.
    started_with: BTreeMap<String, String>,
    not_before: Mono,
    started_ms: Option<i64>,
    ready: Option<bool>,
    ready_ms: Option<i64>,
    /// Counts while it is ready.
    ready_since_ms: Option<i64>,
    /// [`VmStatus::unproven`].
    unproven: bool,
    /// The last status written, without its times.
    written: Option<VmStatus>,
    /// Its status in the store.
    told: OwnRecord,
    /// What was said of its moves there.
    said: OwnRecord,
    /// A copy that this host sends.
    outgoing: Option<moves::Outgoing>,
    /// The attempt for which the process here waits; its guest has not run here.
    incoming: Option<i64>,
    /// The guest that runs here, as long as part of its memory is yet to come from the host before.
    following: Option<moves::Following>,
    /// It was told that the process waits.
    listening: bool,
    mirrors: mirrors::Mirrors,
    limited: Option<disks::Limited>,
    hot: hot_disks::Hot,
    /// The backup that is made of it.
    backup: Option<Job>,
    /// The copies that are made of its mirrored disks.
    copying: Option<copying::Copying>,
    /// What the copies are called that are to be made.
    attempt: Option<String>,
    /// The copies that are put in the place of its replicas.
    putting: Option<copying::Putting>,
    /// Its disks may still be held as they were at an instant.
    unclosed: bool,
    /// An attempt that failed here.
    gave_up: Option<i64>,
    /// The attempt for which it was told that nothing of it runs here, and in which session.
    said_gone: Option<(i64, u64)>,
    /// When to look again for a move's sake.
    again: Option<Duration>,
    /// The last object and placement seen, for cleaning after both are gone.
    last: Option<(Arc<Stored<VmSpec>>, Arc<Placement>)>,
}

/// Owns `vm` until it is not this host's and nothing of it is left here, or until `cancel`.
pub async fn run(
    parts: Arc<AgentParts>,
    vm: Name,
    networks: watch::Receiver<Networks>,
    cancel: CancellationToken,
) {
    let mut events = parts.vms.events();
    let mut task = VmTask::new(parts, vm, networks);
    task.look(&cancel).await;
    task.remember();
    let now = Arc::clone(&task.parts.live.borrow());
    if task.health_target(&now).is_none() {
        (task.ready, task.ready_ms) = (None, None);
    }
    let (mut live, mut session) = (task.parts.live.clone(), task.parts.session.clone());
    let mut silent = task.parts.heard.silent.clone();
    let (target, mut health) = health_watch::spawn(&task.parts, task.ready, &cancel);
    let (watched, mut hung) = hang_watch::spawn(&task.parts, &task.vm, &cancel);
    while !cancel.is_cancelled() {
        let snapshot = Arc::clone(&live.borrow_and_update());
        session.borrow_and_update();
        silent.borrow_and_update();
        let Some(pause) = task.turn(&snapshot).await else {
            return;
        };
        target.send_replace(
            task.health_target(&snapshot)
                .map(|target| Asked { target, known: task.ready.filter(|_| task.unproven) }),
        );
        let now = task.watched(&snapshot);
        watched.send_if_modified(|before| std::mem::replace(before, now.clone()) != now);
        tokio::select! {
            biased;
            () = cancel.cancelled() => {}
            event = events.recv() => task.event(event).await,
            _ = live.changed() => {}
            _ = session.changed() => {}
            _ = silent.changed() => {}
            _ = health.changed() => {
                let health = *health.borrow_and_update();
                task.health(health);
            }
            _ = hung.changed() => {
                let found = hung.borrow_and_update().clone();
                task.watched_out(found).await;
            }
            () = task.parts.clock.sleep(pause) => {}
        }
    }
}

impl VmTask {
    /// It knows of nothing yet.
    fn new(parts: Arc<AgentParts>, vm: Name, networks: watch::Receiver<Networks>) -> Self {
        let now = parts.clock.now();
        Self {
            running: None,
            parts,
            vm,
            networks,
            ended: None,
            ended_unseen: None,
            note: String::new(),
            deleted: false,
            epoch: 0,
            restarts: 0,
            failures: 0,
            hung: 0,
            hung_at: now,
            heard: false,
            runs_since: None,
            unsure: false,
            resets: 0,
            started_with: BTreeMap::new(),
            not_before: now,
            started_ms: None,
            ready: None,
            ready_ms: None,
            ready_since_ms: None,
            unproven: false,
            written: None,
            told: OwnRecord::default(),
            said: OwnRecord::default(),
            outgoing: None,
            incoming: None,
            following: None,
            listening: false,
            mirrors: mirrors::Mirrors::new(),
            limited: None,
            hot: hot_disks::Hot::default(),
            backup: None,
            copying: None,
            attempt: None,
            putting: None,
            unclosed: true,
            gave_up: None,
            said_gone: None,
            again: None,
            last: None,
        }
    }

    /// Finds what runs already. It listens before it looks: an end between the two is seen by one of them.
    async fn look(&mut self, cancel: &CancellationToken) {
        while !cancel.is_cancelled() {
            match self.parts.vms.find(self.vm.as_str()).await {
                Ok(found) => {
                    self.running = found.map(|vm| vm.epoch);
                    break;
                }
                Err(error) => self.failed("look for", &error),
            }
            self.parts.clock.sleep(ASK_AGAIN).await;
        }
        let until = self.parts.clock.now().plus(SILENCE);
        while self.running.is_some() && !cancel.is_cancelled() {
            match self.parts.vms.state(self.vm.as_str()).await {
                Ok(GuestState::NotStarted) => self.end_unstarted("it was never let run").await,
                // It came from elsewhere, and was not let run here.
                Ok(GuestState::Paused | GuestState::Broken) if !self.was_let_run() => {
                    self.end_unstarted("it was never let run here").await;
                }
                Ok(_) => {
                    self.close_views().await;
                    return self.find_copy().await;
                }
                Err(error) => {
                    tracing::warn!(vm = %self.vm, why = super::chain(&error), "it does not tell what it does");
                    if self.was_let_run() {
                        self.note =
                            "its QEMU did not answer when this host's daemon started".into();
                        self.following = self.may_be_torn().await;
                        return;
                    }
                    if self.parts.clock.now() >= until {
                        self.end_unstarted("it does not answer and may never have run").await;
                    }
                }
            }
            self.parts.clock.sleep(ASK_AGAIN).await;
        }
    }

    /// Whether an earlier daemon told that its guest runs in the process that is there: it tells so after each start,
    /// and takes it back before the next.
    fn was_let_run(&self) -> bool {
        let live = self.parts.live.borrow();
        live.vm_status.get(&self.vm).is_some_and(|status| {
            status.host == self.parts.me
                && self.running == Some(status.epoch)
                && matches!(status.phase, VmPhase::Running | VmPhase::Stopping)
        })
    }

    /// Ends a process whose guest an earlier daemon may not have let run; it is started anew, but only after this one
    /// is gone.
    async fn end_unstarted(&mut self, why: &str) {
        tracing::warn!(vm = %self.vm, "a process that an earlier daemon left is ended: {why}");
        self.kill().await;
    }

    /// Takes over what an earlier daemon wrote of the VM that runs, or of the one that ran when it ended.
    fn remember(&mut self) {
        let live = Arc::clone(&self.parts.live.borrow());
        let Some(status) = live.vm_status.get(&self.vm).filter(|s| s.host == self.parts.me) else {
            return;
        };
        let ended = self.running.is_none() && status.phase == VmPhase::Running;
        if self.running != Some(status.epoch) && !ended {
            return;
        }
        self.epoch = status.epoch;
        self.restarts = status.restarts;
        self.failures = status.failures;
        self.hung = status.hung;
        self.resets = status.resets;
        if ended {
            self.ended_unseen = Some((status.session, status.epoch));
        } else {
            self.started_ms = status.started_ms;
            self.started_with.clone_from(&status.started_with);
            self.ready = status.ready;
            self.ready_ms = status.ready_ms;
            self.ready_since_ms = status.ready_since_ms;
            self.unproven = status.unproven;
            self.heard = status.heard;
        }
    }

    /// A VM that ran when the daemon before this one ended, and runs no more in the same session, ended by itself: its
    /// restart policy decides. In a later session everything was ended, and it is started as on a new host.
    async fn judge_unseen_end(&mut self) {
        let Some(session) = self.parts.current_session() else { return };
        if let Some((of, epoch)) = self.ended_unseen.take()
            && of == session.number
        {
            let what = "it ended while this host's daemon did not run";
            self.ended_by_itself(epoch, Exit::Crashed, what).await;
        }
    }

    /// One turn; how long until the next at the latest, or nothing when the task is over.
    async fn turn(&mut self, snapshot: &Snapshot) -> Option<Duration> {
        let wanted = wanted::vm(snapshot, &self.parts.me, &self.vm);
        if let (Some(object), Some(placement)) =
            (snapshot.vms.get(&self.vm), snapshot.placements.get(&self.vm))
            && (placement.host == self.parts.me || matches!(wanted, Wanted::Receive { .. }))
        {
            self.last = Some((Arc::clone(&object.value), Arc::clone(&placement.value)));
        }
        self.new_epoch(wanted);
        let runs = self.running.is_some();
        if !runs || !matches!(wanted, Wanted::Run { .. }) && !self.hot.stands() {
            self.hot.makes_nothing_ready().await;
        }
        self.judge_unseen_end().await;
        let policy = snapshot.vms.get(&self.vm).map_or(RestartPolicy::Never, |vm| vm.spec.restart);
        let now = self.parts.clock.now();
        let seen = Seen {
            running: self.running,
            may_start: self.parts.current_session().is_some(),
            ended: self.ended,
            backing_off: now < self.not_before,
            resets: self.resets,
            deleted: self.deleted,
            unstarted: self.incoming.is_some(),
            following: self.following.is_some(),
            handover: self.handover(snapshot),
            gave_up: self.has_given_up(wanted),
        };
        let step = next(wanted, policy, &seen);
        self.again = None;
        if !matches!(step, Step::Settled | Step::Wait | Step::LeaveEnded) {
            self.leave_disks(matches!(step, Step::Start)).await;
        }
        match step {
            Step::Stop if self.stands_on(snapshot).await => {}
            Step::Stop if matches!(wanted, Wanted::Leave { .. }) => self.leave(snapshot).await,
            Step::Start | Step::Stop | Step::Reset
                if !self.stays_here(snapshot, "it is stopped or started anew").await => {}
            Step::Start if !self.reverted(snapshot).await => {}
            Step::Start => self.start(snapshot).await,
            Step::Stop => self.stop(snapshot).await,
            Step::Kill => self.close_or_kill().await,
            Step::Reset => self.reset(snapshot).await,
            Step::Receive
            | Step::Attend
            | Step::HandOver
            | Step::LetRun
            | Step::Follow
            | Step::SayGone => self.move_on(snapshot, wanted, step).await,
            Step::Clean => self.clean(snapshot, wanted).await,
            Step::LeaveEnded => {
                let why = "it ended and its restart policy leaves it";
                self.report(snapshot, VmPhase::Stopped, why).await;
                self.keep_snapshots(snapshot).await;
                self.keep_backup(snapshot).await;
            }
            Step::Settled if matches!(wanted, Wanted::NotMine) => return None,
            Step::Settled => self.settled(snapshot, wanted).await,
            Step::Wait => {}
        }
        Some(self.pause(step))
    }

    /// How long until the next turn at the latest.
    fn pause(&self, step: Step) -> Duration {
        let rest = Duration::from_nanos(self.not_before.0.saturating_sub(self.parts.clock.now().0));
        let pause = match (rest.is_zero(), step) {
            (true, Step::Kill | Step::Clean) => Duration::ZERO,
            (true, Step::Stop | Step::Reset) if self.again.is_none() => Duration::ZERO,
            (true, _) => NET,
            (false, _) => rest.min(NET),
        };
        self.again.map_or(pause, |again| again.max(rest).min(pause))
    }

    /// Something of a move is to be looked at again so soon.
    fn look_again(&mut self, pause: Duration) {
        self.again = Some(self.again.map_or(pause, |now| now.min(pause)));
    }

    /// How the copy stands that the owner before had, if this is its new owner.
    fn handover(&self, snapshot: &Snapshot) -> Handover {
        let Some(placement) = snapshot.placements.get(&self.vm) else { return Handover::Broken };
        match &placement.moved_from {
            Some(from) => snapshot.handover(&self.vm, from),
            // It was settled before this host looked.
            None => self.awaited().map_or(Handover::Broken, |attempt| {
                let hosts = snapshot.migration_status.get(&self.vm);
                let whole = hosts.is_some_and(|hosts| {
                    hosts.values().any(|told| {
                        told.attempt == attempt && told.phase == MigrationPhase::HandedOver
                    })
                });
                if whole { Handover::Whole } else { Handover::Broken }
            }),
        }
    }

    async fn move_on(&mut self, snapshot: &Snapshot, wanted: Wanted, step: Step) {
        match (step, wanted) {
            (Step::Receive, Wanted::Receive { epoch, attempt }) => {
                self.receive(snapshot, attempt, epoch).await;
            }
            (Step::Attend, Wanted::Receive { attempt, .. }) => self.attend(attempt).await,
            (Step::HandOver, Wanted::HandOver { attempt }) => {
                self.hand_over(snapshot, attempt).await;
            }
            (Step::LetRun, _) => self.let_run(snapshot).await,
            (Step::Follow, _) => self.follow(snapshot, wanted).await,
            (Step::SayGone, Wanted::Leave { attempt }) => self.say_gone(snapshot, attempt).await,
            _ => {}
        }
    }

    fn new_epoch(&mut self, wanted: Wanted) {
        if let Wanted::Run { epoch, resets } = wanted {
            if epoch != self.epoch {
                self.epoch = epoch;
                self.ended = None;
                self.restarts = 0;
                self.failures = 0;
                self.hung = 0;
                self.resets = resets;
                self.not_before = self.parts.clock.now();
                self.ready = None;
                self.ready_ms = None;
                self.unproven = false;
                self.heard = false;
                self.started_ms = None;
            }
            self.deleted = false;
        } else if matches!(wanted, Wanted::Receive { .. }) {
            self.deleted = false;
        } else if matches!(wanted, Wanted::Stop | Wanted::Leave { .. }) {
            self.ended = None;
        }
    }

    async fn settled(&mut self, snapshot: &Snapshot, wanted: Wanted) {
        match wanted {
            Wanted::Run { .. } => {
                let since = *self.runs_since.get_or_insert(self.parts.clock.now());
                if self.runs_well(since, self.ready) {
                    self.failures = 0;
                    self.forget_hangs();
                }
                self.keep_mirrors().await;
                if self.running.is_none() {
                    return;
                }
                self.change_disks(snapshot).await;
                self.limit_disks(snapshot).await;
                self.keep_snapshots(snapshot).await;
                self.keep_backup(snapshot).await;
                let note = [&self.note, &self.hot.note].into_iter().find(|note| !note.is_empty());
                let note = note.cloned().unwrap_or_default();
                self.report(snapshot, VmPhase::Running, &note).await;
                if self.may_go() {
                    self.send_away(snapshot).await;
                }
            }
            Wanted::Stop => {
                self.report(snapshot, VmPhase::Stopped, "").await;
                self.keep_snapshots(snapshot).await;
                self.keep_backup(snapshot).await;
            }
            Wanted::Delete => self.report(snapshot, VmPhase::Stopped, "deleted").await,
            Wanted::Receive { .. }
            | Wanted::HandOver { .. }
            | Wanted::Leave { .. }
            | Wanted::NotMine
            | Wanted::Unknown => {}
        }
    }

    /// Writes the status if it changed, in a transaction that compares the placement: an agent that lost the VM
    /// meanwhile writes nothing. True when the store has it.
    async fn publish(&mut self, snapshot: &Snapshot, phase: VmPhase, message: &str) -> bool {
        // What is to move here is its owner's to tell of.
        let mine = |placement: &&Versioned<Placement>| placement.host == self.parts.me;
        let Some(placement) = snapshot.placements.get(&self.vm).filter(mine) else {
            return false;
        };
        let Some(session) = self.parts.current_session() else { return false };
        let object = snapshot.vms.get(&self.vm);
        let generation = object.map_or(0, |vm| vm.meta.generation);
        let checked = object.is_some_and(|vm| vm.spec.check.is_some());
        let started_with = self.running.map(|_| self.started_with.clone());
        let mut status = VmStatus {
            host: self.parts.me.clone(),
            session: session.number,
            epoch: placement.epoch,
            generation,
            phase,
            since_ms: 0,
            started_ms: self.started_ms,
            ready: self.ready,
            ready_ms: self.ready_ms,
            ready_since_ms: self.ready_since_ms.filter(|_| self.ready == Some(true)),
            unproven: self.unproven && checked && self.running.is_some(),
            restarts: self.restarts,
            failures: self.failures,
            hung: self.hung,
            heard: self.heard && self.running.is_some(),
            idle: phase == VmPhase::Failed && self.running.is_none() && !self.unsure,
            started_with: started_with.unwrap_or_default(),
            disks_change: self.hot.changes && self.running.is_some(),
            ports: self.hot.ports && self.running.is_some(),
            resets: self.resets,
            message: message.to_owned(),
        };
        let (live, key) = (Arc::clone(&self.parts.live.borrow()), keys::vm_status(&self.vm));
        let there = live.vm_status.get(&self.vm).map(|status| status.revision);
        if self.written.as_ref() == Some(&status) && !self.told.overwritten(&live, there) {
            return true;
        }
        let bare = status.clone();
        status.since_ms = (self.parts.wall_ms)();
        // Until it is known what the store has: this may be given up half-way.
        self.written = None;
        let mut compare = vec![Compare::ModRevision(keys::placement(&self.vm), placement.revision)];
        compare.extend(self.told.compare(&live, key.clone(), there));
        let value = serde_json::to_vec(&status).expect("a status is plain data");
        match self.parts.store.txn(compare, vec![Op::Put(key, value.into())]).await {
            Ok(outcome) if outcome.succeeded => {
                self.told.written(outcome.revision);
                self.written = Some(bare);
                true
            }
            Ok(_) => {
                // One of before was carried out after all, or the placement has changed: the live copy tells.
                self.look_again(TOLD_AGAIN);
                false
            }
            Err(error) => {
                tracing::debug!(vm = %self.vm, %error, "its status could not be written");
                self.retry_in(Duration::from_millis(200));
                false
            }
        }
    }

    async fn report(&mut self, snapshot: &Snapshot, phase: VmPhase, message: &str) {
        self.publish(snapshot, phase, message).await;
    }

    fn retry_in(&mut self, pause: Duration) {
        self.not_before = self.parts.clock.now().plus(pause);
    }

    async fn start(&mut self, snapshot: &Snapshot) {
        // What waited for a guest has ended.
        self.incoming = None;
        // The whole start belongs to this session; the guard refuses it when another one is open at its end.
        let Some(session) = self.parts.current_session() else { return };
        // Before the transaction, so that nothing of the wait lies between it and the start.
        let Some(kvm) = self.parts.facts.borrow().as_ref().map(|facts| facts.kvm) else {
            return self.retry_in(Duration::from_millis(200));
        };
        // The transaction behind this status is what makes a start and a change of owner exclude each other. It is
        // done also when the store has this status already.
        self.written = None;
        if !self.publish(snapshot, VmPhase::Starting, "").await {
            self.retry_in(Duration::from_millis(100));
            return;
        }
        let Some((object, placement)) = self.last.clone() else {
            return;
        };
        let begun = self.parts.clock.now();
        let preparation = Preparation {
            parts: Arc::clone(&self.parts),
            vm: self.vm.clone(),
            snapshot,
            object: Arc::clone(&object),
            placement: Arc::clone(&placement),
            session: session.number,
            kvm,
            networks: self.networks.clone(),
            incoming: None,
            begun: self.mirrors.begun(),
        };
        let launch = match self.prepare(snapshot, preparation, session).await {
            Some(Ok(launch)) => launch,
            Some(Err(failure)) => return self.not_started(snapshot, &failure).await,
            None => return,
        };
        if self.parts.clock.now().since(begun) > FRESH {
            // The owner may have changed while the disks were made.
            self.written = None;
            if !self.publish(snapshot, VmPhase::Starting, "").await {
                return self.retry_in(Duration::from_millis(100));
            }
        }
        // From here on something may be written.
        self.mirrors.starts();
        match self.parts.vms.start(&launch).await {
            Ok(running) => {
                self.running = Some(running.epoch);
                self.unsure = false;
                self.ended = None;
                self.started_ms = Some((self.parts.wall_ms)());
                self.ready = None;
                self.ready_ms = None;
                self.unproven = false;
                self.heard = false;
                self.resets = object.spec.resets;
                self.started_with = object.spec.hardware();
                self.hot.begins(launch.ports);
                self.report(snapshot, VmPhase::Running, "").await;
            }
            Err(error) => {
                // Its process may be there yet, killed and hanging in the kernel.
                let found = self.parts.vms.find(self.vm.as_str()).await;
                self.unsure = found.is_err();
                if let Ok(found) = found {
                    self.running = found.map(|vm| vm.epoch);
                }
                self.not_started(snapshot, &StartFailure::of(&error)).await;
            }
        }
    }

    async fn not_started(&mut self, snapshot: &Snapshot, failure: &StartFailure) {
        tracing::warn!(vm = %self.vm, why = %failure, "it could not be started");
        self.failures += 1;
        self.retry_in(Duration::from_millis(backoff_ms(self.failures)));
        self.report(snapshot, VmPhase::Failed, &failure.0).await;
    }

    /// Makes ready what it needs, for as long as that takes, and says what it is waiting for. Nothing when it shall
    /// not start any more: it was deleted or placed elsewhere, or the session ended.
    async fn prepare(
        &mut self,
        snapshot: &Snapshot,
        preparation: Preparation<'_>,
        session: Session,
    ) -> Option<Result<VmLaunch, StartFailure>> {
        let (step, mut now) = watch::channel(String::new());
        let (mut live, mut sessions) = (self.parts.live.clone(), self.parts.session.clone());
        let wanted = wanted::vm(snapshot, &self.parts.me, &self.vm);
        let (me, vm, clock) = (self.parts.me.clone(), self.vm.clone(), self.parts.clock.clone());
        let changed = async {
            tokio::select! {
                _ = live.wait_for(|live| !wanted::same(wanted, wanted::vm(live, &me, &vm))) => {}
                _ = sessions.wait_for(|now| *now != Some(session)) => {}
            }
        };
        let made = preparation.run(&step);
        tokio::pin!(made, changed);
        let (mut since, mut pause) = (clock.now(), SLOW);
        loop {
            tokio::select! {
                biased;
                made = &mut made => return Some(made),
                () = &mut changed => {
                    tracing::info!(vm = %self.vm, step = *now.borrow(), "its start is given up: it is not wanted here any more");
                    return None;
                }
                Ok(()) = now.changed() => (since, pause) = (clock.now(), SLOW),
                () = clock.sleep(pause) => {
                    pause = (pause * 2).min(SLOWEST);
                    let what = now.borrow().clone();
                    let waits = clock.now().since(since).as_secs();
                    let message = format!("waiting for {waits} s: {what}");
                    // As it is by now, or the store would not take it.
                    let snapshot = Arc::clone(&self.parts.live.borrow());
                    self.report(&snapshot, VmPhase::Starting, &message).await;
                }
            }
        }
    }

    async fn stop(&mut self, snapshot: &Snapshot) {
        self.report(snapshot, VmPhase::Stopping, "").await;
        let grace = self
            .last
            .as_ref()
            .map_or(Duration::from_secs(10), |(o, _)| o.spec.stop_grace.duration());
        match self.parts.vms.stop(self.vm.as_str(), grace).await {
            Ok(()) => {
                if let Some(epoch) = self.running {
                    self.close_mirrors(epoch).await;
                }
                self.gone(snapshot, "").await;
            }
            Err(error) => self.failed("stop", &error),
        }
    }

    async fn kill(&mut self) {
        match self.parts.vms.kill(self.vm.as_str()).await {
            Ok(()) => {
                // The last that it sent may be under way: to who took the guest over it is all the difference.
                self.parts.tunnel.finish(self.vm.as_str());
                self.running = None;
                self.runs_since = None;
                self.written = None;
                self.incoming = None;
                self.following = None;
                self.outgoing = None;
                self.mirrors.ends();
                self.note.clear();
            }
            Err(error) => self.failed("kill", &error),
        }
    }

    async fn gone(&mut self, snapshot: &Snapshot, message: &str) {
        self.running = None;
        self.following = None;
        self.runs_since = None;
        self.started_ms = None;
        self.ready = None;
        self.ready_ms = None;
        self.unproven = false;
        self.report(snapshot, VmPhase::Stopped, message).await;
    }

    fn failed(&mut self, what: &str, error: &dyn std::error::Error) {
        tracing::error!(vm = %self.vm, why = super::chain(error), "could not {what} it; trying again");
        self.retry_in(Duration::from_millis(500));
    }

    async fn reset(&mut self, snapshot: &Snapshot) {
        let wanted = snapshot.vms.get(&self.vm).map_or(self.resets, |vm| vm.spec.resets);
        if self.was_changed(snapshot) {
            // Its process cannot take up what was changed; the one that is started next does.
            return self.kill().await;
        }
        if self.waits_for_its_disk(snapshot).await {
            return;
        }
        match self.parts.vms.reset(self.vm.as_str()).await {
            Ok(()) => {
                self.resets = wanted;
                self.heard = false;
                self.report(snapshot, VmPhase::Running, "reset").await;
            }
            Err(error) => self.failed("reset", &error),
        }
    }

    async fn event(&mut self, event: Result<VmEvent, broadcast::error::RecvError>) {
        match event {
            Ok(VmEvent::Exited { vm, epoch, how }) if vm == self.vm.as_str() => {
                self.exited(epoch, how).await;
            }
            Ok(VmEvent::DiskBroke { vm }) if vm == self.vm.as_str() => self.mirrors.broke = true,
            Ok(VmEvent::DiskGone { vm }) if vm == self.vm.as_str() => self.hot.look_again(),
            // Another VM's, or a copy that has come further: woken, its turn looks at it.
            Ok(_) => {}
            Err(_) => self.resync().await,
        }
    }

    /// Events were lost: asks the driver what runs.
    async fn resync(&mut self) {
        if let Ok(found) = self.parts.vms.find(self.vm.as_str()).await {
            if let (Some(epoch), None) = (self.running, &found) {
                self.exited(epoch, Exit::Crashed).await;
            }
            self.running = found.map(|vm| vm.epoch);
        }
        self.hot.look_again();
        self.parts.clock.sleep(Duration::from_millis(50)).await;
    }
}
