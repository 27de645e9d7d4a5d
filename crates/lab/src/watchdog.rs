//! The simulated watchdog of each lab host: a pipe that its guard writes to, and a thread outside that cuts and
//! restores the host's power when nothing was written for two seconds.
//!
//! It works as a hardware watchdog does: the first byte arms it, a `V` disarms it, and it goes on counting while its
//! host is paused or its guard is dead. `haven lab watchdog off` takes it out, to see what the guard does alone.

use crate::lab::Lab;
use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::{
    fs::{File, OpenOptions},
    io::Read,
    os::{fd::AsFd, unix::fs::OpenOptionsExt},
    path::PathBuf,
    time::{Duration, Instant},
};

/// Without a byte for so long the host is reset.
const TIMEOUT: Duration = Duration::from_secs(2);

/// A host's pipe.
#[must_use]
pub fn pipe(lab: &Lab, host: &str) -> PathBuf {
    lab.host_dir(host).join("watchdog")
}

fn off_mark(lab: &Lab, host: &str) -> PathBuf {
    lab.host_dir(host).join("watchdog.off")
}

/// Makes a host's pipe; fine when it is there.
///
/// # Errors
/// When its directory is not writable.
pub fn make(lab: &Lab, host: &str) -> Result<PathBuf> {
    let path = pipe(lab, host);
    std::fs::create_dir_all(lab.host_dir(host))?;
    if !path.exists() {
        let mode = nix::sys::stat::Mode::from_bits_truncate(0o600);
        nix::unistd::mkfifo(&path, mode)
            .with_context(|| format!("{} could not be made", path.display()))?;
    }
    Ok(path)
}

/// Takes a host's watchdog out, or puts it back.
///
/// # Errors
/// When the lab has no such host.
pub fn set(lab: &Lab, host: &str, on: bool) -> Result<()> {
    lab.host(host)?;
    let mark = off_mark(lab, host);
    if on {
        if mark.exists() {
            std::fs::remove_file(&mark)?;
        }
        return Ok(());
    }
    std::fs::write(&mark, "").with_context(|| format!("{} is not writable", mark.display()))
}

/// Watches over one host for ever.
///
/// # Errors
/// When its pipe cannot be opened.
pub fn keep(lab: &Lab, host: &str) -> Result<()> {
    let path = make(lab, host)?;
    // Opened for both directions, so that it has no end when the guard's side closes.
    let mut bytes = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(nix::libc::O_NONBLOCK)
        .open(&path)
        .with_context(|| format!("{} could not be opened", path.display()))?;
    let mut fed: Option<Instant> = None;
    loop {
        let left = fed.map(|at| TIMEOUT.saturating_sub(at.elapsed()));
        if left.is_some_and(|left| left.is_zero()) {
            fed = None;
            if !off_mark(lab, host).exists() && lab.init(host).is_some() {
                reset(lab, host);
                drain(&mut bytes);
            }
            continue;
        }
        wait(&bytes, left);
        match drain(&mut bytes) {
            Some(b'V') => fed = None,
            Some(_) => fed = Some(Instant::now()),
            None => {}
        }
    }
}

fn wait(bytes: &File, left: Option<Duration>) {
    let timeout = match left {
        None => PollTimeout::NONE,
        Some(left) => {
            PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::ZERO)
        }
    };
    let _ = poll(&mut [PollFd::new(bytes.as_fd(), PollFlags::POLLIN)], timeout);
}

/// The last byte written, if any was.
fn drain(bytes: &mut File) -> Option<u8> {
    let mut last = None;
    let mut buffer = [0; 256];
    while let Ok(count @ 1..) = bytes.read(&mut buffer) {
        last = Some(buffer[count - 1]);
    }
    last
}

fn reset(lab: &Lab, host: &str) {
    let done = lab.power_off(host).and_then(|()| lab.power_on(host));
    let log = lab.host_dir(host).join("watchdog.log");
    let line = match done {
        Ok(()) => "reset: not fed for 2 s\n".to_owned(),
        Err(error) => format!("reset failed: {error:#}\n"),
    };
    if let Ok(mut file) = OpenOptions::new().create(true).append(true).open(log) {
        use std::io::Write;
        let _ = file.write_all(line.as_bytes());
    }
}
