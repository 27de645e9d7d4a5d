//! Storage of this host: pools that are directories, images kept by their content, seeds.
//!
//! A `local` pool dies with its host. A `shared` pool is one directory mounted on every host; so that an unmounted
//! path is noticed it must hold the file `.haven-pool` with its own path in it (`pool.rs` tells who writes that and
//! when). An `rbd` pool is one of a Ceph cluster (`rbd/`), an `nfs` pool a
//! directory of an NFS server (`nfs/`), a `gluster` pool one of a Gluster volume (`gluster/`).
//!
//! A volume is made under the name `<volume>.part`, brought to the disk, given to its VM and renamed, so that after a
//! power cut there is a whole volume or none. A step that fails leaves nothing. Its file is named after the VM's uid
//! too, so that no VM gets the volume of an earlier one of its name.

use crate::agent::storage::{StorageFailure, VolumeName};

pub mod aside;
pub mod backup;
pub mod busy;
pub mod copies;
pub mod files;
pub mod gluster;
pub mod images;
pub mod luks;
pub mod masters;
pub mod mirrored;
pub mod nfs;
pub mod pool;
pub mod pools;
pub mod qemu_img;
pub mod rbd;
pub mod seed;
pub mod snapshots;
pub mod sparse;

#[cfg(test)]
mod copies_test;
#[cfg(test)]
mod encrypted_test;
#[cfg(test)]
mod masters_test;
#[cfg(test)]
mod storage_test;

/// A size in the largest unit in which it has at most one decimal place of error.
pub(crate) fn in_words(bytes: u64) -> String {
    match bytes {
        0..0x10_0000 => format!("{bytes} bytes"),
        _ if bytes.is_multiple_of(1 << 30) => format!("{} GiB", bytes >> 30),
        0x10_0000..0x4000_0000 => format!("{} MiB", bytes.div_ceil(1 << 20)),
        _ => format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30)),
    }
}

/// Why a disk is not made that was there when it was asked what it is to be made from: it would be an empty one.
pub(crate) fn was_there(name: &VolumeName) -> StorageFailure {
    says(format!(
        "{name} was there a moment ago, and is not any more; it is not made anew without its image, but tried again. Was its pool moved, or an older copy of it put in its place?"
    ))
}

/// A failure, as a sentence for people.
pub(crate) fn says(what: impl Into<String>) -> StorageFailure {
    StorageFailure { what: what.into() }
}
