//! Wishes about hosts and neighbours that no placement breaks (invariant 7), apart from the code that places.
//!
//! Judged in the order in which the placements are committed: a wish to be near holds once there is somebody to be
//! near to. Soft wishes may be broken.

use crate::placement::{asks_apart, asks_near, selects};
use haven_model::{Name, Snapshot, VmSpec, object::Stored};
use std::collections::BTreeMap;

/// Which VMs stand beside each other.
pub(crate) struct Neighbours<'a> {
    snapshot: &'a Snapshot,
    /// Per host that is not lost.
    hosts: BTreeMap<&'a Name, Vec<&'a Stored<VmSpec>>>,
    /// Per host, what is being moved there: others keep apart from it already, and are not near to it yet.
    coming: BTreeMap<&'a Name, Vec<&'a Stored<VmSpec>>>,
}

impl<'a> Neighbours<'a> {
    /// As the store has them.
    pub(crate) fn of(snapshot: &'a Snapshot) -> Self {
        let here = |host: &Name| {
            snapshot.host_status.contains_key(host)
                && snapshot.leases.get(host).is_none_or(|lease| !lease.closed)
        };
        let mut hosts: BTreeMap<&Name, Vec<_>> =
            snapshot.hosts.keys().filter(|host| here(host)).map(|host| (host, vec![])).collect();
        let mut coming: BTreeMap<&Name, Vec<_>> = BTreeMap::new();
        for (name, placement) in &snapshot.placements {
            let Some(vm) = snapshot.vms.get(name) else { continue };
            if let Some(vms) = hosts.get_mut(&placement.host) {
                vms.push(&*vm.value);
            }
            if let Some(to) = &placement.moving_to {
                coming.entry(&to.host).or_default().push(&*vm.value);
            }
        }
        Self { snapshot, hosts, coming }
    }

    /// Puts a VM on a host.
    ///
    /// # Errors
    /// The wish that this breaks.
    pub(crate) fn add(&mut self, name: &Name, host: &Name) -> Result<(), String> {
        let Some(vm) = self.snapshot.vms.get(name).map(|vm| &*vm.value) else { return Ok(()) };
        self.own(vm, host)?;
        self.spread(vm, host)?;
        for other in self.beside(host) {
            let must = |of: &Stored<VmSpec>, from: &Stored<VmSpec>| {
                !of.spec.affinity.soft && asks_apart(&of.spec, &from.meta.labels)
            };
            if other.meta.name != *name && (must(vm, other) || must(other, vm)) {
                let other = &other.meta.name;
                return Err(format!(
                    "{name} is placed on {host} beside {other}, and they must be apart"
                ));
            }
        }
        if let Some(vms) = self.hosts.get_mut(host) {
            vms.push(vm);
        }
        Ok(())
    }

    /// What is on a host or comes to it.
    fn beside(&self, host: &Name) -> impl Iterator<Item = &&'a Stored<VmSpec>> {
        let here = self.hosts.get(host).into_iter().flatten();
        here.chain(self.coming.get(host).into_iter().flatten())
    }

    fn own(&self, vm: &Stored<VmSpec>, host: &Name) -> Result<(), String> {
        let (name, affinity) = (&vm.meta.name, &vm.spec.affinity);
        let labels = self.snapshot.hosts.get(host).map(|host| &host.meta.labels);
        if labels.is_some_and(|labels| !selects(&affinity.hosts, labels)) {
            return Err(format!("{name} is placed on {host}, which lacks the labels it asks for"));
        }
        let wanted = |vms: &Vec<&Stored<VmSpec>>| {
            let mut others = vms.iter().filter(|other| other.meta.name != *name);
            others.any(|other| asks_near(&vm.spec, &other.meta.labels))
        };
        let here = self.hosts.get(host).is_some_and(&wanted);
        if !affinity.soft && !here && self.hosts.values().any(wanted) {
            return Err(format!("{name} is placed on {host}, away from what it must be near to"));
        }
        Ok(())
    }

    fn spread(&self, vm: &Stored<VmSpec>, host: &Name) -> Result<(), String> {
        let Some(owner) = vm.meta.member_of() else { return Ok(()) };
        let Some(service) = self.snapshot.services.get(&owner.name) else { return Ok(()) };
        let spread = &service.spec.spread;
        if !spread.required {
            return Ok(());
        }
        let zone = |of: &Name| self.snapshot.hosts.get(of)?.meta.labels.get(&spread.by);
        let shared = |other: &Name| {
            other == host
                || (spread.by != "host" && zone(other).is_some() && zone(other) == zone(host))
        };
        let member = |other: &Stored<VmSpec>| {
            other.meta.owner.as_ref() == Some(owner) && other.meta.name != vm.meta.name
        };
        let all = self.hosts.iter().chain(&self.coming);
        let beside = all.filter(|(other, _)| shared(other));
        match beside.flat_map(|(_, vms)| vms).find(|other| member(other)) {
            Some(other) => Err(format!(
                "{} and {} of service {} share a {}",
                vm.meta.name, other.meta.name, owner.name, spread.by
            )),
            None => Ok(()),
        }
    }
}
