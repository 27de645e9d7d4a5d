//! What runs as PID 1 inside a lab host (`haven lab host-init`).
//!
//! It promises three things. The host's file systems stand before any process of Haven runs. The guard
//! and the daemon run and are run again when they end, as systemd does it on a real server. No
//! zombie stays. When it is killed the kernel ends every other process of the PID namespace at once,
//! and that is the lab's power cut: so it holds nothing that would have to be cleaned up.
//!
//! It is called in fresh mount, PID, UTS and IPC namespaces, inside the host's network namespace, so
//! that the sysfs it mounts shows that namespace's devices.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// Where a lab host's parts stand on the machine.
#[derive(Debug, Clone)]
pub struct Layout {
    /// The cached Debian tree, never written.
    pub lower: PathBuf,
    /// The lab's directory of this host: `upper` and `work` survive a power cut, `run` does not.
    pub host_dir: PathBuf,
    /// The directory that all hosts see as `/srv/shared`.
    pub shared: PathBuf,
    /// The directory with the copies of the two programs that the host runs.
    pub binaries: PathBuf,
    /// The pipe that the host's watchdog reads, if there is one.
    pub watchdog: Option<PathBuf>,
    /// The host's name.
    pub name: String,
}

/// The program of the daemon and the command line.
pub const DAEMON: &str = "haven";
/// The program of the guard, installed beside it.
pub const GUARD: &str = "haven-guard";
/// What a lab host believes to have, MiB: it shares its machine with the others.
const HOST_MEMORY_MIB: &str = "2048";
/// Where the host sees its watchdog.
const WATCHDOG: &str = "/dev/haven-watchdog";
/// More of the daemon's environment, as on a real server (`packaging/haven.service`).
const SETTINGS: &str = "/etc/default/haven";
const DAEMON_UNIT: &str = "daemon";
const FIRST_BACKOFF: Duration = Duration::from_millis(200);
const LONGEST_BACKOFF: Duration = Duration::from_secs(2);

/// Becomes the host: mounts, then supervises the guard and the daemon for ever.
///
/// # Errors
/// When a mount fails, so that the host does not come up half.
pub fn run(layout: &Layout) -> Result<()> {
    mount_all(layout)?;
    nix::unistd::sethostname(&layout.name).context("the host name could not be set")?;
    fs::write("/etc/hostname", format!("{}\n", layout.name))
        .context("/etc/hostname could not be written")?;
    // A failure here shows at once in every later step, with a better sentence.
    let _ = Command::new("ip").args(["link", "set", "lo", "up"]).status();
    fs::write("/run/haven/booted", "").context("/run/haven is not writable")?;
    write_reboot().context("/etc/haven/reboot could not be written")?;
    supervise(vec![Unit::new("guard", GUARD, &[]), Unit::new(DAEMON_UNIT, DAEMON, &["daemon"])])
}

/// How a lab host restarts itself: nobody feeds its watchdog any more, and that resets it.
fn write_reboot() -> Result<()> {
    let script = "#!/bin/sh\n[ -e /dev/haven-watchdog ] || { echo 'this lab host has no watchdog that would reset it' >&2; exit 1; }\nfor of in /proc/[0-9]*; do\n  case \"$(cat \"$of/comm\" 2>/dev/null)\" in\n    haven|haven-guard) kill -STOP \"${of#/proc/}\" ;;\n  esac\ndone\n";
    fs::create_dir_all("/etc/haven")?;
    fs::write("/etc/haven/reboot", script)?;
    fs::set_permissions("/etc/haven/reboot", PermissionsExt::from_mode(0o755))?;
    Ok(())
}

