//! The driver for QEMU: one process per VM, started stopped, recorded, given to the guard, and only then let run.
//!
//! ```text
//!   spawned (-S) ─► recorded ─► guarded ─► QMP answers ─► cont ─► followed to its end
//!        │              │           │            │
//!        stray          └───────────┴────────────┴─ a daemon killed here leaves a VM that is `NotStarted`
//! ```
//!
//! A VM's directory (`run_dir.rs`) is all that a restarted daemon needs to adopt it.

use super::{
    commands::{self, Command},
    console,
    driver::{Exit, GuestState, RunningVm, Signs, Stray, VmDriver, VmError, VmEvent, VmLaunch},
    guest_agent,
    launch::{self, Handed, system},
    page_faults,
    process::Process,
    qmp::{DEADLINE, Qmp, QmpError},
    record, run_dir, scan, scope,
};
use crate::{
    guard::{Guard, Registration},
    network::tap,
};
use async_trait::async_trait;
use haven_model::vm::DiskLimits;
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};
use tokio::{sync::broadcast, task::JoinHandle};

/// Where the driver keeps things.
#[derive(Clone, Debug)]
pub struct QemuConfig {
    /// QEMU's program, looked up in `PATH` unless it is a path.
    pub program: PathBuf,
    /// `RUN/vms`: gone after a reboot.
    pub run_dir: PathBuf,
    /// `LOG/vms`: what consoles said.
    pub log_dir: PathBuf,
    /// Each process gets a scope of systemd ([`scope`]).
    pub scopes: bool,
}

struct Live {
    process: Arc<Process>,
    epoch: u64,
    /// Locked while it is connected: QEMU serves one client at a time.
    qmp: Arc<tokio::sync::Mutex<Option<Arc<Qmp>>>>,
    /// Hears what the guest says of a power-off; ends with the connection.
    listener: Option<JoinHandle<()>>,
    /// Haven ended it itself.
    killed: bool,
    /// The guest said that it powers off.
    powered_off: bool,
    /// The way into a process that takes a guest.
    way_in: Option<UnixStream>,
    /// The socket at which it takes the contents of disks.
    disks_in: Option<PathBuf>,
    /// The nodes of replicas that failed.
    failed: BTreeSet<String>,
    /// Its guest has powered off, and all that it wrote is on all replicas.
    whole: bool,
    /// Held while a view of its disks is opened or closed.
    views: Arc<tokio::sync::Mutex<()>>,
}

impl Live {
    fn new(process: Arc<Process>, epoch: u64) -> Self {
        let qmp = Arc::default();
        let listener = None;
        let (way_in, disks_in) = (None, None);
        let failed = BTreeSet::new();
        let (killed, powered_off) = (false, false);
        let (whole, views) = (false, Arc::default());
        Self {
            process,
            epoch,
            qmp,
            listener,
            killed,
            powered_off,
            way_in,
            disks_in,
            failed,
            whole,
            views,
        }
    }
}

/// The epoch of a process that ended whole, and the mirrored volumes that it had open.
type EndedWhole = (u64, Vec<String>);

type Table = Arc<Mutex<BTreeMap<String, Live>>>;

/// Runs VMs with QEMU.
pub struct QemuDriver {
    config: QemuConfig,
    guard: Arc<dyn Guard>,
    live: Table,
    /// Held while a process and its record come into being or are looked for, so that no one sees one without the
    /// other.
    births: Mutex<()>,
    /// By VM, the epoch of its last process, if that ended whole, and the mirrored volumes that it had open.
    whole: Arc<Mutex<BTreeMap<String, EndedWhole>>>,
    events: broadcast::Sender<VmEvent>,
}

/// How long QEMU may take until its QMP answers.
const SOCKET_PATIENCE: Duration = Duration::from_secs(10);
/// How long a killed process may take to go.
const KILL_PATIENCE: Duration = Duration::from_secs(10);
/// How long a process may take to close its disks whose guest is elsewhere.
const CLOSES: Duration = Duration::from_secs(1);
/// How long after the end of a process its last events may come.
const LAST_EVENTS: Duration = Duration::from_secs(1);

/// The records of what runs cannot be read.
const UNTOLD: &str =
    "what runs on this host cannot be told; look at /run/haven/vms and the limit of open files";

