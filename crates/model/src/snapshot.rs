//! The snapshot: everything that stands in the store, typed, at one revision.

use crate::{
    backup::{BackupRun, TargetSpec, Verification},
    certificate::CertificateSpec,
    clients::DiskClients,
    cluster::{ClusterSpec, ManagerRecord},
    drain::Drain,
    event::Incident,
    host::{HostSpec, HostStatus, Lease, LostSession},
    image::ImageSpec,
    load::HostLoad,
    maintenance::{Maintenance, WorkStatus},
    migration::{Migration, MigrationPhase, MigrationStatus, MovedFrom},
    name::{Name, ObjectRef},
    network::NetworkSpec,
    object::{Kind, Object, Stored},
    placement::{FrontendPlacement, Placement},
    pool::{HostRooms, PoolSpec},
    service::ServiceSpec,
    tolerant,
    vm::{AGENT, DISKS, DiskSpec, DiskState, VmPhase, VmSpec, VmStatus, Wait},
    vm_snapshot::{CopyRef, VmSnapshot},
    volume::{GoneVolume, ReplicaIs, ReplicaStatus, Volume, VolumeCheck, VolumeRef},
};
use serde::{Serialize, de::DeserializeOwned};
use std::{collections::BTreeMap, ops::Deref, sync::Arc};

/// A record with the revision at which it was last written. Cheap to clone.
#[derive(Debug, Serialize)]
pub struct Versioned<T> {
    /// The store's revision of the last write.
    pub revision: i64,
    /// The record.
    pub value: Arc<T>,
}
impl<T> Clone for Versioned<T> {
    fn clone(&self) -> Self {
        Self { revision: self.revision, value: Arc::clone(&self.value) }
    }
}
impl<T> Deref for Versioned<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.value
    }
}

/// Records of one type by name.
pub type Table<T> = BTreeMap<Name, Versioned<T>>;

/// How the copy of a VM stands that its owner before a live migration had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Handover {
    /// Not known yet: it may run.
    Pending,
    /// It can run no more, and the new owner has all of it.
    Whole,
    /// It can run no more and the new owner can; part of its memory still comes from there.
    Following,
    /// It can run no more, and the new owner may not have all of it.
    Broken,
}

/// What applying one key changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Nothing that anybody waits for: a renewal, an event, a key of a newer version.
    Quiet,
    /// A record of the snapshot.
    Changed,
}

/// Everything that is known, at one revision. Cloning shares the records.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Snapshot {
    /// The store's revision.
    pub revision: i64,
    /// The cluster's spec.
    pub cluster: Option<Versioned<ClusterSpec>>,
    /// Who manages.
    pub manager: Option<Versioned<ManagerRecord>>,
    /// Hosts.
    pub hosts: Table<Stored<HostSpec>>,
    /// Pools.
    pub pools: Table<Stored<PoolSpec>>,
    /// Images.
    pub images: Table<Stored<ImageSpec>>,
    /// Networks.
    pub networks: Table<Stored<NetworkSpec>>,
    /// Certificates.
    pub certificates: Table<Stored<CertificateSpec>>,
    /// Where backups go.
    pub targets: Table<Stored<TargetSpec>>,
    /// VMs, also those of services.
    pub vms: Table<Stored<VmSpec>>,
    /// Services.
    pub services: Table<Stored<ServiceSpec>>,
    /// Renewal records by host.
    pub leases: Table<Lease>,
    /// Proofs of lost sessions by host.
    pub lost: Table<LostSession>,
    /// Drains by host.
    pub drains: Table<Drain>,
    /// Hosts that are restarted or upgraded, one after another.
    pub maintenance: Option<Versioned<Maintenance>>,
    /// What hosts say of the work on them.
    pub work_status: Table<WorkStatus>,
    /// Owners by VM.
    pub placements: Table<Placement>,
    /// Address holders by service.
    pub frontends: Table<FrontendPlacement>,
    /// Host statuses.
    pub host_status: Table<HostStatus>,
    /// What hosts measure of the work on them.
    pub loads: Table<HostLoad>,
    /// The room that hosts have in pools.
    pub rooms: Table<HostRooms>,
    /// VM statuses.
    pub vm_status: Table<VmStatus>,
    /// Live migrations, wanted, under way and ended, by VM.
    pub migrations: Table<Migration>,
    /// What hosts say of migrations, by VM and host.
    pub migration_status: BTreeMap<Name, Table<MigrationStatus>>,
    /// Mirrored volumes.
    pub volumes: BTreeMap<VolumeRef, Versioned<Volume>>,
    /// Who has the disks of VMs in `rbd` pools open.
    pub clients: Table<DiskClients>,
    /// Comparisons of their replicas.
    pub checks: BTreeMap<VolumeRef, Versioned<VolumeCheck>>,
    /// Disks that were removed from their VMs.
    pub gone: BTreeMap<VolumeRef, Versioned<GoneVolume>>,
    /// The last making of a backup of each VM.
    pub backups: Table<BackupRun>,
    /// The last comparison of the backups in each target.
    pub verifications: Table<Verification>,
    /// Snapshots of VMs, by the uid of the VM and their names.
    pub vm_snapshots: BTreeMap<String, Table<VmSnapshot>>,
    /// What hosts say of their replicas, by volume and host.
    pub replica_status: BTreeMap<VolumeRef, Table<ReplicaStatus>>,
    /// Since when VMs wait for what they start after.
    pub waits: Table<Wait>,
    /// Incidents by number.
    pub incidents: BTreeMap<u64, Versioned<Incident>>,
    /// Records that are there and cannot be read by this version, by key below the root, with their revisions. Nothing
    /// may be concluded from their absence above. A spec is kept there as it was read last.
    pub unreadable: BTreeMap<String, i64>,
}

