//! The guard's process: one loop over one poll, on memory that was all taken at the start.

use super::{
    EXTEND, REFUSALS, REGISTER, Reply, Request, START_MARGIN_NS, STATUS, UNREGISTER, boottime_ns,
    bytes_of, read_as, start_time,
};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        mman::{MapFlags, MlockAllFlags, ProtFlags, mlockall, mmap},
        socket::{
            AddressFamily, Backlog, MsgFlags, SockFlag, SockType, UnixAddr, accept4, bind, listen,
            recv, send, socket,
        },
    },
};
use std::{
    fs::OpenOptions,
    io::Write,
    num::NonZeroUsize,
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd},
    os::unix::fs::OpenOptionsExt,
    path::PathBuf,
};

/// VMs that one guard can watch over.
pub const SLOTS: usize = 1024;
/// A watchdog resets the host when it is not fed for so long, nanoseconds.
const WATCHDOG_NS: u64 = 2_000_000_000;
/// How much later than the guard's deadline the watchdog may fire; less than `T - D`, nanoseconds.
const WATCHDOG_SLACK_NS: u64 = 400_000_000;
/// How often the watchdog is fed, milliseconds.
const FEED_MS: u16 = 250;
/// The deadline is never moved further ahead than this, nanoseconds.
const FURTHEST_NS: u64 = 10_000_000_000;

/// What the guard is started with.
#[derive(Clone, Debug)]
pub struct GuardOptions {
    /// Where its socket and its state stand; must be a tmpfs.
    pub run_dir: PathBuf,
    /// The watchdog device, if there is one.
    pub watchdog: Option<PathBuf>,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Slot {
    used: u32,
    pid: i32,
    start: u64,
    vm: [u8; 64],
    tap: [u8; 16],
}

#[repr(C)]
struct State {
    deadline_ns: u64,
    fired: u32,
    padding: u32,
    slots: [Slot; SLOTS],
}

struct Process {
    state: &'static mut State,
    pidfds: [RawFd; SLOTS],
    watchdog: Option<std::fs::File>,
}

/// Runs the guard; returns only when it cannot.
///
/// # Errors
/// What the system said when the socket, the state or the memory could not be had.
pub fn run(options: &GuardOptions) -> std::io::Result<()> {
    std::fs::create_dir_all(&options.run_dir)?;
    let state = map_state(&options.run_dir.join("guard.state"))?;
    let path = options.run_dir.join("guard.sock");
    let _ = std::fs::remove_file(&path);
    let listener = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
    bind(listener.as_raw_fd(), &UnixAddr::new(&path)?)?;
    listen(&listener, Backlog::new(8)?)?;
    let watchdog = match &options.watchdog {
        None => None,
        Some(path) => {
            Some(OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(path)?)
        }
    };
    real_time();
    let mut process = Process { state, pidfds: [-1; SLOTS], watchdog };
    process.reopen();
    process.serve(&listener)
}

fn map_state(path: &std::path::Path) -> std::io::Result<&'static mut State> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)?;
    let size = NonZeroUsize::new(size_of::<State>()).expect("the state is not empty");
    file.set_len(size.get() as u64)?;
    let flags = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: a fresh shared mapping of a file of exactly this size; every bit pattern is a valid `State`, and this
    // process holds the only reference to it for all its life.
    unsafe {
        let address = mmap(None, size, flags, MapFlags::MAP_SHARED, &file, 0)?;
        Ok(address.cast::<State>().as_mut())
    }
}

/// Memory that is never paged out, and a turn before everything else. A machine that refuses is told, not failed.
fn real_time() {
    if let Err(error) = mlockall(MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE) {
        tracing::warn!(%error, "the guard's memory is not locked; raise LimitMEMLOCK");
    }
    let priority = libc::sched_param { sched_priority: 50 };
    // SAFETY: a plain system call on this process with a valid parameter.
    if unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const priority) } != 0 {
        let error = std::io::Error::last_os_error();
        tracing::warn!(%error, "the guard does not run at real-time priority");
    }
}

fn pidfd_open(pid: i32) -> RawFd {
    // SAFETY: a plain system call; a negative result is an error and is handled as "gone".
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    RawFd::try_from(fd).unwrap_or(-1)
}

impl Process {
    /// Takes over what a guard before this one watched over.
    fn reopen(&mut self) {
        // A deadline of another boot says nothing about this one.
        if self.state.deadline_ns > boottime_ns() + FURTHEST_NS {
            self.state.deadline_ns = 0;
        }
        for i in 0..SLOTS {
            let slot = self.state.slots[i];
            if slot.used == 0 {
                continue;
            }
            let fd = pidfd_open(slot.pid);
            if fd >= 0 && start_time(slot.pid) == Some(slot.start) {
                self.pidfds[i] = fd;
            } else {
                self.clear(i);
            }
        }
    }

    fn clear(&mut self, i: usize) {
        self.state.slots[i].used = 0;
        if self.pidfds[i] >= 0 {
            // SAFETY: this descriptor was opened by `pidfd_open` and nobody else has it.
            drop(unsafe { OwnedFd::from_raw_fd(self.pidfds[i]) });
            self.pidfds[i] = -1;
        }
    }