/// Processes cannot be looked at.
const UNSEEN: &str = "the processes of this host cannot be told; the daemon needs root and /proc";

fn lock(table: &Table) -> MutexGuard<'_, BTreeMap<String, Live>> {
    table.lock().unwrap_or_else(PoisonError::into_inner)
}

impl QemuDriver {
    /// A driver that knows of nothing yet; [`VmDriver::list`] adopts what runs.
    #[must_use]
    pub fn new(config: QemuConfig, guard: Arc<dyn Guard>) -> Self {
        page_faults::take_back();
        let (events, _) = broadcast::channel(256);
        let (births, whole) = (Mutex::new(()), Arc::default());
        Self { config, guard, live: Table::default(), births, whole, events }
    }

    pub(super) fn directory(&self, vm: &str) -> PathBuf {
        self.config.run_dir.join(vm)
    }

    fn births(&self) -> MutexGuard<'_, ()> {
        self.births.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn entry<T>(&self, vm: &str, read: impl FnOnce(&mut Live) -> T) -> Option<T> {
        lock(&self.live).get_mut(vm).map(read)
    }

    /// Refuses a VM that has a process, known, recorded by an earlier daemon, or (asked with `strays`) named by nothing.
    fn runs_not(&self, vm: &str, strays: bool) -> Result<(), VmError> {
        let directory = &self.directory(vm);
        let recorded = record::read(directory)
            .and_then(|record| match record {
                Some(record) => Process::find(record.pid, record.start_time),
                None => Ok(None),
            })
            .map_err(system(format!("the launch record of {vm} cannot be read")))?;
        let known = self.entry(vm, |entry| entry.process.pid());
        let mut pid = known.or(recorded.map(|process| process.pid()));
        if pid.is_none() && strays {
            let found = scan::processes(Path::new("/proc"), &self.config.run_dir);
            let found = found.map_err(system(UNSEEN))?;
            pid = found.iter().find(|one| one.vm == vm).map(|one| one.pid);
        }
        match pid {
            Some(pid) => Err(VmError::RunsAlready { vm: vm.into(), pid }),
            None => Ok(()),
        }
    }

    /// Starts the process, stopped; from here on the table knows it.
    fn spawn(&self, launch: &VmLaunch, handed: Handed) -> Result<Arc<Process>, VmError> {
        let _births = self.births();
        self.runs_not(&launch.vm, false)?;
        // How the one before ended says nothing of this one.
        self.whole.lock().unwrap_or_else(PoisonError::into_inner).remove(&launch.vm);
        let (program, log) = (&self.config.program, self.log(&launch.vm));
        let process = launch::spawn(program, launch, &self.config.run_dir, &log, handed)?;
        let process = Arc::new(process);
        let entry = Live::new(Arc::clone(&process), launch.epoch);
        lock(&self.live).insert(launch.vm.clone(), entry);
        Ok(process)
    }

    /// Gives the process to the guard, and only then lets the guest run, unless that runs elsewhere.
    async fn bring_up(&self, launch: &VmLaunch, process: &Process) -> Result<(), VmError> {
        let tap = launch.nics.first().map_or("", |nic| nic.tap.as_str());
        self.guard
            .register(&Registration {
                vm: &launch.vm,
                pid: process.pid(),
                session: launch.session,
                tap,
            })
            .await
            .map_err(|source| VmError::Guard { vm: launch.vm.clone(), source })?;
        let first = if launch.incoming { &commands::STATUS } else { &commands::CONTINUE };
        let source = tokio::select! {
            biased;
            _ = process.ended() => QmpError::Closed,
            met = self.ask(&launch.vm, first, SOCKET_PATIENCE) => match met {
                Err(VmError::Qmp { source, .. }) => source,
                other => return other.map(|_| ()),
            },
        };
        // A QEMU that ends closes its socket first; what it said is the better reason.
        let broken = matches!(source, QmpError::Closed | QmpError::Io(_));
        if broken && tokio::time::timeout(LAST_EVENTS, process.ended()).await.is_ok() {
            let said = launch::last_words(&self.directory(&launch.vm));
            return Err(VmError::Died { vm: launch.vm.clone(), said });
        }
        Err(VmError::Qmp { vm: launch.vm.clone(), source })
    }