/// The bytes and revision of one key.
pub type Raw<'a> = Option<(&'a [u8], i64)>;

/// What one key came to.
enum Read<T> {
    Absent,
    Unreadable,
    Record(Versioned<T>),
}

fn decode<T: DeserializeOwned>(raw: Raw<'_>) -> Read<T> {
    let Some((bytes, revision)) = raw else { return Read::Absent };
    match tolerant::read(bytes) {
        Ok(value) => Read::Record(Versioned { revision, value: Arc::new(value) }),
        Err(_) => Read::Unreadable,
    }
}

/// What applying one key did: whether the record could be read, if there is one, and whether anybody waits for it.
struct Applied {
    readable: bool,
    change: Change,
}

impl Applied {
    const QUIET: Self = Self { readable: true, change: Change::Quiet };

    fn changed(readable: bool) -> Self {
        Self { readable, change: Change::Changed }
    }
}

/// What people wish for: one that cannot be read stays as it was read last.
fn set_spec<T: DeserializeOwned>(
    table: &mut Table<Stored<T>>,
    name: &str,
    raw: Raw<'_>,
) -> Applied {
    let Ok(name) = Name::new(name) else {
        return Applied::QUIET;
    };
    let Some((bytes, revision)) = raw else {
        table.remove(&name);
        return Applied::changed(true);
    };
    let Ok((mut value, whole)) = tolerant::read_noting::<Stored<T>>(bytes) else {
        return Applied::changed(false);
    };
    value.meta.whole = whole.map(Arc::new);
    table.insert(name, Versioned { revision, value: Arc::new(value) });
    Applied::changed(true)
}

/// What is so: an old one would be wrong.
fn set<T: DeserializeOwned>(table: &mut Table<T>, name: &str, raw: Raw<'_>) -> Applied {
    let Ok(name) = Name::new(name) else {
        return Applied::QUIET;
    };
    match decode(raw) {
        Read::Record(record) => _ = table.insert(name, record),
        Read::Absent => _ = table.remove(&name),
        Read::Unreadable => {
            table.remove(&name);
            return Applied::changed(false);
        }
    }
    Applied::changed(true)
}

fn set_one<T: DeserializeOwned>(
    one: &mut Option<Versioned<T>>,
    raw: Raw<'_>,
    keep: bool,
) -> Applied {
    match decode(raw) {
        Read::Record(record) => *one = Some(record),
        Read::Absent => *one = None,
        Read::Unreadable => {
            if !keep {
                *one = None;
            }
            return Applied::changed(false);
        }
    }
    Applied::changed(true)
}

/// The same for what is of a volume; `keep`: what cannot be read stays as it was.
fn of_volume<T: DeserializeOwned>(
    table: &mut BTreeMap<VolumeRef, Versioned<T>>,
    path: &str,
    raw: Raw<'_>,
    keep: bool,
) -> Applied {
    let Some(volume) = VolumeRef::parse(path) else { return Applied::QUIET };
    let mut one = table.remove(&volume);
    let applied = set_one(&mut one, raw, keep);
    table.extend(one.map(|record| (volume, record)));
    applied
}

