//! The seam for disks that come, go and grow while their guest runs (docs/decisions/0025-hot-disks.md).

use super::driver::{DiskLaunch, VmError};
use async_trait::async_trait;
use std::time::Duration;

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
    /// It is in a port, so that it can go while its guest runs.
    pub ported: bool,
    /// Its guest stands for its sake ([`HotDisks::park`]).
    pub parked: bool,
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
    /// Asks the guest to let a disk go and closes it once it has, for which it is waited so long. One that was asked may let it go at
    /// any later time: that is an event ([`super::driver::VmEvent::DiskGone`]).
    async fn unplug(
        &self,
        vm: &str,
        place: usize,
        named: &str,
        patience: Duration,
    ) -> Result<LetGo, VmError>;
    /// Makes a disk larger that has no replicas, and tells its guest.
    async fn grow(&self, vm: &str, place: usize, size: u64, named: &str) -> Result<(), VmError>;
    /// Stops the guest and closes a disk of it, which keeps its device: it can be opened again as another one. Whether no replica
    /// that was open failed, so that all of them have all that was written; false when that cannot be told. Who asks goes on with
    /// [`HotDisks::unpark`], for nobody else lets the guest run on.
    ///
    /// # Errors
    /// Its guest runs as before, unless [`HotDisks::has`] says that the disk is parked.
    async fn park(&self, vm: &str, place: usize) -> Result<bool, VmError>;
    /// Gives the device of a parked disk a disk again, which may be larger by now, tells the guest so and lets it run on.
    ///
    /// # Errors
    /// It stands on, unless [`HotDisks::has`] says that the disk is not parked any more.
    async fn unpark(&self, vm: &str, disk: &DiskLaunch, named: &str) -> Result<(), VmError>;
}
