//! The hardware watchdog as the guard feeds it: a machine whose kernel or guard hangs is reset before another host may
//! run its VMs.
//!
//! It is fed only while its reset, if this were the last feed, would come no later than the guard's deadline plus a
//! slack that `T - D` covers; so a paused machine is reset in time or wakes to a watchdog that has fired.

use std::{
    fs::{File, OpenOptions},
    io::Write,
    os::{fd::AsRawFd, unix::fs::OpenOptionsExt},
    path::Path,
};

/// It resets the machine when it is not fed for so long, nanoseconds.
pub(super) const TIMEOUT_NS: u64 = 2_000_000_000;
/// How much later than the guard's deadline it may reset; less than `T - D`, nanoseconds.
pub(super) const SLACK_NS: u64 = 400_000_000;
/// How often it is fed, nanoseconds.
const FEED_NS: u64 = 250_000_000;
/// How soon it is looked at again when it was due and not right, nanoseconds. A host that lives by promises
/// (docs/decisions/0015-failsafe.md) has a deadline that is far enough away for 0.2 s after each of them, twice a second.
const AGAIN_NS: u64 = 20_000_000;
/// `WDIOC_SETTIMEOUT` of linux/watchdog.h: `_IOWR('W', 6, int)`.
const SET_TIMEOUT: libc::c_ulong = 0xc004_5706;

pub(super) struct Watchdog {
    device: File,
    next_ns: u64,
}

impl Watchdog {
    /// Opens and arms it. Nothing when there is none, or when it is too slow to be of use: a machine that it resets
    /// later than another host takes over is no help, and it is left unarmed.
    pub(super) fn open(path: &Path) -> Option<Self> {
        let result = OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(path);
        let mut device = match result {
            Ok(device) => device,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                tracing::warn!(path = %path.display(), "this machine has no watchdog; a paused host will not be reset");
                return None;
            }
            Err(error) => {
                tracing::error!(%error, path = %path.display(), "the watchdog cannot be opened; a paused host will not be reset");
                return None;
            }
        };
        let mut seconds: libc::c_int = 2;
        // SAFETY: a plain system call with a pointer to an int that it reads and writes.
        let set = unsafe { libc::ioctl(device.as_raw_fd(), SET_TIMEOUT, &raw mut seconds) } == 0;
        // What is no watchdog device (the lab's is a pipe) refuses this call and has the two seconds anyhow.
        if set && seconds > 2 {
            tracing::error!(
                seconds,
                "this watchdog cannot reset within 2 s and is not used; load softdog or another"
            );
            let _ = device.write(b"V");
            return None;
        }
        tracing::info!(path = %path.display(), "the watchdog is armed");
        Some(Self { device, next_ns: 0 })
    }

    /// Feeds it if that is due and right; when to come again. `deadline_ns` is the guard's, absent when nothing runs.
    pub(super) fn feed(&mut self, now_ns: u64, deadline_ns: Option<u64>) -> u64 {
        if now_ns >= self.next_ns {
            let right =
                deadline_ns.is_none_or(|deadline| now_ns + TIMEOUT_NS <= deadline + SLACK_NS);
            if right {
                let _ = self.device.write(b"1");
            }
            self.next_ns = now_ns + if right { FEED_NS } else { AGAIN_NS };
        }
        self.next_ns
    }

    /// Tells it that the guard ends in good order.
    pub(super) fn disarm(&mut self) {
        let _ = self.device.write(b"V");
    }
}

#[cfg(test)]
mod tests {
    use super::{AGAIN_NS, SLACK_NS, TIMEOUT_NS, Watchdog};
    use haven_model::failsafe::HELD;

    const MS: u64 = 1_000_000;

    /// The longest time without a feed within a minute, milliseconds, under deadlines as `deadline` gives them.
    fn longest_gap(first_ns: u64, deadline: impl Fn(u64) -> u64) -> u64 {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut watchdog = Watchdog { device: file.reopen().unwrap(), next_ns: 0 };
        let (mut now, mut fed, mut gap, mut size) = (first_ns, first_ns, 0, 0);
        while now < first_ns + 60_000 * MS {
            let next = watchdog.feed(now, Some(deadline(now)));
            let feeds = file.as_file().metadata().unwrap().len();
            if feeds > size {
                assert!(now + TIMEOUT_NS <= deadline(now) + SLACK_NS, "no feed too late");
                (size, fed) = (feeds, now);
            }
            gap = gap.max(now - fed);
            now = next;
        }
        gap / MS
    }

    #[test]
    fn a_host_that_lives_by_promises_is_fed_whenever_it_began() {
        // A question every 500 ms; each answer takes a while and holds from when the question was sent.
        for answer_ms in [1, 50, 150] {
            for phase_ms in (0..500).step_by(7) {
                let gap = longest_gap(1_000_000 * MS + phase_ms * MS, |now| {
                    let answered = now - answer_ms * MS;
                    let sent = answered - answered % (500 * MS);
                    sent + HELD.0 * MS
                });
                assert!(gap <= 1000, "{gap} ms without a feed: {answer_ms} ms, phase {phase_ms}");
            }
        }
    }

    #[test]
    fn it_starves_once_the_deadline_moves_no_more() {
        let begun = 1_000_000 * MS;
        let gap = longest_gap(begun, |_| begun + 4400 * MS);
        assert!(gap >= 60_000 - 4400, "{gap}");
        // The last feed is at most one look later than it may be.
        assert!(
            gap <= 60_000 - (4400 + SLACK_NS / MS - TIMEOUT_NS / MS) + (250 * MS + AGAIN_NS) / MS
        );
    }
}
