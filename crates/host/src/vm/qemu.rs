//! The driver for QEMU.
//!
//! A VM's directory `RUN/vms/<vm>/` holds `launch.json` (what was started, by which process), `qmp.sock`,
//! `console.sock` and `stderr`. It is all that a restarted daemon needs to adopt the VM.

use super::{
    driver::{Accel, Exit, RunningVm, VmDriver, VmError, VmEvent, VmLaunch},
    qmp::{DEADLINE, Qmp, QmpError},
};
use crate::guard::{Guard, Registration, start_time};
use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::{
    collections::BTreeMap,
    fs::File,
    io,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::{fs::chown, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::{io::unix::AsyncFd, sync::broadcast};

/// Where the driver keeps things.
#[derive(Clone, Debug)]
pub struct QemuConfig {
    /// `RUN/vms`: gone after a reboot.
    pub run_dir: PathBuf,
    /// `LOG/vms`: what consoles said.
    pub log_dir: PathBuf,
}

/// What `launch.json` holds.
#[derive(Serialize, Deserialize)]
struct Launched {
    launch: VmLaunch,
    pid: i32,
    start_time: u64,
}

struct Live {
    pid: i32,
    qmp: Option<Arc<Qmp>>,
    /// Haven ended it itself.
    killed: bool,
    /// The guest said that it powers off.
    powered_off: bool,
}

type Table = Arc<Mutex<BTreeMap<String, Live>>>;

/// Runs VMs with QEMU.
pub struct QemuDriver {
    config: QemuConfig,
    guard: Arc<dyn Guard>,
    live: Table,
    events: broadcast::Sender<VmEvent>,
}

/// How long QEMU may take to open its QMP socket.
const SOCKET_PATIENCE: Duration = Duration::from_secs(10);
/// How long a killed process may take to go.
const KILL_PATIENCE: Duration = Duration::from_secs(10);
/// The first descriptor number that a tap gets in QEMU; far above those that the daemon has open, so that giving one
/// tap its number never closes another.
const TAP_FD: i32 = 500;

fn system(what: impl Into<String>) -> impl FnOnce(io::Error) -> VmError {
    let what = what.into();
    move |source| VmError::System { what, source }
}

/// The command line of a VM; `taps` are the descriptors that QEMU inherits.
#[must_use]
pub fn arguments(launch: &VmLaunch, directory: &Path, log: &Path) -> Vec<String> {
    let mut args: Vec<String> = Vec::new();
    let mut add = |flag: &str, value: String| {
        args.push(flag.to_owned());
        if !value.is_empty() {
            args.push(value);
        }
    };
    let file = |name: &str| directory.join(name).display().to_string();
    add("-name", format!("guest={},process=haven-{},debug-threads=on", launch.vm, launch.vm));
    add("-nodefaults", String::new());
    add("-no-user-config", String::new());
    add("-display", "none".into());
    add("-S", String::new());
    match launch.accel {
        Accel::Kvm => {
            add("-accel", "kvm".into());
            add("-cpu", "host".into());
        }
        Accel::Tcg => {
            add("-accel", "tcg".into());
            add("-cpu", "max".into());
        }
    }
    add("-machine", "q35,usb=off".into());
    add("-smp", launch.cpus.to_string());
    add("-m", format!("{}B", launch.memory_bytes));
    add("-uuid", launch.uuid.clone());
    add(
        "-sandbox",
        "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny".into(),
    );
    add("-qmp", format!("unix:{},server=on,wait=off", file("qmp.sock")));
    add(
        "-chardev",
        format!(
            "socket,id=console,path={},server=on,wait=off,logfile={},logappend=on",
            file("console.sock"),
            log.display()
        ),
    );
    add("-serial", "chardev:console".into());
    add("-device", "virtio-rng-pci".into());
    devices(launch, &mut add);
    args
}

/// What hangs on the machine: what it boots, disks, the seed, network cards.
fn devices(launch: &VmLaunch, add: &mut dyn FnMut(&str, String)) {
    if let Some(boot) = &launch.direct_boot {
        add("-kernel", boot.kernel.display().to_string());
        if let Some(initrd) = &boot.initrd {
            add("-initrd", initrd.display().to_string());
        }
        add("-append", boot.cmdline.clone());
    }
    for (i, disk) in launch.disks.iter().enumerate() {
        let node = json!({
            "driver": disk.format, "node-name": format!("d{i}"), "read-only": disk.read_only, "discard": "unmap",
            "file": { "driver": "file", "filename": disk.path, "aio": "threads" },
        });
        add("-blockdev", node.to_string());
        add(
            "-device",
            format!("virtio-blk-pci,drive=d{i},serial={},bootindex={}", disk.name, i + 1),
        );
    }
    if let Some(seed) = &launch.seed {
        let node = json!({
            "driver": "raw", "node-name": "seed", "read-only": true,
            "file": { "driver": "file", "filename": seed },
        });
        add("-blockdev", node.to_string());
        add("-device", "virtio-blk-pci,drive=seed,serial=seed".into());
    }
    for (i, nic) in launch.nics.iter().enumerate() {
        add("-netdev", format!("tap,id=n{i},fd={}", TAP_FD + i as i32));
        add("-device", format!("virtio-net-pci,netdev=n{i},mac={},host_mtu={}", nic.mac, nic.mtu));
    }
}

/// Opens an existing tap for QEMU, which has no right to do so itself.
fn open_tap(name: &str) -> io::Result<OwnedFd> {
    let file = File::options().read(true).write(true).open("/dev/net/tun")?;
    // SAFETY: a zeroed ifreq is valid; the name is cut to its field and ends with zero; the ioctl reads only it.
    unsafe {
        let mut request: libc::ifreq = std::mem::zeroed();
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes().take(15)) {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as i16;
        if libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(file.into())
}

impl QemuDriver {
    /// A driver that knows of nothing yet; [`VmDriver::list`] adopts what runs.
    #[must_use]
    pub fn new(config: QemuConfig, guard: Arc<dyn Guard>) -> Self {
        let (events, _) = broadcast::channel(256);
        Self { config, guard, live: Table::default(), events }
    }

    fn directory(&self, vm: &str) -> PathBuf {
        self.config.run_dir.join(vm)
    }

    fn spawn(&self, launch: &VmLaunch) -> Result<i32, VmError> {
        let directory = self.directory(&launch.vm);
        let prepared = std::fs::create_dir_all(&directory)
            .and_then(|()| std::fs::create_dir_all(&self.config.log_dir))
            .and_then(|()| chown(&directory, Some(launch.uid), Some(launch.uid)));
        prepared
            .map_err(system(format!("the directory {} cannot be prepared", directory.display())))?;
        let log = self.log(&launch.vm);
        let _ = std::fs::remove_file(directory.join("qmp.sock"));
        let _ = std::fs::remove_file(directory.join("console.sock"));
        let logged = File::options().create(true).append(true).open(&log);
        logged
            .and_then(|_| chown(&log, Some(launch.uid), Some(launch.uid)))
            .map_err(system(format!("{} cannot be written", log.display())))?;
        let stderr = File::create(directory.join("stderr"))
            .map_err(system(format!("{} cannot be written", directory.display())))?;
        let mut taps = Vec::new();
        for nic in &launch.nics {
            let tap = open_tap(&nic.tap)
                .map_err(system(format!("the tap {} cannot be opened", nic.tap)))?;
            taps.push(tap);
        }
        let numbers: Vec<i32> = taps.iter().map(AsRawFd::as_raw_fd).collect();
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args(arguments(launch, &directory, &log))
            .current_dir("/")
            .uid(launch.uid)
            .gid(launch.uid)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr);
        // SAFETY: setsid, dup2 and fcntl are async-signal-safe and touch only the child.
        unsafe {
            command.pre_exec(move || {
                nix::unistd::setsid()?;
                for (i, fd) in numbers.iter().enumerate() {
                    let wanted = TAP_FD + i as i32;
                    // A descriptor that has the wanted number already would keep its close-on-exec flag.
                    let done = if *fd == wanted {
                        libc::fcntl(wanted, libc::F_SETFD, 0)
                    } else {
                        libc::dup2(*fd, wanted)
                    };
                    if done < 0 {
                        return Err(io::Error::last_os_error());
                    }
                }
                Ok(())
            });
        }
        let child = command.spawn().map_err(|source| {
            if source.kind() == io::ErrorKind::NotFound {
                VmError::NoQemu
            } else {
                VmError::System { what: format!("QEMU of {} cannot be started", launch.vm), source }
            }
        })?;
        i32::try_from(child.id()).map_err(|_| VmError::NotHere(launch.vm.clone()))
    }

    fn remember(&self, launch: &VmLaunch, pid: i32) -> Result<(), VmError> {
        let record =
            Launched { launch: launch.clone(), pid, start_time: start_time(pid).unwrap_or(0) };
        let text = serde_json::to_vec(&record).expect("a launch is plain data");
        let path = self.directory(&launch.vm).join("launch.json");
        let new = path.with_extension("new");
        std::fs::write(&new, text)
            .and_then(|()| std::fs::rename(&new, &path))
            .map_err(system(format!("{} cannot be written", path.display())))
    }

    /// Waits until QEMU listens; when it ends instead, says what it said.
    async fn meet(&self, vm: &str, pid: i32) -> Result<Arc<Qmp>, VmError> {
        let path = self.directory(vm).join("qmp.sock");
        let until = tokio::time::Instant::now() + SOCKET_PATIENCE;
        loop {
            match Qmp::connect(&path).await {
                Ok(qmp) => return Ok(qmp),
                Err(QmpError::Io(_)) if !ended(pid) && tokio::time::Instant::now() < until => {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                Err(_) if ended(pid) => {
                    let said = std::fs::read_to_string(self.directory(vm).join("stderr"))
                        .unwrap_or_default();
                    let last: Vec<&str> = said.lines().rev().take(3).collect();
                    let said = last.into_iter().rev().collect::<Vec<_>>().join("; ");
                    return Err(VmError::Died { vm: vm.into(), said });
                }
                Err(source) => {
                    return Err(VmError::Qmp { vm: vm.into(), source });
                }
            }
        }
    }

    /// Follows a process to its end, and what its guest says of a power-off.
    fn follow(&self, vm: &str, epoch: u64, pid: i32, qmp: Option<Arc<Qmp>>) {
        let entry = Live { pid, qmp: qmp.clone(), killed: false, powered_off: false };
        lock(&self.live).insert(vm.to_owned(), entry);
        if let Some(qmp) = qmp {
            let (live, vm, mut said) = (Arc::clone(&self.live), vm.to_owned(), qmp.events());
            tokio::spawn(async move {
                while let Ok(event) = said.recv().await {
                    if event["event"] == "SHUTDOWN"
                        && event["data"]["guest"] == true
                        && let Some(entry) = lock(&live).get_mut(&vm)
                    {
                        entry.powered_off = true;
                    }
                }
            });
        }
        let (live, events, guard) =
            (Arc::clone(&self.live), self.events.clone(), Arc::clone(&self.guard));
        let (vm, directory) = (vm.to_owned(), self.directory(vm));
        tokio::spawn(async move {
            gone(pid).await;
            // Before the table forgets it: a new start of this VM writes a record of its own.
            let _ = std::fs::remove_file(directory.join("launch.json"));
            let entry = {
                let mut table = lock(&live);
                if table.get(&vm).is_some_and(|entry| entry.pid == pid) {
                    table.remove(&vm)
                } else {
                    None
                }
            };
            let _ = guard.unregister(&vm).await;
            let Some(entry) = entry else { return };
            let how = match (entry.killed, entry.powered_off) {
                (true, _) => Exit::Killed,
                (false, true) => Exit::PoweredOff,
                (false, false) => Exit::Crashed,
            };
            let _ = events.send(VmEvent::Exited { vm, epoch, how });
        });
    }

    fn entry<T>(&self, vm: &str, read: impl FnOnce(&mut Live) -> T) -> Option<T> {
        lock(&self.live).get_mut(vm).map(read)
    }

    async fn qmp_call(&self, vm: &str, command: &str) -> Result<(), VmError> {
        let qmp = self.entry(vm, |entry| entry.qmp.clone()).flatten();
        let qmp = qmp.ok_or_else(|| VmError::NotHere(vm.into()))?;
        let called = qmp.call(command, json!({}), DEADLINE).await;
        called.map(|_| ()).map_err(|source| VmError::Qmp { vm: vm.into(), source })
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

    async fn launch_process(&self, launch: &VmLaunch, pid: i32) -> Result<Arc<Qmp>, VmError> {
        self.remember(launch, pid)?;
        let tap = launch.nics.first().map_or("", |nic| nic.tap.as_str());
        self.guard
            .register(&Registration { vm: &launch.vm, pid, session: launch.session, tap })
            .await
            .map_err(|source| VmError::Guard { vm: launch.vm.clone(), source })?;
        let qmp = self.meet(&launch.vm, pid).await?;
        qmp.call("cont", json!({}), DEADLINE)
            .await
            .map_err(|source| VmError::Qmp { vm: launch.vm.clone(), source })?;
        Ok(qmp)
    }
}

fn lock(table: &Table) -> std::sync::MutexGuard<'_, BTreeMap<String, Live>> {
    table.lock().unwrap_or_else(PoisonError::into_inner)
}

fn kill_process(pid: i32) {
    let _ =
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
}

/// Whether a process has ended; one that waits to be reaped has.
fn ended(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_none_or(|(_, rest)| rest.trim_start().starts_with('Z'))
}

/// Resolves when a process has ended, and reaps it if it is a child of this daemon.
async fn gone(pid: i32) {
    // SAFETY: a plain system call; a negative result means that there is no such process.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if let Ok(fd) = i32::try_from(fd)
        && fd >= 0
    {
        // SAFETY: the descriptor was just opened and nobody else has it.
        let owned = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: the descriptor is owned by what is registered and is not closed before it.
        let watched =
            unsafe { AsyncFd::register_with_interest(owned, tokio::io::Interest::READABLE) };
        if let Ok(watched) = watched {
            let _ = watched.readable().await;
        }
    }
    let _ = nix::sys::wait::waitpid(
        nix::unistd::Pid::from_raw(pid),
        Some(nix::sys::wait::WaitPidFlag::WNOHANG),
    );
}

#[async_trait]
impl VmDriver for QemuDriver {
    async fn start(&self, launch: &VmLaunch) -> Result<RunningVm, VmError> {
        let pid = self.spawn(launch)?;
        match self.launch_process(launch, pid).await {
            Ok(qmp) => {
                self.follow(&launch.vm, launch.epoch, pid, Some(qmp));
                Ok(RunningVm { vm: launch.vm.clone(), epoch: launch.epoch, pid })
            }
            Err(error) => {
                kill_process(pid);
                gone(pid).await;
                let _ = std::fs::remove_file(self.directory(&launch.vm).join("launch.json"));
                let _ = self.guard.unregister(&launch.vm).await;
                Err(error)
            }
        }
    }

    async fn list(&self) -> Result<Vec<RunningVm>, VmError> {
        let Ok(entries) = std::fs::read_dir(&self.config.run_dir) else {
            return Ok(Vec::new());
        };
        let mut found = Vec::new();
        for entry in entries.flatten() {
            let path = entry.path().join("launch.json");
            let Ok(text) = std::fs::read(&path) else {
                continue;
            };
            let Ok(record) = serde_json::from_slice::<Launched>(&text) else {
                continue;
            };
            let vm = record.launch.vm.clone();
            if start_time(record.pid) != Some(record.start_time) || ended(record.pid) {
                let _ = std::fs::remove_file(&path);
                continue;
            }
            if !lock(&self.live).contains_key(&vm) {
                let qmp = Qmp::connect(&self.directory(&vm).join("qmp.sock")).await.ok();
                tracing::info!(vm, pid = record.pid, "adopted");
                self.follow(&vm, record.launch.epoch, record.pid, qmp);
            }
            found.push(RunningVm { vm, epoch: record.launch.epoch, pid: record.pid });
        }
        Ok(found)
    }

    async fn stop(&self, vm: &str, grace: Duration) -> Result<(), VmError> {
        if self.entry(vm, |entry| entry.killed = true).is_none() {
            return Ok(());
        }
        let asked = self.qmp_call(vm, "system_powerdown").await.is_ok();
        if asked && self.wait_gone(vm, grace).await {
            return Ok(());
        }
        self.kill(vm).await
    }

    async fn kill(&self, vm: &str) -> Result<(), VmError> {
        let pid = self.entry(vm, |entry| {
            entry.killed = true;
            entry.pid
        });
        let Some(pid) = pid else { return Ok(()) };
        kill_process(pid);
        if self.wait_gone(vm, KILL_PATIENCE).await {
            Ok(())
        } else {
            let source = io::ErrorKind::TimedOut.into();
            Err(VmError::System { what: format!("the process {pid} of {vm} does not end"), source })
        }
    }

    async fn reset(&self, vm: &str) -> Result<(), VmError> {
        self.qmp_call(vm, "system_reset").await
    }

    fn events(&self) -> broadcast::Receiver<VmEvent> {
        self.events.subscribe()
    }

    fn console(&self, vm: &str) -> PathBuf {
        self.directory(vm).join("console.sock")
    }

    fn log(&self, vm: &str) -> PathBuf {
        self.config.log_dir.join(format!("{vm}.console.log"))
    }
}
