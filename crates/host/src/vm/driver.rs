//! The seam: what the agent asks of whatever runs VMs.

use super::{
    hot_disks::HotDisks,
    migration::LiveMigration,
    mirrors::{MirrorLaunch, Mirrors},
    snapshots::Snapshots,
    views::Views,
};
use crate::{agent::storage::FilerLaunch, storage::rbd::node::RbdLaunch};
use async_trait::async_trait;
use haven_model::{vm::DiskLimits, volume::LUKS_HEAD_BYTES};
use serde::{Deserialize, Serialize};
use std::{path::PathBuf, time::Duration};
use tokio::sync::broadcast;

/// What runs the guest's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Accel {
    /// The processor itself.
    Kvm,
    /// QEMU's emulation.
    Tcg,
}

/// A disk of a VM that is about to start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskLaunch {
    /// Unique within the VM.
    pub name: String,
    /// The file.
    pub path: PathBuf,
    /// `raw` or `qcow2`.
    pub format: String,
    /// The guest cannot write.
    pub read_only: bool,
    /// As the guest sees it, bytes.
    pub size_bytes: u64,
    /// Its content comes with its guest, from the host that runs it.
    #[serde(default)]
    pub arrives: bool,
    /// The file is one of several replicas.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mirror: Option<MirrorLaunch>,
    /// It is an image of a Ceph cluster, and no file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rbd: Option<Box<RbdLaunch>>,
    /// The file with the key under which it is encrypted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub luks: Option<PathBuf>,
    /// A filer keeps it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filer: Option<Box<FilerLaunch>>,
    /// The port that it is plugged into; none when it stays as long as its process does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slot: Option<u8>,
    /// Its guest stands, and its device has nothing that takes or gives anything ([`super::hot_disks::HotDisks::park`]).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub parked: bool,
}

impl DiskLaunch {
    /// Whether its guest is stopped when the disk gives an error: whoever owns the VM knows what to do then.
    #[must_use]
    pub fn stops(&self) -> bool {
        self.mirror.is_some() || self.rbd.is_some() || self.filer.is_some()
    }
    /// Whether what decrypts it is a node of its own, above all else: a file that knows nothing of keys.
    #[must_use]
    pub fn decrypted_above(&self) -> bool {
        self.luks.is_some() && self.format == "raw"
    }
    /// How much it is beneath that, bytes.
    #[must_use]
    pub fn stored_bytes(&self) -> u64 {
        self.size_bytes + if self.decrypted_above() { LUKS_HEAD_BYTES } else { 0 }
    }
    /// The node that its device has, at a place.
    #[must_use]
    pub fn drive(&self, place: usize) -> String {
        format!("{}{place}", if self.decrypted_above() { "e" } else { "d" })
    }
}

/// A kernel that QEMU boots directly.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirectBoot {
    /// The kernel.
    pub kernel: PathBuf,
    /// Its initial file system.
    pub initrd: Option<PathBuf>,
    /// Its command line.
    pub cmdline: String,
}

/// A network card of a VM that is about to start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NicLaunch {
    /// The tap, which exists already.
    pub tap: String,
    /// MAC address.
    pub mac: String,
    /// Largest packet, bytes.
    pub mtu: u32,
}

/// Everything there is to know to start a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmLaunch {
    /// Its name.
    pub vm: String,
    /// The unix user of its process.
    pub uid: u32,
    /// The epoch under which it runs.
    pub epoch: u64,
    /// The session of this host in which its start began.
    #[serde(default)]
    pub session: u64,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Memory, bytes.
    pub memory_bytes: u64,
    /// Its disks.
    pub disks: Vec<DiskLaunch>,
    /// A kernel to boot directly.
    pub direct_boot: Option<DirectBoot>,
    /// The NoCloud seed.
    pub seed: Option<PathBuf>,
    /// Its network cards.
    pub nics: Vec<NicLaunch>,
    /// What runs it.
    pub accel: Accel,
    /// The machine's UUID as the guest sees it.
    pub uuid: String,
    /// The machine type; QEMU's newest when absent.
    #[serde(default)]
    pub machine: Option<String>,
    /// It takes a guest that runs elsewhere.
    #[serde(default)]
    pub incoming: bool,
    /// That guest's memory may follow it.
    #[serde(default)]
    pub postcopy: bool,
    /// It has a port for a guest agent.
    #[serde(default)]
    pub agent: bool,
    /// It has ports for disks ([`DiskLaunch::slot`]).
    #[serde(default)]
    pub ports: bool,
    /// How the VM's spec names its disks, as they are now: [`haven_model::VmSpec::hardware`]'s `disks`.
    #[serde(default)]
    pub disks_as: String,
}

