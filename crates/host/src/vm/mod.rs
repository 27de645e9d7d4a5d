//! VMs of this host: QEMU, driven by QMP.
//!
//! What it promises: a guest does not run before the guard watches over its process; a daemon that was restarted
//! finds and adopts what runs; each VM runs as a unix user of its own, sandboxed, with no network but its taps.
//!
//! Rejected: libvirt (it would own restarts and fencing, which are Haven's purpose), and the `qapi` crate (it dies on
//! one unknown event).

pub mod arguments;
pub mod commands;
pub mod console;
pub mod driver;
pub mod fake;
pub mod kvm;
pub mod launch;
pub mod probe;
pub mod process;
pub mod qemu;
pub mod qmp;
pub mod record;
pub mod run_dir;
pub mod scan;

#[cfg(test)]
mod fake_test;
#[cfg(test)]
mod qmp_test;
