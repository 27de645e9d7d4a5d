//! A process, held by a descriptor of its own (pidfd): a signal reaches it or nobody, never a later process of the
//! same number. A failure to look (no descriptors left) is an error and is never taken for the process' end.

use nix::sys::wait::WaitPidFlag;
use std::{
    io,
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
    path::Path,
};
use tokio::io::{Interest, unix::AsyncFd};

/// What `/proc/<pid>/stat` tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stat {
    /// When it started, clock ticks since boot.
    pub start_time: u64,
    /// It has ended and waits to be reaped.
    pub ended: bool,
}

/// Whether an error only says that there is no such process.
#[must_use]
pub fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

/// Looks at a process under `proc`, which is `/proc` but for tests; nothing when there is none.
///
/// # Errors
/// When it cannot be looked at, which says nothing about it.
pub fn look(proc: &Path, pid: i32) -> io::Result<Option<Stat>> {
    let text = match std::fs::read(proc.join(pid.to_string()).join("stat")) {
        Ok(text) => text,
        Err(error) if is_gone(&error) => return Ok(None),
        Err(error) => return Err(error),
    };
    let text = String::from_utf8_lossy(&text);
    // The name may hold anything, so the fields are counted from behind its bracket.
    let read = || {
        let (_, rest) = text.rsplit_once(')')?;
        let mut fields = rest.split_whitespace();
        let ended = matches!(fields.next()?, "Z" | "X");
        Some(Stat { start_time: fields.nth(18)?.parse().ok()?, ended })
    };
    read().map(Some).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// A process that ran when it was found.
#[derive(Debug)]
pub struct Process {
    pid: i32,
    fd: AsyncFd<OwnedFd>,
}

impl Process {
    /// Takes hold of a child that was not reaped yet.
    ///
    /// # Errors
    /// When there is no such process, or no descriptor left.
    pub fn of_child(pid: i32) -> io::Result<Self> {
        // SAFETY: a plain system call; a negative result means that it failed.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        let fd = i32::try_from(fd).map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just opened and nobody else has it.
        let owned = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: the descriptor is owned by what is registered and is not closed before it.
        let fd = unsafe { AsyncFd::register_with_interest(owned, Interest::READABLE) };
        Ok(Self { pid, fd: fd? })
    }

    /// Takes hold of the process that started at `start_time`; nothing when it has ended.
    ///
    /// # Errors
    /// When it cannot be looked at, which says nothing about it.
    pub fn find(pid: i32, start_time: u64) -> io::Result<Option<Self>> {
        let held = match Self::of_child(pid) {
            Ok(held) => held,
            Err(error) if is_gone(&error) => return Ok(None),
            Err(error) => return Err(error),
        };
        // Looked at while it is held: what is seen now is what is held.
        let same = look(Path::new("/proc"), pid)?
            .is_some_and(|stat| stat.start_time == start_time && !stat.ended);
        Ok(same.then_some(held))
    }

    /// Its number.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Ends it at once; fine when it has ended.
    pub fn kill(&self) {
        // SAFETY: a plain system call on a descriptor that is open; no signal information is passed.
        unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.fd.get_ref().as_raw_fd(),
                libc::SIGKILL,
                std::ptr::null::<libc::siginfo_t>(),
                0,
            );
        }
    }

    /// Resolves when it has ended, and reaps it if it is a child of this daemon.
    ///
    /// # Errors
    /// When the descriptor cannot be waited for (the runtime ends).
    pub async fn ended(&self) -> io::Result<()> {
        let _ready = self.fd.readable().await?;
        // Not a child, or reaped already: both fine. By its descriptor, since its number may be another's by now.
        let _ = nix::sys::wait::waitid(
            nix::sys::wait::Id::PIDFd(self.fd.get_ref().as_fd()),
            WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG,
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::{Process, look};
    use std::path::Path;

    #[tokio::test]
    async fn a_process_is_held_until_its_end_and_not_mistaken_for_another() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let stat = look(Path::new("/proc"), pid).unwrap().unwrap();
        assert!(Process::find(pid, stat.start_time + 1).unwrap().is_none());
        let held = Process::find(pid, stat.start_time).unwrap().unwrap();
        let second = Process::of_child(pid).unwrap();
        held.kill();
        held.ended().await.unwrap();
        second.ended().await.unwrap();
        assert_eq!(look(Path::new("/proc"), pid).unwrap(), None);
        assert!(Process::find(pid, stat.start_time).unwrap().is_none());
        held.kill();
        // It was reaped already.
        assert!(child.wait().is_err());
    }

    #[test]
    fn what_cannot_be_read_is_not_taken_for_gone() {
        let proc = tempfile::tempdir().unwrap();
        assert_eq!(look(proc.path(), 7).unwrap(), None);
        std::fs::create_dir_all(proc.path().join("7")).unwrap();
        std::fs::write(proc.path().join("7/stat"), "nonsense").unwrap();
        assert!(look(proc.path(), 7).is_err());
        let line = "7 (a) b) Z 1 7 7 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 4242 0";
        std::fs::write(proc.path().join("7/stat"), line).unwrap();
        let stat = look(proc.path(), 7).unwrap().unwrap();
        assert!(stat.ended);
        assert_eq!(stat.start_time, 4242);
    }
}
