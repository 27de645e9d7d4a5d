//! Power of one lab host: on, off, and commands run inside it.
//!
//! A host is on while PID 1 of its PID namespace lives. Switching it off kills that process; the
//! kernel then kills every other process of the namespace, whatever it is doing: a power cut.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::host_init::Layout;

/// A lab host that was switched on by this process.
#[derive(Debug)]
pub struct Machine {
    outer: Child,
    init: Pid,
    root: std::path::PathBuf,
}

impl Machine {
    /// Switches the host on inside the existing network namespace `netns`. Its `/run/haven` is empty then.
    ///
    /// # Errors
    /// When the run directory cannot be wiped, or the host's first process does not come up within 5 s.
    pub fn power_on(binary: &Path, netns: &str, layout: &Layout) -> Result<Self> {
        let run = layout.host_dir.join("run");
        if run.exists() {
            std::fs::remove_dir_all(&run)
                .with_context(|| format!("{} could not be wiped", run.display()))?;
        }
        let mut command = Command::new("ip");
        command.args(["netns", "exec", netns, "unshare", "--mount", "--pid", "--uts", "--ipc"]);
        command.args(["--fork", "--kill-child"]).arg(binary).args(["lab", "host-init", "--lower"]);
        command.arg(&layout.lower).arg("--host-dir").arg(&layout.host_dir).arg("--shared");
        command
            .arg(&layout.shared)
            .arg("--binaries")
            .arg(&layout.binaries)
            .arg("--name")
            .arg(&layout.name);
        if let Some(socket) = &layout.watchdog {
            command.arg("--watchdog").arg(socket);
        }
        std::fs::create_dir_all(&layout.host_dir)?;
        let said = std::fs::File::create(layout.host_dir.join("boot.log"))?;
        command.stdin(Stdio::null()).stdout(said.try_clone()?).stderr(said).process_group(0);
        let mut outer = command.spawn().context("unshare did not start")?;
        match wait_for_init(outer.id()).and_then(|init| wait_for_boot(&run, init)) {
            Ok(init) => Ok(Self { outer, init, root: layout.host_dir.join("root") }),
            Err(error) => {
                let _ = outer.kill();
                let _ = outer.wait();
                Err(error).with_context(|| format!("{} did not come up", layout.name))
            }
        }
    }

    /// Cuts the power: every process of the host is gone when this returns.
    ///
    /// # Errors
    /// When the outer process cannot be waited for.
    pub fn power_off(&mut self) -> Result<()> {
        // ESRCH only says that it is off already.
        let _ = kill(self.init, Signal::SIGKILL);
        self.outer.wait().context("the host's outer process could not be waited for")?;
        Ok(())
    }

    /// The host's PID 1, as the machine numbers it.
    #[must_use]
    pub fn init(&self) -> Pid {
        self.init
    }

    /// A command to be run inside the host, with all its namespaces and its root.
    #[must_use]
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--net", "--mount", "--pid", "--uts", "--ipc", "--target"]);
        command.arg(self.init.to_string()).arg(format!("--root=/proc/{}/root", self.init));
        command.arg("--wd=/").arg("--").arg(program);
        command
    }

    /// Lets the host run on when this process ends; returns its PID 1.
    #[must_use]
    pub fn detach(self) -> Pid {
        let init = self.init;
        std::mem::forget(self);
        init
    }

    /// Where the host's root is mounted inside its own mount namespace.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.power_off();
    }
}

/// The host's first process says that its file systems stand by making `/run/haven/booted`.
fn wait_for_boot(run: &Path, init: Pid) -> Result<Pid> {
    let limit = Instant::now() + Duration::from_secs(10);
    while Instant::now() < limit && kill(init, None).is_ok() {
        if run.join("booted").exists() {
            return Ok(init);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    bail!("it did not mount its file systems; read boot.log in its directory")
}

fn wait_for_init(outer: u32) -> Result<Pid> {
    let limit = Instant::now() + Duration::from_secs(5);
    while Instant::now() < limit {
        // `ip netns exec` and `unshare` replace themselves, so PID 1 is the only child.
        let path = format!("/proc/{outer}/task/{outer}/children");
        let children = std::fs::read_to_string(path).unwrap_or_default();
        if let Some(first) = children.split_whitespace().next() {
            return Ok(Pid::from_raw(first.parse().context("a process id is a number")?));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    bail!("no process appeared in its PID namespace within 5 s; read the message above")
}
