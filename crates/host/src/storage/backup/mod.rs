//! Backups: disks kept outside the cluster, in chunks that are stored once (docs/decisions/0023-backups.md).
//!
//! ```text
//!   guest's disks ──view (vm/views.rs)──► agent/backup/job.rs ──chunks──► repository.rs ──► a directory, or a bucket
//!   a file ──────── served.rs ──────────┘                                   │
//!   single files ◄─ files/ ◄─────────────────────────────────────────────────┤
//!   a new disk ◄─── served.rs ◄──────── restore.rs ◄────────────────────────┘
//! ```
//!
//! What it promises: a backup that is listed is whole, and every byte of it is compared with a checksum when it is read;
//! whatever is interrupted leaves the backups of before as they are; a target needs nothing of its cluster to be read.

pub mod files;
pub mod repository;
pub mod restore;
pub mod served;
pub mod target;

#[cfg(test)]
mod restore_test;
