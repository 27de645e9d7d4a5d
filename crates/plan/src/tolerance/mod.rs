//! Tolerance: which hosts live, which are proven lost, and what becomes of their VMs.

pub mod hosts;
pub mod migration;
pub mod recovery;
pub mod removal;
