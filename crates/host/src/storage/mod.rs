//! Storage of this host: pools that are directories, images kept by their content, seeds.
//!
//! A `local` pool dies with its host. A `shared` pool is one directory mounted on every host; so that an unmounted
//! path is noticed it must hold the file `.haven-pool` with its own path in it (`pool.rs` tells who writes that and
//! when).
//!
//! A volume is made under the name `<volume>.part`, brought to the disk, given to its VM and renamed, so that after a
//! power cut there is a whole volume or none. A step that fails leaves nothing.

use crate::agent::storage::StorageFailure;

pub mod files;
pub mod images;
pub mod pool;
pub mod seed;

#[cfg(test)]
mod storage_test;

/// A failure, as a sentence for people.
fn says(what: impl Into<String>) -> StorageFailure {
    StorageFailure { what: what.into() }
}
