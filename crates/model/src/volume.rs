//! Mirrored volumes: on which hosts their replicas are, and which of them count (docs/decisions/0022-mirrored-volumes.md).

use crate::{backup::BackupRef, image::ImageFile, name::Name, units::Bytes};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, fmt};

/// The fewest replicas that a mirrored volume has.
pub const FEWEST_REPLICAS: u32 = 2;
/// The most.
pub const MOST_REPLICAS: u32 = 3;
/// What stands before the content of an encrypted disk whose file holds nothing else (LUKS version 1, eight key slots), bytes.
pub const LUKS_HEAD_BYTES: u64 = 2_068_480;

/// The key of an encrypted disk, as it stands in the store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DiskKey {
    /// Sealed for this disk of this VM.
    pub sealed: String,
}

/// Which volume: of which disk of which VM. Written `vm.disk`; no name holds a dot.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub struct VolumeRef {
    /// The VM.
    pub vm: Name,
    /// Its disk.
    pub disk: Name,
}

impl VolumeRef {
    /// Reads `vm.disk`; nothing when it is something else.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (vm, disk) = text.split_once('.')?;
        Some(Self { vm: Name::new(vm).ok()?, disk: Name::new(disk).ok()? })
    }
}

impl fmt::Display for VolumeRef {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(to, "{}.{}", self.vm, self.disk)
    }
}

impl fmt::Debug for VolumeRef {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, to)
    }
}

impl From<VolumeRef> for String {
    fn from(volume: VolumeRef) -> Self {
        volume.to_string()
    }
}

impl TryFrom<String> for VolumeRef {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        Self::parse(&text).ok_or_else(|| format!("`{text}` is no volume; write vm.disk"))
    }
}

/// What a volume holds before its guest has written anything.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct FirstContent {
    /// The image's disk.
    pub file: ImageFile,
    /// Its format, as QEMU names it.
    pub format: String,
}

/// How a replica stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ReplicaState {
    /// It has every write that the guest saw acknowledged, and what was flushed is on its disk.
    Counted,
    /// It may lack some, or have some that the others lack.
    Stale,
    /// The same, and its owner may say at any moment that it counts. Until that has been taken back nobody goes on without it:
    /// the word may be under way to the store.
    Returning,
}

/// A volume's record. Who may write it is not in it: that is the host on which its VM is placed, under the epoch of that
/// placement.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Volume {
    /// The uid of its VM: a later VM of the same name has other volumes.
    pub vm_uid: String,
    /// The pool in which its replicas are.
    pub pool: Name,
    /// What it held at first, the same on all hosts, whatever the image of that name is by now. Nothing when it was empty.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first: Option<FirstContent>,
    /// The disk of a backup that it held at first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restored: Option<Box<BackupRef>>,
    /// The copy of another volume that it held at first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cloned: Option<Box<ClonedFrom>>,
    /// As the guest sees it.
    pub size: Bytes,
    /// Its replicas hold what its guest wrote encrypted, behind a head of [`LUKS_HEAD_BYTES`].
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub encrypted: bool,
    /// By host.
    pub replicas: BTreeMap<Name, ReplicaState>,
    /// Counts the processes that had it open; each has a number of its own, under which replicas are served to it and to no
    /// earlier one. The epoch of the placement would not do: a VM that is started anew on its host keeps that. 0 as long as
    /// nobody had it open: only then may a replica that counts be made.
    pub run: u64,
    /// The counted replicas are the same, byte for byte, and nobody writes. Otherwise they may differ in what was under way.
    pub clean: bool,
    /// The run is nobody's: it was begun so that all before it are shut out. Whoever is the owner begins another one.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub shut: bool,
    /// What it was made to hold again the last time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub based: Option<Based>,
}

/// A copy of a volume as it was in a snapshot, from which another one is made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ClonedFrom {
    /// Which volume.
    pub volume: VolumeRef,
    /// The uid of its VM.
    pub vm_uid: String,
    /// What the copies are called ([`crate::vm_snapshot::VmSnapshot::copy`]).
    pub copy: String,
}

/// What a volume holds from a run on, whatever it held before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Based {
    /// What the copies are called ([`crate::vm_snapshot::VmSnapshot::copy`]).
    pub copy: String,
    /// From which run on. A replica that counts and was open in no run from there on has its copy put in its place before anybody
    /// opens it.
    pub run: u64,
}

impl Volume {
    /// One that nobody has opened yet, whose replicas are all to be made.
    #[must_use]
    pub fn new(
        vm_uid: String,
        pool: Name,
        size: Bytes,
        hosts: impl IntoIterator<Item = Name>,
    ) -> Self {
        let replicas = hosts.into_iter().map(|host| (host, ReplicaState::Counted)).collect();
        Self {
            vm_uid,
            pool,
            first: None,
            restored: None,
            cloned: None,
            size,
            encrypted: false,
            replicas,
            run: 0,
            clean: true,
            shut: false,
            based: None,
        }
    }

