//! The guard's process: one loop over one poll, on memory that was all taken at the start.

use super::watchdog::Watchdog;
use super::{
    EXTEND, HOLD, REFUSALS, REGISTER, RELEASE, Reply, Request, START_MARGIN_NS, STATUS, UNREGISTER,
    boottime_ns, bytes_of, read_as, start_time,
};
use nix::{
    fcntl::{Flock, FlockArg},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        mman::{MapFlags, MlockAllFlags, ProtFlags, mlockall, mmap},
        resource::{Resource, setrlimit},
        signal::{SigSet, Signal},
        signalfd::{SfdFlags, SignalFd},
        socket::{
            AddressFamily, Backlog, MsgFlags, SockFlag, SockType, UnixAddr, accept4, bind, listen,
            recv, send, socket,
        },
        time::TimeSpec,
        timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags},
    },
};
use std::{
    fs::{File, OpenOptions, Permissions},
    num::NonZeroUsize,
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::PathBuf,
    time::Duration,
};

/// VMs that one guard can watch over.
pub const SLOTS: usize = 1024;
/// Service addresses that one guard can take from the host.
pub const LABELS: usize = 256;
/// The taps of one VM: its first, and those that differ from it in the last digit.
const TAPS: u8 = 8;
/// While something that it killed has not ended yet it looks again after this, nanoseconds.
const AGAIN_NS: u64 = 2_000_000;
/// Descriptors: a pidfd for each VM, and a few more.
const DESCRIPTORS: u64 = 4096;
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
    /// The session under which it was last extended.
    session: u64,
    /// The deadline at which it fired last.
    fired_at_ns: u64,
    fired: u32,
    padding: u32,
    slots: [Slot; SLOTS],
    /// Labels of the service addresses; the first byte of a free one is 0.
    labels: [[u8; 16]; LABELS],
}

struct Process {
    state: &'static mut State,
    pidfds: [RawFd; SLOTS],
    watchdog: Option<Watchdog>,
    timer: TimerFd,
    ending: SignalFd,
}

/// What a turn of the loop found.
#[derive(Default)]
struct Woken {
    called: bool,
    spoken: bool,
    ending: bool,
}

/// Runs the guard; returns when it was told to end and watches over nothing, or when it cannot run.
///
/// # Errors
/// What the system said when the lock, the socket, the state or the memory could not be had.
pub fn run(options: &GuardOptions) -> std::io::Result<()> {
    std::fs::create_dir_all(&options.run_dir)?;
    let _lock = lock(&options.run_dir.join("guard.lock"))?;
    let _ = setrlimit(Resource::RLIMIT_NOFILE, DESCRIPTORS, DESCRIPTORS);
    let state = map_state(&options.run_dir.join("guard.state"))?;
    let path = options.run_dir.join("guard.sock");
    let _ = std::fs::remove_file(&path);
    let listener = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
    bind(listener.as_raw_fd(), &UnixAddr::new(&path)?)?;
    std::fs::set_permissions(&path, Permissions::from_mode(0o600))?;
    listen(&listener, Backlog::new(8)?)?;
    let watchdog = options.watchdog.as_deref().and_then(Watchdog::open);
    real_time();
    let timer = TimerFd::new(ClockId::CLOCK_BOOTTIME, TimerFlags::TFD_CLOEXEC)?;
    let ending = ending()?;
    let mut process = Process { state, pidfds: [-1; SLOTS], watchdog, timer, ending };
    process.reopen();
    process.serve(&listener)
}

/// One guard per host: a second one would take the socket and the state from the first.
fn lock(path: &std::path::Path) -> std::io::Result<Flock<File>> {
    let file =
        OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path)?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| {
        std::io::Error::new(
            std::io::Error::from(errno).kind(),
            format!("another guard holds {}; only one runs on a host", path.display()),
        )
    })
}

