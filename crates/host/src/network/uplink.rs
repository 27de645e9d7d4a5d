//! Whether what guests and addresses of this host are reached by has a link: the cards in a bridge, or the card that
//! holds an address (DESIGN.md section 8). A host whose uplink alone is cut is well for the cluster, and of no use to
//! those who ask its guests.
//!
//! Rejected: asking something beyond the switch (who is asked then decides what moves, and is one more thing that
//! can fail). A switch that takes packets and loses them is not seen.

use super::{
    driver::{NetworkError, slot_of},
    linux::failed,
};
use async_trait::async_trait;
use futures::{StreamExt, TryStreamExt};
use ipnet::Ipv4Net;
use rtnetlink::{
    Handle, MulticastGroup,
    packet_route::{
        address::AddressAttribute,
        link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo},
    },
};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr},
    time::Duration,
};
use tokio::sync::Notify;

/// How often the cards are looked at where the kernel does not tell of changes.
const WITHOUT_NEWS: Duration = Duration::from_secs(5);

/// What leads to the world.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Uplink {
    /// A bridge that somebody made, with the cards in it.
    Bridge(String),
    /// The card with an address in the subnet of this one.
    Near(Ipv4Addr),
}

/// Looks at uplinks.
#[async_trait]
pub trait UplinkDriver: Send + Sync {
    /// Those of `wanted` that have no link, and why in words. One that is not there at all is none of them, nor is a
    /// bridge without cards: it was not made to lead anywhere.
    async fn cut(
        &self,
        wanted: &BTreeSet<Uplink>,
    ) -> Result<BTreeMap<Uplink, String>, NetworkError>;

    /// Returns once a network card may have changed.
    async fn changed(&self);
}

/// A network card, as far as it counts here.
#[derive(Clone, Debug)]
pub(super) struct Card {
    /// Its name.
    pub name: String,
    /// It is switched on and has a link.
    pub carries: bool,
    /// The number of the bridge that it is plugged into.
    pub bridge: Option<u32>,
    /// What kind of software it is; nothing for one of hardware.
    pub kind: Option<InfoKind>,
}

impl Card {
    /// One that leads out of this machine: hardware, or what is made of it.
    fn is_physical(&self) -> bool {
        use InfoKind::{Bond, MacVlan, Team, Vlan};
        self.kind.as_ref().is_none_or(|kind| matches!(kind, Bond | MacVlan | Team | Vlan))
    }

    /// A guest's, or one of Haven's own.
    fn is_inner(&self) -> bool {
        let tunnel = matches!(self.kind, Some(InfoKind::Tun | InfoKind::Vxlan));
        tunnel || slot_of(&self.name).is_some()
    }
}

/// Why the card with this number leads nowhere, if so. Pure.
pub(super) fn dead(cards: &BTreeMap<u32, Card>, index: u32) -> Option<String> {
    let card = cards.get(&index)?;
    if card.kind != Some(InfoKind::Bridge) {
        return (!card.carries).then(|| format!("the network card {} has no link", card.name));
    }
    let ports = || cards.values().filter(|port| port.bridge == Some(index) && !port.is_inner());
    // Beside hardware, what leads to a container says nothing of the world.
    let physical = ports().any(Card::is_physical);
    let ports: Vec<&Card> = ports().filter(|port| port.is_physical() == physical).collect();
    if ports.is_empty() || ports.iter().any(|port| port.carries) {
        return None;
    }
    let names: Vec<&str> = ports.iter().map(|port| port.name.as_str()).collect();
    let (names, has) = (names.join(", "), if names.len() == 1 { "has" } else { "have" });
    Some(format!("{names} of the bridge {} {has} no link", card.name))
}

/// Asks the kernel, and is told by it.
pub struct LinuxUplinks {
    handle: Handle,
    news: std::sync::Arc<Notify>,
    told: bool,
}

impl LinuxUplinks {
    /// For this network namespace.
    ///
    /// # Errors
    /// When netlink cannot be used.
    pub fn new() -> Result<Self, NetworkError> {
        let (connection, handle, _) =
            rtnetlink::new_connection().map_err(failed("netlink cannot be used"))?;
        tokio::spawn(connection);
        let news = std::sync::Arc::<Notify>::default();
        let told = match rtnetlink::new_multicast_connection(&[MulticastGroup::Link]) {
            Ok((connection, _, mut messages)) => {
                tokio::spawn(connection);
                let news = std::sync::Arc::clone(&news);
                tokio::spawn(async move {
                    while messages.next().await.is_some() {
                        news.notify_one();
                    }
                });
                true
            }
            Err(error) => {
                tracing::warn!(%error, "the kernel does not tell of changed network cards; they are looked at every 5 s");
                false
            }
        };
        Ok(Self { handle, news, told })
    }

