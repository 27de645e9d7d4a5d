//! Hosts: the servers of the cluster, and the lease by which they are known to live.

pub use crate::power::PowerSpec;
use crate::{ObjectRef, cluster::ProofKind, units::Bytes};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
};

/// What is wanted of a host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct HostSpec {
    /// Its address on the network of the cluster.
    pub address: Ipv4Addr,
    /// How its power is controlled, if at all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub power: Option<PowerSpec>,
    /// Takes no new VMs while true.
    #[serde(default)]
    pub cordoned: bool,
    /// It only votes: it runs no VM and holds no address. Decided when it becomes part of the cluster.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub witness: bool,
    /// Memory kept for the host itself.
    #[serde(default = "default_reserve")]
    pub reserved_memory: Bytes,
}

fn default_reserve() -> Bytes {
    Bytes::mib(512)
}

/// The renewal record of a host. Rewritten by the host alone, closed by a recovery alone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Lease {
    /// Counts the sessions of the host: one from opening to closing, during which its VMs may run.
    pub session: u64,
    /// Counts renewals within the session.
    pub count: u64,
    /// Set by the recovery of the host. A closed session is never opened again.
    #[serde(default)]
    pub closed: bool,
    /// The record's own `T`, milliseconds: whoever sees it unchanged for so long may take every deadline that the
    /// host's guard was ever told as passed. Each renewal states it anew, so a shorter `T` in the cluster's spec
    /// counts only once the host has renewed under it and no longer deadline of before is left.
    #[serde(default = "default_ttl_ms")]
    pub ttl_ms: u64,
}

/// What the hosts lived by that did not state it.
fn default_ttl_ms() -> u64 {
    crate::cluster::Timers::default().lease.0
}

/// The proof under which a session was closed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct LostSession {
    /// Which session of the host.
    pub session: u64,
    /// The evidence that no VM of it can run any longer.
    pub proof: ProofKind,
    /// When it was closed, wall clock, milliseconds since 1970.
    pub at_ms: i64,
    /// When the host was last heard, wall clock, milliseconds since 1970.
    pub last_heard_ms: i64,
    /// The incident that tells the story.
    pub incident: u64,
}

/// What this version understands. Whatever would be misread, or waited for in vain, on a host that says less, is refused
/// until all hosts that it concerns say as much.
pub const SPEAKS: u32 = RBD_SNAPSHOTS;
/// From here on it restarts and upgrades its host when it is told to.
pub const MAINTENANCE: u32 = 1;
/// From here on it knows of guests whose memory follows them.
pub const POSTCOPY: u32 = 2;
/// From here on a guest that moves live takes along the disks that only its host has.
pub const GOES_ALONG: u32 = 2;
/// What a host says that knows of mirrored volumes.
pub const MIRRORS: u32 = 3;
/// From here on guests with mirrored disks move live, and their replicas are compared.
pub const MIRRORS_MOVE: u32 = 4;
/// From here on it backs up VMs, and makes disks from backups.
pub const BACKUPS: u32 = 5;
/// From here on it leaves a mirrored disk alone that was shut to it.
pub const SHUTS: u32 = 6;
/// From here on its VMs have ports into which disks are plugged while their guests run.
pub const PLUGS: u32 = 7;
/// From here on it takes snapshots of VMs, and knows that a disk which holds some does not go along.
pub const SNAPSHOTS: u32 = 8;
/// From here on it keeps copies of mirrored disks, and puts one in the place of its replica when the record says so.
pub const KEPT_COPIES: u32 = 9;
/// From here on it makes disks from snapshots of other VMs, and knows VMs of which snapshots are taken by themselves.
pub const CLONES: u32 = 10;
/// From here on it knows pools of Ceph clusters.
pub const RBD: u32 = 11;
/// From here on it encrypts disks.
pub const ENCRYPTS: u32 = 12;
/// From here on it knows pools of NFS servers and of Gluster volumes.
pub const FILERS: u32 = 13;
/// From here on it takes snapshots of disks in pools of Ceph clusters, and makes disks from them.
pub const RBD_SNAPSHOTS: u32 = 14;

/// What an agent sees of its own host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, rename_all = "camelCase")]
pub struct HostStatus {
    /// The session in which this was written.
    pub session: u64,
    /// Haven's version there.
    pub version: String,
    /// What its daemon understands beyond the first version: see [`SPEAKS`].
    pub speaks: u32,
    /// Logical CPUs.
    pub cpus: u32,
    /// Installed memory.
    pub memory: Bytes,
    /// `kvm` or `tcg`.
    pub accel: String,
    /// QEMU's version.
    pub qemu: String,
    /// Changes at every boot of the host.
    pub boot_id: String,
    /// Contents of images kept there (SHA-256).
    pub images: BTreeSet<String>,
    /// Whether it runs a member of the store, and its id.
    pub etcd_member: Option<u64>,
    /// That member does not answer, or the one that was here before did not.
    pub etcd_silent: bool,
    /// Labels that the host found out about itself.
    pub facts: BTreeMap<String, String>,
    /// Networks and services whose guests and addresses nobody outside reaches there: their uplink has no link.
    pub cut_off: BTreeSet<ObjectRef>,
    /// What is wrong there, one sentence each.
    pub problems: Vec<String>,
}