/// What is measured wakes nobody, and what cannot be read of it is as if it were not measured.
fn quietly<T: DeserializeOwned>(table: &mut Table<T>, name: &str, raw: Raw<'_>) -> Applied {
    set(table, name, raw);
    Applied::QUIET
}

impl Snapshot {
    /// Applies one key: `raw` is its value and revision, or nothing when it was deleted.
    pub fn apply(&mut self, key: &str, raw: Raw<'_>) -> Change {
        let Some(path) = key.strip_prefix(crate::keys::ROOT) else {
            return Change::Quiet;
        };
        let applied = self.fold(path, raw);
        match raw {
            Some((_, revision)) if !applied.readable => {
                self.unreadable.insert(path.to_owned(), revision);
            }
            _ => _ = self.unreadable.remove(path),
        }
        applied.change
    }

    fn fold(&mut self, path: &str, raw: Raw<'_>) -> Applied {
        let (head, rest) = path.split_once('/').unwrap_or((path, ""));
        match head {
            "cluster" => set_one(&mut self.cluster, raw, true),
            "manager" => set_one(&mut self.manager, raw, false),
            "spec" => self.apply_spec(rest, raw),
            "leases" => self.apply_lease(rest, raw),
            "lost" => set(&mut self.lost, rest, raw),
            "placement" => match rest.split_once('/') {
                Some(("vm", name)) => set(&mut self.placements, name, raw),
                Some(("frontend", name)) => set(&mut self.frontends, name, raw),
                _ => Applied::QUIET,
            },
            "status" => match rest.split_once('/') {
                Some(("host", name)) => set(&mut self.host_status, name, raw),
                Some(("vm", name)) => set(&mut self.vm_status, name, raw),
                Some(("work", name)) => set(&mut self.work_status, name, raw),
                Some(("load", name)) => quietly(&mut self.loads, name, raw),
                Some(("rooms", name)) => quietly(&mut self.rooms, name, raw),
                Some(("migration", path)) => self.apply_migration_status(path, raw),
                Some(("replica", path)) => self.apply_replica_status(path, raw),
                _ => Applied::QUIET,
            },
            "maintenance" => set_one(&mut self.maintenance, raw, false),
            "drains" => set(&mut self.drains, rest, raw),
            "migrations" => set(&mut self.migrations, rest, raw),
            "waits" => set(&mut self.waits, rest, raw),
            "volumes" => of_volume(&mut self.volumes, rest, raw, false),
            "clients" => set(&mut self.clients, rest, raw),
            "checks" => of_volume(&mut self.checks, rest, raw, true),
            "gone" => of_volume(&mut self.gone, rest, raw, false),
            "backups" => set(&mut self.backups, rest, raw),
            "verifications" => set(&mut self.verifications, rest, raw),
            "snapshots" => self.apply_vm_snapshot(rest, raw),
            "incidents" => {
                let Ok(number) = rest.parse() else {
                    return Applied::QUIET;
                };
                let mut one = self.incidents.remove(&number);
                let applied = set_one(&mut one, raw, false);
                self.incidents.extend(one.map(|incident| (number, incident)));
                applied
            }
            _ => Applied::QUIET,
        }
    }

    fn apply_spec(&mut self, path: &str, raw: Raw<'_>) -> Applied {
        match path.split_once('/') {
            Some(("host", name)) => set_spec(&mut self.hosts, name, raw),
            Some(("pool", name)) => set_spec(&mut self.pools, name, raw),
            Some(("image", name)) => set_spec(&mut self.images, name, raw),
            Some(("network", name)) => set_spec(&mut self.networks, name, raw),
            Some(("certificate", name)) => set_spec(&mut self.certificates, name, raw),
            Some(("target", name)) => set_spec(&mut self.targets, name, raw),
            Some(("vm", name)) => set_spec(&mut self.vms, name, raw),
            Some(("service", name)) => set_spec(&mut self.services, name, raw),
            _ => Applied::QUIET,
        }
    }

