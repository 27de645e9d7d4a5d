//! The seam for mirrored disks: what the agent asks of a process that has several replicas of one disk open.
//!
//! No driver decides which replicas count. A process acknowledges a write once all that it has open have it; when one of
//! them fails, the guest is stopped with the write in hand, and goes on when whoever decides has said how.

use super::driver::VmError;
use async_trait::async_trait;
use haven_model::Name;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    path::PathBuf,
};

/// How a process opens the replicas of a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MirrorLaunch {
    /// The volume, as those who serve it know it.
    pub volume: String,
    /// The run of the process.
    pub run: u64,
    /// The directory with the key of that run.
    pub keys: PathBuf,
    /// On how many hosts it is to be, this one among them. So many must have a write until it is acknowledged; a replica that
    /// does not count is stood in for.
    pub copies: usize,
    /// Those of other hosts that count; none yet for a guest that is to come from elsewhere ([`Mirrors::open_arrived`]).
    pub others: Vec<ReplicaAt>,
}

/// Where a replica is served.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaAt {
    /// The host.
    pub host: Name,
    /// Its address.
    pub address: IpAddr,
    /// The port.
    pub port: u16,
    /// Which process serves it.
    pub instance: String,
    /// The start of its machine.
    pub boot: String,
}

impl ReplicaAt {
    /// Which process of which machine it is, in short.
    #[must_use]
    pub fn print(&self) -> Print {
        Print::of(&self.boot, &self.instance)
    }
}

/// A hash in hexadecimal, cut to so many digits.
pub(super) fn short(text: &str, digits: usize) -> String {
    let hash = Sha256::digest(text.as_bytes());
    let mut hex: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
    hex.truncate(digits);
    hex
}

/// Which process of which machine serves a replica, short enough for the name of a node: 10 digits of the machine's start, 6 of
/// the process.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Print(String);

/// The digits of it that tell the machine.
const OF_BOOT: usize = 10;
/// Those that tell the process.
const OF_INSTANCE: usize = 6;

impl Print {
    /// That of a process on a machine.
    #[must_use]
    pub fn of(boot: &str, instance: &str) -> Self {
        Self(short(boot, OF_BOOT) + &short(instance, OF_INSTANCE))
    }
    /// Reads one.
    #[must_use]
    pub fn read(text: &str) -> Option<Self> {
        let whole = text.len() == OF_BOOT + OF_INSTANCE;
        (whole && text.bytes().all(|byte| byte.is_ascii_hexdigit())).then(|| Self(text.to_owned()))
    }
    /// As text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
    /// The part that tells the machine.
    #[must_use]
    pub fn machine(&self) -> &str {
        &self.0[..OF_BOOT]
    }
}

/// How far a copy is that brings a replica up to what the others have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Catching {
    /// None was begun.
    Not,
    /// It goes on: bytes in all, and those that are done.
    Goes {
        /// In all.
        total: u64,
        /// Done.
        done: u64,
    },
    /// All is there.
    Done,
    /// It broke; why.
    Broke(String),
}

/// A replica of another host that a process has open: it gets all that is written, and no write succeeds without it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Linked {
    /// Which process of which machine.
    pub print: Print,
    /// It failed a write, or was cut off.
    pub broken: bool,
    /// The copy to it.
    pub catching: Catching,
}

/// How a process has a mirrored disk open.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DiskMirror {
    /// By host; what is not named gets nothing of what is written.
    pub linked: BTreeMap<Name, Linked>,
    /// The guest is stopped, because a disk did not take what was written.
    pub stopped: bool,
}

/// Changes which replicas a process has open.
#[async_trait]
pub trait Mirrors: Send + Sync {
    /// How it has a disk open, by its place, as far as it is on these hosts.
    async fn mirror(
        &self,
        vm: &str,
        place: usize,
        hosts: &BTreeSet<Name>,
    ) -> Result<DiskMirror, VmError>;
    /// Ends the connection to a replica that may be silent: what is written to it fails at once.
    async fn cut(&self, vm: &str, place: usize, host: &Name) -> Result<(), VmError>;
    /// Notes from now on what is written, for a replica that has all until now. It stands as long as the process does.
    async fn note(&self, vm: &str, place: usize, host: &Name) -> Result<(), VmError>;
    /// Goes on without a replica. Only once it counts no more.
    async fn leave_out(&self, vm: &str, place: usize, host: &Name) -> Result<(), VmError>;
    /// Takes a replica in, to which all is written from now on and from which nothing is read, and begins to copy to it: what was
    /// noted if that was noted for this replica on this machine, else everything.
    async fn take_in(&self, vm: &str, place: usize, replica: &ReplicaAt) -> Result<(), VmError>;
    /// Brings what was copied to a replica to its disk.
    async fn flush_copy(&self, vm: &str, place: usize, host: &Name) -> Result<(), VmError>;
    /// Forgets the copy to a replica that counts by now, and what was noted for it.
    async fn settle(&self, vm: &str, place: usize, host: &Name) -> Result<(), VmError>;
    /// Lets a guest run on that is stopped for a disk's sake; what was not written is written anew.
    async fn go_on(&self, vm: &str) -> Result<(), VmError>;
    /// The volumes that its process has open, by the places of their disks. What is wanted of the VM may be another by now.
    async fn mirrored(&self, vm: &str) -> Vec<(usize, String)>;
    /// The volumes that its last process had open, if that ran under this epoch and ended by itself with all that its guest wrote on
    /// all replicas.
    fn ended_whole(&self, vm: &str, epoch: u64) -> Vec<String>;
    /// Opens the replicas of others for a guest that has come from elsewhere, all of it, and that has not run here yet; or names
    /// the host whose replica does not answer. It may be called again, with others or without that one.
    ///
    /// # Errors
    /// The process is of no use then.
    async fn open_arrived(
        &self,
        vm: &str,
        place: usize,
        mirror: &MirrorLaunch,
    ) -> Result<Result<(), Name>, VmError>;
    /// Closes the replicas of this host in a process that has handed its guest over: they can be served to where it is now.
    async fn let_go(&self, vm: &str) -> Result<(), VmError>;
    /// Whether its guest is stopped for a disk's sake.
    async fn is_stopped(&self, vm: &str) -> Result<bool, VmError>;
}
