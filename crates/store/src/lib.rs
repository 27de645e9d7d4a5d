//! The only user of etcd: reads, transactions, the live copy, the cluster's keys and certificates, sealed secrets, and
//! the supervision of etcd itself.
//!
//! Nothing outside this crate names etcd's types, so that the rest of Haven cannot come to depend on more of it than
//! is used here.

pub mod certificate;
pub mod clock;
pub mod contact;
pub mod file;
pub mod live;
pub mod memory;
pub mod pki;
pub mod raw;
pub mod seal;
pub mod server;
pub mod testing;
pub mod upkeep;

#[cfg(test)]
mod certificate_test;
#[cfg(test)]
mod pki_test;
#[cfg(test)]
mod seal_test;
