//! Backups of the VMs that are placed here (docs/decisions/0023-backups.md).
//!
//! ```text
//!   record in the store ──► the VM's task (vm_task/backups.rs) opens a view of the disks ──► job.rs reads and stores
//!            ▲                                                                                    │
//!            └──────────────────────────── how far it is, how it ended ───────────────────────────┘
//! ```
//!
//! The record is the task: whoever has the VM carries it out, and begins it anew where another host had begun it. Chunks that
//! are in the target already are not sent again.

pub mod job;
pub mod verify;
