//! Does KVM run a Linux guest here? On some machines `/dev/kvm` opens and guests hang under it, so it is believed only
//! after one has booted: this host's own kernel with an init of a few instructions that says one line. Once per
//! boot of the host and version of QEMU, with a limit on its time; the verdict is kept in a file.
//!
//! Rejected: asking the processor's flags (they are there on the machines where guests hang), and trying again at each
//! start of the daemon (it would start seconds later each time).

use super::{arguments::accelerator, driver::Accel, run_dir};
use serde::{Deserialize, Serialize};
use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Write},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::process::CommandExt,
    },
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

/// The verdict.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kvm {
    /// A guest booted.
    Works,
    /// No guest booted, for this reason.
    Fails(String),
    /// It could not be tried, for this reason.
    NotTried(String),
}

/// How long the guest may take.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Between two signs of life.
    pub silence: Duration,
    /// Until its init speaks.
    pub whole: Duration,
}

/// A guest under KVM takes about a second; a host that has just booted may be busy.
pub const LIMITS: Limits =
    Limits { silence: Duration::from_secs(8), whole: Duration::from_secs(30) };

/// What is needed to try.
#[derive(Clone, Debug)]
pub struct Trial {
    /// QEMU's program.
    pub program: PathBuf,
    /// Its version.
    pub qemu: String,
    /// The kernel to boot.
    pub kernel: Option<PathBuf>,
    /// Where the verdict is kept.
    pub state: PathBuf,
    /// How long it may take.
    pub limits: Limits,
}

/// What was found, when and with what.
#[derive(Serialize, Deserialize)]
struct Kept {
    boot_id: String,
    qemu: String,
    works: bool,
    why: String,
}

const KEPT: &str = "kvm.json";
/// What the guest's init says.
const MARKER: &str = "haven: the guest runs\n";
/// The user that the trial runs as: `nobody`.
const UID: u32 = 65_534;

/// The kernel that this host runs, else the newest there is.
#[must_use]
pub fn kernel() -> Option<PathBuf> {
    if let Some(named) = std::env::var_os("HAVEN_PROBE_KERNEL") {
        return Some(named.into());
    }
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let own = PathBuf::from(format!("/boot/vmlinuz-{}", release.trim()));
    if own.exists() {
        return Some(own);
    }
    let entries = std::fs::read_dir("/boot").ok()?.flatten().map(|entry| entry.path());
    let kernel = |path: &PathBuf| {
        path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz"))
    };
    entries.filter(kernel).max()
}

impl Trial {
    /// The verdict: the one that is kept if it is of this boot and this QEMU, else a new one.
    #[must_use]
    pub fn verdict(&self) -> Kvm {
        let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
            .unwrap_or_default()
            .trim()
            .to_owned();
        if let Some(kept) = self.kept(&boot_id) {
            return if kept.works { Kvm::Works } else { Kvm::Fails(kept.why) };
        }
        let found = self.boot(Accel::Kvm);
        let (works, why) = match &found {
            Kvm::Works => (true, String::new()),
            Kvm::Fails(why) => (false, why.clone()),
            Kvm::NotTried(_) => return found,
        };
        let kept = Kept { boot_id, qemu: self.qemu.clone(), works, why };
        let text = serde_json::to_vec(&kept).expect("a verdict is plain data");
        if let Err(error) = std::fs::create_dir_all(&self.state)
            .and_then(|()| run_dir::write(&self.state.join(KEPT), &text, None))
        {
            tracing::warn!(%error, "the verdict on KVM cannot be kept; it will be tried again");
        }
        found
    }

    fn kept(&self, boot_id: &str) -> Option<Kept> {
        let text = std::fs::read(self.state.join(KEPT)).ok()?;
        let kept: Kept = serde_json::from_slice(&text).ok()?;
        (!boot_id.is_empty() && kept.boot_id == boot_id && kept.qemu == self.qemu).then_some(kept)
    }

    /// Boots the guest once.
    #[must_use]
    pub fn boot(&self, accel: Accel) -> Kvm {
        let device = match accel {
            Accel::Tcg => None,
            Accel::Kvm => match open_kvm() {
                Ok(device) => Some(device),
                Err(error) => {
                    return Kvm::NotTried(format!(
                        "/dev/kvm cannot be opened ({error}); enable virtualization in the firmware and load kvm_intel or kvm_amd"
                    ));
                }
            },
        };
        let Some(kernel) = &self.kernel else {
            return Kvm::NotTried(
                "/boot holds no kernel to try it with; name one in HAVEN_PROBE_KERNEL".into(),
            );
        };
        // The trial's user may read neither of the files; it inherits copies that it may.
        let prepared = std::fs::read(kernel)
            .and_then(|kernel| Ok((copy(&kernel)?, copy(&initial_file_system())?)));
        match prepared {
            Ok((kernel, initrd)) => self.run(accel, device, &kernel, &initrd),
            Err(error) => Kvm::NotTried(format!(
                "{} cannot be prepared for the trial ({error})",
                kernel.display()
            )),
        }
    }