    /// How long the file of each replica is, bytes.
    #[must_use]
    pub fn stored_bytes(&self) -> u64 {
        self.size.0 + if self.encrypted { LUKS_HEAD_BYTES } else { 0 }
    }

    /// What this host puts in the place of its replica before that is open in this run, if it was not open since.
    #[must_use]
    pub fn based(&self, host: &Name) -> Option<&Based> {
        // One that does not count is copied to.
        self.based.as_ref().filter(|_| self.counts(host))
    }

    /// The hosts whose replicas count.
    pub fn counted(&self) -> impl Iterator<Item = &Name> {
        let counted = self.replicas.iter().filter(|(_, state)| **state == ReplicaState::Counted);
        counted.map(|(host, _)| host)
    }

    /// Whether a host's replica counts.
    #[must_use]
    pub fn counts(&self, host: &Name) -> bool {
        self.replicas.get(host) == Some(&ReplicaState::Counted)
    }

    /// The record with this replica in another state.
    #[must_use]
    pub fn with(&self, host: &Name, state: ReplicaState) -> Self {
        let mut volume = self.clone();
        volume.replicas.insert(host.clone(), state);
        volume
    }

    /// The record with which all runs so far are shut out. Only of one that a process may have open: what nobody has opened
    /// yet, or has closed, needs no shutting, and its next owner takes it as it is.
    #[must_use]
    pub fn shut_out(&self) -> Option<Self> {
        let open = self.run > 0 && !self.clean && !self.shut;
        open.then(|| Self { run: self.run + 1, shut: true, ..self.clone() })
    }

    /// The last run in which anybody may have written. None does in one that is nobody's, and who has not served that yet lacks
    /// nothing for it.
    #[must_use]
    pub fn written_in(&self) -> u64 {
        self.run - u64::from(self.shut)
    }

    /// The record with these replicas counted no more.
    #[must_use]
    pub fn without<'a>(&self, hosts: impl IntoIterator<Item = &'a Name>) -> Self {
        let mut volume = self.clone();
        for host in hosts {
            if let Some(state) = volume.replicas.get_mut(host) {
                *state = ReplicaState::Stale;
            }
        }
        volume
    }
}

/// A disk that a person removed from its VM, with what was on it. It stands as long as the VM does: a host that was away removes what
/// it has once it is back, and no other disk of the VM gets the name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct GoneVolume {
    /// The uid of its VM.
    pub vm_uid: String,
    /// The pool in which it was.
    pub pool: Name,
    /// Who removed it.
    pub by: String,
    /// When, milliseconds since 1970.
    pub at_ms: i64,
}

/// What a host says of its replica of a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ReplicaStatus {
    /// The session of the host that says so.
    pub session: u64,
    /// How it is.
    #[serde(flatten)]
    pub is: ReplicaIs,
}

/// How a replica is on its host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase", tag = "is")]
pub enum ReplicaIs {
    /// It is served.
    Served {
        /// To this run, and to none before it.
        run: u64,
        /// At this TCP port of the host's address.
        port: u16,
        /// Changes when its process is another one.
        instance: String,
        /// Changes when the machine was started anew: what was not flushed may be lost then.
        boot: String,
    },
    /// It cannot be served.
    Failed {
        /// Why, in words.
        why: String,
    },
}

/// A comparison of the replicas of a volume, piece by piece, asked for by a person. The host of its VM carries it out, whichever
/// that is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct VolumeCheck {
    /// Its own.
    pub id: String,
    /// Who asked for it.
    pub by: String,
    /// When, milliseconds since 1970.
    pub at_ms: i64,
    /// Replicas that differ from that of the VM's host are copied anew from it.
    #[serde(default)]
    pub repair: bool,
    /// So much of the volume has been compared.
    pub done: Bytes,
    /// By host, what differs there from the replica of the VM's host.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub differs: BTreeMap<Name, Differs>,
    /// Pieces in which the replica of the VM's host differs from two others that are the same.
    #[serde(default)]
    pub alone: u64,
    /// How it ended; nothing while it goes on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outcome: Option<CheckOutcome>,
}

/// Where two replicas differ.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Differs {
    /// In so many pieces of 64 KiB.
    pub pieces: u64,
    /// Where the first of them begin, bytes.
    pub first: Vec<u64>,
}

/// The end of a comparison.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CheckOutcome {
    /// When, milliseconds since 1970.
    pub at_ms: i64,
    /// All that was to be compared is the same, or is made so.
    pub well: bool,
    /// In words.
    pub message: String,
}

impl VolumeCheck {
    /// It has ended.
    #[must_use]
    pub fn ended(&self, at_ms: i64, well: bool, message: String) -> Self {
        Self { outcome: Some(CheckOutcome { at_ms, well, message }), ..self.clone() }
    }
}
