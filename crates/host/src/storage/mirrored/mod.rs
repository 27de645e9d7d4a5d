//! Mirrored volumes: the same disk on several hosts, so that it outlives each of them (docs/decisions/0022-mirrored-volumes.md).
//!
//! ```text
//!   the owner's host                           another host
//!   QEMU: quorum ─┬─ its own replica, a file
//!                 └─ NBD over TLS ───────────► qemu-storage-daemon ── its replica, a file
//!                    the key of this epoch     one per volume, one epoch at a time
//! ```
//!
//! What it promises: from when a replica is served under an epoch, nobody of an older one writes to it, whatever was
//! restarted, paused or cut off in between; and whoever has the key of one volume's epoch reaches that and nothing else.
//!
//! Built so far: the side that serves ([`driver`]). Nothing uses it yet.

pub mod daemon;
pub mod driver;
pub mod epochs;
