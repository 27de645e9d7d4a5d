//! What goes over the API, beside the objects themselves.

use crate::{
    backup::{Backup, BackupRun, BackupSpec},
    cluster::ClusterSpec,
    drain::Drain,
    manifest::Problem,
    migration::{Migration, MigrationOptions, MigrationStatus},
    name::{Name, ObjectRef},
    object::Object,
    units::Bytes,
    vm::DiskState,
    vm_snapshot::VmSnapshot,
    volume::{Volume, VolumeCheck, VolumeRef},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The column of a running VM that names the parts changed since it started.
pub const CHANGED: &str = "changed";

/// An object with the revision of its record, for optimistic concurrency.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Item {
    /// The store's revision of the last write.
    pub resource_version: i64,
    /// The object.
    #[serde(flatten)]
    pub object: Object,
    /// In words: what is seen of it now.
    #[serde(default)]
    pub state: String,
    /// The host that runs or holds it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<Name>,
    /// Further words by column, as wide lists show them.
    #[serde(default)]
    pub columns: std::collections::BTreeMap<String, String>,
    /// What the one who changed it should know, a sentence.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub warning: String,
}

/// A page of a list. Objects and tokens come in order of their names, what happened in order of time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(rename = "{T}Page")]
pub struct Page<T> {
    /// What is on it.
    pub items: Vec<T>,
    /// The `after` (of what happened: the `before`) that asks for the next page; absent on the last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

/// The cluster's own spec with the revision of its record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct ClusterItem {
    /// The store's revision of the last write.
    pub resource_version: i64,
    /// What is wanted of the cluster as a whole.
    pub spec: ClusterSpec,
}

/// An error (RFC 9457).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ProblemBody {
    /// A few words.
    pub title: String,
    /// The HTTP status.
    pub status: u16,
    /// A sentence.
    pub detail: String,
    /// What to do.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub hint: String,
    /// What is wrong with a manifest or a body, each with its place.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<Problem>,
    /// For 409: which version the writer saw and which one there is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub conflict: Option<Conflict>,
}

/// Somebody else changed an object after it was read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Conflict {
    /// `kind/name`.
    pub object: String,
    /// The version that the writer saw; 0 when there was none.
    pub given: i64,
    /// The version that there is now; 0 when there is none any longer.
    pub now: i64,
}

/// Which Haven answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Version {
    /// As `haven --version` prints it.
    pub version: String,
}

/// One file of manifests.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ManifestFile {
    /// As the person named it.
    pub name: String,
    /// Its content.
    pub text: String,
}

/// What is to be applied.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct ApplyRequest {
    /// All files; either all of them are applied or none.
    pub files: Vec<ManifestFile>,
    /// Only say what would happen.
    #[serde(default)]
    pub dry_run: bool,
}

/// What became of one object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Applied {
    /// `kind/name`.
    pub object: String,
    /// `created`, `changed` or `unchanged`.
    pub outcome: String,
    /// As it was, YAML; empty when it was not there.
    pub before: String,
    /// As it is now, YAML.
    pub after: String,
    /// The generation of the spec that is wanted now; who waits for it looks for at least this one.
    #[serde(default)]
    pub generation: u64,
    /// What the one who applied it should know, a sentence.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub warning: String,
}

/// A token as lists show it: never its secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TokenLine {
    /// Its name.
    pub name: String,
    /// `viewer`, `operator` or `admin`; `join` for a token that lets one host join.
    pub role: String,
    /// When it ends, milliseconds since 1970.
    pub expires_ms: i64,
}

/// A new secret, shown once.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct Secret {
    /// The secret.
    pub secret: String,
    /// When it ends, milliseconds since 1970.
    pub expires_ms: i64,
}

