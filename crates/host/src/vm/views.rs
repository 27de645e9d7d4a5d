//! The seam for reading the disks of a guest as they were at one instant, while it runs on (docs/decisions/0023-backups.md).

use super::driver::VmError;
use async_trait::async_trait;
use std::io;

/// A part of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Bytes.
    pub length: u64,
    /// It reads as zeros.
    pub zero: bool,
    /// It may have changed since the mark that the view was opened with; always where there is none.
    pub dirty: bool,
}

/// A disk as it was.
#[async_trait]
pub trait DiskView: Send {
    /// As the guest sees it, bytes.
    fn size(&self) -> u64;
    /// Whether it is known what has changed since the mark that was asked for.
    fn is_marked(&self) -> bool;
    /// Extents from `offset` on: at least one, and at most `length` bytes in all.
    async fn status(&mut self, offset: u64, length: u32) -> io::Result<Vec<Extent>>;
    /// Reads.
    async fn read(&mut self, offset: u64, into: &mut [u8]) -> io::Result<()>;
    /// This part will not be read any more: what the guest overwrites there need not be kept.
    async fn release(&mut self, offset: u64, length: u32) -> io::Result<()>;
}

/// What is asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ViewAsked {
    /// The disks; all of them when there is none.
    pub disks: Vec<String>,
    /// What is noted of their changes.
    pub marks: Option<Marks>,
    /// What other disks keep in themselves at the same instant.
    pub keep: Option<Keep>,
    /// Mirrored disks that are encrypted are shown as they lie in their replicas, and not as their guest sees them.
    pub stored: bool,
}

/// Marks in disks, from which on it is noted what changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Marks {
    /// For whom: marks of others are left alone.
    pub owner: String,
    /// The mark that is set at the instant of the view.
    pub mark: String,
    /// The mark since which it is to be told what has changed, if its process still has it.
    pub since: Option<String>,
}

/// A snapshot that disks keep in themselves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keep {
    /// Its name there.
    pub snapshot: String,
    /// Which disks.
    pub disks: Vec<String>,
}

/// Disks of a VM at one instant.
pub struct View {
    /// The guest's agent had its file systems frozen.
    pub frozen: bool,
    /// The disks, with their names.
    pub disks: Vec<(String, Box<dyn DiskView>)>,
}

/// Shows disks of running guests as they were.
#[async_trait]
pub trait Views: Send + Sync {
    /// Opens a view of disks of a guest that runs, in place of the one that may be open. What the guest overwrites is
    /// kept beside its disks as long as it is open; when there is no room for that, the view breaks and not the guest.
    async fn open_view(&self, vm: &str, asked: &ViewAsked) -> Result<View, VmError>;
    /// Closes it; fine when none is open. Marks stay.
    async fn close_view(&self, vm: &str) -> Result<(), VmError>;
}
