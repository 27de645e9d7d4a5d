//! How much room each usable host has, and what runs where. Built once per plan; kept as the plan gives room away.

use super::{asks_apart, asks_near, selects};
use crate::tolerance::hosts::HostState;
use haven_model::{Bytes, Name, Snapshot, VmSpec, object::Stored, vm::Selector};
use std::collections::BTreeMap;

/// Memory that QEMU itself needs beside the guest's.
pub const OVERHEAD: Bytes = Bytes::mib(64);

/// What a VM takes of a host.
#[derive(Clone, Copy, Debug)]
pub struct Cost {
    /// Bytes.
    pub memory: u64,
    /// Virtual CPUs.
    pub cpus: u64,
}

/// What a VM takes of a host.
#[must_use]
pub fn cost(spec: &VmSpec) -> Cost {
    Cost { memory: spec.memory.0 + OVERHEAD.0, cpus: u64::from(spec.cpus) }
}

/// The room of one host.
#[derive(Clone, Debug, Default)]
pub struct HostRoom<'a> {
    /// For guests, bytes.
    pub memory: u64,
    /// Promised, bytes.
    pub memory_used: u64,
    /// Logical CPUs.
    pub cpus: u64,
    /// Promised.
    pub cpus_used: u64,
    vms: Vec<&'a Stored<VmSpec>>,
    /// Those of them that have wishes about their neighbours.
    wishing: Vec<&'a Stored<VmSpec>>,
    /// VMs that are being moved here: others keep apart from them already, and are not near to them yet.
    coming: Vec<&'a Stored<VmSpec>>,
}

impl<'a> HostRoom<'a> {
    /// Bytes that are not promised.
    #[must_use]
    pub fn memory_free(&self) -> u64 {
        self.memory.saturating_sub(self.memory_used)
    }
    /// Whether a VM with these labels is there or comes.
    #[must_use]
    pub fn will_run(&self, selector: &Selector) -> bool {
        self.runs(selector) || self.coming.iter().any(|vm| selects(selector, &vm.meta.labels))
    }
    /// Whether a VM with these labels is there.
    #[must_use]
    pub fn runs(&self, selector: &Selector) -> bool {
        self.vms.iter().any(|vm| selects(selector, &vm.meta.labels))
    }
    /// A VM that is there or comes and asks to be apart from one with these labels; one whose wish may not be broken first.
    #[must_use]
    pub fn refuses(&self, labels: &BTreeMap<String, String>) -> Option<&'a Stored<VmSpec>> {
        let all = self.wishing.iter().chain(&self.coming).copied();
        let asking = all.filter(|vm| asks_apart(&vm.spec, labels));
        asking.min_by_key(|vm| vm.spec.affinity.soft)
    }
    /// A VM that is there, asks to be near one with these labels, and is near none yet.
    #[must_use]
    pub fn misses(&self, labels: &BTreeMap<String, String>) -> Option<&'a Stored<VmSpec>> {
        self.wishing.iter().copied().find(|asking| {
            let has = |vm: &&Stored<VmSpec>| {
                !std::ptr::eq(*vm, *asking) && asks_near(&asking.spec, &vm.meta.labels)
            };
            asks_near(&asking.spec, labels) && !self.vms.iter().any(has)
        })
    }
}

/// The room of all hosts.
#[derive(Clone, Debug, Default)]
pub struct Room<'a> {
    hosts: BTreeMap<Name, HostRoom<'a>>,
    /// Where the members of each service are, one entry per member.
    services: BTreeMap<Name, Vec<Name>>,
}

impl<'a> Room<'a> {
    /// What the snapshot leaves.
    #[must_use]
    pub fn of(snapshot: &'a Snapshot, states: &BTreeMap<Name, HostState>) -> Self {
        let mut room = Self::default();
        for (host, state) in states {
            if matches!(state, HostState::Lost(_)) {
                continue;
            }
            if let Some(status) = snapshot.host_status.get(host) {
                let reserved = snapshot.hosts[host].spec.reserved_memory.0;
                let host_room = HostRoom {
                    memory: status.memory.0.saturating_sub(reserved),
                    cpus: u64::from(status.cpus),
                    ..HostRoom::default()
                };
                room.hosts.insert(host.clone(), host_room);
            }
        }
        for (name, placement) in &snapshot.placements {
            let Some(vm) = snapshot.vms.get(name) else { continue };
            room.use_up(&placement.host, vm);
            if let Some(to) = &placement.moving_to {
                room.expect(&to.host, vm);
            }
        }
        room
    }

    /// Notes that `vm` is (to be) on `host`.
    pub fn use_up(&mut self, host: &Name, vm: &'a Stored<VmSpec>) {
        let Some(room) = self.hosts.get_mut(host) else {
            return;
        };
        let cost = cost(&vm.spec);
        room.memory_used += cost.memory;
        room.cpus_used += cost.cpus;
        room.vms.push(vm);
        if !vm.spec.affinity.near.is_empty() || !vm.spec.affinity.apart.is_empty() {
            room.wishing.push(vm);
        }
        if let Some(owner) = vm.meta.member_of() {
            self.services.entry(owner.name.clone()).or_default().push(host.clone());
        }
    }

    /// Notes that `vm` is being moved to `host`.
    pub fn expect(&mut self, host: &Name, vm: &'a Stored<VmSpec>) {
        let Some(room) = self.hosts.get_mut(host) else {
            return;
        };
        let cost = cost(&vm.spec);
        room.memory_used += cost.memory;
        room.cpus_used += cost.cpus;
        room.coming.push(vm);
        if let Some(owner) = vm.meta.member_of() {
            self.services.entry(owner.name.clone()).or_default().push(host.clone());
        }
    }

    /// Forgets `vm`, which is on `host` and looks for another one.
    pub fn take_away(&mut self, host: &Name, vm: &Stored<VmSpec>) {
        let Some(room) = self.hosts.get_mut(host) else {
            return;
        };
        let cost = cost(&vm.spec);
        room.memory_used = room.memory_used.saturating_sub(cost.memory);
        room.cpus_used = room.cpus_used.saturating_sub(cost.cpus);
        room.vms.retain(|other| other.meta.name != vm.meta.name);
        room.wishing.retain(|other| other.meta.name != vm.meta.name);
        if let Some(hosts) =
            vm.meta.member_of().and_then(|owner| self.services.get_mut(&owner.name))
            && let Some(index) = hosts.iter().position(|on| on == host)
        {
            hosts.swap_remove(index);
        }
    }

    /// Forgets a host with all that is on it, as if it were lost.
    pub fn lose(&mut self, host: &Name) {
        self.hosts.remove(host);
        for hosts in self.services.values_mut() {
            hosts.retain(|on| on != host);
        }
    }

    /// The room of a host that is not lost.
    #[must_use]
    pub fn of_host(&self, host: &Name) -> Option<&HostRoom<'a>> {
        self.hosts.get(host)
    }

    /// The hosts of a service's members, one entry per member.
    #[must_use]
    pub fn hosts_of_service(&self, service: &Name) -> &[Name] {
        self.services.get(service).map_or(&[], Vec::as_slice)
    }

    /// Whether a VM with these labels is on any host.
    #[must_use]
    pub fn anywhere(&self, selector: &Selector) -> bool {
        self.hosts.values().any(|room| room.runs(selector))
    }

    /// Every host that is not lost.
    pub fn hosts(&self) -> impl Iterator<Item = (&Name, &HostRoom<'a>)> {
        self.hosts.iter()
    }
}
