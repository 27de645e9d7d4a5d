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
const TIMEOUT_NS: u64 = 2_000_000_000;
/// How much later than the guard's deadline it may reset; less than `T - D`, nanoseconds.
const SLACK_NS: u64 = 400_000_000;
/// How often it is fed, nanoseconds.
const FEED_NS: u64 = 250_000_000;
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
            if deadline_ns.is_none_or(|deadline| now_ns + TIMEOUT_NS <= deadline + SLACK_NS) {
                let _ = self.device.write(b"1");
            }
            self.next_ns = now_ns + FEED_NS;
        }
        self.next_ns
    }

    /// Tells it that the guard ends in good order.
    pub(super) fn disarm(&mut self) {
        let _ = self.device.write(b"V");
    }
}
