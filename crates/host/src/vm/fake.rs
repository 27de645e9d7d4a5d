//! VMs that are only records, for the simulator. All hosts share one [`World`], so that a judge outside sees who
//! runs what.

use super::{
    driver::{Exit, GuestState, RunningVm, Signs, Stray, VmDriver, VmError, VmEvent, VmLaunch},
    fake_disks::LocalDisks,
    fake_hot_disks::PluggedDisks,
    fake_migration::{Copies, Moves},
    fake_mirrors::MirroredDisks,
    fake_snapshots::FakeKept,
    fake_views::FakeDisks,
};
use crate::guard::{Guard, Registration};
use async_trait::async_trait;
use haven_model::vm::DiskLimits;
use haven_store::clock::Clock;
use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::sync::broadcast;

/// Called at every start (true) and end (false) of a VM: host, VM, epoch.
pub type Witness = Arc<dyn Fn(&str, &str, u64, bool) + Send + Sync>;

/// Who runs what: (host, VM) to epoch.
#[derive(Default)]
pub struct World {
    witness: Option<Witness>,
    running: Mutex<BTreeMap<(String, String), u64>>,
    /// Guests that do not run although their process does.
    states: Mutex<BTreeMap<(String, String), GuestState>>,
    /// VMs whose QEMU does not answer.
    silent: Mutex<BTreeSet<(String, String)>>,
    /// Guests that hang, until they are reset or end.
    hung: Mutex<BTreeSet<(String, String)>>,
    /// Who was reset.
    resets: Mutex<Vec<(String, String)>>,
    /// By host, VM and place of the disk.
    limits: Mutex<BTreeMap<(String, String, usize), DiskLimits>>,
    /// How often each VM was started, anywhere.
    starts: Mutex<BTreeMap<String, u32>>,
    /// Host to processes that nothing names.
    strays: Mutex<BTreeMap<String, Vec<Stray>>>,
    events: Mutex<BTreeMap<String, broadcast::Sender<VmEvent>>>,
    /// Copies between hosts.
    pub(super) moves: Moves,
    /// Disks that only one host has.
    pub local_disks: LocalDisks,
    /// Disks that come, go and grow.
    pub plugged: PluggedDisks,
    /// What disks hold.
    pub disks: FakeDisks,
    /// What they held, kept in themselves.
    pub kept: FakeKept,
    /// Disks that several hosts have.
    pub mirrors: MirroredDisks,
}

impl World {
    /// A world whose witness hears of every start and end at the instant at which it happens.
    #[must_use]
    pub fn witnessed(witness: Witness) -> Self {
        Self { witness: Some(witness), ..Self::default() }
    }

    /// Everything that runs now.
    #[must_use]
    pub fn running(&self) -> BTreeMap<(String, String), u64> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The VMs that a host runs.
    #[must_use]
    pub fn running_on(&self, host: &str) -> Vec<(String, u64)> {
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        running
            .iter()
            .filter(|((on, _), _)| on == host)
            .map(|((_, vm), epoch)| (vm.clone(), *epoch))
            .collect()
    }

    /// The VMs that have a process on a host, whether or not their guests execute.
    #[must_use]
    pub fn processes_on(&self, host: &str) -> Vec<(String, u64)> {
        let mut all = self.running_on(host);
        all.extend(self.idle_on(host));
        all
    }

    /// Says what the guest of a VM that runs does from now on, until its end.
    pub fn set_state(&self, host: &str, vm: &str, state: GuestState) {
        let key = (host.to_owned(), vm.to_owned());
        self.states.lock().unwrap_or_else(PoisonError::into_inner).insert(key, state);
    }

    /// The QEMU of a VM that runs answers no more, until its end.
    pub fn set_silent(&self, host: &str, vm: &str) {
        let key = (host.to_owned(), vm.to_owned());
        self.silent.lock().unwrap_or_else(PoisonError::into_inner).insert(key);
    }

    pub(super) fn is_silent(&self, host: &str, vm: &str) -> bool {
        let key = (host.to_owned(), vm.to_owned());
        self.silent.lock().unwrap_or_else(PoisonError::into_inner).contains(&key)
    }

    /// The guest of a VM that runs hangs from now on, until it is reset or ends.
    pub fn set_hung(&self, host: &str, vm: &str) {
        let key = (host.to_owned(), vm.to_owned());
        self.hung.lock().unwrap_or_else(PoisonError::into_inner).insert(key);
    }