    /// Starts a VM's process under the guard, and its guest unless that comes in from elsewhere.
    pub(super) async fn start_process(
        &self,
        launch: &VmLaunch,
        incoming: Option<OwnedFd>,
    ) -> Result<RunningVm, VmError> {
        // Asked before its taps are, which it would hold, and again with nobody in between.
        self.runs_not(&launch.vm, true)?;
        let taps = launch::open_taps(launch).await?;
        let process = self.spawn(launch, Handed { taps, incoming })?;
        if let Err(error) = self.bring_up(launch, &process).await {
            process.kill();
            if tokio::time::timeout(KILL_PATIENCE, process.ended()).await.is_err() {
                // It stays known, so that nothing is started beside it, and is forgotten when it has ended.
                let pid = process.pid();
                self.entry(&launch.vm, |entry| entry.killed = true);
                self.follow(&launch.vm, process);
                return Err(unkillable(pid, &launch.vm));
            }
            forget(&launch.vm, &self.directory(&launch.vm), &*self.guard, &self.live).await;
            return Err(error);
        }
        let pid = process.pid();
        self.follow(&launch.vm, process);
        Ok(RunningVm { vm: launch.vm.clone(), epoch: launch.epoch, pid })
    }

    /// Keeps the way into a process that takes a guest, until somebody asks for it.
    pub(super) fn keep_way_in(&self, vm: &str, way: UnixStream) {
        self.entry(vm, |entry| entry.way_in = Some(way));
    }

    /// Gives the way into a process that takes a guest away.
    pub(super) fn take_way_in(&self, vm: &str) -> Option<UnixStream> {
        self.entry(vm, |entry| entry.way_in.take()).flatten()
    }

    /// Notes where a process takes the contents of disks, or that it does no more; where it did before.
    pub(super) fn takes_disks(&self, vm: &str, at: Option<PathBuf>) -> Option<PathBuf> {
        self.entry(vm, |entry| std::mem::replace(&mut entry.disks_in, at)).flatten()
    }

    /// The epoch of the last process of a VM, if that ended whole, and the mirrored volumes that it had open.
    pub(super) fn was_whole(&self, vm: &str) -> Option<EndedWhole> {
        self.whole.lock().unwrap_or_else(PoisonError::into_inner).get(vm).cloned()
    }

    /// The nodes of replicas that failed, after a change of them.
    pub(super) fn failed_nodes(
        &self,
        vm: &str,
        change: impl FnOnce(&mut BTreeSet<String>),
    ) -> BTreeSet<String> {
        let changed = self.entry(vm, |entry| {
            change(&mut entry.failed);
            entry.failed.clone()
        });
        changed.unwrap_or_default()
    }

    /// Held while a view of a VM's disks is opened or closed.
    pub(super) fn views(&self, vm: &str) -> Option<Arc<tokio::sync::Mutex<()>>> {
        self.entry(vm, |entry| Arc::clone(&entry.views))
    }

    /// Where a process takes the contents of disks.
    pub(super) fn where_disks_come_in(&self, vm: &str) -> Option<PathBuf> {
        self.entry(vm, |entry| entry.disks_in.clone()).flatten()
    }