    fn run(&self, accel: Accel, device: Option<OwnedFd>, kernel: &File, initrd: &File) -> Kvm {
        let mut command = Command::new(&self.program);
        let path = |file: &File| format!("/proc/self/fd/{}", file.as_raw_fd());
        command
            .args(accelerator(accel, device.as_ref().map(AsRawFd::as_raw_fd)))
            .args(["-machine", "q35,usb=off", "-m", "256", "-nodefaults", "-no-user-config"])
            .args(["-display", "none", "-serial", "stdio", "-no-reboot"])
            .args(["-kernel", &path(kernel), "-initrd", &path(initrd)])
            .args(["-append", "console=ttyS0 earlyprintk=ttyS0 panic=-1"])
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        if nix::unistd::geteuid().is_root() {
            command.uid(UID).gid(UID);
        }
        let mut inherited = vec![kernel.as_raw_fd(), initrd.as_raw_fd()];
        inherited.extend(device.as_ref().map(AsRawFd::as_raw_fd));
        // SAFETY: fcntl is async-signal-safe and touches only the child.
        unsafe {
            command.pre_exec(move || {
                for fd in &inherited {
                    if libc::fcntl(*fd, libc::F_SETFD, 0) < 0 {
                        return Err(io::Error::last_os_error());
                    }
                }
                Ok(())
            });
        }
        let mut child = match command.spawn() {
            Ok(child) => child,
            Err(error) => return Kvm::NotTried(format!("QEMU cannot be started ({error})")),
        };
        let verdict = watch(&mut child, self.limits);
        // Both fail only when it has ended.
        let _ = child.kill();
        let _ = child.wait();
        match verdict {
            Ok(()) => Kvm::Works,
            Err(why) => Kvm::Fails(why),
        }
    }
}

/// Opens `/dev/kvm` for QEMU, whose user may not.
///
/// # Errors
/// When there is none, or it is not for this process.
pub fn open_kvm() -> io::Result<OwnedFd> {
    Ok(OpenOptions::new().read(true).write(true).open("/dev/kvm")?.into())
}

/// A file in memory.
fn copy(content: &[u8]) -> io::Result<File> {
    let mut file = File::from(nix::sys::memfd::memfd_create(
        "haven-kvm-trial",
        nix::sys::memfd::MFdFlags::MFD_CLOEXEC,
    )?);
    file.write_all(content)?;
    Ok(file)
}

/// Reads what the guest says until its init speaks.
fn watch(child: &mut Child, limits: Limits) -> Result<(), String> {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let begin = Instant::now();
    let mut from = child.stdout.take().ok_or("its output was not captured")?;
    let (mut said, mut bytes, mut last) = (Vec::new(), [0; 4096], begin);
    loop {
        let left = (begin + limits.whole).min(last + limits.silence) - Instant::now();
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        let mut ready = [PollFd::new(from.as_fd(), PollFlags::POLLIN)];
        match poll(&mut ready, timeout) {
            Err(nix::errno::Errno::EINTR) => continue,
            Err(error) => return Err(format!("its output cannot be read ({error})")),
            Ok(0) => return Err(hang(&said, begin.elapsed())),
            Ok(_) => {}
        }
        match from.read(&mut bytes) {
            Ok(0) => return Err(format!("QEMU ended under it: {}", complaint(child))),
            Ok(read) => {
                said.extend_from_slice(&bytes[..read]);
                last = Instant::now();
            }
            Err(error) => return Err(format!("its output cannot be read ({error})")),
        }
        if said.windows(MARKER.len() - 1).any(|part| part == MARKER.trim_end().as_bytes()) {
            return Ok(());
        }
    }
}

/// What a guest that was given up did.
fn hang(said: &[u8], after: Duration) -> String {
    let text = String::from_utf8_lossy(said);
    let seconds = after.as_secs();
    match text.lines().rfind(|line| !line.trim().is_empty()) {
        Some(line) => format!(
            "a Linux guest under it was given up after {seconds} s, its last line was `{}`",
            line.trim()
        ),
        None => format!("a Linux guest under it said nothing for {seconds} s"),
    }
}

/// The last line that QEMU, which has ended, said.
fn complaint(child: &mut Child) -> String {
    // It may have closed its output without ending; reading would wait for it then.
    let _ = child.kill();
    let mut said = String::new();
    if let Some(from) = &mut child.stderr {
        let _ = from.take(1 << 16).read_to_string(&mut said);
    }
    said.lines().last().unwrap_or("it said nothing").trim().to_owned()
}