    fn apply_migration_status(&mut self, path: &str, raw: Raw<'_>) -> Applied {
        let Some((vm, host)) = path.split_once('/') else { return Applied::QUIET };
        let Ok(vm) = Name::new(vm) else { return Applied::QUIET };
        let table = self.migration_status.entry(vm.clone()).or_default();
        let applied = set(table, host, raw);
        if table.is_empty() {
            self.migration_status.remove(&vm);
        }
        applied
    }

    fn apply_vm_snapshot(&mut self, path: &str, raw: Raw<'_>) -> Applied {
        let Some((uid, name)) = path.split_once('/') else { return Applied::QUIET };
        let table = self.vm_snapshots.entry(uid.to_owned()).or_default();
        let applied = set(table, name, raw);
        if table.is_empty() {
            self.vm_snapshots.remove(uid);
        }
        applied
    }

    fn apply_replica_status(&mut self, path: &str, raw: Raw<'_>) -> Applied {
        let Some((volume, host)) = path.split_once('/') else { return Applied::QUIET };
        let Some(volume) = VolumeRef::parse(volume) else { return Applied::QUIET };
        let table = self.replica_status.entry(volume.clone()).or_default();
        let applied = set(table, host, raw);
        if table.is_empty() {
            self.replica_status.remove(&volume);
        }
        applied
    }

    /// What a host says of its replica of a volume, in the session that is open there now.
    #[must_use]
    pub fn replica_told(&self, volume: &VolumeRef, host: &Name) -> Option<&ReplicaIs> {
        let lease = self.leases.get(host).filter(|lease| !lease.closed)?;
        let told = self.replica_status.get(volume)?.get(host)?;
        (told.session == lease.session).then_some(&told.is)
    }

    /// What a host says of its side of an attempt to move a VM, in the session that is open there now.
    #[must_use]
    pub fn migration_told(
        &self,
        vm: &Name,
        host: &Name,
        attempt: i64,
    ) -> Option<&Versioned<MigrationStatus>> {
        let lease = self.leases.get(host).filter(|lease| !lease.closed)?;
        let told = self.migration_status.get(vm)?.get(host)?;
        (told.attempt == attempt && told.session == lease.session).then_some(told)
    }

    /// The host to which what is sent to a VM's guest is led. While a guest is stopped on its way to another host that is
    /// the other host already: there the packets wait until it runs again, and here they would be lost.
    #[must_use]
    pub fn reached_at<'a>(&'a self, vm: &Name, placement: &'a Versioned<Placement>) -> &'a Name {
        let to = placement.moving_to.as_ref().filter(|to| !to.restart);
        let stopped = to.filter(|_| {
            let told = self.migration_told(vm, &placement.host, placement.revision);
            told.is_some_and(|told| told.phase == MigrationPhase::Stopped)
        });
        stopped.map_or(&placement.host, |to| &to.host)
    }

    /// A mere renewal wakes nobody; an opened or closed session does.
    fn apply_lease(&mut self, name: &str, raw: Raw<'_>) -> Applied {
        let state = |snapshot: &Self| snapshot.leases.get(name).map(|l| (l.session, l.closed));
        let before = state(self);
        let applied = set(&mut self.leases, name, raw);
        let quiet = before == state(self);
        Applied { change: if quiet { Change::Quiet } else { Change::Changed }, ..applied }
    }

    /// A record of an object that is there and cannot be read: its spec, or who owns it. Whoever meets one leaves the
    /// object as it is.
    #[must_use]
    pub fn unreadable_of(&self, object: &ObjectRef) -> Option<&str> {
        let (kind, name) = (object.kind.as_str(), &object.name);
        let owner = match object.kind {
            Kind::Vm => Some(format!("placement/vm/{name}")),
            Kind::Service => Some(format!("placement/frontend/{name}")),
            Kind::Host => Some(format!("leases/{name}")),
            _ => None,
        };
        let keys = std::iter::once(format!("spec/{kind}/{name}")).chain(owner);
        keys.into_iter()
            .find_map(|key| self.unreadable.get_key_value(&key))
            .map(|(key, _)| key.as_str())
    }

    /// The first record below a prefix that is there and cannot be read.
    #[must_use]
    pub fn unreadable_under(&self, prefix: &str) -> Option<&str> {
        let first = self.unreadable.range(prefix.to_owned()..).next().map(|(key, _)| key.as_str());
        first.filter(|key| key.starts_with(prefix))
    }

    /// The cluster's spec, or the defaults before there is one.
    #[must_use]
    pub fn cluster_spec(&self) -> Arc<ClusterSpec> {
        self.cluster.as_ref().map(|c| Arc::clone(&c.value)).unwrap_or_default()
    }