    /// Follows a process to its end and keeps its logs bounded on the way.
    fn follow(&self, vm: &str, process: Arc<Process>) {
        let (live, events, guard) =
            (Arc::clone(&self.live), self.events.clone(), Arc::clone(&self.guard));
        let whole = Arc::clone(&self.whole);
        let (vm, directory) = (vm.to_owned(), self.directory(vm));
        let logs = Arc::new([self.log(&vm), directory.join(run_dir::MESSAGES)]);
        if self.config.scopes {
            tokio::spawn(give_scope(vm.clone(), process.pid()));
        }
        tokio::spawn(async move {
            let bounded = tokio::spawn(bound(logs));
            let ended = process.ended().await;
            bounded.abort();
            if ended.is_err() {
                // The runtime ends, and the process runs on.
                return;
            }
            let listener = lock(&live).get_mut(&vm).and_then(|entry| entry.listener.take());
            if let Some(listener) = listener {
                let _ = tokio::time::timeout(LAST_EVENTS, listener).await;
            }
            let said = launch::last_words(&directory);
            let is_whole = lock(&live).get(&vm).filter(|e| e.whole).map(|entry| entry.epoch);
            if let Some(epoch) = is_whole {
                let record = record::read(&directory).ok().flatten();
                let volumes = record.map(|of| of.launch.mirrored_volumes()).unwrap_or_default();
                let volumes = volumes.into_iter().map(|(_, volume)| volume).collect();
                let mut whole = whole.lock().unwrap_or_else(PoisonError::into_inner);
                whole.insert(vm.clone(), (epoch, volumes));
            }
            let Some(entry) = forget(&vm, &directory, &*guard, &live).await else { return };
            let how = match (entry.killed, entry.powered_off) {
                (true, _) => Exit::Killed,
                (false, true) => Exit::PoweredOff,
                (false, false) => Exit::Crashed,
            };
            // It may have ended by itself just before it was to be killed.
            match how {
                Exit::Crashed => {
                    tracing::warn!(vm, epoch = entry.epoch, said, "its QEMU ended unexpectedly");
                }
                Exit::Killed | Exit::PoweredOff => {
                    tracing::info!(vm, epoch = entry.epoch, said, "its QEMU ended");
                }
            }
            let _ = events.send(VmEvent::Exited { vm, epoch: entry.epoch, how });
        });
    }

    /// The connection to a VM's QEMU, made anew if it ended.
    pub(super) async fn qmp(&self, vm: &str, patience: Duration) -> Result<Arc<Qmp>, VmError> {
        let held = self.entry(vm, |entry| (Arc::clone(&entry.qmp), entry.process.pid()));
        let (held, pid) = held.ok_or_else(|| VmError::NotHere(vm.into()))?;
        let mut held = held.lock().await;
        if let Some(qmp) = held.as_ref().filter(|qmp| !qmp.is_closed()) {
            return Ok(Arc::clone(qmp));
        }
        let qmp = Qmp::connect(&self.directory(vm).join(run_dir::QMP_SOCKET), patience)
            .await
            .map_err(|source| VmError::Qmp { vm: vm.into(), source })?;
        let listener = Listener {
            live: Arc::clone(&self.live),
            events: self.events.clone(),
            vm: vm.into(),
            pid,
            qmp: Arc::downgrade(&qmp),
        };
        let listener = tokio::spawn(listener.listen(qmp.events()));
        self.entry(vm, |entry| entry.listener = Some(listener));
        *held = Some(Arc::clone(&qmp));
        Ok(qmp)
    }

    pub(super) async fn ask(
        &self,
        vm: &str,
        command: &Command,
        patience: Duration,
    ) -> Result<Value, VmError> {
        let qmp = self.qmp(vm, patience).await?;
        let answer = qmp.call(command, json!({}), DEADLINE).await;
        answer.map_err(|source| VmError::Qmp { vm: vm.into(), source })
    }

