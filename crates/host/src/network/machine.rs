//! What this machine has, asked of the kernel: network cards, and the entries that lead to guests elsewhere.

use super::{driver::NetworkError, linux::failed};
use futures::TryStreamExt;
use rtnetlink::{
    Handle,
    packet_route::{
        AddressFamily,
        link::{LinkAttribute, LinkFlags},
        neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage},
    },
};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
};

/// A network card.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// Its number.
    pub index: u32,
    /// It is up.
    pub up: bool,
    /// The bridge that it is plugged into.
    pub controller: Option<u32>,
}

/// All network cards by name.
pub type Links = BTreeMap<String, Link>;

/// Asks for all network cards.
///
/// # Errors
/// When they cannot be listed.
pub async fn links(handle: &Handle) -> Result<Links, NetworkError> {
    let mut links = Links::new();
    let mut list = handle.link().get().execute();
    while let Some(message) =
        list.try_next().await.map_err(failed("network cards cannot be listed"))?
    {
        let mut name = None;
        let mut link = Link {
            index: message.header.index,
            up: message.header.flags.contains(LinkFlags::Up),
            controller: None,
        };
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(text) => name = Some(text),
                LinkAttribute::Controller(index) => link.controller = Some(index),
                _ => {}
            }
        }
        links.extend(name.map(|name| (name, link)));
    }
    Ok(links)
}

/// The entries that lead to guests.
#[derive(Clone, Debug, Default)]
pub struct Ways {
    /// Tunnel, MAC address, host.
    hosts: BTreeSet<(u32, [u8; 6], Ipv4Addr)>,
    /// Port of a bridge, MAC address.
    ports: BTreeSet<(u32, [u8; 6])>,
    /// Bridge, address, MAC address.
    arp: BTreeSet<(u32, Ipv4Addr, [u8; 6])>,
}

impl Ways {
    /// Asks for all entries.
    ///
    /// # Errors
    /// When they cannot be listed.
    pub async fn ask(handle: &Handle) -> Result<Self, NetworkError> {
        let mut ways = Self::default();
        for family in [AddressFamily::Bridge, AddressFamily::Inet] {
            let mut list = handle.neighbours().get().set_address_family(family).execute();
            while let Some(message) =
                list.try_next().await.map_err(failed("the ways to guests cannot be listed"))?
            {
                ways.add(&message);
            }
        }
        Ok(ways)
    }

    fn add(&mut self, message: &NeighbourMessage) {
        let (mut mac, mut destination) = (None, None);
        for attribute in &message.attributes {
            match attribute {
                NeighbourAttribute::LinkLayerAddress(bytes) => {
                    mac = <[u8; 6]>::try_from(bytes.as_slice()).ok();
                }
                NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => {
                    destination = Some(*ip);
                }
                // An entry of a bridge or a tunnel does not say of which kind its address is.
                NeighbourAttribute::Destination(NeighbourAddress::Other(bytes)) => {
                    destination = <[u8; 4]>::try_from(bytes.as_slice()).ok().map(Ipv4Addr::from);
                }
                _ => {}
            }
        }
        let Some(mac) = mac else { return };
        let index = message.header.ifindex;
        match (message.header.family, destination) {
            (AddressFamily::Inet, Some(ip)) => _ = self.arp.insert((index, ip, mac)),
            (AddressFamily::Bridge, Some(host)) => _ = self.hosts.insert((index, mac, host)),
            (AddressFamily::Bridge, None)
                if !message.header.flags.contains(NeighbourFlags::Own) =>
            {
                self.ports.insert((index, mac));
            }
            _ => {}
        }
    }

    /// The entries of a tunnel: which guest is behind which host.
    pub fn through(&self, tunnel: u32) -> impl Iterator<Item = ([u8; 6], Ipv4Addr)> {
        let entries = self.hosts.iter().filter(move |(index, ..)| *index == tunnel);
        entries.map(|(_, mac, host)| (*mac, *host))
    }

    /// Whether the way to a guest on another host is whole: from the bridge through the tunnel to its host.
    #[must_use]
    pub fn lead(
        &self,
        (bridge, tunnel): (u32, u32),
        (ip, mac): (Ipv4Addr, [u8; 6]),
        host: Ipv4Addr,
    ) -> bool {
        self.hosts.contains(&(tunnel, mac, host))
            && self.ports.contains(&(tunnel, mac))
            && self.arp.contains(&(bridge, ip, mac))
    }
}
