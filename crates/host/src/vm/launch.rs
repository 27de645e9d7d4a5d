//! Starts QEMU's process, stopped (`-S`), with all that it needs already open.

use super::{
    arguments::{Descriptors, arguments},
    driver::{Accel, VmError, VmLaunch},
    kvm::open_kvm,
    process::Process,
    record, run_dir,
    scan::DIRECTORY,
};
use std::{
    fs::File,
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

/// How long a tap may stay busy after the end of the process that had it.
const TAP_PATIENCE: Duration = Duration::from_secs(2);

/// What is open for QEMU; the daemon closes its own copies once QEMU runs, so that a QEMU that ends is noticed.
struct Opened {
    qmp: OwnedFd,
    console: OwnedFd,
    log: File,
    messages: File,
    kvm: Option<OwnedFd>,
    taps: Vec<OwnedFd>,
    incoming: Option<OwnedFd>,
    agent: Option<OwnedFd>,
}

/// What the daemon hands to a VM's process.
pub struct Handed {
    /// An open tap for each network card.
    pub taps: Vec<OwnedFd>,
    /// Where its guest comes in, if it runs elsewhere.
    pub incoming: Option<OwnedFd>,
}

/// Makes a [`VmError::System`] of what was tried.
pub fn system(what: impl Into<String>) -> impl FnOnce(io::Error) -> VmError {
    let what = what.into();
    move |source| VmError::System { what, source }
}

/// A program as the daemon finds it in its own `PATH`. Left to the start itself, it would be looked for as the VM's
/// user, and a directory that only root may enter would make a missing program a forbidden one.
pub fn find(program: &Path) -> Option<PathBuf> {
    if program.components().count() > 1 {
        return program.exists().then(|| program.to_owned());
    }
    let path = std::env::var_os("PATH").unwrap_or_else(|| "/usr/bin:/bin".into());
    std::env::split_paths(&path)
        .map(|directory| directory.join(program))
        .find(|file| file.is_file())
}

/// Starts `program` and writes its launch record. What fails on the way leaves no process.
///
/// # Errors
/// As the variants of [`VmError`] tell.
pub fn spawn(
    program: &Path,
    launch: &VmLaunch,
    run: &Path,
    log: &Path,
    handed: Handed,
) -> Result<Process, VmError> {
    let directory = run_dir::prepare(run, &launch.vm).map_err(system(format!(
        "the directory {} cannot be prepared",
        run.join(&launch.vm).display()
    )))?;
    let opened = open(launch, &directory, log, handed)?;
    let fds = Descriptors {
        qmp: opened.qmp.as_raw_fd(),
        console: opened.console.as_raw_fd(),
        log: opened.log.as_raw_fd(),
        kvm: opened.kvm.as_ref().map(AsRawFd::as_raw_fd),
        taps: opened.taps.iter().map(AsRawFd::as_raw_fd).collect(),
        incoming: opened.incoming.as_ref().map(AsRawFd::as_raw_fd),
        agent: opened.agent.as_ref().map(AsRawFd::as_raw_fd),
    };
    let inherited = fds.all();
    let mut command = Command::new(find(program).ok_or(VmError::NoQemu)?);
    command
        .args(arguments(launch, &fds))
        // Nothing of the daemon's environment is QEMU's business.
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_else(|| "/usr/bin:/bin".into()))
        .env(DIRECTORY, &directory)
        .current_dir("/")
        .uid(launch.uid)
        .gid(launch.uid)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(opened.messages);
    // SAFETY: setsid and fcntl are async-signal-safe and touch only the child. The descriptors keep their numbers:
    // giving them others could close one that the child still needs.
    unsafe {
        command.pre_exec(move || {
            nix::unistd::setsid()?;
            for fd in &inherited {
                if libc::fcntl(*fd, libc::F_SETFD, 0) < 0 {
                    return Err(io::Error::last_os_error());
                }
            }
            Ok(())
        });
    }
    let mut child =
        command.spawn().map_err(system(format!("QEMU of {} cannot be started", launch.vm)))?;
    let held = i32::try_from(child.id())
        .map_err(|_| io::Error::from(io::ErrorKind::InvalidData))
        .and_then(Process::of_child)
        .and_then(|process| record::write(&directory, launch, process.pid()).map(|()| process));
    held.map_err(|source| {
        // It cannot have run its guest. Both fail only when it has ended.
        let _ = child.kill();
        let _ = child.wait();
        let what = format!("the launch of {} cannot be recorded", launch.vm);
        VmError::System { what, source }
    })
}

