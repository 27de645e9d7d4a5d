//! Volumes as images of a Ceph pool (RBD): one copy for all hosts, kept by Ceph on several (docs/decisions/0026-rbd.md).
//!
//! ```text
//!   this daemon ── rbd, ceph (programs) ──┐
//!                                         ├──► monitors, OSDs: the pool, its images
//!   QEMU ── librbd, one client per disk ──┘    who has an image open: its watchers
//! ```
//!
//! What it promises: once [`images::Images::shut_out`] has returned, whoever opens the image afterwards finds every
//! object of it closed to the clients that had it open before, whatever was stopped or cut off in between, and so
//! does nobody write to it but the new owner.
//!
//! What keeps an old owner out is the blocklist of the OSDs alone. The exclusive lock of an image is no fence: QEMU
//! never takes it for good (it calls no `rbd_lock_acquire`), librbd hands it over to whoever wants to write and takes
//! it back for the next write, so two running guests would write in turns. It is what makes a live migration need no
//! step here. An entry of the blocklist that ends lets a client that slept through it write again, so entries are
//! made for [`clients::SHUT_OUT_SECONDS`]. A client's address holds a number that is never used twice, so nobody else
//! is meant.
//!
//! Each disk of a QEMU is a client of its own. Which one is noted when the VM starts ([`images::Images::clients`]):
//! during a fault of the cluster the question who has an image open may hang.

pub mod clients;
pub mod images;
pub mod node;
pub mod pool;
pub mod program;
pub mod snapshots;
pub mod volumes;

#[cfg(test)]
mod rbd_test;
#[cfg(test)]
mod words_test;
