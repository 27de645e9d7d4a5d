//! The seam: what the agent asks of whatever measures.

use crate::vm::driver::RunningVm;
use std::{io, time::Duration};

/// What a VM's process has used so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Used {
    /// Time on CPUs, all its threads together.
    pub cpu: Duration,
    /// Its memory that is in use now, bytes.
    pub memory: u64,
}

/// For how long some work on the host stood still so far for want of something.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stalled {
    /// A CPU.
    pub cpu: Duration,
    /// Memory.
    pub memory: Duration,
}

/// Measures. All of it only ever grows but for the memory.
pub trait Meter: Send + Sync {
    /// What a VM has used; nothing when it has ended.
    ///
    /// # Errors
    /// When it cannot be looked at, which says nothing about it.
    fn used(&self, vm: &RunningVm) -> io::Result<Option<Used>>;
    /// How long work stood still; nothing where that is not told.
    fn stalled(&self) -> Option<Stalled>;
}