    async fn wait_gone(&self, vm: &str, patience: Duration) -> bool {
        let until = tokio::time::Instant::now() + patience;
        while lock(&self.live).contains_key(vm) {
            if tokio::time::Instant::now() >= until {
                return false;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        true
    }

    /// Takes over what an earlier daemon recorded, each by itself.
    fn adopt(&self) -> io::Result<Adopted> {
        let _births = self.births();
        let mut adopted = Adopted::default();
        for (vm, record) in record::all(&self.config.run_dir)? {
            if lock(&self.live).contains_key(&vm) {
                continue;
            }
            match record.and_then(|record| self.adopt_one(&vm, record)) {
                Ok(true) => adopted.new.push(vm),
                Ok(false) => {}
                Err(error) => _ = adopted.untold.insert(vm, error),
            }
        }
        Ok(adopted)
    }

    /// True when its process runs.
    fn adopt_one(&self, vm: &str, record: Option<record::Launched>) -> io::Result<bool> {
        let Some(record) = record else { return Ok(false) };
        let Some(process) = Process::find(record.pid, record.start_time)? else {
            run_dir::remove(&self.directory(vm).join(run_dir::RECORD))?;
            return Ok(false);
        };
        let process = Arc::new(process);
        let entry = Live::new(Arc::clone(&process), record.launch.epoch);
        lock(&self.live).insert(vm.to_owned(), entry);
        tracing::info!(vm, pid = process.pid(), "adopted");
        self.follow(vm, process);
        Ok(true)
    }

    fn running(&self, vm: &str) -> Option<RunningVm> {
        let vm = vm.to_owned();
        self.entry(&vm, |entry| (entry.epoch, entry.process.pid())).map(|(epoch, pid)| RunningVm {
            vm: vm.clone(),
            epoch,
            pid,
        })
    }
}

/// What [`QemuDriver::adopt`] found.
#[derive(Default)]
struct Adopted {
    /// What was not known before.
    new: Vec<String>,
    /// VMs of which it cannot be told whether they run.
    untold: BTreeMap<String, io::Error>,
}

impl Adopted {
    /// The first that cannot be told, if there is one.
    fn all_told(&mut self) -> io::Result<()> {
        self.untold.pop_first().map_or(Ok(()), |(_, error)| Err(error))
    }
}

/// Nothing waits for it: a start must not depend on how fast systemd is.
async fn give_scope(vm: String, pid: i32) {
    if let Err(error) = scope::give(&vm, pid).await {
        let error = &error as &dyn std::error::Error;
        tracing::warn!(
            vm,
            error,
            "it has no scope of its own: `systemctl kill haven` would end it"
        );
    }
}

/// Cuts logs that have grown long, until it is aborted. On a thread that may wait for the disk: the daemon's other
/// work, such as renewing its lease, must not.
async fn bound(logs: Arc<[PathBuf]>) {
    let mut tick = tokio::time::interval(console::INTERVAL);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        let logs = Arc::clone(&logs);
        let cut = tokio::task::spawn_blocking(move || {
            for log in &*logs {
                if let Err(error) = console::cut(log) {
                    tracing::warn!(path = %log.display(), %error, "it has grown long and cannot be cut");
                }
            }
        });
        // It fails only when the runtime ends.
        let _ = cut.await;
    }
}

/// Forgets a VM whose process has ended. The table comes last: once that has forgotten it, a new start of this VM
/// writes a record and registers with the guard, and neither may be taken away then.
async fn forget(vm: &str, directory: &Path, guard: &dyn Guard, live: &Table) -> Option<Live> {
    if let Err(error) = run_dir::remove(&directory.join(run_dir::RECORD)) {
        tracing::warn!(vm, %error, "its launch record cannot be removed");
    }
    // The guard holds the process itself; a registration of one that ended does no harm.
    let _ = guard.unregister(vm).await;
    lock(live).remove(vm)
}

/// Notes what a guest says of a power-off and what its disks do, and tells how a copy of it comes on.
struct Listener {
    live: Table,
    events: broadcast::Sender<VmEvent>,
    vm: String,
    pid: i32,
    /// To end a process that does not by itself when its guest does: one that has, or had, mirrored disks.
    qmp: Weak<Qmp>,
}

impl Listener {
    async fn listen(self, mut said: broadcast::Receiver<Value>) {
        if let Some(qmp) = self.qmp.upgrade() {
            let status = qmp.call(&commands::STATUS, json!({}), DEADLINE).await;
            let off = status
                .is_ok_and(|status| commands::guest_state(&status) == Some(GuestState::Ended));
            if off {
                // It powered off while nobody listened: whether all was written is not known.
                self.note(|entry| entry.powered_off = true);
                let _ = qmp.call(&commands::QUIT, json!({}), DEADLINE).await;
            }
        }
        loop {
            match said.recv().await {
                Ok(event) => {
                    self.hear(&event);
                    if commands::powers_off(&event) {
                        self.end(&mut said).await;
                    }
                }
                Err(broadcast::error::RecvError::Lagged(_)) => {}
                Err(broadcast::error::RecvError::Closed) => return,
            }
        }
    }

    fn note(&self, note: impl FnOnce(&mut Live)) {
        let mut live = lock(&self.live);
        live.get_mut(&self.vm).filter(|entry| entry.process.pid() == self.pid).map(note);
    }