/// A host asks to become part of the cluster.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct JoinRequest {
    /// The join token's secret.
    pub secret: String,
    /// Its name.
    pub host: Name,
    /// Its address.
    pub address: std::net::Ipv4Addr,
    /// How its power is controlled.
    #[serde(default)]
    pub power: Option<crate::host::PowerSpec>,
    /// It is to be a witness.
    #[serde(default)]
    pub witness: bool,
    /// Its certificate request, PEM.
    pub request: String,
}

/// What a host gets that became part of the cluster.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct JoinAnswer {
    /// Its certificate, PEM.
    pub certificate: String,
    /// The authority's certificate, PEM.
    pub ca: String,
    /// The authority's key, PEM: every host can admit others.
    pub ca_key: String,
    /// The key of the heartbeats, hexadecimal.
    pub heartbeat_key: String,
    /// Where the store's members are reached.
    pub endpoints: Vec<String>,
}

/// Asks for a VM to be moved while it runs.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct MigrationAsked {
    /// Where to; chosen by Haven when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub to: Option<Name>,
    /// How.
    pub options: MigrationOptions,
}

/// How the last live migration of a VM stands.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct MigrationView {
    /// The migration, with its outcome once it has ended; none when there never was one.
    pub migration: Option<Migration>,
    /// The VM's owner now.
    pub host: Option<Name>,
    /// While it moves: where to.
    pub to: Option<Name>,
    /// What the host that sends says.
    pub source: Option<MigrationStatus>,
    /// What the host that takes says.
    pub target: Option<MigrationStatus>,
    /// What it waits for, a sentence.
    pub waiting: Option<String>,
}

/// A VM that keeps a host from being drained.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DrainLeft {
    /// Which VM.
    pub vm: Name,
    /// Where it moves to at the moment.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<Name>,
    /// What it waits for or is at, a sentence.
    pub why: String,
}

/// A replica of a mirrored volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ReplicaLine {
    /// Its host.
    pub host: Name,
    /// It has every write that the guest saw acknowledged.
    pub counted: bool,
    /// How it is, in words.
    pub is: String,
}

/// A disk of a VM, and of a mirrored one how its replicas are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VolumeView {
    /// `vm.disk`.
    pub name: VolumeRef,
    /// As its guest sees it, or is to.
    pub size: Bytes,
    /// The pool in which it is.
    pub pool: Name,
    /// What is written on it lies encrypted in its pool.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub encrypted: bool,
    /// How it stands towards its guest.
    pub state: DiskState,
    /// What keeps it from being as it is wanted, in words.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// The host of its VM.
    pub owner: Option<Name>,
    /// Its replicas, if it is mirrored.
    pub replicas: Vec<ReplicaLine>,
    /// The record of a mirrored one, once hosts are chosen for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volume: Option<Volume>,
    /// The last comparison of its replicas.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub check: Option<VolumeCheck>,
}

/// A comparison of replicas is asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CheckAsked {
    /// Replicas that differ from that of the VM's host are copied anew from it.
    #[serde(default)]
    pub repair: bool,
}

/// A backup is asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct BackupAsked {
    /// Where to; where the VM's own spec says, or to the only target that there is, when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<Name>,
}

/// The last making of a backup of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct BackupView {
    /// Of which VM.
    pub vm: Name,
    /// When it is backed up by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spec: Option<BackupSpec>,
    /// How the last one stands.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run: Option<BackupRun>,
}

/// The backups in a target.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct BackupList {
    /// By VM, older ones first.
    pub backups: Vec<Backup>,
    /// What is there and cannot be read, a sentence each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unreadable: Vec<String>,
}

/// What stands on a disk of a backup, or on a part of one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct BackupSystem {
    /// Its root: `DISK:/` or `DISK:PARTITION:/`.
    pub at: String,
    /// In words.
    pub holds: String,
    /// How large it is.
    pub size: Bytes,
}