    async fn cards(&self) -> Result<BTreeMap<u32, Card>, NetworkError> {
        let mut cards = BTreeMap::new();
        let mut list = self.handle.link().get().execute();
        while let Some(message) =
            list.try_next().await.map_err(failed("network cards cannot be listed"))?
        {
            let flags = message.header.flags;
            let mut card = Card {
                name: String::new(),
                carries: flags.contains(LinkFlags::Up) && flags.contains(LinkFlags::LowerUp),
                bridge: None,
                kind: None,
            };
            for attribute in message.attributes {
                match attribute {
                    LinkAttribute::IfName(name) => card.name = name,
                    LinkAttribute::Controller(index) => card.bridge = Some(index),
                    LinkAttribute::LinkInfo(infos) => {
                        card.kind = infos.into_iter().find_map(|info| match info {
                            LinkInfo::Kind(kind) => Some(kind),
                            _ => None,
                        });
                    }
                    _ => {}
                }
            }
            cards.insert(message.header.index, card);
        }
        Ok(cards)
    }

    /// The subnets of this machine's cards, and their numbers.
    async fn subnets(&self) -> Result<Vec<(Ipv4Net, u32)>, NetworkError> {
        let mut subnets = Vec::new();
        let mut list = self.handle.address().get().execute();
        while let Some(found) =
            list.try_next().await.map_err(failed("addresses cannot be listed"))?
        {
            let length = found.header.prefix_len;
            let own = found.attributes.iter().find_map(|attribute| match attribute {
                AddressAttribute::Local(IpAddr::V4(own)) if length < 32 => Some(*own),
                _ => None,
            });
            let subnet = own.and_then(|own| Ipv4Net::new(own, length).ok());
            subnets.extend(subnet.map(|subnet| (subnet, found.header.index)));
        }
        Ok(subnets)
    }
}

#[async_trait]
impl UplinkDriver for LinuxUplinks {
    async fn cut(
        &self,
        wanted: &BTreeSet<Uplink>,
    ) -> Result<BTreeMap<Uplink, String>, NetworkError> {
        let cards = self.cards().await?;
        let near = wanted.iter().any(|uplink| matches!(uplink, Uplink::Near(_)));
        let subnets = if near { self.subnets().await? } else { Vec::new() };
        let index = |uplink: &Uplink| match uplink {
            Uplink::Bridge(name) => {
                cards.iter().find(|(_, card)| card.name == *name).map(|(index, _)| *index)
            }
            // The first one, as the address itself is put on.
            Uplink::Near(ip) => {
                subnets.iter().find(|(subnet, _)| subnet.contains(ip)).map(|(_, index)| *index)
            }
        };
        let cut = wanted
            .iter()
            .filter_map(|uplink| Some((uplink.clone(), dead(&cards, index(uplink)?)?)));
        Ok(cut.collect())
    }

    async fn changed(&self) {
        if self.told {
            self.news.notified().await;
        } else {
            tokio::time::sleep(WITHOUT_NEWS).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn card(name: &str, carries: bool, bridge: Option<u32>, kind: Option<InfoKind>) -> Card {
        Card { name: name.into(), carries, bridge, kind }
    }

    #[test]
    fn a_bridge_is_dead_when_none_of_its_hardware_has_a_link() {
        let bridge = || (1, card("br0", true, None, Some(InfoKind::Bridge)));
        let port = |carries| (2, card("eth1", carries, Some(1), None));
        let tap = || (3, card("hv3n0", true, Some(1), Some(InfoKind::Tun)));
        let pod = || (4, card("veth9", true, Some(1), Some(InfoKind::Veth)));
        let of = |cards: Vec<(u32, Card)>| dead(&cards.into_iter().collect(), 1);
        assert_eq!(of(vec![bridge(), port(true), tap()]), None);
        // Neither a guest's card nor a container's is a way out.
        let said = of(vec![bridge(), port(false), tap(), pod()]);
        assert_eq!(said.as_deref(), Some("eth1 of the bridge br0 has no link"));
        let second = |carries| (5, card("bond0", carries, Some(1), Some(InfoKind::Bond)));
        assert_eq!(of(vec![bridge(), port(false), second(true)]), None);
        let said = of(vec![bridge(), port(false), second(false)]);
        assert_eq!(said.as_deref(), Some("eth1, bond0 of the bridge br0 have no link"));
        // One that leads nowhere by design is well, and so is what is not there.
        assert_eq!(of(vec![bridge(), tap()]), None);
        assert_eq!(of(vec![]), None);
    }

    #[test]
    fn a_card_without_a_link_is_dead() {
        let of = |carries| dead(&[(1, card("eth0", carries, None, None))].into(), 1);
        assert_eq!(of(true), None);
        assert_eq!(of(false).as_deref(), Some("the network card eth0 has no link"));
    }
}