/// An initial file system (`newc` cpio) with nothing but an init.
fn initial_file_system() -> Vec<u8> {
    let mut archive = Vec::new();
    for (number, (name, mode, content)) in
        [("init", 0o100_755, init()), ("TRAILER!!!", 0, Vec::new())].into_iter().enumerate()
    {
        // Number, mode, owner, group, links, time, size, four of devices, length of the name, sum.
        let fields = [number + 1, mode, 0, 0, 1, 0, content.len(), 0, 0, 0, 0, name.len() + 1, 0];
        archive.extend_from_slice(b"070701");
        for field in fields {
            archive.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        archive.extend_from_slice(name.as_bytes());
        archive.push(0);
        archive.resize(archive.len().next_multiple_of(4), 0);
        archive.extend_from_slice(&content);
        archive.resize(archive.len().next_multiple_of(4), 0);
    }
    archive
}

/// A program for Linux on x86-64 that says [`MARKER`] on its console and waits for ever.
fn init() -> Vec<u8> {
    const BASE: u64 = 0x40_0000;
    const HEAD: u64 = 64 + 56;
    let mut code = vec![0xb8, 1, 0, 0, 0]; // mov eax, 1 (write)
    code.extend([0xbf, 1, 0, 0, 0]); // mov edi, 1 (the console)
    code.extend([0x48, 0x8d, 0x35, 16, 0, 0, 0]); // lea rsi, [rip + 16] (behind the code)
    code.extend([0xba, MARKER.len() as u8, 0, 0, 0]); // mov edx, its length
    code.extend([0x0f, 0x05]); // syscall
    code.extend([0xb8, 34, 0, 0, 0]); // mov eax, 34 (pause)
    code.extend([0x0f, 0x05]); // syscall
    code.extend([0xeb, 0xf7]); // jump back to the pause
    code.extend(MARKER.bytes());
    let size = HEAD + code.len() as u64;
    let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    let half = |elf: &mut Vec<u8>, value: u16| elf.extend(value.to_le_bytes());
    let word = |elf: &mut Vec<u8>, value: u32| elf.extend(value.to_le_bytes());
    let long = |elf: &mut Vec<u8>, value: u64| elf.extend(value.to_le_bytes());
    half(&mut elf, 2); // a program
    half(&mut elf, 62); // for x86-64
    word(&mut elf, 1);
    for value in [BASE + HEAD, 64, 0] {
        long(&mut elf, value); // entry, program headers, no sections
    }
    word(&mut elf, 0);
    for value in [64, 56, 1, 0, 0, 0] {
        half(&mut elf, value); // sizes and counts of headers
    }
    word(&mut elf, 1); // loaded
    word(&mut elf, 5); // read and run
    for value in [0, BASE, BASE, size, size, 0x1000] {
        long(&mut elf, value); // offset, addresses, sizes, alignment
    }
    elf.extend(code);
    elf
}

#[cfg(test)]
mod tests {
    use super::{Kept, Kvm, LIMITS, MARKER, Trial, init};
    use crate::machine::command::program;
    use std::process::Command;

    #[test]
    fn the_init_is_a_program_that_speaks() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("init");
        program(&path, &init());
        let output = Command::new("timeout").arg("0.5").arg(&path).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout), MARKER);
        // It did not end by itself.
        assert_eq!(output.status.code(), Some(124));
    }

    #[test]
    fn a_verdict_is_kept_for_this_boot_and_this_qemu_only() {
        let state = tempfile::tempdir().unwrap();
        let trial = |qemu: &str| Trial {
            program: "/nonexistent/qemu".into(),
            qemu: qemu.into(),
            kernel: None,
            state: state.path().into(),
            limits: LIMITS,
        };
        let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
        let keep = |boot_id: &str, works: bool| {
            let kept = Kept {
                boot_id: boot_id.into(),
                qemu: "11.1.3".into(),
                works,
                why: "it hangs".into(),
            };
            std::fs::write(state.path().join("kvm.json"), serde_json::to_vec(&kept).unwrap())
                .unwrap();
        };
        keep(boot_id.trim(), false);
        assert_eq!(trial("11.1.3").verdict(), Kvm::Fails("it hangs".into()));
        keep(boot_id.trim(), true);
        assert_eq!(trial("11.1.3").verdict(), Kvm::Works);
        assert!(matches!(trial("11.2.0").verdict(), Kvm::NotTried(_)));
        keep("another boot", true);
        assert!(matches!(trial("11.1.3").verdict(), Kvm::NotTried(_)));
    }
}
