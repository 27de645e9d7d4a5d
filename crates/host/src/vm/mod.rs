//! VMs of this host: QEMU, driven by QMP.
//!
//! What it promises: a guest does not run before the guard watches over its process; a daemon that was restarted
//! finds and adopts what runs, tells what never ran, and finds what nothing names; each VM runs as a unix user of its
//! own, sandboxed, with no network but its taps.
//!
//! ```text
//!   qemu.rs ──► launch.rs ──► QEMU ◄── qmp.rs ◄── commands.rs: all that is asked and read
//!      │           └── run_dir.rs: root's files; QEMU inherits sockets, log, taps and /dev/kvm, and opens none itself
//!      ├──► record.rs, scan.rs: what an earlier daemon started, recorded or not
//!      ├──► process.rs: the process, held by its pidfd
//!      ├──► migration.rs, qemu_migration.rs: a guest moves while it runs
//!      │           ├── qemu_disks.rs: disks of this host that go along
//!      │           └── page_faults.rs: what a guest needs whose memory follows it
//!      ├──► hot_disks.rs, qemu_hot_disks.rs: disks that come, go and grow while their guest runs
//!      ├──► views.rs, qemu_views.rs: its disks as they were at one instant, read by nbd.rs
//!      ├──► snapshots.rs, qemu_snapshots.rs: its disks as they were, kept in themselves
//!      ├──► guest_agent.rs: whether the agent in the guest answers; file systems that it freezes
//!      ├──► scope.rs: a control group of its own, from systemd
//!      └──► console.rs: bounded logs               probe.rs ──► kvm.rs: does KVM run a guest here
//! ```
//!
//! Rejected: libvirt (it would own restarts and fencing, which are Haven's purpose), the `qapi` crate (it dies on
//! one unknown event), and a sockets' directory that belongs to the VM's user (a guest that broke out could put a link
//! there to another VM's socket, and the daemon would obey it).

pub mod arguments;
pub mod commands;
pub mod console;
pub mod driver;
pub mod fake;
pub mod fake_disks;
pub mod fake_hot_disks;
pub mod fake_migration;
pub mod fake_mirrors;
pub mod fake_snapshots;
pub mod fake_views;
pub mod guest_agent;
pub mod hot_disks;
pub mod kvm;
pub mod launch;
pub mod migration;
pub mod mirrors;
pub mod nbd;
pub mod page_faults;
pub mod probe;
pub mod process;
pub mod qemu;
pub mod qemu_disks;
mod qemu_hot_disks;
pub mod qemu_migration;
pub mod qemu_mirrors;
mod qemu_parking;
mod qemu_snapshots;
mod qemu_views;
pub mod qmp;
pub mod record;
pub mod run_dir;
pub mod scan;
pub mod scope;
pub mod snapshots;
pub mod views;

#[cfg(test)]
mod fake_test;
#[cfg(test)]
mod nbd_test;
#[cfg(test)]
mod qemu_test;
#[cfg(test)]
mod qmp_test;