/// A file in a backup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct BackupFile {
    /// Its name.
    pub name: String,
    /// `file`, `directory`, `link` or `special`.
    pub kind: String,
    /// How large it is.
    pub size: Bytes,
    /// Who may do what with it, as `chmod` takes it.
    pub mode: u16,
    /// Whose it is.
    pub uid: u32,
    /// Of which group.
    pub gid: u32,
    /// When it was changed, milliseconds since 1970.
    pub modified_ms: i64,
    /// Where a link leads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub leads_to: Option<String>,
}

/// What a backup holds: of the place that was asked about, or which places there are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct BackupFiles {
    /// What stands on its disks.
    pub systems: Vec<BackupSystem>,
    /// What stands in the directory.
    pub files: Vec<BackupFile>,
}

/// A snapshot is asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SnapshotAsked {
    /// What it shall be called; after the time when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<Name>,
    /// Of these disks only; of all when empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<Name>,
}

/// A VM is to be what it was.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RevertAsked {
    /// These disks only; all that are in the snapshot when empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<Name>,
}

/// A VM is to be made of another one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CloneAsked {
    /// The name of the new VM.
    pub name: Name,
    /// The snapshot whose disks it gets; its disks as they are now when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<Name>,
    /// It is not started.
    #[serde(default)]
    pub stopped: bool,
}

/// A snapshot of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SnapshotView {
    /// Its name.
    pub name: Name,
    /// All that is known of it.
    pub snapshot: VmSnapshot,
    /// Why it does not come further, if so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waiting: Option<String>,
}

/// A comparison of backups with their checksums is asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct VerifyAsked {
    /// Only those of this VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<Name>,
    /// Only this one of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backup: Option<String>,
}

/// A VM is to be made from a backup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RestoreAsked {
    /// Where the backup is.
    pub target: Name,
    /// Of which VM it is.
    pub vm: Name,
    /// Which one; the newest when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backup: Option<String>,
    /// The name of the new VM; that of the VM before when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<Name>,
    /// The pool of its disks; those of the VM before when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<Name>,
    /// It is not started.
    #[serde(default)]
    pub stopped: bool,
}

/// How the drain of a host stands.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct DrainView {
    /// The host's state: `draining`, `drained`, or another where there is no drain.
    pub state: String,
    /// The drain; none when there is none, or none any more.
    pub drain: Option<Drain>,
    /// The VMs that run there, or have a copy there.
    pub left: Vec<DrainLeft>,
    /// What is to be said of each service address that it still holds, a sentence.
    pub addresses: Vec<String>,
    /// The VMs that it has moved.
    pub moved: Vec<Name>,
    /// The VMs that have their place there and do not run.
    pub resting: Vec<Name>,
    /// While it brings back: the VMs that are still away, each with what it waits for or is at.
    pub away: Vec<DrainLeft>,
    /// What a reboot of the host would cost, a sentence; none when it would cost nothing.
    pub quorum: Option<String>,
}

/// One thing that would happen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RehearsedStep {
    /// So long after the beginning, milliseconds.
    pub after_ms: u64,
    /// What it is about.
    pub object: ObjectRef,
    /// What and why, a sentence.
    pub message: String,
}

/// What would become of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RehearsedVm {
    /// Which VM.
    pub vm: Name,
    /// Where it is now; none for one that does not exist yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<Name>,
    /// Where it would be; none when it would be nowhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<Name>,
    /// So long after the beginning it would serve there, milliseconds; none when it would not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after_ms: Option<u64>,
    /// Why it would not, a sentence; empty when it would.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub why: String,
}

/// What would happen, by the code that decides when it does.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, rename_all = "camelCase")]
pub struct Rehearsal {
    /// In order of time.
    pub steps: Vec<RehearsedStep>,
    /// What would become of the VMs that it concerns: those that would serve in the order in which they would, then the
    /// others.
    pub vms: Vec<RehearsedVm>,
    /// So long until nothing more would happen, milliseconds.
    pub ends_after_ms: u64,
    /// What the times rest on, a sentence.
    pub figures: String,
}

