//! The only user of etcd: reads, transactions, the live copy, the cluster's keys and certificates, and the
//! supervision of etcd itself.
//!
//! Nothing outside this crate names etcd's types, so that the rest of Haven cannot come to depend on more of it than
//! is used here.

pub mod clock;
pub mod file;
pub mod live;
pub mod memory;
pub mod pki;
pub mod raw;
pub mod server;
pub mod upkeep;

#[cfg(test)]
mod pki_test;