fn bind(from: &Path, to: &Path) -> Result<()> {
    mount(Some(from), to, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .with_context(|| format!("{} could not be bound to {}", from.display(), to.display()))
}

fn fresh(kind: &str, to: &Path, options: Option<&str>) -> Result<()> {
    fs::create_dir_all(to).with_context(|| format!("{} could not be made", to.display()))?;
    mount(Some(kind), to, Some(kind), MsFlags::empty(), options)
        .with_context(|| format!("{kind} could not be mounted at {}", to.display()))
}

fn bind_file(from: &Path, to: &Path) -> Result<()> {
    if let Some(folder) = to.parent() {
        fs::create_dir_all(folder)?;
    }
    File::create(to).with_context(|| format!("{} could not be made", to.display()))?;
    bind(from, to)
}

fn mount_all(layout: &Layout) -> Result<()> {
    // Without this a mount made here would show on the machine itself.
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>)
        .context("the mount namespace could not be made private")?;
    let at = |name: &str| layout.host_dir.join(name);
    for name in ["upper", "work", "root", "run"] {
        fs::create_dir_all(at(name))
            .with_context(|| format!("{} could not be made", at(name).display()))?;
    }
    let root = at("root");
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        layout.lower.display(),
        at("upper").display(),
        at("work").display()
    );
    mount(Some("overlay"), &root, Some("overlay"), MsFlags::empty(), Some(options.as_str()))
        .with_context(|| format!("the overlay of {} could not be mounted", layout.name))?;
    fresh("proc", &root.join("proc"), None)?;
    fresh("sysfs", &root.join("sys"), None)?;
    fresh("tmpfs", &root.join("run"), Some("mode=755"))?;
    fresh("tmpfs", &root.join("tmp"), Some("mode=1777"))?;
    mount_devices(&root.join("dev"))?;
    for (from, to) in [(at("run"), "run/haven"), (layout.shared.clone(), "srv/shared")] {
        fs::create_dir_all(root.join(to))?;
        bind(&from, &root.join(to))?;
    }
    // A file system of its own, where somebody has mounted one for this host: one that can be filled.
    if at("disk").is_dir() {
        fs::create_dir_all(root.join("srv/disk"))?;
        bind(&at("disk"), &root.join("srv/disk"))?;
    }
    for program in [DAEMON, GUARD] {
        bind_file(&layout.binaries.join(program), &root.join("usr/bin").join(program))?;
    }
    if let Some(socket) = &layout.watchdog {
        bind_file(socket, &root.join(WATCHDOG.trim_start_matches('/')))?;
    }
    nix::unistd::chroot(&root).context("the host's root could not be entered")?;
    std::env::set_current_dir("/").context("the host's root could not be entered")?;
    fs::create_dir_all("/var/log/haven").context("/var/log/haven could not be made")
}

fn mount_devices(dev: &Path) -> Result<()> {
    fresh("tmpfs", dev, Some("mode=755"))?;
    let wanted = ["null", "zero", "full", "random", "urandom", "tty", "kvm", "fuse", "net/tun"];
    for name in wanted {
        let outside = Path::new("/dev").join(name);
        if outside.exists() {
            bind_file(&outside, &dev.join(name))?;
        }
    }
    // A node of its own: the daemon changes its group.
    if let Ok(outside) = fs::metadata("/dev/userfaultfd") {
        let own = dev.join("userfaultfd");
        let mode = nix::sys::stat::Mode::from_bits_truncate(0o600);
        nix::sys::stat::mknod(&own, nix::sys::stat::SFlag::S_IFCHR, mode, outside.rdev())
            .with_context(|| format!("{} could not be made", own.display()))?;
    }
    fresh("tmpfs", &dev.join("shm"), Some("mode=1777"))?;
    fresh("devpts", &dev.join("pts"), Some("newinstance,ptmxmode=0666,mode=620"))?;
    std::os::unix::fs::symlink("pts/ptmx", dev.join("ptmx"))?;
    std::os::unix::fs::symlink("/proc/self/fd", dev.join("fd"))?;
    Ok(())
}

