//! The snapshot: everything that stands in the store, typed, at one revision.

use crate::{
    cluster::{ClusterSpec, ManagerRecord},
    event::Incident,
    host::{HostSpec, HostStatus, Lease, LostSession},
    image::ImageSpec,
    name::{Name, ObjectRef},
    network::NetworkSpec,
    object::{Kind, Object, Stored},
    placement::{FrontendPlacement, Placement},
    pool::PoolSpec,
    service::ServiceSpec,
    vm::{VmSpec, VmStatus},
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
    /// VMs, also those of services.
    pub vms: Table<Stored<VmSpec>>,
    /// Services.
    pub services: Table<Stored<ServiceSpec>>,
    /// Renewal records by host.
    pub leases: Table<Lease>,
    /// Proofs of lost sessions by host.
    pub lost: Table<LostSession>,
    /// Owners by VM.
    pub placements: Table<Placement>,
    /// Address holders by service.
    pub frontends: Table<FrontendPlacement>,
    /// Host statuses.
    pub host_status: Table<HostStatus>,
    /// VM statuses.
    pub vm_status: Table<VmStatus>,
    /// Incidents by number.
    pub incidents: BTreeMap<u64, Versioned<Incident>>,
}

/// The bytes and revision of one key.
pub type Raw<'a> = Option<(&'a [u8], i64)>;

fn decode<T: DeserializeOwned>(raw: Raw<'_>) -> Option<Versioned<T>> {
    let (bytes, revision) = raw?;
    // A record this version cannot read is as good as absent; the API refuses to write such records.
    let value = serde_json::from_slice(bytes).ok()?;
    Some(Versioned { revision, value: Arc::new(value) })
}

fn set<T: DeserializeOwned>(table: &mut Table<T>, name: &str, raw: Raw<'_>) -> Change {
    let Ok(name) = Name::new(name) else {
        return Change::Quiet;
    };
    match decode(raw) {
        Some(record) => {
            table.insert(name, record);
        }
        None => {
            table.remove(&name);
        }
    }
    Change::Changed
}

impl Snapshot {
    /// Applies one key: `raw` is its value and revision, or nothing when it was deleted.
    pub fn apply(&mut self, key: &str, raw: Raw<'_>) -> Change {
        let Some(path) = key.strip_prefix(crate::keys::ROOT) else {
            return Change::Quiet;
        };
        let (head, rest) = path.split_once('/').unwrap_or((path, ""));
        match head {
            "cluster" => {
                self.cluster = decode(raw);
                Change::Changed
            }
            "manager" => {
                self.manager = decode(raw);
                Change::Changed
            }
            "spec" => self.apply_spec(rest, raw),
            "leases" => self.apply_lease(rest, raw),
            "lost" => set(&mut self.lost, rest, raw),
            "placement" => match rest.split_once('/') {
                Some(("vm", name)) => set(&mut self.placements, name, raw),
                Some(("frontend", name)) => set(&mut self.frontends, name, raw),
                _ => Change::Quiet,
            },
            "status" => match rest.split_once('/') {
                Some(("host", name)) => set(&mut self.host_status, name, raw),
                Some(("vm", name)) => set(&mut self.vm_status, name, raw),
                _ => Change::Quiet,
            },
            "incidents" => {
                let Ok(number) = rest.parse() else {
                    return Change::Quiet;
                };
                match decode(raw) {
                    Some(incident) => self.incidents.insert(number, incident),
                    None => self.incidents.remove(&number),
                };
                Change::Changed
            }
            _ => Change::Quiet,
        }
    }

    fn apply_spec(&mut self, path: &str, raw: Raw<'_>) -> Change {
        match path.split_once('/') {
            Some(("host", name)) => set(&mut self.hosts, name, raw),
            Some(("pool", name)) => set(&mut self.pools, name, raw),
            Some(("image", name)) => set(&mut self.images, name, raw),
            Some(("network", name)) => set(&mut self.networks, name, raw),
            Some(("vm", name)) => set(&mut self.vms, name, raw),
            Some(("service", name)) => set(&mut self.services, name, raw),
            _ => Change::Quiet,
        }
    }

    /// A mere renewal wakes nobody; an opened or closed session does.
    fn apply_lease(&mut self, name: &str, raw: Raw<'_>) -> Change {
        let state = |snapshot: &Self| snapshot.leases.get(name).map(|l| (l.session, l.closed));
        let before = state(self);
        set(&mut self.leases, name, raw);
        if before == state(self) { Change::Quiet } else { Change::Changed }
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

    /// The members of a service, by name.
    pub fn members<'a>(
        &'a self,
        service: &'a Name,
    ) -> impl Iterator<Item = (&'a Name, &'a Versioned<Stored<VmSpec>>)> {
        self.vms.iter().filter(move |(_, vm)| {
            vm.meta.owner.as_ref().is_some_and(|o| o.kind == Kind::Service && o.name == *service)
        })
    }
}
