//! The seam for moving a guest that runs: what the agent asks of both hosts' drivers (docs/decisions/0011-live-migration.md).
//!
//! No driver decides who runs. The process on the new host never lets the guest run by itself; the one on the old host
//! may do so by itself when a copy breaks, and whoever drives it ends it then if the owner has changed.

use super::driver::{RunningVm, VmError, VmLaunch};
use async_trait::async_trait;
use haven_model::migration::{MigrationOptions, Progress};
use std::{
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
};

/// How far a copy is, as the process tells that sends or takes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Copy {
    /// There is none.
    None,
    /// It goes on.
    Active,
    /// The sender has stopped the guest and waits to hand it over.
    Stopped,
    /// The sender can run the guest no more and the taker can; memory that the guest needs is still being sent.
    Following,
    /// That broke off: what had not come by then never comes, and neither side can run the guest.
    Torn,
    /// All of it is on the other side: the sender can run the guest no more, and the taker can.
    Whole,
    /// It broke; the sender may run the guest on.
    Broken(String),
}

/// How far the contents of disks are that go along.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DisksSent {
    /// Bytes in all so far; what the guest writes meanwhile is sent again.
    pub total: u64,
    /// Of these, still to be sent.
    pub left: u64,
    /// All disks have a copy that follows what the guest writes.
    pub whole: bool,
    /// Why that of one of them ended.
    pub broken: Option<String>,
}

impl DisksSent {
    /// No disk goes along, and nothing is left of one that did.
    #[must_use]
    pub fn none() -> Self {
        Self { whole: true, ..Self::default() }
    }
}

/// A copy and its figures.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transfer {
    /// How far it is.
    pub copy: Copy,
    /// Figures, on the sender's side.
    pub progress: Progress,
}

impl Transfer {
    /// There is none.
    #[must_use]
    pub fn none() -> Self {
        Self { copy: Copy::None, progress: Progress::default() }
    }
}

/// Moves guests that run.
#[async_trait]
pub trait LiveMigration: Send + Sync {
    /// The machine type that a VM runs as, so that the other side makes the same.
    async fn machine(&self, vm: &str) -> Result<String, VmError>;
    /// Starts the process that takes a guest. It is under the guard, and does not let the guest run.
    async fn start_incoming(&self, launch: &VmLaunch) -> Result<RunningVm, VmError>;
    /// The way into a process that takes a guest; once.
    fn way_in(&self, vm: &str) -> Option<UnixStream>;
    /// Lets a guest run that has arrived whole.
    async fn let_run(&self, vm: &str) -> Result<(), VmError>;
    /// The socket at which a process takes the contents of disks; nothing when it takes none.
    fn disks_in(&self, vm: &str) -> Option<PathBuf>;
    /// Begins to send the contents of these disks, by their places, through `socket`, while the guest runs and writes.
    async fn send_disks(&self, vm: &str, socket: &Path, places: &[usize]) -> Result<(), VmError>;
    /// How far that is; so many were wanted.
    async fn disks_sent(&self, vm: &str, wanted: usize) -> Result<DisksSent, VmError>;
    /// Sends what is left of disks whose guest is stopped; returns when all of it is on the other side's disks.
    async fn finish_disks(&self, vm: &str) -> Result<(), VmError>;
    /// Begins to send a guest that runs through `socket`. It stops by itself when little is left, and waits.
    async fn send(
        &self,
        vm: &str,
        socket: &Path,
        options: &MigrationOptions,
    ) -> Result<(), VmError>;
    /// Lets a guest go over before all of its memory is there, which follows. It stops for that as for any handover.
    async fn start_postcopy(&self, vm: &str) -> Result<(), VmError>;
    /// Whether a process took a guest whose memory may follow it, and nobody has noted that all of it came. A QEMU that
    /// waits for memory may answer nobody, so this does not ask it.
    async fn may_lack_memory(&self, vm: &str) -> bool;
    /// Notes that all of the memory of a guest is here, for whichever daemon comes later.
    async fn note_whole(&self, vm: &str);
    /// How far a copy is, on either side.
    async fn transfer(&self, vm: &str) -> Result<Transfer, VmError>;
    /// Sends what is left of a guest that was stopped for it. From then on it writes to the other side's disks, should it
    /// run on here by itself.
    async fn hand_over(&self, vm: &str) -> Result<(), VmError>;
    /// Ends a copy, of disks too; returns when the guest runs on here.
    async fn take_back(&self, vm: &str) -> Result<(), VmError>;
}