    /// Whether it says that a disk failed.
    fn hear(&self, event: &Value) -> bool {
        let is = |of: commands::Event| event["event"] == of.name();
        // Nobody listening is fine.
        if is(commands::MIGRATION) {
            let _ = self.events.send(VmEvent::Copied { vm: self.vm.clone() });
        } else if is(commands::DEVICE_GONE) {
            let _ = self.events.send(VmEvent::DiskGone { vm: self.vm.clone() });
        } else if commands::powers_off(event) {
            self.note(|entry| entry.powered_off = true);
        } else if is(commands::REPLICA_FAILED) || is(commands::DISK_FAILED) {
            tracing::info!(vm = self.vm, %event, "a disk fails");
            if let Some(node) =
                event["data"]["node-name"].as_str().filter(|_| is(commands::REPLICA_FAILED))
            {
                self.note(|entry| _ = entry.failed.insert(node.to_owned()));
            }
            let _ = self.events.send(VmEvent::DiskBroke { vm: self.vm.clone() });
            return true;
        }
        false
    }

    /// The guest has powered off and its process waits: ends it, and notes whether all that it wrote is on all replicas.
    async fn end(&self, said: &mut broadcast::Receiver<Value>) {
        let Some(qmp) = self.qmp.upgrade() else { return };
        // It answers once all that was under way has come to its end, and then all has been said of that.
        let answered = qmp.call(&commands::STATUS, json!({}), DEADLINE).await;
        let mut well =
            answered.is_ok_and(|status| commands::guest_state(&status) == Some(GuestState::Ended));
        loop {
            match said.try_recv() {
                Ok(event) => well &= !self.hear(&event),
                Err(broadcast::error::TryRecvError::Lagged(_)) => well = false,
                Err(_) => break,
            }
        }
        self.note(|entry| entry.whole = well && entry.failed.is_empty());
        let _ = qmp.call(&commands::QUIT, json!({}), DEADLINE).await;
    }
}

#[async_trait]
impl VmDriver for QemuDriver {
    async fn start(&self, launch: &VmLaunch) -> Result<RunningVm, VmError> {
        self.start_process(launch, None).await
    }

    async fn list(&self) -> Result<Vec<RunningVm>, VmError> {
        let adopted = self.adopt().map_err(system(UNTOLD))?;
        for (vm, error) in &adopted.untold {
            tracing::error!(vm, %error, "it cannot be told whether it runs");
        }
        for vm in adopted.new {
            // Without it the end of the guest is still noticed, but not whether it was a power-off.
            if let Err(error) = self.qmp(&vm, DEADLINE).await {
                tracing::warn!(vm, error = &error as &dyn std::error::Error, "it does not answer");
            }
        }
        let table = lock(&self.live);
        let running = table.iter().map(|(vm, entry)| RunningVm {
            vm: vm.clone(),
            epoch: entry.epoch,
            pid: entry.process.pid(),
        });
        Ok(running.collect())
    }

    async fn find(&self, vm: &str) -> Result<Option<RunningVm>, VmError> {
        if let Some(running) = self.running(vm) {
            return Ok(Some(running));
        }
        let mut adopted = self.adopt().map_err(system(UNTOLD))?;
        match adopted.untold.remove(vm) {
            Some(error) => Err(system(UNTOLD)(error)),
            None => Ok(self.running(vm)),
        }
    }

    async fn stop(&self, vm: &str, grace: Duration) -> Result<(), VmError> {
        if self.entry(vm, |entry| entry.killed = true).is_none() {
            return Ok(());
        }
        let asked = self.ask(vm, &commands::POWERDOWN, DEADLINE).await.is_ok();
        if asked && self.wait_gone(vm, grace).await {
            return Ok(());
        }
        self.kill(vm).await
    }

    async fn kill(&self, vm: &str) -> Result<(), VmError> {
        let process = self.entry(vm, |entry| {
            entry.killed = true;
            Arc::clone(&entry.process)
        });
        let Some(process) = process else { return Ok(()) };
        process.kill();
        if self.wait_gone(vm, KILL_PATIENCE).await {
            return Ok(());
        }
        Err(unkillable(process.pid(), vm))
    }

    async fn close(&self, vm: &str) -> Result<(), VmError> {
        let record = record::read(&self.directory(vm));
        let record = record.map_err(system(format!("the launch record of {vm} cannot be read")))?;
        let in_ceph = |of: &record::Launched| of.launch.disks.iter().any(|disk| disk.rbd.is_some());
        if !record.as_ref().is_some_and(in_ceph) {
            return Ok(());
        }
        self.entry(vm, |entry| entry.killed = true);
        self.ask(vm, &commands::QUIT, CLOSES).await?;
        self.wait_gone(vm, CLOSES).await;
        Ok(())
    }

