//! The seam: the whole wanted state of a host's networks.

use async_trait::async_trait;
use ipnet::Ipv4Net;
use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    time::Duration,
};

/// How often the machine itself is compared with what this host made: what somebody else removed comes back.
pub const LOOK_AGAIN: Duration = Duration::from_secs(30);

/// How a network is carried.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NetworkKind {
    /// VXLAN between the hosts.
    Overlay {
        /// Identifier.
        vni: u32,
        /// The guests' subnet.
        subnet: Ipv4Net,
        /// The gateway's address, the same on every host.
        gateway: Ipv4Addr,
        /// Its MAC address, the same on every host.
        gateway_mac: [u8; 6],
        /// Guests reach the world through this host's address.
        nat: bool,
    },
    /// A bridge that exists already.
    Bridge {
        /// Its name.
        uplink_bridge: String,
    },
}

/// A network card of a guest of this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalPort {
    /// Name of the tap.
    pub tap: String,
    /// The guest's MAC address.
    pub mac: [u8; 6],
    /// The guest's address.
    pub ip: Option<Ipv4Addr>,
    /// The unix user of its QEMU.
    pub owner_uid: u32,
    /// Its guest is reached elsewhere at the moment: it moves here, or from here. Nothing is sent to it.
    pub idle: bool,
}

/// A network card of a guest of another host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemotePort {
    /// The guest's MAC address.
    pub mac: [u8; 6],
    /// The guest's address.
    pub ip: Ipv4Addr,
    /// The other host's address.
    pub host: Ipv4Addr,
}

/// One network as this host shall carry it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkWanted {
    /// Its name.
    pub name: String,
    /// How.
    pub kind: NetworkKind,
    /// Largest packet, bytes.
    pub mtu: u32,
    /// Addresses of all hosts: what they ask guests from, so that no answer to them is translated.
    pub hosts: Vec<Ipv4Addr>,
    /// Guests here.
    pub local: Vec<LocalPort>,
    /// Guests elsewhere.
    pub remote: Vec<RemotePort>,
}

/// What may be on this machine for records that cannot be read here. It stays as it is, and everything else goes on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LeftAlone {
    /// Networks whose records cannot be read. Which bridge and tunnel is theirs is not known.
    pub networks: BTreeSet<String>,
    /// Taps of guests of this host in those networks.
    pub taps: BTreeSet<String>,
    /// Where some guests are cannot be read: the slots of all others. Nothing when all is known.
    pub known_slots: Option<BTreeSet<u32>>,
}

impl LeftAlone {
    /// Whether there is nothing of the kind.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.networks.is_empty() && self.known_slots.is_none()
    }

    /// Whether a card with one of Haven's names may be of such a record.
    #[must_use]
    pub fn keeps(&self, card: &str) -> bool {
        match slot_of(card) {
            None => !self.networks.is_empty(),
            Some(slot) => {
                let nobodys = |known: &BTreeSet<u32>| !known.contains(&slot);
                self.taps.contains(card) || self.known_slots.as_ref().is_some_and(nobodys)
            }
        }
    }
}

/// The slot in the name of a tap: `hv`, digits, `n`, digits. Nothing for another card.
#[must_use]
pub fn slot_of(card: &str) -> Option<u32> {
    let (slot, nic) = card.strip_prefix("hv")?.split_once('n')?;
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    (digits(slot) && digits(nic)).then(|| slot.parse().ok()).flatten()
}

/// Something of a network could not be made.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {why}")]
pub struct NetworkError {
    /// What was tried.
    pub what: String,
    /// What the system said.
    pub why: String,
}

impl NetworkError {
    /// Several as one.
    ///
    /// # Errors
    /// When there are any.
    pub fn all(errors: Vec<Self>) -> Result<(), Self> {
        let mut errors = errors.into_iter();
        let Some(mut first) = errors.next() else { return Ok(()) };
        for error in errors {
            first.why = format!("{}; {error}", first.why);
        }
        Err(first)
    }
}

/// Makes networks.
#[async_trait]
pub trait NetworkDriver: Send + Sync {
    /// Makes the machine match; cheap when it does already. Returns the networks that could not be made; each fails by
    /// itself. An error means that none was looked at.
    async fn apply(
        &self,
        wanted: &[NetworkWanted],
        left_alone: &LeftAlone,
    ) -> Result<BTreeMap<String, NetworkError>, NetworkError>;
}