fn open(
    launch: &VmLaunch,
    directory: &Path,
    log: &Path,
    Handed { taps, incoming }: Handed,
) -> Result<Opened, VmError> {
    let at = |name: &str| directory.join(name);
    let socket = |name: &str| {
        run_dir::listen(&at(name))
            .map_err(system(format!("the socket {} cannot be made", at(name).display())))
    };
    let messages = run_dir::remove(&at(run_dir::MESSAGES))
        .and_then(|()| run_dir::append(&at(run_dir::MESSAGES)))
        .map_err(system(format!("{} cannot be written", at(run_dir::MESSAGES).display())))?;
    let logs = log.parent().unwrap_or(Path::new("/"));
    let log = std::fs::create_dir_all(logs)
        .and_then(|()| run_dir::append(log))
        .map_err(system(format!("the console's log {} cannot be written", log.display())))?;
    let kvm = match launch.accel {
        Accel::Kvm => Some(open_kvm().map_err(system(format!(
            "/dev/kvm cannot be opened for {}; load kvm_intel or kvm_amd, or set HAVEN_ACCEL=tcg for the daemon",
            launch.vm
        )))?),
        Accel::Tcg => None,
    };
    Ok(Opened {
        qmp: socket(run_dir::QMP_SOCKET)?,
        console: socket(run_dir::CONSOLE_SOCKET)?,
        log,
        messages,
        kvm,
        taps,
        incoming,
        agent: launch.agent.then(|| socket(run_dir::AGENT_SOCKET)).transpose()?,
    })
}

/// Opens the taps of a VM. One may still be busy although the QEMU that had it is gone: the kernel closes what an
/// io_uring holds only some time after the process' end, and nothing tells when.
///
/// # Errors
/// When there is none of that name, or somebody holds it.
pub async fn open_taps(launch: &VmLaunch) -> Result<Vec<OwnedFd>, VmError> {
    let until = tokio::time::Instant::now() + TAP_PATIENCE;
    let mut taps = Vec::new();
    for nic in &launch.nics {
        let tap = loop {
            match open_tap(&nic.tap) {
                Err(error)
                    if error.kind() == io::ErrorKind::ResourceBusy
                        && tokio::time::Instant::now() < until =>
                {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                other => break other,
            }
        };
        taps.push(tap.map_err(system(format!(
            "the tap {} of {} cannot be opened; if it is busy, another process holds it",
            nic.tap, launch.vm
        )))?);
    }
    Ok(taps)
}

/// Opens an existing tap for QEMU, which has no right to do so itself.
///
/// # Errors
/// As the system tells.
pub fn open_tap(name: &str) -> io::Result<OwnedFd> {
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
    // The guard takes the cards of what it ends down.
    crate::network::tap::set_up(name)?;
    Ok(file.into())
}

/// The last that QEMU said, and what a person can do about it.
#[must_use]
pub fn last_words(directory: &Path) -> String {
    let said = std::fs::read(directory.join(run_dir::MESSAGES)).unwrap_or_default();
    let said = String::from_utf8_lossy(&said);
    let mut last: Vec<&str> = said.lines().rev().take(3).collect();
    last.reverse();
    let said = last.join("; ");
    if said.is_empty() {
        return "it said nothing; the kernel's log may tell (`dmesg`)".into();
    }
    let hints = [
        (
            "KVM kernel module",
            "KVM does not work on this host; set HAVEN_ACCEL=tcg for the daemon, or load the module kvm_intel or kvm_amd",
        ),
        (
            "Unknown driver 'rbd'",
            "QEMU of this host knows no RBD; install the package qemu-block-extra in the same version",
        ),
        (
            "Invalid password",
            "the key that the cluster has of this disk does not open it; nothing was changed in it: the file is another disk's, or the record of its key was altered",
        ),
        (
            "Unknown driver 'nfs'",
            "QEMU of this host knows no NFS; install the package qemu-block-extra in the same version",
        ),
        (
            "Cannot allocate memory",
            "the host is short of memory; free some or place the VM elsewhere",
        ),
        (
            "Failed to get \"write\" lock",
            "another process has this disk open; end it, `lsof` names it",
        ),
        (
            "Permission denied",
            "the VM's unix user may not read this file; check its owner and folder",
        ),
        (
            "No such file",
            "a file of the VM is missing on this host; `haven explain` tells which disk or image",
        ),
    ];
    match hints.iter().find(|(sign, _)| said.contains(sign)) {
        Some((_, hint)) => format!("{said} ({hint})"),
        None => said,
    }
}

#[cfg(test)]
mod tests {
    use super::last_words;

    #[test]
    fn what_qemu_said_comes_with_a_hint() {
        let directory = tempfile::tempdir().unwrap();
        assert!(last_words(directory.path()).contains("dmesg"));
        let text = "a\nb\nc\nqemu: -blockdev x: Failed to get \"write\" lock\nIs another process using it?\n";
        std::fs::write(directory.path().join("stderr"), text).unwrap();
        let said = last_words(directory.path());
        assert!(said.starts_with("c; qemu") && said.contains("`lsof` names it"), "{said}");
    }
}
