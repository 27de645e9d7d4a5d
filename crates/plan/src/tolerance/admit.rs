//! Whether a change that people ask for leaves enough free for the loss of hosts.
//!
//! Only what adds load is asked about: a VM that shall run and did not, one that takes more or asks for more of its
//! host, a service of more members. Whatever takes load away is always let in, and a recovery is never asked: the
//! reserve is there for it.
//!
//! What is judged is the cluster as it will be once the change has come about. While a service is being updated it may
//! have more members for a while; these may use the reserve.

use crate::{
    balance::services::template_hash,
    tolerance::admission::{Reserve, Shortfall, places, reserved},
};
use haven_model::{
    Meta, Name, Object, ObjectRef, Observations, Snapshot, Versioned, VmSpec,
    cluster::AdmissionPolicy,
    object::{Kind, Stored},
    service::{SERVICE_LABEL, ServiceSpec, TEMPLATE_LABEL},
};
use std::{collections::BTreeSet, sync::Arc};

/// What a change would use up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TooMuch {
    /// What adds load, of what was asked for.
    pub adds: Vec<ObjectRef>,
    /// With the arithmetic, a sentence.
    pub why: String,
}

/// Whether these objects, as they would be written, leave enough free for the loss of as many hosts as the cluster's
/// spec says. Nothing when they do.
#[must_use]
pub fn admit(snapshot: &Snapshot, seen: &Observations, wanted: &[Object]) -> Option<TooMuch> {
    let spec = snapshot.cluster_spec();
    let reserved = reserved(snapshot);
    if spec.admission == AdmissionPolicy::Off || reserved == 0 {
        return None;
    }
    // Members that the manager has yet to make are there already.
    let mut before = snapshot.clone();
    for service in snapshot.services.values().filter(|service| !service.meta.deleting) {
        put_missing(&mut before, service);
    }
    let after = after(&before, wanted);
    let added = added(&before, &after);
    if added.is_empty() {
        return None;
    }
    let mut reserve = Reserve::of(&after, seen);
    let mut nowhere = reserve.homeless.clone();
    nowhere.retain(|homeless| added.contains(&homeless.vm));
    let why = if nowhere.is_empty() {
        words(&before, seen, reserved, &short(&mut reserve, reserved)?)
    } else {
        format!("no host has room for it now: {}", places(&nowhere))
    };
    let adds = |reference: &ObjectRef| match reference.kind {
        Kind::Service => after.members(&reference.name).any(|(vm, _)| added.contains(vm)),
        Kind::Vm => added.contains(&reference.name),
        _ => false,
    };
    let adds = wanted.iter().map(Object::reference).filter(adds).collect();
    Some(TooMuch { adds, why })
}

/// What falls short when as many hosts are lost as memory is kept for, or fewer.
fn short(reserve: &mut Reserve<'_>, reserved: usize) -> Option<Shortfall> {
    (1..=reserved).find_map(|count| reserve.worst(count))
}

fn words(before: &Snapshot, seen: &Observations, reserved: usize, short: &Shortfall) -> String {
    let hosts = if reserved == 1 { "host" } else { "hosts" };
    let was_short = self::short(&mut Reserve::of(before, seen), reserved).is_some();
    let already = if was_short { "; it would not before this change, either" } else { "" };
    format!("the loss of {reserved} {hosts} would leave VMs without a place: {short}{already}")
}

/// The cluster as it will be once this has come about.
fn after(before: &Snapshot, wanted: &[Object]) -> Snapshot {
    let mut after = before.clone();
    for object in wanted {
        match object {
            Object::Vm(vm) => put_vm(&mut after, vm.clone()),
            Object::Service(service) => {
                let revision = after.services.get(&service.meta.name).map_or(0, |s| s.revision);
                let value = Versioned { revision, value: Arc::new(service.clone()) };
                after.services.insert(service.meta.name.clone(), value);
                put_members(&mut after, service);
            }
            _ => {}
        }
    }
    after
}

