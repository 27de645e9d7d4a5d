//! The seam for snapshots that a guest's disks keep in themselves, while it runs (docs/decisions/0027-snapshots.md).

use super::driver::VmError;
use async_trait::async_trait;
use std::{collections::BTreeMap, pin::Pin};

/// What is done with disks that something else keeps than QEMU; why it was not.
pub type Beside = Pin<Box<dyn Future<Output = Result<(), String>> + Send>>;

/// A disk, and what it keeps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Keeps {
    /// As the guest sees it, bytes.
    pub size: u64,
    /// When each of its snapshots was taken, by its name there; wall clock, milliseconds since 1970.
    pub snapshots: BTreeMap<String, i64>,
}

/// Takes snapshots of guests that run.
#[async_trait]
pub trait Snapshots: Send + Sync {
    /// The disks of its process that can keep snapshots, by name.
    async fn keeps(&self, vm: &str) -> Result<BTreeMap<String, Keeps>, VmError>;
    /// Has these disks keep a snapshot, all at one instant, or none of them. Whether the guest's agent had its file systems
    /// frozen.
    async fn take_snapshot(
        &self,
        vm: &str,
        disks: &[String],
        snapshot: &str,
    ) -> Result<bool, VmError>;
    /// The same with disks that something else keeps: that is done `beside` it while the guest stands, so that all show one instant.
    /// When it fails some of them may keep it. It is carried to its end whether or not anybody waits for that.
    async fn take_held(
        &self,
        vm: &str,
        disks: &[String],
        snapshot: &str,
        beside: Beside,
    ) -> Result<bool, VmError>;
    /// Has one disk keep it no more; it must do so.
    async fn remove_snapshot(&self, vm: &str, disk: &str, snapshot: &str) -> Result<(), VmError>;
}