    /// An object of any kind with its revision.
    #[must_use]
    pub fn object(&self, reference: &ObjectRef) -> Option<(Object, i64)> {
        let name = &reference.name;
        match reference.kind {
            Kind::Host => {
                self.hosts.get(name).map(|o| (Object::Host((*o.value).clone()), o.revision))
            }
            Kind::Pool => {
                self.pools.get(name).map(|o| (Object::Pool((*o.value).clone()), o.revision))
            }
            Kind::Image => {
                self.images.get(name).map(|o| (Object::Image((*o.value).clone()), o.revision))
            }
            Kind::Network => {
                self.networks.get(name).map(|o| (Object::Network((*o.value).clone()), o.revision))
            }
            Kind::Certificate => self
                .certificates
                .get(name)
                .map(|o| (Object::Certificate((*o.value).clone()), o.revision)),
            Kind::Target => {
                self.targets.get(name).map(|o| (Object::Target((*o.value).clone()), o.revision))
            }
            Kind::Vm => self.vms.get(name).map(|o| (Object::Vm((*o.value).clone()), o.revision)),
            Kind::Service => {
                self.services.get(name).map(|o| (Object::Service((*o.value).clone()), o.revision))
            }
        }
    }

    /// All objects of a kind.
    #[must_use]
    pub fn objects(&self, kind: Kind) -> Vec<(Object, i64)> {
        let names: Vec<Name> = match kind {
            Kind::Host => self.hosts.keys().cloned().collect(),
            Kind::Pool => self.pools.keys().cloned().collect(),
            Kind::Image => self.images.keys().cloned().collect(),
            Kind::Network => self.networks.keys().cloned().collect(),
            Kind::Certificate => self.certificates.keys().cloned().collect(),
            Kind::Target => self.targets.keys().cloned().collect(),
            Kind::Vm => self.vms.keys().cloned().collect(),
            Kind::Service => self.services.keys().cloned().collect(),
        };
        names.into_iter().filter_map(|name| self.object(&ObjectRef::new(kind, name))).collect()
    }

    /// Whether the host's session is open (it may run VMs as far as the store knows).
    #[must_use]
    pub fn session_open(&self, host: &Name) -> bool {
        self.leases.get(host).is_some_and(|lease| !lease.closed)
    }

    /// What a VM's owner says of it: of this epoch, and of the session that is open there now. A host that was lost and
    /// is back has said something in an earlier session, and what it ran then has ended.
    ///
    /// A guest that was handed over live is what it was: until its new owner has said something, what the one before
    /// said counts.
    #[must_use]
    pub fn told_of(&self, vm: &Name) -> Option<&VmStatus> {
        let placement = self.placements.get(vm)?;
        let lease = self.leases.get(&placement.host).filter(|lease| !lease.closed)?;
        let status = &*self.vm_status.get(vm)?.value;
        let current = status.epoch == placement.epoch
            && status.host == placement.host
            && status.session == lease.session;
        let handed = || {
            placement.moved_from.as_ref().is_some_and(|from| {
                status.epoch + 1 == placement.epoch
                    && status.host == from.host
                    && status.session == from.session
                    && self.handover(vm, from) != Handover::Broken
            })
        };
        (current || handed()).then_some(status)
    }

    /// Whether the copy of a VM that its owner before had can run no more, and how that came.
    #[must_use]
    pub fn handover(&self, vm: &Name, from: &MovedFrom) -> Handover {
        let told = self.migration_status.get(vm).and_then(|hosts| hosts.get(&from.host));
        let told = told.filter(|told| told.attempt == from.attempt);
        match told.map(|told| told.phase) {
            Some(MigrationPhase::HandedOver) => return Handover::Whole,
            Some(MigrationPhase::Gone) => return Handover::Broken,
            _ => {}
        }
        // A session that was closed, or that a later one followed, left nothing that runs.
        let lease = self.leases.get(&from.host);
        let stands = lease.is_some_and(|lease| lease.session == from.session && !lease.closed);
        match told.map(|told| told.phase) {
            _ if !stands => Handover::Broken,
            Some(MigrationPhase::Following) => Handover::Following,
            _ => Handover::Pending,
        }
    }