/// Where the places of disks with a port begin: behind those of all that have none.
const PORTED: usize = 50;

impl VmLaunch {
    /// Whether one of its disks has replicas on other hosts.
    #[must_use]
    pub fn is_mirrored(&self) -> bool {
        self.disks.iter().any(|disk| disk.mirror.is_some())
    }
    /// The places of its disks, in their order: what all that QEMU has of a disk is called after. Another disk that comes or goes
    /// does not change it.
    #[must_use]
    pub fn places(&self) -> Vec<usize> {
        let mut fixed = 0..;
        let place = |disk: &DiskLaunch| match disk.slot {
            Some(slot) => Some(PORTED + usize::from(slot)),
            None => fixed.next(),
        };
        self.disks.iter().filter_map(place).collect()
    }
    /// Its disks by their places.
    pub fn placed(&self) -> impl Iterator<Item = (usize, &DiskLaunch)> {
        self.places().into_iter().zip(&self.disks)
    }
    /// The number in [`VmLaunch::disks`] of the disk at a place.
    #[must_use]
    pub fn at(&self, place: usize) -> Option<usize> {
        self.places().into_iter().position(|at| at == place)
    }
    /// The volumes of the mirrored disks, by their places.
    #[must_use]
    pub fn mirrored_volumes(&self) -> Vec<(usize, String)> {
        let volume = |(place, disk): (usize, &DiskLaunch)| {
            Some((place, disk.mirror.as_ref()?.volume.clone()))
        };
        self.placed().filter_map(volume).collect()
    }
    /// The disks whose contents come with the guest, by their places.
    pub fn arriving(&self) -> impl Iterator<Item = usize> {
        self.placed().filter(|(_, disk)| disk.arrives).map(|(place, _)| place)
    }
}

/// What a guest was seen to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Signs {
    /// Whether its agent answered just now.
    pub agent: bool,
    /// Requests to its disks so far.
    pub disk: u64,
    /// Packets that it has sent so far.
    pub network: u64,
}

/// A VM that runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunningVm {
    /// Its name.
    pub vm: String,
    /// The epoch under which it was started.
    pub epoch: u64,
    /// Its process.
    pub pid: i32,
}

/// What a guest does, as QEMU tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestState {
    /// It runs.
    Running,
    /// QEMU waits to be told to run it, and it has not run here yet: the daemon that started it was killed before it
    /// let it run.
    NotStarted,
    /// It ran and is stopped on purpose; it can go on.
    Paused,
    /// It ran and cannot go on without help: a disk's error, a panic, an error of QEMU.
    Broken,
    /// It powered off and QEMU waits to end.
    Ended,
}

/// A QEMU process of this host that no launch record names. Its guest never ran.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stray {
    /// The VM that it says to run.
    pub vm: String,
    /// Its process.
    pub pid: i32,
    /// When it started; tells it from a later process of the same number.
    pub start_time: u64,
}

/// How a VM's process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// The guest powered itself off.
    PoweredOff,
    /// It ended unexpectedly.
    Crashed,
    /// It was killed.
    Killed,
}

/// What happens to VMs without being asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VmEvent {
    /// The process is gone.
    Exited {
        /// Which VM.
        vm: String,
        /// Its epoch.
        epoch: u64,
        /// How.
        how: Exit,
    },
    /// A copy of its guest has come further.
    Copied {
        /// Which VM.
        vm: String,
    },
    /// Its guest has let a disk go, at whatever time.
    DiskGone {
        /// Which VM.
        vm: String,
    },
    /// One of its disks does not take what is written, or a replica of one does not.
    DiskBroke {
        /// Which VM.
        vm: String,
    },
}

