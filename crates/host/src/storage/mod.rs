//! Storage of this host: pools that are directories, images kept by their content, seeds.
//!
//! A `local` pool dies with its host. A `shared` pool is one directory mounted on every host; so that an unmounted
//! path is noticed it must hold the file `.haven-pool`, which the first user of a new pool writes only into an empty
//! directory.

pub mod files;
pub mod images;
pub mod seed;

#[cfg(test)]
mod storage_test;