/// Asks for hosts to be worked on, one after another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MaintenanceAsked {
    /// What is done.
    pub work: crate::maintenance::Work,
    /// In this order; all, when none is named.
    #[serde(default)]
    pub hosts: Vec<Name>,
}

/// How the work on hosts stands.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct MaintenanceView {
    /// The last one; none when there never was one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub maintenance: Option<crate::maintenance::Maintenance>,
    /// What it is at, a sentence.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub now: Option<String>,
    /// Hosts that are drained for it.
    pub drained: Vec<Name>,
}

/// The load of one host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HostBalance {
    /// Its name.
    pub host: Name,
    /// How busy its VMs keep its CPUs, thousandths of all of them; absent while that is not measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<u32>,
    /// The same once the moves are done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_after: Option<u32>,
    /// The memory that its VMs have in use, thousandths of all that is for VMs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<u32>,
    /// The same once the moves are done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_after: Option<u32>,
    /// For how much of the time its work stood still.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pressure: Option<crate::load::Pressure>,
}

/// A move that would help.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct BalancingMove {
    /// Which VM.
    pub vm: Name,
    /// Where it runs.
    pub from: Name,
    /// Where it would run.
    pub to: Name,
    /// Why, a sentence with the figures before and after.
    pub reason: String,
    /// By how much the busier one of the two hosts is relieved, thousandths of what it has.
    pub gain: u32,
}

/// How even the load is, and what would make it more so.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, rename_all = "camelCase")]
pub struct Balance {
    /// The cluster's policy.
    pub policy: crate::load::RebalancePolicy,
    /// Every host that takes VMs.
    pub hosts: Vec<HostBalance>,
    /// In this order; each rests on those before it.
    pub moves: Vec<BalancingMove>,
    /// Why nothing is moved at the moment whatever would help, a sentence.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub held: Option<String>,
    /// Why Haven moves nothing by itself just now, a sentence; somebody who asks is not kept from it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rests: Option<String>,
}

/// A host on the overview.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct HostLine {
    /// Its name.
    pub name: String,
    /// Its address.
    pub address: String,
    /// `online`, `lost (lease-expired)` and so on.
    pub state: String,
    /// VMs placed there.
    pub vms: usize,
    /// Memory promised, bytes.
    pub memory_used: u64,
    /// Memory for guests, bytes.
    pub memory: u64,
    /// What it does beside running VMs: `manager`, `voter`, `holds ADDRESS`.
    pub roles: Vec<String>,
}

/// A service on the overview.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ServiceLine {
    /// Its name.
    pub name: String,
    /// Members that are ready.
    pub ready: usize,
    /// Members that are wanted.
    pub wanted: usize,
    /// `ADDRESS:PORT`, or empty.
    pub address: String,
    /// The host that holds the address.
    pub holder: String,
}

/// The cluster on one screen.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Overview {
    /// The cluster's name.
    pub cluster: String,
    /// A sentence: everything is well, or what is not.
    pub headline: String,
    /// Hosts.
    pub hosts: Vec<HostLine>,
    /// Services.
    pub services: Vec<ServiceLine>,
    /// Hosts that run a voter, and those of them that are online.
    pub voters: (usize, usize),
    /// VMs that run, and those that should.
    pub vms: (usize, usize),
    /// What is down.
    pub down: Vec<String>,
    /// What is at risk.
    pub risks: Vec<String>,
    /// What would be better otherwise, and is well.
    #[serde(default)]
    pub advice: Vec<String>,
    /// So many hosts can be lost now: the smaller of the next two.
    pub survivable: usize,
    /// So many hosts can be lost now, whichever they are, and every VM that can move finds a place; 3 stands for 3 or
    /// more.
    #[serde(default)]
    pub survivable_vms: usize,
    /// So many voters can be lost now, and the store keeps its quorum.
    #[serde(default)]
    pub survivable_store: usize,
    /// Open incidents, a sentence each.
    pub incidents: Vec<String>,
    /// The store's revision: every write counts it on.
    #[serde(default)]
    pub revision: i64,
}
