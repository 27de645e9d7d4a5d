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
//! The side that serves is here ([`driver`]), what each side does next ([`steps`]), which random interleavings are tried
//! against, how replicas are compared ([`pieces`], [`compare`]), and copies of them as they were ([`kept`]); who carries it out is `agent/mirrored/` and, while a VM runs, `agent/vm_task/mirrors.rs`. What QEMU is told stands
//! in `vm/qemu_mirrors.rs`.

pub mod compare;
pub mod daemon;
pub mod driver;
pub mod fake;
pub mod kept;
pub mod pieces;
pub mod runs;
pub mod steps;

#[cfg(test)]
mod keep_test;
#[cfg(test)]
mod steps_test;