/// The settings in a file of `NAME=value` lines, as systemd's `EnvironmentFile` has them: no quotes are needed here.
fn settings(text: &str) -> impl Iterator<Item = (&str, &str)> {
    let lines = text.lines().map(str::trim).filter(|line| !line.starts_with('#'));
    lines.filter_map(|line| line.split_once('='))
}

/// When PID 1 of this host began: no other boot of it began then.
fn boot() -> String {
    let stat = fs::read_to_string("/proc/1/stat").unwrap_or_default();
    let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    fields.split_whitespace().nth(19).unwrap_or_default().to_owned()
}

/// One process that is kept running.
struct Unit {
    name: &'static str,
    program: &'static str,
    arguments: &'static [&'static str],
    started: Option<Instant>,
    next_start: Instant,
    backoff: Duration,
    /// Tells this boot of the host from its others.
    boot: String,
}

impl Unit {
    fn new(name: &'static str, program: &'static str, arguments: &'static [&'static str]) -> Self {
        let (next_start, backoff) = (Instant::now(), FIRST_BACKOFF);
        let boot = boot();
        Self { name, program, arguments, started: None, next_start, backoff, boot }
    }

    fn start(&mut self) -> Result<Pid> {
        let path = format!("/var/log/haven/{}.log", self.name);
        let log = OpenOptions::new().create(true).append(true).open(&path)?;
        let mut command = Command::new(Path::new("/usr/bin").join(self.program));
        command.args(self.arguments).env_clear().envs(environment());
        command.env("HAVEN_MEMORY_MIB", HOST_MEMORY_MIB);
        command.env("HAVEN_BOOT_ID", &self.boot);
        if self.name == DAEMON_UNIT {
            command.envs(settings(&fs::read_to_string(SETTINGS).unwrap_or_default()));
        }
        if Path::new(WATCHDOG).exists() {
            command.env("HAVEN_WATCHDOG", WATCHDOG);
        }
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).process_group(0);
        let child = command.spawn().with_context(|| format!("the {} did not start", self.name))?;
        self.started = Some(Instant::now());
        Ok(Pid::from_raw(child.id().cast_signed()))
    }

    fn ended(&mut self) {
        // A process that ran for a while is started again at once; one that fails at once is not.
        let ran_long = self.started.is_some_and(|at| at.elapsed() > Duration::from_secs(10));
        self.backoff =
            if ran_long { FIRST_BACKOFF } else { (self.backoff * 2).min(LONGEST_BACKOFF) };
        self.next_start = Instant::now() + self.backoff;
        self.started = None;
    }
}

/// What a service of a booted machine finds in its environment, and what is meant for Haven; nothing
/// else of whoever began the lab: their `TMPDIR` is no directory of this host.
fn environment() -> impl Iterator<Item = (OsString, OsString)> {
    let ours = |name: &OsString| {
        let name = name.to_string_lossy();
        name.starts_with("HAVEN_") || name.starts_with("RUST_")
    };
    let path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    let path = (OsString::from("PATH"), OsString::from(path));
    std::env::vars_os().filter(move |(name, _)| ours(name)).chain([path])
}

fn supervise(mut units: Vec<Unit>) -> Result<()> {
    let mut running: BTreeMap<i32, usize> = BTreeMap::new();
    loop {
        for (index, unit) in units.iter_mut().enumerate() {
            if unit.started.is_none() && Instant::now() >= unit.next_start {
                match unit.start() {
                    Ok(pid) => _ = running.insert(pid.as_raw(), index),
                    Err(error) => {
                        eprintln!("{error:#}");
                        unit.ended();
                    }
                }
            }
        }
        match waitpid(None::<Pid>, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => {
                std::thread::sleep(Duration::from_millis(50));
            }
            Ok(status) => {
                if let Some(index) = status.pid().and_then(|pid| running.remove(&pid.as_raw())) {
                    units[index].ended();
                }
            }
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error).context("the children could not be waited for"),
        }
    }
}
