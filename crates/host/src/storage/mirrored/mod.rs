//! Mirrored volumes: the same disk on several hosts, so that it outlives each of them (docs/decisions/0022-mirrored-volumes.md).
//!
//! ```text
//!   the owner's host                           another host
//!   QEMU: quorum ─┬─ its own replica, a file
//!                 └─ NBD over TLS ───────────► qemu-storage-daemon ── its replica, a file
//!                    the key of this run       one per volume, one run at a time
//! ```
//!
//! What it promises: from when a replica is served to a run of its volume, nobody of an earlier one writes to it, whatever was
//! restarted, paused or cut off in between; and whoever has the key of one volume's run reaches that and nothing else.
//!
//! Built so far: the side that serves ([`driver`]), and what each side does next ([`steps`]), which random interleavings are
//! tried against. Nothing uses them yet.

pub mod daemon;
pub mod driver;
pub mod runs;
pub mod steps;

#[cfg(test)]
mod steps_test;
