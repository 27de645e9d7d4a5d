//! Placements: who runs what. Written by the manager, except that the next candidate of a frontend may claim it
//! when its holder is suspected and nobody answers for the address (DESIGN.md section 4, "Addresses").

use crate::{
    migration::{MovedFrom, MovingTo},
    name::Name,
    vm::VmSpec,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
};

/// A guest's address on one of its networks. It keeps it wherever it runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct NicAddress {
    /// The network.
    pub network: Name,
    /// The address.
    pub ip: Ipv4Addr,
    /// The MAC address, `02:68:` and the four bytes of the IP address.
    pub mac: String,
}

impl NicAddress {
    /// The MAC address that goes with an IP address.
    #[must_use]
    pub fn mac_of(ip: Ipv4Addr) -> [u8; 6] {
        let o = ip.octets();
        [0x02, 0x68, o[0], o[1], o[2], o[3]]
    }
    /// Makes the record for an address of a network.
    #[must_use]
    pub fn new(network: Name, ip: Ipv4Addr) -> Self {
        let mac = Self::mac_of(ip).map(|byte| format!("{byte:02x}")).join(":");
        Self { network, ip, mac }
    }
}

/// Who runs a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Placement {
    /// The owner.
    pub host: Name,
    /// Counts changes of owner, from 1. An older epoch is always refused.
    pub epoch: u64,
    /// A small number no other VM has: its unix user is 200000 + slot, its taps are `hv<slot>n<i>`.
    pub slot: u32,
    /// The guest's addresses, one per network card.
    pub nics: Vec<NicAddress>,
    /// While it is being moved live: where to.
    #[serde(default, rename = "movingTo", skip_serializing_if = "Option::is_none")]
    pub moving_to: Option<MovingTo>,
    /// After it was moved live: where from, until the copy there can run no more.
    #[serde(default, rename = "movedFrom", skip_serializing_if = "Option::is_none")]
    pub moved_from: Option<MovedFrom>,
    /// It kept failing on another host and was given to this one.
    #[serde(default, rename = "failedOn", skip_serializing_if = "Option::is_none")]
    pub failed_on: Option<FailedOn>,
}

/// Where a VM kept failing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct FailedOn {
    /// The host.
    pub host: Name,
    /// When it was taken from there, wall clock, milliseconds since 1970.
    pub at_ms: i64,
}

/// The unix user of slot 0.
pub const UID_BASE: u32 = 200_000;

impl Placement {
    /// A placement without a migration.
    #[must_use]
    pub fn new(host: Name, epoch: u64, slot: u32, nics: Vec<NicAddress>) -> Self {
        Self { host, epoch, slot, nics, moving_to: None, moved_from: None, failed_on: None }
    }
    /// Every host on which something of the VM may be: its owner, and the other side of a migration.
    pub fn hosts(&self) -> impl Iterator<Item = &Name> {
        // Where it only starts anew, nothing of it is before the change.
        let to = self.moving_to.iter().filter(|to| !to.restart).map(|to| &to.host);
        let from = self.moved_from.iter().map(|from| &from.host);
        std::iter::once(&self.host).chain(to).chain(from)
    }
    /// The unix user that this VM's QEMU runs as.
    #[must_use]
    pub fn unix_uid(&self) -> u32 {
        UID_BASE + self.slot
    }
    /// Whether its cards are those that are wanted of the VM.
    #[must_use]
    pub fn fits(&self, spec: &VmSpec) -> bool {
        self.nics.len() == spec.networks.len()
            && self.nics.iter().zip(&spec.networks).all(|(has, wanted)| {
                has.network == wanted.network && wanted.address.is_none_or(|ip| ip == has.ip)
            })
    }
    /// Name of the tap of network card `index`.
    #[must_use]
    pub fn tap(&self, index: usize) -> String {
        format!("hv{}n{index}", self.slot)
    }
}

/// Who holds a service's address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct FrontendPlacement {
    /// The host that holds it.
    pub holder: Name,
    /// Counts changes of holder, from 1.
    pub epoch: u64,
    /// Who takes it next, in this order.
    pub candidates: Vec<Name>,
    /// The holder before, when it gave the address up by plan: it goes on serving for a moment, so that nobody asks in
    /// vain while the address moves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<Name>,
    /// Percent of the traffic by template (a short hash), while an update splits it. Members of templates that are not
    /// named share what is left evenly. Empty: all members share evenly.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub traffic: BTreeMap<String, u32>,
}

impl FrontendPlacement {
    /// The host that may try to take the address now: the first candidate that is not itself suspected, when the
    /// holder is. Pure, so that every host finds the same answer.
    #[must_use]
    pub fn claimant(&self, suspected: &BTreeSet<Name>) -> Option<&Name> {
        suspected
            .contains(&self.holder)
            .then(|| {
                self.candidates
                    .iter()
                    .find(|host| **host != self.holder && !suspected.contains(*host))
            })
            .flatten()
    }
    /// The record after `host` took the address.
    #[must_use]
    pub fn claimed_by(&self, host: &Name) -> Self {
        Self { holder: host.clone(), epoch: self.epoch + 1, from: None, ..self.clone() }
    }
    /// Percent that is left for templates that are not named.
    #[must_use]
    pub fn traffic_left(&self) -> u32 {
        100u32.saturating_sub(self.traffic.values().sum())
    }
    /// Whether members of a template get nothing, however well they are.
    #[must_use]
    pub fn gets_nothing(&self, template: &str) -> bool {
        self.traffic.get(template).copied().unwrap_or_else(|| self.traffic_left()) == 0
    }
}