    fn serve(&mut self, listener: &OwnedFd) -> std::io::Result<()> {
        let mut connection: Option<OwnedFd> = None;
        loop {
            self.act();
            let timeout = self.timeout();
            let (mut called, mut spoken) = (false, false);
            {
                let mut fds = [
                    PollFd::new(listener.as_fd(), PollFlags::POLLIN),
                    PollFd::new(connection.as_ref().unwrap_or(listener).as_fd(), PollFlags::POLLIN),
                ];
                let count = if connection.is_some() { 2 } else { 1 };
                if poll(&mut fds[..count], timeout).is_ok() {
                    called = fds[0].any().unwrap_or(false);
                    spoken = count == 2 && fds[1].any().unwrap_or(false);
                }
            }
            if spoken
                && let Some(daemon) = &connection
                && !self.answer(daemon)
            {
                connection = None;
            }
            // The newest daemon wins: the one before it is gone or about to be.
            if called && let Ok(fd) = accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC) {
                // SAFETY: the descriptor was just returned by accept4 and nobody else has it.
                connection = Some(unsafe { OwnedFd::from_raw_fd(fd) });
            }
        }
    }

    /// Sleeps no longer than to the deadline, nor than the watchdog can wait.
    fn timeout(&self) -> PollTimeout {
        let now = boottime_ns();
        let live = self.live() > 0;
        let to_deadline = match self.state.deadline_ns {
            deadline if live && deadline > now => (deadline - now).div_ceil(1_000_000),
            _ if live => 2,
            _ => 60_000,
        };
        let feed = if self.watchdog.is_some() { u64::from(FEED_MS) } else { u64::MAX };
        PollTimeout::from(u16::try_from(to_deadline.min(feed)).unwrap_or(u16::MAX))
    }

    fn live(&self) -> u32 {
        self.state.slots.iter().map(|slot| slot.used).sum()
    }

    /// Everything that time asks for: forget what ended, fire, feed.
    fn act(&mut self) {
        for i in 0..SLOTS {
            if self.state.slots[i].used != 0 && self.ended(i) {
                self.clear(i);
            }
        }
        let now = boottime_ns();
        let live = self.live();
        if live > 0 && now >= self.state.deadline_ns {
            self.fire();
        }
        let in_time = now + WATCHDOG_NS <= self.state.deadline_ns + WATCHDOG_SLACK_NS;
        if (live == 0 || in_time)
            && let Some(watchdog) = &mut self.watchdog
        {
            let _ = watchdog.write(b"1");
        }
    }

    fn ended(&self, i: usize) -> bool {
        // SAFETY: the descriptor is open for as long as its slot is used.
        let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(self.pidfds[i]) };
        let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|n| n > 0)
    }

    fn fire(&mut self) {
        self.state.fired += 1;
        for i in 0..SLOTS {
            if self.state.slots[i].used == 0 {
                continue;
            }
            // SAFETY: a plain system call on an open pidfd; no signal info is passed.
            unsafe {
                libc::syscall(
                    libc::SYS_pidfd_send_signal,
                    self.pidfds[i],
                    libc::SIGKILL,
                    std::ptr::null::<libc::siginfo_t>(),
                    0,
                );
            }
            link_down(&self.state.slots[i].tap);
        }
    }

    /// Answers one request; false when the daemon is gone.
    fn answer(&mut self, daemon: &OwnedFd) -> bool {
        let mut packet = [0u8; size_of::<Request>()];
        let Ok(length) = recv(daemon.as_raw_fd(), &mut packet, MsgFlags::MSG_DONTWAIT) else {
            return false;
        };
        let Some(request) = read_as::<Request>(&packet[..length]) else {
            return false;
        };
        let refusal = match request.kind {
            EXTEND => {
                let furthest = boottime_ns() + FURTHEST_NS;
                let deadline = request.deadline_ns.min(furthest);
                // A deadline that has passed is not moved on while something it should have ended is left.
                let fired = self.live() > 0 && boottime_ns() >= self.state.deadline_ns;
                if deadline > self.state.deadline_ns && !fired {
                    self.state.deadline_ns = deadline;
                }
                0
            }
            REGISTER => self.register(&request),
            UNREGISTER => {
                for i in 0..SLOTS {
                    if self.state.slots[i].used != 0
                        && self.state.slots[i].vm == request.vm
                        && self.ended(i)
                    {
                        self.clear(i);
                    }
                }
                0
            }
            _ => 0,
        };
        debug_assert!((refusal as usize) < REFUSALS.len() && STATUS > 0, "refusals have words");
        let reply = Reply {
            refusal,
            live: self.live(),
            fired: self.state.fired,
            padding: 0,
            deadline_ns: self.state.deadline_ns,
        };
        send(daemon.as_raw_fd(), bytes_of(&reply), MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL)
            .is_ok()
    }

    fn register(&mut self, request: &Request) -> u32 {
        if boottime_ns() + START_MARGIN_NS > self.state.deadline_ns {
            return 1;
        }
        let Some(i) = (0..SLOTS).find(|i| self.state.slots[*i].used == 0) else {
            return 2;
        };
        let fd = pidfd_open(request.pid);
        let Some(start) = start_time(request.pid).filter(|_| fd >= 0) else {
            return 3;
        };
        self.pidfds[i] = fd;
        let (vm, tap) = (request.vm, request.tap);
        self.state.slots[i] = Slot { used: 1, pid: request.pid, start, vm, tap };
        0
    }
}

/// Takes a network card down, so that not one more packet leaves. Best effort: the kill is what counts.
fn link_down(tap: &[u8; 16]) {
    if tap[0] == 0 {
        return;
    }
    // SAFETY: a zeroed ifreq is valid; the name is shorter than its field and ends with zero; the socket is closed.
    unsafe {
        let fd = libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0);
        if fd >= 0 {
            let mut request: libc::ifreq = std::mem::zeroed();
            for (to, from) in request.ifr_name.iter_mut().zip(tap.iter().take(15)) {
                *to = *from as libc::c_char;
            }
            libc::ioctl(fd, libc::SIOCSIFFLAGS, &raw mut request);
            libc::close(fd);
        }
    }
}
