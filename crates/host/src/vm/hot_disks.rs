//! The seam for disks that come, go and grow while their guest runs (docs/decisions/0025-hot-disks.md).

use super::driver::{DiskLaunch, VmError};
use async_trait::async_trait;

/// A disk that a process has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HasDisk {
    /// Unique within the VM.
    pub name: String,
    /// What all that its process has of it is called after.
    pub place: usize,
    /// As its guest sees it, bytes.
    pub size_bytes: u64,
    /// It has replicas on other hosts.
    pub mirrored: bool,
    /// Its guest sees it. One of which that is not so was being plugged in or out when a daemon ended.
    pub plugged: bool,
}

/// The disks that a process has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Has {
    /// It has ports into which disks are plugged.
    pub ports: bool,
    /// Those that it has, in the order in which they came.
    pub disks: Vec<HasDisk>,
    /// What was told of them last ([`HotDisks::plug`]).
    pub named: String,
}

/// Whether a guest has let a disk go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LetGo {
    /// Nobody has it open any more.
    Yes {
        /// No replica that was open failed: all of them have all that was written.
        whole: bool,
    },
    /// Its guest was asked for it and still has it.
    NotYet,
}

/// Plugs disks in and out, and makes them larger. All of it may be asked for again after it was given up half-way, by a later
/// daemon too. `named` is kept with the disks and says in the words of whoever asks how they are afterwards.
#[async_trait]
pub trait HotDisks: Send + Sync {
    /// What its process has.
    async fn has(&self, vm: &str) -> Result<Has, VmError>;
    /// Plugs a disk in, with a [`DiskLaunch::slot`] that is free.
    ///
    /// # Errors
    /// Its guest does not see it then, unless [`HotDisks::has`] says so.
    async fn plug(&self, vm: &str, disk: &DiskLaunch, named: &str) -> Result<(), VmError>;
    /// Asks the guest to let a disk go and closes it once it has.
    async fn unplug(&self, vm: &str, place: usize, named: &str) -> Result<LetGo, VmError>;
    /// Makes a disk larger that has no replicas, and tells its guest.
    async fn grow(&self, vm: &str, place: usize, size: u64, named: &str) -> Result<(), VmError>;
}