fn put_vm(after: &mut Snapshot, mut vm: Stored<VmSpec>) {
    let name = vm.meta.name.clone();
    let old = after.vms.get(&name);
    let revision = old.map_or(0, |old| old.revision);
    if old.is_none() {
        // The youngest.
        vm.meta.created_ms = i64::MAX;
    }
    after.vms.insert(name, Versioned { revision, value: Arc::new(vm) });
}

/// The members that a service will have.
fn put_members(after: &mut Snapshot, service: &Stored<ServiceSpec>) {
    if service.meta.deleting {
        return;
    }
    let template = template_hash(&service.spec);
    let name = &service.meta.name;
    let members: Vec<(Name, Stored<VmSpec>)> = after
        .members(name)
        .filter(|(_, vm)| !vm.meta.deleting)
        .map(|(name, vm)| (name.clone(), (*vm.value).clone()))
        .collect();
    let wanted = service.spec.replicas as usize;
    let keep = members.len().min(wanted);
    for (gone, _) in &members[keep..] {
        after.vms.remove(gone);
        after.placements.remove(gone);
    }
    for (member, mut vm) in members.into_iter().take(keep) {
        let new = like(service, &template, vm.meta.clone());
        if asks_more(&vm, &new) {
            // One from the new template takes its place.
            after.placements.remove(&member);
            vm = new;
            vm.meta.created_ms = i64::MAX;
        }
        put_vm(after, vm);
    }
    put_missing(after, service);
}

/// Makes the members that a service lacks.
fn put_missing(after: &mut Snapshot, service: &Stored<ServiceSpec>) {
    let name = &service.meta.name;
    let there = after.members(name).filter(|(_, vm)| !vm.meta.deleting).count();
    let missing = (service.spec.replicas as usize).saturating_sub(there);
    if missing == 0 {
        return;
    }
    let names = (1u32..).map_while(|n| Name::new(format!("{name}-{n}")).ok());
    let free: Vec<Name> =
        names.filter(|name| !after.vms.contains_key(name)).take(missing).collect();
    let template = template_hash(&service.spec);
    for member in free {
        put_vm(after, like(service, &template, Meta::new(member, String::new(), i64::MAX)));
    }
}

/// A member as the service's template has it.
fn like(service: &Stored<ServiceSpec>, template: &str, mut meta: Meta) -> Stored<VmSpec> {
    let mut spec = service.spec.template.spec.clone();
    spec.check.clone_from(&service.spec.check);
    meta.labels.clone_from(&service.spec.template.labels);
    meta.labels.insert(SERVICE_LABEL.into(), service.meta.name.to_string());
    meta.labels.insert(TEMPLATE_LABEL.into(), template.to_owned());
    meta.owner = Some(ObjectRef::new(Kind::Service, service.meta.name.clone()));
    Stored { meta, spec }
}

/// Whether a VM takes more, or asks for more, than it did.
fn asks_more(was: &Stored<VmSpec>, is: &Stored<VmSpec>) -> bool {
    let labels = |vm: &Stored<VmSpec>| {
        let mut labels = vm.meta.labels.clone();
        labels.retain(|key, _| !key.starts_with("haven/"));
        labels
    };
    is.spec.memory > was.spec.memory
        || is.spec.cpus > was.spec.cpus
        || is.spec.affinity != was.spec.affinity
        || labels(is) != labels(was)
}

/// The VMs that run after a change and did not, or not so, before it.
fn added(before: &Snapshot, after: &Snapshot) -> BTreeSet<Name> {
    let runs = |vm: &&Versioned<Stored<VmSpec>>| vm.spec.running && !vm.meta.deleting;
    let spread = |snapshot: &Snapshot, vm: &Stored<VmSpec>| {
        let service = vm.meta.owner.as_ref().and_then(|owner| snapshot.services.get(&owner.name));
        service.map(|service| service.spec.spread.clone())
    };
    let added = after.vms.iter().filter(|(_, vm)| runs(vm)).filter(|(name, vm)| {
        before
            .vms
            .get(*name)
            .filter(runs)
            .is_none_or(|was| asks_more(was, vm) || spread(before, was) != spread(after, vm))
    });
    added.map(|(name, _)| name.clone()).collect()
}
