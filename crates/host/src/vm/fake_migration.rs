//! Moving VMs that are only records: the same ways to go on, to stop and to break as QEMU has, the nasty ones too.
//!
//! A sender whose copy breaks after it was told to hand over runs its guest on *by itself*, and the taker may have got
//! all of it nevertheless.

use super::{
    driver::{RunningVm, VmError, VmEvent, VmLaunch},
    fake::{FakeVmDriver, World},
    migration::{Copy, DisksSent, LiveMigration, Transfer},
    qmp::QmpError,
};
use async_trait::async_trait;
use haven_model::migration::{MigrationOptions, Progress};
use std::{
    collections::{BTreeMap, BTreeSet},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

/// Between two looks of a copy at the world.
const LOOK: Duration = Duration::from_millis(10);

/// How copies go.
pub trait Copies: Send + Sync {
    /// Whether two hosts hear each other.
    fn reach(&self, from: &str, to: &str) -> bool;
    /// How long the next copy takes while the guest runs.
    fn takes(&self) -> Duration;
    /// How long the memory of the next guest that goes over before it takes to follow.
    fn follows(&self) -> Duration {
        Duration::from_millis(300)
    }
    /// Whether the next one breaks at its very end, and whether the taker has all of it nevertheless.
    fn breaks(&self) -> Option<bool>;
    /// Whether the next QEMU answers whose guest waits for memory that does not come.
    fn torn_answers(&self) -> bool {
        true
    }
    /// Whether a sender waits before it hands over, and a taker until it is told to run. One that does not is broken
    /// on purpose.
    fn waits(&self) -> bool {
        true
    }
    /// Whether a sender that is told to hand over writes to the taker's disks from then on. One that does not is broken
    /// on purpose.
    fn exchanges(&self) -> bool {
        true
    }
}

/// Copies that go well.
pub struct GoodCopies;

impl Copies for GoodCopies {
    fn reach(&self, _from: &str, _to: &str) -> bool {
        true
    }
    fn takes(&self) -> Duration {
        Duration::from_millis(300)
    }
    fn breaks(&self) -> Option<bool> {
        None
    }
}

#[derive(Clone, Debug)]
struct OneCopy {
    from: String,
    to: String,
    sender: Copy,
    taker: Copy,
    /// The sender was told to send the rest.
    handing: bool,
    /// All of its memory was sent once.
    round: bool,
    /// It was told to go over before all of its memory is there.
    postcopy: bool,
    /// Looks at which something could be sent.
    sent: u64,
    /// The way between the two ended, with the daemon of one of them.
    cut: bool,
}

/// Disks on their way.
#[derive(Clone, Debug)]
struct Disks {
    from: String,
    to: String,
    count: usize,
    whole: bool,
    broken: bool,
}

/// What of the world is about copies.
#[derive(Default)]
pub struct Moves {
    /// Processes whose guest does not execute: one that waits for it, or one that has stopped it.
    idle: Mutex<BTreeMap<(String, String), u64>>,
    /// By VM.
    copies: Mutex<BTreeMap<String, OneCopy>>,
    /// Disks that go along, by VM.
    disks: Mutex<BTreeMap<String, Disks>>,
    /// Processes that took a guest whose memory may follow, until it is noted that all of it came: host and VM.
    lacking: Mutex<BTreeSet<(String, String)>>,
    /// Hosts on which nothing executes.
    frozen: Mutex<BTreeSet<String>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl World {
    /// Nothing on a host executes any more, or again.
    pub fn set_frozen(&self, host: &str, frozen: bool) {
        let mut all = lock(&self.moves.frozen);
        if frozen {
            all.insert(host.to_owned());
        } else {
            all.remove(host);
        }
    }

    /// The daemon of a host ended, and with it the ways of copies to and from other hosts, which lead through it.
    pub fn cut_ways(&self, host: &str) {
        for copy in lock(&self.moves.copies).values_mut() {
            copy.cut |= copy.from == host || copy.to == host;
            // The sender waits for its own host's word; the taker sees it at once.
            if copy.cut && copy.sender == Copy::Stopped && !copy.handing {
                copy.taker = Copy::Broken("the way between the hosts ended".into());
            }
        }
        for disks in lock(&self.moves.disks).values_mut() {
            disks.broken |= disks.from == host || disks.to == host;
        }
    }

    /// Processes on a host whose guests do not execute.
    #[must_use]
    pub fn idle_on(&self, host: &str) -> Vec<(String, u64)> {
        let idle = lock(&self.moves.idle);
        let here = idle.iter().filter(|((on, _), _)| on == host);
        here.map(|((_, vm), epoch)| (vm.clone(), *epoch)).collect()
    }

    /// Its process took a guest some of whose memory may be elsewhere.
    pub fn set_lacking(&self, host: &str, vm: &str) {
        lock(&self.moves.lacking).insert((host.to_owned(), vm.to_owned()));
    }

    /// Its process is gone.
    pub(super) fn forget_lacking(&self, host: &str, vm: &str) {
        lock(&self.moves.lacking).remove(&(host.to_owned(), vm.to_owned()));
    }

    pub(super) fn end_idle(&self, host: &str, vm: &str) -> Option<u64> {
        lock(&self.moves.idle).remove(&(host.to_owned(), vm.to_owned()))
    }

    fn set_idle(&self, host: &str, vm: &str, epoch: u64) {
        lock(&self.moves.idle).insert((host.to_owned(), vm.to_owned()), epoch);
    }

    /// The guest stops, and its process stays.
    fn halt(&self, host: &str, vm: &str) {
        if let Some(epoch) = self.stop_executing(host, vm) {
            self.set_idle(host, vm, epoch);
        }
    }

    /// The guest goes on in a process that stands.
    fn go_on(&self, host: &str, vm: &str) {
        if let Some(epoch) = self.end_idle(host, vm) {
            self.execute(host, vm, epoch);
        }
    }

    fn has_process(&self, host: &str, vm: &str) -> bool {
        let key = (host.to_owned(), vm.to_owned());
        lock(&self.moves.idle).contains_key(&key) || self.running().contains_key(&key)
    }

    fn change(&self, vm: &str, change: impl FnOnce(&mut OneCopy)) {
        let mut copies = lock(&self.moves.copies);
        let Some(copy) = copies.get_mut(vm) else { return };
        change(copy);
        let hosts = [copy.from.clone(), copy.to.clone()];
        drop(copies);
        for host in hosts {
            self.tell(&host, VmEvent::Copied { vm: vm.to_owned() });
        }
    }

    fn disks_from(&self, host: &str, vm: &str) -> Option<Disks> {
        lock(&self.moves.disks).get(vm).filter(|disks| disks.from == host).cloned()
    }

    fn sent_more(&self, vm: &str) {
        if let Some(copy) = lock(&self.moves.copies).get_mut(vm) {
            copy.sent += 1;
        }
    }

    fn copy(&self, vm: &str) -> Option<OneCopy> {
        lock(&self.moves.copies).get(vm).cloned()
    }

    pub(super) fn is_frozen(&self, host: &str) -> bool {
        lock(&self.moves.frozen).contains(host)
    }

    fn stalls(&self, copy: &OneCopy, copies: &dyn Copies) -> bool {
        self.is_frozen(&copy.to) || !copies.reach(&copy.from, &copy.to)
    }

    /// Ends a copy whose other side is gone; true when it did.
    fn broken(&self, vm: &str, copy: &OneCopy, copies: &dyn Copies) -> bool {
        let gone = |why: &str| Copy::Broken(why.to_owned());
        if copy.sender == Copy::Following {
            let (from, to) = (self.has_process(&copy.from, vm), self.has_process(&copy.to, vm));
            if !from || !to || copy.cut {
                // The guest waits for ever for what does not come.
                self.halt(&copy.to, vm);
                if to && !copies.torn_answers() {
                    self.set_silent(&copy.to, vm);
                }
                self.change(vm, |copy| (copy.sender, copy.taker) = (Copy::Torn, Copy::Torn));
            }
            return !from || !to || copy.cut;
        }
        if !self.has_process(&copy.from, vm) {
            self.change(vm, |copy| {
                copy.sender = gone("the sender is gone");
                if copy.taker != Copy::Whole {
                    copy.taker = gone("the sender is gone");
                }
            });
            return true;
        }
        if copy.sender == Copy::Stopped {
            // It waits for its own host's word, and looks at no wire before (`pause_event` in QEMU's migration.c).
            return false;
        }
        if copy.cut || !self.has_process(&copy.to, vm) {
            // The guest goes on by itself, whoever owns it.
            self.go_on(&copy.from, vm);
            self.change(vm, |copy| {
                (copy.sender, copy.taker) = (gone("the taker is gone"), gone("the taker is gone"));
            });
            return true;
        }
        false
    }
}

/// The contents of disks that go along: until they are there, and as long as they follow what the guest writes.
async fn carry(world: Arc<World>, vm: String, copies: Arc<dyn Copies>) {
    let mut left = copies.takes();
    loop {
        tokio::time::sleep(LOOK).await;
        let mut all = lock(&world.moves.disks);
        let Some(disks) = all.get_mut(&vm) else { return };
        let there = world.has_process(&disks.from, &vm) && world.has_process(&disks.to, &vm);
        if !there {
            disks.broken = true;
        }
        if disks.broken {
            return;
        }
        if world.is_frozen(&disks.from) || world.is_frozen(&disks.to) {
            continue;
        }
        if copies.reach(&disks.from, &disks.to) && !disks.whole {
            left = left.saturating_sub(LOOK);
            disks.whole = left.is_zero();
        }
    }
}

/// One copy, from its first byte to its end. Nobody waits for it: QEMU does it by itself.
async fn run(world: Arc<World>, vm: String, copies: Arc<dyn Copies>) {
    let takes = copies.takes();
    let (mut left, mut follows) = (takes, copies.follows());
    loop {
        tokio::time::sleep(LOOK).await;
        let Some(copy) = world.copy(&vm) else { return };
        if matches!(copy.sender, Copy::Broken(_) | Copy::Torn | Copy::Whole) {
            return;
        }
        // A sender whose host is paused notices nothing, and does nothing by itself.
        if world.is_frozen(&copy.from) {
            continue;
        }
        if world.broken(&vm, &copy, &*copies) {
            return;
        }
        if world.stalls(&copy, &*copies) {
            continue;
        }
        world.sent_more(&vm);
        if copy.sender == Copy::Following {
            follows = follows.saturating_sub(LOOK);
            if follows.is_zero() {
                return world.change(&vm, |copy| {
                    (copy.sender, copy.taker) = (Copy::Whole, Copy::Whole);
                });
            }
        } else if copy.sender == Copy::Active && !copy.handing {
            left = left.saturating_sub(LOOK);
            if !copy.round && left <= takes / 2 {
                world.change(&vm, |copy| copy.round = true);
            }
            if left.is_zero() || copy.postcopy {
                if world.mirrors.writes(&copy.from, &vm) {
                    continue;
                }
                world.halt(&copy.from, &vm);
                if !copies.waits() {
                    finish(&world, &vm, &copy, None);
                    return world.go_on(&copy.to, &vm);
                }
                world.change(&vm, |copy| copy.sender = Copy::Stopped);
            }
        } else if copy.handing {
            let breaks = copies.breaks();
            let goes_on = copy.postcopy && breaks.is_none();
            finish(&world, &vm, &copy, breaks);
            if !goes_on {
                return;
            }
        }
    }
}

fn finish(world: &World, vm: &str, copy: &OneCopy, breaks: Option<bool>) {
    let whole = if copy.postcopy { Copy::Following } else { Copy::Whole };
    let Some(all_came) = breaks else {
        world.mirrors.carry(&copy.from, vm);
        return world.change(vm, |copy| (copy.sender, copy.taker) = (whole.clone(), whole.clone()));
    };
    world.go_on(&copy.from, vm);
    let broken = || Copy::Broken("the wire broke".into());
    world.change(vm, |copy| {
        copy.sender = broken();
        copy.taker = if all_came && !copy.postcopy { Copy::Whole } else { broken() };
    });
}

fn refused(vm: &str, command: &str, said: &str) -> VmError {
    let source = QmpError::Refused { command: command.into(), said: said.into() };
    VmError::Qmp { vm: vm.into(), source }
}

#[async_trait]
impl LiveMigration for FakeVmDriver {
    async fn machine(&self, _vm: &str) -> Result<String, VmError> {
        self.clock.pass().await;
        Ok("pc-q35-11.1".into())
    }

    async fn start_incoming(&self, launch: &VmLaunch) -> Result<RunningVm, VmError> {
        self.start_process(launch).await?;
        // A new process knows nothing of a copy that an earlier one took or sent.
        lock(&self.world.moves.copies).retain(|vm, copy| {
            *vm != launch.vm || (copy.to != self.host && copy.from != self.host)
        });
        self.world.set_idle(&self.host, &launch.vm, launch.epoch);
        if launch.postcopy {
            self.world.set_lacking(&self.host, &launch.vm);
        }
        Ok(RunningVm { vm: launch.vm.clone(), epoch: launch.epoch, pid: 1 })
    }

    fn way_in(&self, _vm: &str) -> Option<UnixStream> {
        None
    }

    async fn let_run(&self, vm: &str) -> Result<(), VmError> {
        self.clock.pass().await;
        let arrived = |copy: OneCopy| matches!(copy.taker, Copy::Whole | Copy::Following);
        let arrived = self.world.copy(vm).is_some_and(arrived);
        if !arrived {
            return Err(refused(vm, "cont", "the guest has not arrived"));
        }
        self.world.go_on(&self.host, vm);
        Ok(())
    }

    fn disks_in(&self, _vm: &str) -> Option<PathBuf> {
        None
    }

    async fn send_disks(&self, vm: &str, socket: &Path, places: &[usize]) -> Result<(), VmError> {
        self.clock.pass().await;
        let (from, to) = (self.host.clone(), socket.display().to_string());
        let disks = Disks { from, to, count: places.len(), whole: false, broken: false };
        lock(&self.world.moves.disks).insert(vm.to_owned(), disks);
        tokio::spawn(carry(Arc::clone(&self.world), vm.to_owned(), Arc::clone(&self.copies)));
        Ok(())
    }

    async fn disks_sent(&self, vm: &str, wanted: usize) -> Result<DisksSent, VmError> {
        self.clock.pass().await;
        let disks = self.world.disks_from(&self.host, vm);
        let Some(disks) = disks else {
            let broken = (wanted > 0).then(|| "there is no copy".to_owned());
            return Ok(DisksSent { broken, ..DisksSent::none() });
        };
        let broken = (disks.broken || disks.count < wanted).then(|| "the wire broke".to_owned());
        Ok(DisksSent { total: 1, left: u64::from(!disks.whole), whole: disks.whole, broken })
    }

    async fn finish_disks(&self, vm: &str) -> Result<(), VmError> {
        self.clock.pass().await;
        let disks = self.world.disks_from(&self.host, vm);
        lock(&self.world.moves.disks).remove(vm);
        match disks.filter(|disks| disks.whole && !disks.broken) {
            Some(disks) if self.copies.reach(&disks.from, &disks.to) => {
                self.world.local_disks.copied(&disks.from, &disks.to, vm);
                Ok(())
            }
            _ => Err(refused(vm, "blockdev-mirror", "the wire broke")),
        }
    }

    async fn send(
        &self,
        vm: &str,
        socket: &Path,
        _options: &MigrationOptions,
    ) -> Result<(), VmError> {
        self.clock.pass().await;
        let to = socket.display().to_string();
        let (from, sender, taker) = (self.host.clone(), Copy::Active, Copy::Active);
        let copy = OneCopy {
            from,
            to,
            sender,
            taker,
            handing: false,
            round: false,
            postcopy: false,
            sent: 0,
            cut: false,
        };
        lock(&self.world.moves.copies).insert(vm.to_owned(), copy);
        tokio::spawn(run(Arc::clone(&self.world), vm.to_owned(), Arc::clone(&self.copies)));
        Ok(())
    }

    async fn start_postcopy(&self, vm: &str) -> Result<(), VmError> {
        self.clock.pass().await;
        match self.world.copy(vm) {
            Some(copy) if copy.from == self.host && copy.sender == Copy::Active => {
                self.world.change(vm, |copy| copy.postcopy = true);
                Ok(())
            }
            _ => Err(refused(vm, "migrate-start-postcopy", "there is no copy under way")),
        }
    }

    async fn may_lack_memory(&self, vm: &str) -> bool {
        lock(&self.world.moves.lacking).contains(&(self.host.clone(), vm.to_owned()))
    }

    async fn note_whole(&self, vm: &str) {
        lock(&self.world.moves.lacking).remove(&(self.host.clone(), vm.to_owned()));
    }

    async fn transfer(&self, vm: &str) -> Result<Transfer, VmError> {
        self.clock.pass().await;
        if self.world.is_silent(&self.host, vm) {
            return Err(VmError::Qmp { vm: vm.into(), source: QmpError::Closed });
        }
        let Some(copy) = self.world.copy(vm) else { return Ok(Transfer::none()) };
        let side = match &self.host {
            host if *host == copy.from => copy.sender,
            host if *host == copy.to => copy.taker,
            _ => Copy::None,
        };
        let rounds = if copy.round { 2 } else { 1 };
        let progress = Progress { rounds, sent: copy.sent, ..Progress::default() };
        Ok(Transfer { copy: side, progress })
    }

    async fn hand_over(&self, vm: &str) -> Result<(), VmError> {
        self.clock.pass().await;
        match self.world.copy(vm) {
            Some(copy) if copy.from == self.host && copy.sender == Copy::Stopped => {
                if self.copies.exchanges() {
                    self.world.local_disks.exchange(&copy.from, &copy.to, vm);
                }
                self.world.change(vm, |copy| (copy.sender, copy.handing) = (Copy::Active, true));
                Ok(())
            }
            _ => Err(refused(vm, "migrate-continue", "it does not wait")),
        }
    }

    async fn take_back(&self, vm: &str) -> Result<(), VmError> {
        self.clock.pass().await;
        let follows = |copy: OneCopy| {
            copy.from == self.host && matches!(copy.sender, Copy::Following | Copy::Torn)
        };
        if self.world.copy(vm).is_some_and(follows) {
            return Err(refused(vm, "migrate_cancel", "the guest has gone over"));
        }
        if self.world.disks_from(&self.host, vm).is_some() {
            lock(&self.world.moves.disks).remove(vm);
        }
        self.world.go_on(&self.host, vm);
        if self.world.copy(vm).is_some_and(|copy| copy.from == self.host) {
            self.world.change(vm, |copy| {
                copy.sender = Copy::Broken("taken back".into());
                copy.taker = Copy::Broken("taken back".into());
            });
        }
        Ok(())
    }
}
