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
    /// Who has an address.
    held: BTreeMap<Name, BTreeMap<Ipv4Addr, Name>>,
    /// Addresses that somebody asks for by name.
    wished: BTreeMap<Name, BTreeSet<Ipv4Addr>>,
}

impl Taken {
    /// What the snapshot uses.
    #[must_use]
    pub fn of(snapshot: &Snapshot) -> Self {
        let mut taken = Self::default();
        for (vm, placement) in &snapshot.placements {
            taken.slots.insert(placement.slot);
            for nic in &placement.nics {
                taken.held.entry(nic.network.clone()).or_default().insert(nic.ip, vm.clone());
            }
        }
        // Wished addresses of VMs that are not placed yet are theirs already.
        for vm in snapshot.vms.values() {
            for nic in &vm.spec.networks {
                if let Some(ip) = nic.address {
                    taken.wished.entry(nic.network.clone()).or_default().insert(ip);
                }
            }
        }
        taken
    }

    /// Gives an address to a VM.
    ///
    /// # Errors
    /// With the VM that has it.
    pub fn hold(&mut self, network: &Name, ip: Ipv4Addr, vm: &Name) -> Result<(), Name> {
        let held = self.held.entry(network.clone()).or_default();
        match held.get(&ip) {
            Some(other) if other != vm => Err(other.clone()),
            _ => {
                held.insert(ip, vm.clone());
                Ok(())
            }
        }
    }

    /// Whether nobody has an address or asks for it.
    #[must_use]
    pub fn is_free(&self, network: &Name, ip: Ipv4Addr) -> bool {
        self.held.get(network).is_none_or(|held| !held.contains_key(&ip))
            && self.wished.get(network).is_none_or(|wished| !wished.contains(&ip))
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
            if let Some(held) = self.held.get_mut(&nic.network) {
                held.remove(&nic.ip);
            }
        }
    }
}
