//! Numbers and addresses in use, so that no two VMs get the same.

use haven_model::{Name, NicAddress, Snapshot};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
};

/// What is in use, with what this plan has given away already.
#[derive(Clone, Debug, Default)]
pub struct Taken {
    slots: BTreeSet<u32>,
    next_slot: u32,
    addresses: BTreeMap<Name, BTreeSet<Ipv4Addr>>,
}

impl Taken {
    /// What the snapshot uses.
    #[must_use]
    pub fn of(snapshot: &Snapshot) -> Self {
        let mut taken = Self::default();
        for placement in snapshot.placements.values() {
            taken.slots.insert(placement.slot);
            for nic in &placement.nics {
                taken.take(&nic.network, nic.ip);
            }
        }
        // Wished addresses of VMs that are not placed yet are theirs already.
        for vm in snapshot.vms.values() {
            for nic in &vm.spec.networks {
                if let Some(ip) = nic.address {
                    taken.take(&nic.network, ip);
                }
            }
        }
        taken
    }

    /// Notes an address; false when it was in use.
    pub fn take(&mut self, network: &Name, ip: Ipv4Addr) -> bool {
        self.addresses.entry(network.clone()).or_default().insert(ip)
    }

    /// Whether an address is in use.
    #[must_use]
    pub fn is_taken(&self, network: &Name, ip: Ipv4Addr) -> bool {
        self.addresses.get(network).is_some_and(|set| set.contains(&ip))
    }

    /// The smallest number that no VM has.
    pub fn slot(&mut self) -> u32 {
        while !self.slots.insert(self.next_slot) {
            self.next_slot += 1;
        }
        self.next_slot
    }

    /// Undoes what was taken for a VM that cannot be placed.
    pub fn give_back(&mut self, nics: &[NicAddress]) {
        for nic in nics {
            if let Some(set) = self.addresses.get_mut(&nic.network) {
                set.remove(&nic.ip);
            }
        }
    }
}
