//! The guard: a small separate process that stops every VM of the host, and takes the service addresses from it, if the
//! host's lease was not renewed in time (DESIGN.md section 4).
//!
//! ```text
//!   daemon ── extend(deadline), register(vm, pid) ──► guard ── at the deadline: SIGKILL by pidfd, taps down
//!          ── hold(address label) ────────────────►     ├───── at the deadline: the address is removed
//!                                                       └───── feeds the watchdog
//! ```
//!
//! What it promises: with its deadline passed, every registered process is killed within milliseconds, whatever the
//! daemon does; a guard that was killed and started again keeps deadline and processes, which stand in a file on a
//! tmpfs that it maps; a process is refused with less than a second to the deadline. It is locked in memory, runs at
//! real-time priority where that is allowed, and allocates nothing after its start.
//!
//! Rejected: a thread of the daemon (it would hang with it), and systemd's own watchdog (seconds, not milliseconds).

pub mod client;
pub mod fake;
pub mod nothing;
pub mod process;
mod watchdog;

use async_trait::async_trait;

/// Why the guard did not do something.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GuardError {
    /// It does not answer.
    #[error("the guard of this host does not answer; `haven-guard` must run beside the daemon")]
    Gone(#[source] std::io::Error),
    /// Too near to the deadline, too many VMs, or the process ended.
    #[error("the guard refuses to watch over {vm}: {why}")]
    Refused {
        /// Which VM.
        vm: String,
        /// A few words.
        why: &'static str,
    },
}

/// What the guard tells of itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuardStatus {
    /// `CLOCK_BOOTTIME` nanoseconds.
    pub deadline_ns: u64,
    /// Processes it watches over that have not ended.
    pub live: u32,
    /// How often it fired.
    pub fired: u32,
}

/// A process that is about to run a guest.
#[derive(Clone, Copy, Debug)]
pub struct Registration<'a> {
    /// The VM.
    pub vm: &'a str,
    /// Its process.
    pub pid: i32,
    /// The session in which its start began.
    pub session: u64,
    /// The VM's first network card; its others differ from it in the last digit.
    pub tap: &'a str,
}

/// The guard as the agent sees it.
#[async_trait]
pub trait Guard: Send + Sync {
    /// Moves the deadline on, never back, and tells the session under which that is so.
    async fn extend(&self, session: u64, deadline_ns: u64) -> Result<(), GuardError>;
    /// Puts a process under its watch. Must have returned before the guest runs. Refused unless the start began in
    /// the session of the last extension: one that began before the host was taken for lost must not end after it
    /// came back.
    async fn register(&self, start: &Registration<'_>) -> Result<(), GuardError>;
    /// Forgets a VM whose process has ended.
    async fn unregister(&self, vm: &str) -> Result<(), GuardError>;
    /// Has the address with this label, `CARD:WORD` of at most 15 bytes, taken from the host at the deadline. Fine when
    /// it is so already.
    async fn hold(&self, label: &str) -> Result<(), GuardError>;
    /// Forgets a label.
    async fn release(&self, label: &str) -> Result<(), GuardError>;
    /// How it stands.
    async fn status(&self) -> Result<GuardStatus, GuardError>;
    /// Ends a guard that does not answer, so that its supervisor starts it again; its state is kept.
    async fn replace(&self);
}

/// The least that must be left to the deadline when a process is registered, nanoseconds. The watchdog of a host that runs
/// nothing is fed whatever its deadline is; with less, one that stops right after its first start could be reset later
/// than another host takes over.
pub const START_MARGIN_NS: u64 = watchdog::TIMEOUT_NS - watchdog::SLACK_NS;

/// Longest name kept, bytes.
const NAME: usize = 64;

/// What is asked. Sent as one packet.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Request {
    kind: u32,
    pid: i32,
    deadline_ns: u64,
    session: u64,
    vm: [u8; NAME],
    tap: [u8; 16],
}

pub(crate) const EXTEND: u32 = 1;
pub(crate) const REGISTER: u32 = 2;
pub(crate) const UNREGISTER: u32 = 3;
pub(crate) const STATUS: u32 = 4;
pub(crate) const HOLD: u32 = 5;
pub(crate) const RELEASE: u32 = 6;

/// What is answered. Sent as one packet.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct Reply {
    /// 0: done; otherwise an index into [`REFUSALS`].
    refusal: u32,
    live: u32,
    fired: u32,
    padding: u32,
    deadline_ns: u64,
}

pub(crate) const REFUSALS: [&str; 8] = [
    "",
    "less than a second is left of this host's lease",
    "it watches over as many as it can",
    "its process has ended already",
    "this host's lease ran out, and what it ran is being ended",
    "its start began in an earlier session of this host",
    "it knows as many addresses as it can",
    "this is no label of an address",
];

fn text<const N: usize>(of: &str) -> [u8; N] {
    let mut bytes = [0; N];
    let length = of.len().min(N - 1);
    bytes[..length].copy_from_slice(&of.as_bytes()[..length]);
    bytes
}

/// The bytes of a plain struct.
pub(crate) fn bytes_of<T: Copy>(value: &T) -> &[u8] {
    // SAFETY: only `Request` and `Reply` come here: `repr(C)`, no padding that was not named, no pointers.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast(), size_of::<T>()) }
}

/// Reads a plain struct.
pub(crate) fn read_as<T: Copy>(bytes: &[u8]) -> Option<T> {
    // SAFETY: the length is checked, and every bit pattern is a valid `Request` or `Reply`.
    (bytes.len() == size_of::<T>())
        .then(|| unsafe { std::ptr::read_unaligned(bytes.as_ptr().cast()) })
}

/// `CLOCK_BOOTTIME`, nanoseconds.
#[must_use]
pub fn boottime_ns() -> u64 {
    let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME)
        .expect("every kernel Haven runs on has CLOCK_BOOTTIME");
    u64::try_from(std::time::Duration::from(time).as_nanos()).unwrap_or(u64::MAX)
}

/// When a process started, in clock ticks since boot; nothing when there is none. Tells a process from a later one
/// of the same number. Allocates nothing.
#[must_use]
pub fn start_time(pid: i32) -> Option<u64> {
    use std::io::{Read, Write};
    let mut path = [0u8; 32];
    let mut rest = &mut path[..];
    write!(rest, "/proc/{pid}/stat").ok()?;
    let left = rest.len();
    let path = std::str::from_utf8(&path[..32 - left]).ok()?;
    let mut stat = [0u8; 1024];
    let length = std::fs::File::open(path).ok()?.read(&mut stat).ok()?;
    let stat = &stat[..length];
    // The name may hold anything, so the fields are counted from behind its bracket.
    let end = stat.iter().rposition(|byte| *byte == b')')?;
    let fields = std::str::from_utf8(&stat[end + 1..]).ok()?;
    fields.split_whitespace().nth(19)?.parse().ok()
}