    /// Who was reset, one after another: host, VM.
    #[must_use]
    pub fn resets(&self) -> Vec<(String, String)> {
        self.resets.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What a guest may use of a disk, as its process was told last.
    #[must_use]
    pub fn limits(&self, host: &str, vm: &str, place: usize) -> Option<DiskLimits> {
        let key = (host.to_owned(), vm.to_owned(), place);
        self.limits.lock().unwrap_or_else(PoisonError::into_inner).get(&key).copied()
    }

    /// How often each VM was started, anywhere.
    #[must_use]
    pub fn starts(&self) -> BTreeMap<String, u32> {
        self.starts.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Leaves a process that nothing names, as a daemon does that is killed in the middle of a start.
    pub fn leave_stray(&self, host: &str, stray: Stray) {
        let mut strays = self.strays.lock().unwrap_or_else(PoisonError::into_inner);
        strays.entry(host.to_owned()).or_default().push(stray);
    }

    /// The power of a host is gone, and with it all that ran there.
    pub fn power_cut(&self, host: &str) {
        self.strays.lock().unwrap_or_else(PoisonError::into_inner).remove(host);
        self.kill_all(host);
    }

    /// Ends every VM on a host: its guard fired. Strays stay: the guard does not know them.
    pub fn kill_all(&self, host: &str) {
        for (vm, _) in self.processes_on(host) {
            self.end(host, &vm, Exit::Crashed);
        }
    }

    /// Ends one VM and tells the host's driver.
    pub fn end(&self, host: &str, vm: &str, how: Exit) {
        let epoch = self.stop_executing(host, vm).or_else(|| self.end_idle(host, vm));
        let key = (host.to_owned(), vm.to_owned());
        self.states.lock().unwrap_or_else(PoisonError::into_inner).remove(&key);
        self.silent.lock().unwrap_or_else(PoisonError::into_inner).remove(&key);
        self.hung.lock().unwrap_or_else(PoisonError::into_inner).remove(&key);
        self.forget_lacking(host, vm);
        // What notes their changes ends with it.
        self.disks.forget(vm);
        self.mirrors.ended(host, vm);
        self.plugged.ended(host, vm);
        if let Some(epoch) = epoch {
            self.tell(host, VmEvent::Exited { vm: vm.to_owned(), epoch, how });
        }
    }

    pub(super) fn tell(&self, host: &str, event: VmEvent) {
        let events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(sender) = events.get(host) {
            // Nobody listening is fine.
            let _ = sender.send(event);
        }
    }

    /// The guest executes no more; the epoch under which it did.
    pub(super) fn stop_executing(&self, host: &str, vm: &str) -> Option<u64> {
        let key = (host.to_owned(), vm.to_owned());
        let epoch = self.running.lock().unwrap_or_else(PoisonError::into_inner).remove(&key);
        if let (Some(epoch), Some(witness)) = (epoch, &self.witness) {
            witness(host, vm, epoch, false);
        }
        epoch
    }

    /// The guest executes.
    pub(super) fn execute(&self, host: &str, vm: &str, epoch: u64) {
        let key = (host.to_owned(), vm.to_owned());
        self.running.lock().unwrap_or_else(PoisonError::into_inner).insert(key, epoch);
        self.local_disks.executes(host, vm);
        if let Some(witness) = &self.witness {
            witness(host, vm, epoch, true);
        }
    }

    fn begin(&self, host: &str, vm: &str, epoch: u64) {
        let mut starts = self.starts.lock().unwrap_or_else(PoisonError::into_inner);
        *starts.entry(vm.to_owned()).or_default() += 1;
        drop(starts);
        self.execute(host, vm, epoch);
    }

    fn subscribe(&self, host: &str) -> broadcast::Receiver<VmEvent> {
        let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        events.entry(host.to_owned()).or_insert_with(|| broadcast::channel(256).0).subscribe()
    }
}

/// Decides whether a start fails.
pub type Fails = Arc<dyn Fn() -> bool + Send + Sync>;

/// Runs records on one host.
pub struct FakeVmDriver {
    /// This host.
    pub host: String,
    /// Shared by all hosts.
    pub world: Arc<World>,
    /// Its guard.
    pub guard: Arc<dyn Guard>,
    /// How long a start takes.
    pub start_takes: Duration,
    /// The clock of the daemon that drives it.
    pub clock: Clock,
    /// Whether a start fails.
    pub fails: Fails,
    /// How copies to other hosts go.
    pub copies: Arc<dyn Copies>,
}

impl FakeVmDriver {
    /// Starts a process under the guard, as each kind of start does before its guest does anything.
    pub(super) async fn start_process(&self, launch: &VmLaunch) -> Result<(), VmError> {
        self.clock.sleep(self.start_takes).await;
        if (self.fails)() {
            return Err(VmError::Died { vm: launch.vm.clone(), said: "simulated".into() });
        }
        let here = self.world.processes_on(&self.host);
        if here.iter().any(|(vm, _)| *vm == launch.vm) {
            return Err(VmError::RunsAlready { vm: launch.vm.clone(), pid: 1 });
        }
        self.guard
            .register(&Registration { vm: &launch.vm, pid: 1, session: launch.session, tap: "" })
            .await
            .map_err(|source| VmError::Guard { vm: launch.vm.clone(), source })?;
        let paths = launch.disks.iter().filter_map(|disk| disk.path.to_str());
        self.world.local_disks.opened(&self.host, &launch.vm, paths);
        self.open_mirrors(launch)?;
        self.world.plugged.started(&self.host, launch);
        self.clock.pass().await;
        Ok(())
    }
}

#[async_trait]
impl VmDriver for FakeVmDriver {
    async fn start(&self, launch: &VmLaunch) -> Result<RunningVm, VmError> {
        self.start_process(launch).await?;
        self.world.begin(&self.host, &launch.vm, launch.epoch);
        Ok(RunningVm { vm: launch.vm.clone(), epoch: launch.epoch, pid: 1 })
    }
    async fn list(&self) -> Result<Vec<RunningVm>, VmError> {
        self.clock.pass().await;
        let on = self.world.processes_on(&self.host);
        Ok(on.into_iter().map(|(vm, epoch)| RunningVm { vm, epoch, pid: 1 }).collect())
    }
    async fn find(&self, vm: &str) -> Result<Option<RunningVm>, VmError> {
        Ok(self.list().await?.into_iter().find(|running| running.vm == vm))
    }
    async fn stop(&self, vm: &str, _grace: Duration) -> Result<(), VmError> {
        self.clock.sleep(Duration::from_millis(50)).await;
        self.close_mirrors(vm);
        self.kill(vm).await
    }
    async fn kill(&self, vm: &str) -> Result<(), VmError> {
        self.clock.pass().await;
        self.world.end(&self.host, vm, Exit::Killed);
        Ok(())
    }
    fn kill_all(&self) -> Result<usize, VmError> {
        self.world.kill_all(&self.host);
        Ok(0)
    }
    async fn limit(&self, vm: &str, place: usize, limits: &DiskLimits) -> Result<(), VmError> {
        self.clock.pass().await;
        let mut all = self.world.limits.lock().unwrap_or_else(PoisonError::into_inner);
        all.insert((self.host.clone(), vm.to_owned(), place), *limits);
        Ok(())
    }
    async fn reset(&self, vm: &str) -> Result<(), VmError> {
        let key = (self.host.clone(), vm.to_owned());
        self.world.hung.lock().unwrap_or_else(PoisonError::into_inner).remove(&key);
        self.world.resets.lock().unwrap_or_else(PoisonError::into_inner).push(key);
        Ok(())
    }
    async fn signs(&self, vm: &str) -> Result<Signs, VmError> {
        self.state(vm).await?;
        let key = (self.host.clone(), vm.to_owned());
        let hung = self.world.hung.lock().unwrap_or_else(PoisonError::into_inner).contains(&key);
        Ok(Signs { agent: !hung, disk: 0, network: 0 })
    }
    async fn state(&self, vm: &str) -> Result<GuestState, VmError> {
        self.clock.pass().await;
        let key = (self.host.clone(), vm.to_owned());
        let idle = self.world.idle_on(&self.host).iter().any(|(name, _)| name == vm);
        if !idle && !self.world.running().contains_key(&key) {
            return Err(VmError::NotHere(vm.into()));
        }
        if self.world.is_silent(&self.host, vm) {
            let source = super::qmp::QmpError::Closed;
            return Err(VmError::Qmp { vm: vm.into(), source });
        }
        let states = self.world.states.lock().unwrap_or_else(PoisonError::into_inner);
        let usual = match idle {
            true if self.world.mirrors.waits_to_write(&self.host, vm) => GuestState::Broken,
            true => GuestState::Paused,
            false => GuestState::Running,
        };
        Ok(states.get(&key).copied().unwrap_or(usual))
    }
    async fn strays(&self) -> Result<Vec<Stray>, VmError> {
        self.clock.pass().await;
        let strays = self.world.strays.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(strays.get(&self.host).cloned().unwrap_or_default())
    }
    async fn end_stray(&self, stray: &Stray) -> Result<(), VmError> {
        let mut strays = self.world.strays.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(here) = strays.get_mut(&self.host) {
            here.retain(|one| one != stray);
        }
        Ok(())
    }
    fn events(&self) -> broadcast::Receiver<VmEvent> {
        self.world.subscribe(&self.host)
    }
    fn console(&self, _vm: &str) -> PathBuf {
        PathBuf::new()
    }
    fn log(&self, _vm: &str) -> PathBuf {
        PathBuf::new()
    }
}