    /// A VM with a disk that is yet to be made from a backup: it needs that.
    #[must_use]
    pub fn made_from(&self, target: &Name, vm: &Name, id: &str) -> Option<&Name> {
        let from = |of: &VmSpec| {
            let mut backups = of.disks.iter().filter_map(|disk| disk.backup.as_ref());
            backups.any(|from| from.target == *target && from.vm == *vm && from.id == id)
        };
        let mut needing = self.vms.iter().filter(|(_, of)| from(&of.spec) && !of.meta.deleting);
        needing.next().map(|(name, _)| name)
    }

    /// A VM with a disk that is yet to be made from a disk of the VM with this uid, and in which snapshot that is kept.
    pub fn copies_of<'a>(
        &'a self,
        vm_uid: &'a str,
    ) -> impl Iterator<Item = (&'a Name, &'a CopyRef)> {
        let living = self.vms.iter().filter(|(_, of)| !of.meta.deleting);
        let all = living.flat_map(|(name, of)| {
            of.spec.disks.iter().filter_map(move |disk| Some((name, disk.copy_of.as_deref()?)))
        });
        all.filter(move |(_, copy)| copy.vm_uid == vm_uid)
    }

    /// Which parts of a running VM's spec were changed since its process started. They take effect when it starts anew; what its host
    /// is about to do while it runs is none of them.
    #[must_use]
    pub fn pending(&self, vm: &Name) -> Vec<String> {
        let mut parts = self.changed(vm);
        if self.disks_change(vm) {
            parts.retain(|part| part != DISKS);
        }
        parts
    }

    /// Whether its host gives its process the disks that are wanted, or is about to look whether it can.
    #[must_use]
    pub fn disks_change(&self, vm: &Name) -> bool {
        let Some((told, object)) = self.told_of(vm).zip(self.vms.get(vm)) else { return false };
        told.ports && (told.disks_change || told.generation < object.meta.generation)
    }

    /// The parts of a running VM's spec that its process is not like.
    fn changed(&self, vm: &Name) -> Vec<String> {
        let running = self.told_of(vm).filter(|status| status.phase == VmPhase::Running);
        let object = self.vms.get(vm).filter(|object| object.spec.running && !object.meta.deleting);
        let Some(((status, object), placement)) = running.zip(object).zip(self.placements.get(vm))
        else {
            return Vec::new();
        };
        let (wanted, has) = (object.spec.hardware(), &status.started_with);
        let differs = |(part, of): &(&String, &String)| wanted.get(*part).is_some_and(|w| w != *of);
        let parts = has.iter().filter(differs).map(|(part, _)| part.clone());
        // It is there or it is not, and is named only where it is.
        let port = !has.is_empty() && has.contains_key(AGENT) != wanted.contains_key(AGENT);
        let cards = (!placement.fits(&object.spec)).then(|| "networks".to_owned());
        parts.chain(port.then(|| AGENT.to_owned())).chain(cards).collect()
    }

    /// Those of them that make another machine: a guest that runs cannot go on in it.
    #[must_use]
    pub fn pending_machine(&self, vm: &Name) -> Vec<String> {
        let mut parts = self.changed(vm);
        parts.retain(|part| !["image", "userData"].contains(&part.as_str()));
        parts
    }

    /// How a disk of a VM stands towards its guest.
    #[must_use]
    pub fn disk_state(&self, vm: &Name, disk: &DiskSpec) -> DiskState {
        let running = self.told_of(vm).filter(|told| told.phase == VmPhase::Running);
        let runs = running.is_some();
        // It may be at what was wanted before.
        let unseen = running.zip(self.vms.get(vm));
        let unseen = unseen.is_some_and(|(told, object)| told.generation < object.meta.generation);
        match self.changed(vm).iter().any(|part| part == DISKS) {
            _ if unseen => DiskState::Changing,
            true if self.disks_change(vm) => DiskState::Changing,
            true => DiskState::NextStart,
            false if disk.detached => DiskState::Detached,
            false if runs => DiskState::Attached,
            false => DiskState::Off,
        }
    }

    /// The members of a service, by name.
    pub fn members<'a>(
        &'a self,
        service: &'a Name,
    ) -> impl Iterator<Item = (&'a Name, &'a Versioned<Stored<VmSpec>>)> {
        self.vms
            .iter()
            .filter(move |(_, vm)| vm.meta.member_of().is_some_and(|of| of.name == *service))
    }
}
