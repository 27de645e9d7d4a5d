//! The keys of the store. Everything stands under [`ROOT`].

use crate::{
    name::{Name, ObjectRef},
    object::Kind,
    volume::VolumeRef,
};

/// Prefix of every key.
pub const ROOT: &str = "/haven/";
/// The cluster's spec.
pub const CLUSTER: &str = "/haven/cluster";
/// Who manages.
pub const MANAGER: &str = "/haven/manager";
/// Prefix of the renewal records.
pub const LEASES: &str = "/haven/leases/";
/// Prefix of the owners of VMs.
pub const PLACEMENTS: &str = "/haven/placement/vm/";
/// Prefix of drains.
pub const DRAINS: &str = "/haven/drains/";
/// The restarts or upgrades of hosts, one after another.
pub const MAINTENANCE: &str = "/haven/maintenance";
/// Prefix of mirrored volumes.
pub const VOLUMES: &str = "/haven/volumes/";
/// Prefix of who has disks in `rbd` pools open.
pub const CLIENTS: &str = "/haven/clients/";
/// Prefix of comparisons of replicas.
pub const CHECKS: &str = "/haven/checks/";
/// Prefix of the keys of encrypted disks. No live copy holds them.
pub const DISK_KEYS: &str = "/haven/disk-keys/";
/// Prefix of disks that were removed from their VMs.
pub const GONE: &str = "/haven/gone/";
/// Prefix of the making of backups.
pub const BACKUPS: &str = "/haven/backups/";
/// Prefix of comparisons of backups with their checksums.
pub const VERIFICATIONS: &str = "/haven/verifications/";
/// Prefix of snapshots of VMs.
pub const SNAPSHOTS: &str = "/haven/snapshots/";
/// Prefix of live migrations.
pub const MIGRATIONS: &str = "/haven/migrations/";
/// Prefix of events.
pub const EVENTS: &str = "/haven/events/";
/// Prefix of the audit log.
pub const AUDIT: &str = "/haven/audit/";
/// Prefix of tokens (hashed).
pub const TOKENS: &str = "/haven/tokens/";
/// Prefix of incidents.
pub const INCIDENTS: &str = "/haven/incidents/";
/// Prefix of explanations: what the manager last said of an object.
pub const EXPLAIN: &str = "/haven/explain";

/// An object's spec.
#[must_use]
pub fn object(object: &ObjectRef) -> String {
    format!("/haven/spec/{}/{}", object.kind, object.name)
}
/// Prefix of all specs of a kind.
#[must_use]
pub fn objects(kind: Kind) -> String {
    format!("/haven/spec/{kind}/")
}
/// A host's renewal record.
#[must_use]
pub fn lease(host: &Name) -> String {
    format!("{LEASES}{host}")
}
/// The proof under which a host's last session was closed.
#[must_use]
pub fn lost(host: &Name) -> String {
    format!("/haven/lost/{host}")
}
/// A VM's owner.
#[must_use]
pub fn placement(vm: &Name) -> String {
    format!("{PLACEMENTS}{vm}")
}
/// A service address' holder.
#[must_use]
pub fn frontend(service: &Name) -> String {
    format!("/haven/placement/frontend/{service}")
}
/// What an agent sees of its host.
#[must_use]
pub fn host_status(host: &Name) -> String {
    format!("/haven/status/host/{host}")
}
/// What an agent sees of a VM.
#[must_use]
pub fn vm_status(vm: &Name) -> String {
    format!("/haven/status/vm/{vm}")
}
/// What a host measures of the work on it.
#[must_use]
pub fn host_load(host: &Name) -> String {
    format!("/haven/status/load/{host}")
}
/// The room that a host has in pools.
#[must_use]
pub fn host_rooms(host: &Name) -> String {
    format!("/haven/status/rooms/{host}")
}
/// A mirrored volume.
#[must_use]
pub fn volume(volume: &VolumeRef) -> String {
    format!("{VOLUMES}{volume}")
}
/// Who has the disks of a VM in `rbd` pools open.
#[must_use]
pub fn clients(vm: &Name) -> String {
    format!("{CLIENTS}{vm}")
}
/// The last comparison of the replicas of a volume.
#[must_use]
pub fn check(volume: &VolumeRef) -> String {
    format!("{CHECKS}{volume}")
}
/// The key of an encrypted disk of the VM with this uid.
#[must_use]
pub fn disk_key(vm_uid: &str, disk: &Name) -> String {
    format!("{DISK_KEYS}{vm_uid}/{disk}")
}
/// A disk that was removed from its VM.
#[must_use]
pub fn gone(volume: &VolumeRef) -> String {
    format!("{GONE}{volume}")
}
/// The last making of a backup of a VM.
#[must_use]
pub fn backup(vm: &Name) -> String {
    format!("{BACKUPS}{vm}")
}
/// A snapshot of the VM with this uid.
#[must_use]
pub fn vm_snapshot(vm_uid: &str, name: &Name) -> String {
    format!("{SNAPSHOTS}{vm_uid}/{name}")
}
/// The last comparison of the backups in a target.
#[must_use]
pub fn verification(target: &Name) -> String {
    format!("{VERIFICATIONS}{target}")
}
/// What a host says of its replica of a volume.
#[must_use]
pub fn replica_status(volume: &VolumeRef, host: &Name) -> String {
    format!("/haven/status/replica/{volume}/{host}")
}
/// What a host says of the work on it.
#[must_use]
pub fn work_status(host: &Name) -> String {
    format!("/haven/status/work/{host}")
}
/// The drain of a host.
#[must_use]
pub fn drain(host: &Name) -> String {
    format!("{DRAINS}{host}")
}
/// Since when a VM waits for what it starts after.
#[must_use]
pub fn wait(vm: &Name) -> String {
    format!("/haven/waits/{vm}")
}
/// A VM's last live migration.
#[must_use]
pub fn migration(vm: &Name) -> String {
    format!("{MIGRATIONS}{vm}")
}
/// What a host says of its side of a VM's migration.
#[must_use]
pub fn migration_status(vm: &Name, host: &Name) -> String {
    format!("/haven/status/migration/{vm}/{host}")
}
/// An incident.
#[must_use]
pub fn incident(number: u64) -> String {
    format!("{INCIDENTS}{number:010}")
}
/// An event.
#[must_use]
pub fn event(id: &str) -> String {
    format!("{EVENTS}{id}")
}