    fn kill_all(&self) -> Result<usize, VmError> {
        let signal = |live: &Table| {
            let mut table = lock(live);
            for entry in table.values_mut() {
                entry.killed = true;
                entry.process.kill();
            }
            table.len()
        };
        // Those that are known first: what an earlier daemon recorded is read from files.
        signal(&self.live);
        let adopted = self.adopt().and_then(|mut adopted| adopted.all_told());
        let left = signal(&self.live);
        adopted.map_err(system(UNTOLD))?;
        Ok(left)
    }

    async fn limit(&self, vm: &str, place: usize, limits: &DiskLimits) -> Result<(), VmError> {
        self.throttle(vm, place, limits).await
    }

    async fn reset(&self, vm: &str) -> Result<(), VmError> {
        self.ask(vm, &commands::RESET, DEADLINE).await.map(|_| ())
    }

    async fn state(&self, vm: &str) -> Result<GuestState, VmError> {
        let answer = self.ask(vm, &commands::STATUS, DEADLINE).await?;
        commands::guest_state(&answer)
            .ok_or_else(|| VmError::Qmp { vm: vm.into(), source: QmpError::NotQemu })
    }

    async fn signs(&self, vm: &str) -> Result<Signs, VmError> {
        let stats = self.ask(vm, &commands::BLOCK_STATS, DEADLINE).await?;
        let directory = self.directory(vm);
        let launch = record::read(&directory)
            .map_err(system(format!("the launch record of {vm} cannot be read")))?
            .map(|record| record.launch)
            .ok_or_else(|| VmError::NotHere(vm.into()))?;
        let mut network = 0;
        for nic in &launch.nics {
            network += tap::sent_by_guest(&nic.tap)
                .map_err(system(format!("the packets of {} cannot be counted", nic.tap)))?;
        }
        let agent =
            launch.agent && guest_agent::answers(&directory.join(run_dir::AGENT_SOCKET)).await;
        Ok(Signs { agent, disk: commands::disk_requests(&stats), network })
    }

    async fn strays(&self) -> Result<Vec<Stray>, VmError> {
        let _births = self.births();
        let look = || {
            let records = record::all(&self.config.run_dir)?;
            let named: BTreeSet<_> = records
                .values()
                .filter_map(|record| record.as_ref().ok()?.as_ref())
                .map(|record| (record.pid, record.start_time))
                .collect();
            let mut found = scan::processes(Path::new("/proc"), &self.config.run_dir)?;
            // Whether a record that cannot be read names it is not known.
            found.retain(|one| {
                !named.contains(&(one.pid, one.start_time))
                    && !records.get(&one.vm).is_some_and(io::Result::is_err)
            });
            Ok(found)
        };
        let found = look().map_err(system(UNSEEN))?;
        let stray =
            |one: scan::Found| Stray { vm: one.vm, pid: one.pid, start_time: one.start_time };
        Ok(found.into_iter().map(stray).collect())
    }

    async fn end_stray(&self, stray: &Stray) -> Result<(), VmError> {
        let held = Process::find(stray.pid, stray.start_time)
            .map_err(system(format!("the process {} cannot be looked at", stray.pid)))?;
        let Some(process) = held else { return Ok(()) };
        process.kill();
        match tokio::time::timeout(KILL_PATIENCE, process.ended()).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(source)) => Err(VmError::System {
                what: format!("the process {} cannot be waited for", stray.pid),
                source,
            }),
            Err(_) => Err(unkillable(stray.pid, &stray.vm)),
        }
    }

    fn events(&self) -> broadcast::Receiver<VmEvent> {
        self.events.subscribe()
    }

    fn console(&self, vm: &str) -> PathBuf {
        self.directory(vm).join(run_dir::CONSOLE_SOCKET)
    }

    fn log(&self, vm: &str) -> PathBuf {
        self.config.log_dir.join(format!("{vm}.console.log"))
    }
}

/// A process that SIGKILL does not end waits in the kernel, mostly for storage.
fn unkillable(pid: i32, vm: &str) -> VmError {
    VmError::System {
        what: format!(
            "the process {pid} of {vm} does not end; it waits for storage that does not answer, mend that or reset the host"
        ),
        source: io::ErrorKind::TimedOut.into(),
    }
}