/// Why something could not be done with a VM.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VmError {
    /// QEMU is not installed.
    #[error("QEMU is not installed on this host; install the package qemu-system-x86")]
    NoQemu,
    /// QEMU ended while it was being started.
    #[error("QEMU ended while {vm} was being started: {said}")]
    Died {
        /// Which VM.
        vm: String,
        /// The last lines of what it said.
        said: String,
    },
    /// The guard does not watch over it.
    #[error("{vm} was not started")]
    Guard {
        /// Which VM.
        vm: String,
        /// Why.
        #[source]
        source: crate::guard::GuardError,
    },
    /// QMP did not answer as expected.
    #[error("QEMU of {vm} does not answer as it should")]
    Qmp {
        /// Which VM.
        vm: String,
        /// Why.
        #[source]
        source: super::qmp::QmpError,
    },
    /// A file or a process.
    #[error("{what}")]
    System {
        /// What was tried.
        what: String,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// What was to be done while its guest stands.
    #[error("{0}")]
    Beside(String),
    /// It runs already.
    #[error("{vm} runs on this host already, as process {pid}; end it first")]
    RunsAlready {
        /// Which VM.
        vm: String,
        /// Its process.
        pid: i32,
    },
    /// There is no such VM here.
    #[error("{0} does not run on this host")]
    NotHere(String),
}

/// Runs VMs.
#[async_trait]
pub trait VmDriver: LiveMigration + Mirrors + Views + HotDisks + Snapshots {
    /// Starts a VM; when this returns the guest runs. It must not be dropped before it has returned.
    async fn start(&self, launch: &VmLaunch) -> Result<RunningVm, VmError>;
    /// What is known to have a process, also what an earlier daemon started and what is just being started. Whether the
    /// guest runs in it tells [`VmDriver::state`]. One that cannot be looked at is left out; of it [`VmDriver::find`]
    /// gives an error. An error says nothing about any VM.
    async fn list(&self) -> Result<Vec<RunningVm>, VmError>;
    /// Whether one VM has a process. An error says nothing about it.
    async fn find(&self, vm: &str) -> Result<Option<RunningVm>, VmError>;
    /// Asks the guest to end and ends it after `grace`; returns when its process is gone.
    async fn stop(&self, vm: &str, grace: Duration) -> Result<(), VmError>;
    /// Ends it at once; returns when its process is gone. Fine when it does not run.
    async fn kill(&self, vm: &str) -> Result<(), VmError>;
    /// Has a process whose guest has gone over to another host end by itself, if others wait for that: a client of Ceph's that is
    /// killed holds up for 30 s whoever writes to its disk next. It may be there yet when this returns.
    async fn close(&self, _vm: &str) -> Result<(), VmError> {
        Ok(())
    }
    /// Signals the end to every VM of this host, also to those that an earlier daemon started and to those that are
    /// just being started, and waits for none, so that one that hangs in the kernel does not keep the others running.
    /// Returns how many processes are still there.
    fn kill_all(&self) -> Result<usize, VmError>;
    /// Presses its reset button.
    async fn reset(&self, vm: &str) -> Result<(), VmError>;
    /// Limits what its guest may use of a disk, by its place, from now on.
    async fn limit(&self, vm: &str, place: usize, limits: &DiskLimits) -> Result<(), VmError>;
    /// What its guest does. After a restart of the daemon a VM that is [`GuestState::NotStarted`] must be killed and
    /// started anew (its guard may not know it).
    async fn state(&self, vm: &str) -> Result<GuestState, VmError>;
    /// What its guest shows of itself. An error, as of a QEMU that does not answer, says nothing about the guest.
    async fn signs(&self, vm: &str) -> Result<Signs, VmError>;
    /// Processes of VMs of this host that nothing names: what a daemon left that was killed in the middle of a start.
    /// Never one that is just being started.
    async fn strays(&self) -> Result<Vec<Stray>, VmError>;
    /// Ends a stray; returns when its process is gone. Fine when it has ended.
    async fn end_stray(&self, stray: &Stray) -> Result<(), VmError>;
    /// Events from now on.
    fn events(&self) -> broadcast::Receiver<VmEvent>;
    /// The socket of its serial console.
    fn console(&self, vm: &str) -> PathBuf;
    /// The file with all that its console said.
    fn log(&self, vm: &str) -> PathBuf;
}