/// SIGTERM and SIGINT come as readable descriptors, so that they can wait while VMs live.
fn ending() -> std::io::Result<SignalFd> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals.thread_block()?;
    Ok(SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?)
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
            if start_time(slot.pid) != Some(slot.start) {
                self.clear(i);
                continue;
            }
            self.pidfds[i] = pidfd_open(slot.pid);
            if self.pidfds[i] < 0 && start_time(slot.pid) == Some(slot.start) {
                // It lives and cannot be held: better ended now than running on with nobody to end it.
                let _ =
                    nix::sys::signal::kill(nix::unistd::Pid::from_raw(slot.pid), Signal::SIGKILL);
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
        let mut told_to_end = false;
        loop {
            let next_ns = self.act();
            if told_to_end && self.live() == 0 && !self.holds() {
                if let Some(watchdog) = &mut self.watchdog {
                    watchdog.disarm();
                }
                return Ok(());
            }
            self.set_timer(next_ns);
            let woken = self.wait(listener, connection.as_ref());
            if woken.ending && matches!(self.ending.read_signal(), Ok(Some(_))) {
                told_to_end = true;
                if self.live() > 0 {
                    tracing::warn!("told to end: this guard stays until the last VM has ended");
                }
            }
            if woken.spoken
                && let Some(daemon) = &connection
                && !self.answer(daemon)
            {
                connection = None;
            }
            // The newest daemon wins: the one before it is gone or about to be.
            if woken.called
                && let Ok(fd) = accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC)
            {
                // SAFETY: the descriptor was just returned by accept4 and nobody else has it.
                connection = Some(unsafe { OwnedFd::from_raw_fd(fd) });
            }
        }
    }

    /// Sleeps until somebody speaks or the timer rings.
    fn wait(&self, listener: &OwnedFd, connection: Option<&OwnedFd>) -> Woken {
        let mut fds = [
            PollFd::new(self.timer.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.ending.as_fd(), PollFlags::POLLIN),
            PollFd::new(listener.as_fd(), PollFlags::POLLIN),
            PollFd::new(connection.unwrap_or(listener).as_fd(), PollFlags::POLLIN),
        ];
        let count = if connection.is_some() { 4 } else { 3 };
        if poll(&mut fds[..count], PollTimeout::NONE).is_err() {
            return Woken::default();
        }
        let any = |i: usize| i < count && fds[i].any().unwrap_or(false);
        Woken { ending: any(1), called: any(2), spoken: any(3) }
    }

    /// By the clock that goes on while the machine is suspended: on waking the timer has rung already.
    fn set_timer(&self, at_ns: Option<u64>) {
        let result = match at_ns {
            None => self.timer.unset(),
            Some(at) => {
                let at = TimeSpec::from_duration(Duration::from_nanos(at.max(1)));
                self.timer.set(Expiration::OneShot(at), TimerSetTimeFlags::TFD_TIMER_ABSTIME)
            }
        };
        // Cannot fail with a valid descriptor and time; a guard without its timer would be no guard.
        if result.is_err() {
            std::process::abort();
        }
    }

    fn live(&self) -> u32 {
        self.state.slots.iter().map(|slot| slot.used).sum()
    }

    /// Forgets what ended.
    fn sweep(&mut self) {
        for i in 0..SLOTS {
            if self.state.slots[i].used != 0 && self.ended(i) {
                self.clear(i);
            }
        }
    }

    /// Everything that time asks for: forget what ended, fire, feed. When to look again, `CLOCK_BOOTTIME` ns.
    fn act(&mut self) -> Option<u64> {
        self.sweep();
        let now = boottime_ns();
        let passed = now >= self.state.deadline_ns;
        if passed {
            self.fire();
        }
        let live = self.live() > 0;
        let due = match (live || self.holds(), passed) {
            (false, _) => None,
            (true, false) => Some(self.state.deadline_ns),
            (true, true) => Some(now + AGAIN_NS),
        };
        let deadline_ns = live.then_some(self.state.deadline_ns);
        let feed = self.watchdog.as_mut().map(|watchdog| watchdog.feed(now, deadline_ns));
        due.into_iter().chain(feed).min()
    }

    fn ended(&self, i: usize) -> bool {
        // SAFETY: the descriptor is open for as long as its slot is used.
        let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(self.pidfds[i]) };
        let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|n| n > 0)
    }

    /// Whether there are addresses that it must take from the host.
    fn holds(&self) -> bool {
        self.state.labels.iter().any(|label| label[0] != 0)
    }

    /// Ends all VMs and takes all addresses from the host.
    fn fire(&mut self) {
        if self.live() == 0 && !self.holds() {
            return;
        }
        if self.state.fired_at_ns != self.state.deadline_ns || self.state.fired == 0 {
            self.state.fired_at_ns = self.state.deadline_ns;
            self.state.fired += 1;
        }
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
        }
        for i in 0..SLOTS {
            if self.state.slots[i].used != 0 {
                links_down(self.state.slots[i].tap);
            }
        }
        for label in &mut self.state.labels {
            if label[0] != 0 {
                // Of an alias the kernel removes the address.
                link_down(label);
                *label = [0; 16];
            }
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
            EXTEND => self.extend(request.session, request.deadline_ns),
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
            HOLD => self.hold(request.tap),
            RELEASE => {
                for label in &mut self.state.labels {
                    if *label == request.tap {
                        *label = [0; 16];
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

    /// A deadline that has passed is not moved on while something it should have ended is left.
    fn extend(&mut self, session: u64, deadline_ns: u64) -> u32 {
        self.sweep();
        let now = boottime_ns();
        if now >= self.state.deadline_ns {
            self.fire();
        }
        if self.live() > 0 && now >= self.state.deadline_ns {
            return 4;
        }
        self.state.session = session;
        self.state.deadline_ns = deadline_ns.min(now + FURTHEST_NS).max(self.state.deadline_ns);
        0
    }

    fn hold(&mut self, wanted: [u8; 16]) -> u32 {
        // Without its second half it would be the name of a card, and that card would be taken down.
        let colon = wanted.iter().position(|byte| *byte == b':');
        let end = wanted.iter().position(|byte| *byte == 0);
        if !matches!((colon, end), (Some(colon), Some(end)) if colon > 0 && end > colon + 1) {
            return 7;
        }
        if boottime_ns() + START_MARGIN_NS > self.state.deadline_ns {
            return 1;
        }
        if self.state.labels.contains(&wanted) {
            return 0;
        }
        match self.state.labels.iter_mut().find(|label| label[0] == 0) {
            Some(free) => {
                *free = wanted;
                0
            }
            None => 6,
        }
    }

    fn register(&mut self, request: &Request) -> u32 {
        if boottime_ns() + START_MARGIN_NS > self.state.deadline_ns {
            return 1;
        }
        if request.session != self.state.session {
            return 5;
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

/// Takes a VM's network cards down, so that not one more packet leaves. Best effort: the kill is what counts.
fn links_down(mut tap: [u8; 16]) {
    let Some(last) = tap.iter().position(|byte| *byte == 0).and_then(|end| end.checked_sub(1))
    else {
        return;
    };
    for i in 0..TAPS {
        tap[last] = b'0' + i;
        link_down(&tap);
    }
}

fn link_down(tap: &[u8; 16]) {
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

#[cfg(test)]
mod tests {
    use super::FURTHEST_NS;

    #[test]
    fn systemd_lets_the_guard_stay_past_its_furthest_deadline() {
        let unit = include_str!("../../../../packaging/haven-guard.service");
        let patience_s: u64 = unit
            .lines()
            .find_map(|line| line.strip_prefix("TimeoutStopSec=")?.strip_suffix('s')?.parse().ok())
            .expect("the unit has a limit in seconds");
        assert!(patience_s * 1_000_000_000 > FURTHEST_NS);
    }
}
