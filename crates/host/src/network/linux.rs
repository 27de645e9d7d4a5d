//! The driver for Linux: bridges, VXLAN, forwarding entries and neighbours by netlink.

use super::{
    driver::{
        LOOK_AGAIN, LeftAlone, LocalPort, NetworkDriver, NetworkError, NetworkKind, NetworkWanted,
        RemotePort, slot_of,
    },
    firewall,
    machine::{self, Link, Links, Ways},
    tap,
};
use async_trait::async_trait;
use ipnet::Ipv4Net;
use rtnetlink::{
    Handle, LinkBridge, LinkBridgePort, LinkUnspec, LinkVxlan,
    packet_route::neighbour::{NeighbourFlags, NeighbourState},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr},
    time::{Duration, Instant},
};
use tokio::sync::Mutex;

/// UDP port of VXLAN.
const VXLAN_PORT: u16 = 4789;

/// Makes networks on this machine.
pub struct LinuxNetwork {
    /// This host's address, from which tunnels are sent.
    address: Ipv4Addr,
    handle: Handle,
    state: Mutex<State>,
    look_again: Duration,
}

#[derive(Default)]
struct State {
    /// Forwarding entries written by this driver: (tunnel, MAC) to host.
    remote: BTreeMap<(String, [u8; 6]), Ipv4Addr>,
    /// Tunnels made by this driver, so that entries of a former daemon are gone.
    tunnels: BTreeSet<String>,
    /// Bridges seen or made by this driver.
    bridges: BTreeSet<String>,
    rules: String,
    /// The rules as the kernel listed them when they were loaded.
    listing: Vec<u8>,
    /// [`firewall::generation`] when they were listed last.
    generation: Option<u32>,
    prepared: bool,
    /// When memory was last compared with the machine.
    looked: Option<Instant>,
    /// What the machine has, while memory is compared with it.
    ways: Option<Ways>,
    /// The ways to guests that nothing names stay: whose they are cannot be read.
    keeps_ways: bool,
}

impl State {
    /// Takes over the tunnel of a former daemon with its entries, when some of them may lead to guests whose records
    /// cannot be read. A tunnel is made anew otherwise.
    fn adopt(&mut self, tunnel: &str, there: Option<&Link>) {
        let Some((link, ways)) = there.zip(self.ways.as_ref()).filter(|_| self.keeps_ways) else {
            return;
        };
        if self.tunnels.insert(tunnel.to_owned()) {
            let entries = ways.through(link.index).map(|(mac, to)| ((tunnel.to_owned(), mac), to));
            self.remote.extend(entries);
        }
    }
}

/// Puts what was tried before what the system said.
pub(super) fn failed<E: std::fmt::Display>(
    what: impl Into<String>,
) -> impl FnOnce(E) -> NetworkError {
    let what = what.into();
    move |error| NetworkError { what, why: error.to_string() }
}

/// The bridge of an overlay network.
pub(super) fn bridge_name(vni: u32) -> String {
    format!("hvb{vni:x}")
}
fn tunnel_name(vni: u32) -> String {
    format!("hvx{vni:x}")
}

impl LinuxNetwork {
    /// A driver for this network namespace.
    ///
    /// # Errors
    /// When netlink cannot be used.
    pub fn new(address: Ipv4Addr) -> Result<Self, NetworkError> {
        let (connection, handle, _) =
            rtnetlink::new_connection().map_err(failed("netlink cannot be used"))?;
        tokio::spawn(connection);
        Ok(Self { address, handle, state: Mutex::default(), look_again: LOOK_AGAIN })
    }

    /// Compares the machine with memory after so long, instead of [`LOOK_AGAIN`].
    #[must_use]
    pub fn looking_every(self, look_again: Duration) -> Self {
        Self { look_again, ..self }
    }

    async fn index(&self, name: &str) -> Result<u32, NetworkError> {
        let links = machine::links(&self.handle).await?;
        links.get(name).map(|link| link.index).ok_or_else(|| NetworkError {
            what: format!("the network card {name} is missing"),
            why: "it was not there after it was made".into(),
        })
    }

    async fn delete(&self, name: &str, index: u32) -> Result<(), NetworkError> {
        self.handle
            .link()
            .del(index)
            .execute()
            .await
            .map_err(failed(format!("{name} cannot be removed")))
    }

    async fn overlay(
        &self,
        wanted: &NetworkWanted,
        vni: u32,
        (subnet, gateway, mac): (Ipv4Net, Ipv4Addr, [u8; 6]),
        state: &mut State,
        links: &Links,
    ) -> Result<u32, NetworkError> {
        let (bridge, tunnel) = (bridge_name(vni), tunnel_name(vni));
        let found = links.get(&bridge);
        if found.is_none() {
            // What led over the old bridge went with it.
            if state.bridges.contains(&bridge) {
                tracing::warn!(bridge, "somebody removed this bridge; it is made again");
                state.remote.retain(|(name, _), _| *name != tunnel);
            }
            let message =
                LinkBridge::new(&bridge).address(mac.to_vec()).mtu(wanted.mtu).up().build();
            let made = self.handle.link().add(message).execute().await;
            made.map_err(failed(format!("the bridge {bridge} cannot be made")))?;
        }
        state.bridges.insert(bridge.clone());
        let bridge_index = match found {
            Some(link) => link.index,
            None => self.index(&bridge).await?,
        };
        if found.is_some_and(|link| !link.up) {
            tracing::warn!(bridge, "somebody set this bridge down; it is set up again");
            self.plug(bridge_index, None, &bridge).await?;
        }
        let address =
            self.handle.address().add(bridge_index, IpAddr::V4(gateway), subnet.prefix_len());
        address
            .replace()
            .execute()
            .await
            .map_err(failed(format!("{gateway} cannot be given to {bridge}")))?;
        let there = links.get(&tunnel);
        state.adopt(&tunnel, there);
        if state.tunnels.contains(&tunnel)
            && let Some(link) = there
        {
            if !link.up || link.controller != Some(bridge_index) {
                tracing::warn!(tunnel, "somebody unplugged this tunnel; it is plugged in again");
                self.plug(link.index, Some(bridge_index), &tunnel).await?;
                // Entries of a bridge's port go with the port.
                state.remote.retain(|(name, _), _| *name != tunnel);
            }
        } else {
            if state.tunnels.remove(&tunnel) {
                tracing::warn!(tunnel, "somebody removed this tunnel; it is made again");
            }
            if let Some(link) = there {
                self.delete(&tunnel, link.index).await?;
            }
            let message = LinkVxlan::new(&tunnel, vni)
                .port(VXLAN_PORT)
                .learning(false)
                .local(self.address)
                .mtu(wanted.mtu)
                .controller(bridge_index)
                .up()
                .build();
            let made = self.handle.link().add(message).execute().await;
            made.map_err(failed(format!("the tunnel {tunnel} cannot be made")))?;
            let index = self.index(&tunnel).await?;
            let port = LinkBridgePort::new(index).neigh_suppress(true).learning(false).build();
            let set = self.handle.link().set_port(port).execute().await;
            set.map_err(failed(format!("the tunnel {tunnel} cannot be set up")))?;
            state.remote.retain(|(name, _), _| *name != tunnel);
            state.tunnels.insert(tunnel);
        }
        Ok(bridge_index)
    }

    /// Sets a card up, and plugs it into a bridge if one is given.
    async fn plug(&self, index: u32, bridge: Option<u32>, name: &str) -> Result<(), NetworkError> {
        let mut message = LinkUnspec::new_with_index(index).up();
        if let Some(bridge) = bridge {
            message = message.controller(bridge);
        }
        let set = self.handle.link().set(message.build()).execute().await;
        set.map_err(failed(format!("{name} cannot be set up")))
    }

    /// Looks whether the rules are still as they were loaded; they are loaded anew if not.
    async fn rules(&self, rules: String, state: &mut State) -> Result<(), NetworkError> {
        let mut same = rules == state.rules;
        let generation = firewall::generation();
        let untouched = generation.is_some() && generation == state.generation;
        if same && state.ways.is_some() && !untouched {
            same = match firewall::listing().await {
                Ok(listing) => listing == state.listing,
                // An `nft` that lists nothing in this form never did.
                Err(_) => state.listing.is_empty(),
            };
            if !same {
                tracing::warn!(
                    "somebody changed the firewall's tables `haven`; they are loaded again"
                );
            }
            state.generation = generation;
        }
        if !same {
            state.rules.clear();
            firewall::load(&rules).await?;
            state.generation = firewall::generation();
            state.listing = firewall::listing().await.unwrap_or_default();
            state.rules = rules;
        }
        Ok(())
    }

    /// Forwarding entries of guests elsewhere: where their host is, on which port of the bridge they are, and their
    /// MAC address for ARP.
    async fn remote(
        &self,
        bridge_index: u32,
        tunnel: &str,
        (here, ports): (&[LocalPort], &[RemotePort]),
        state: &mut State,
    ) -> Result<(), NetworkError> {
        let tunnel_index = self.index(tunnel).await?;
        for port in ports {
            let key = (tunnel.to_owned(), port.mac);
            if state.remote.get(&key) == Some(&port.host) {
                let on = (bridge_index, tunnel_index);
                let whole = |ways: &Ways| ways.lead(on, (port.ip, port.mac), port.host);
                if state.ways.as_ref().is_none_or(whole) {
                    continue;
                }
                tracing::warn!(ip = %port.ip, host = %port.host, "somebody removed the way to this guest; it is set again");
            }
            let what = || format!("the way to {} cannot be set", port.ip);
            let neighbours = self.handle.neighbours();
            neighbours
                .add_bridge(tunnel_index, &port.mac)
                .flags(NeighbourFlags::Own)
                .state(NeighbourState::Permanent)
                .destination(IpAddr::V4(port.host))
                .replace()
                .execute()
                .await
                .map_err(failed(what()))?;
            self.bridge_entry(tunnel_index, &port.mac).await?;
            self.arp(bridge_index, port.ip, &port.mac).await?;
            state.remote.insert(key, port.host);
        }
        let named = |mac: &[u8; 6]| here.iter().any(|port| port.mac == *mac);
        let goes = |mac: &[u8; 6]| {
            (!state.keeps_ways || named(mac)) && !ports.iter().any(|port| port.mac == *mac)
        };
        let gone: Vec<(String, [u8; 6])> = state
            .remote
            .keys()
            .filter(|(name, mac)| name == tunnel && goes(mac))
            .cloned()
            .collect();
        for key in gone {
            let mut entry = self.handle.neighbours().add_bridge(tunnel_index, &key.1);
            let message = std::mem::take(entry.message_mut());
            // The tunnel's own entry goes; the bridge's entry is replaced when the guest appears elsewhere.
            let mut message = message;
            message.header.flags = NeighbourFlags::Own;
            let _ = self.handle.neighbours().del(message).execute().await;
            state.remote.remove(&key);
        }
        Ok(())
    }

    /// A static entry of the bridge: this MAC address is behind this port.
    async fn bridge_entry(&self, port_index: u32, mac: &[u8; 6]) -> Result<(), NetworkError> {
        self.handle
            .neighbours()
            .add_bridge(port_index, mac)
            .flags(NeighbourFlags::Controller)
            .state(NeighbourState::Noarp)
            .replace()
            .execute()
            .await
            .map_err(failed("a bridge entry cannot be set"))
    }

    async fn arp(
        &self,
        bridge_index: u32,
        ip: Ipv4Addr,
        mac: &[u8; 6],
    ) -> Result<(), NetworkError> {
        self.handle
            .neighbours()
            .add(bridge_index, IpAddr::V4(ip))
            .link_layer_address(mac)
            .state(NeighbourState::Permanent)
            .replace()
            .execute()
            .await
            .map_err(failed(format!("{ip} cannot be made known")))
    }

    async fn local(
        &self,
        bridge_index: u32,
        mtu: u32,
        ports: &[LocalPort],
        overlay: bool,
        links: &Links,
    ) -> Result<(), NetworkError> {
        for port in ports {
            let known = links.get(&port.tap);
            if known.is_none() {
                tap::create(&port.tap, port.owner_uid)
                    .map_err(failed(format!("the tap {} cannot be made", port.tap)))?;
            }
            let index = match known {
                Some(link) => link.index,
                None => self.index(&port.tap).await?,
            };
            let message =
                LinkUnspec::new_with_index(index).controller(bridge_index).mtu(mtu).up().build();
            let set = self.handle.link().set(message).execute().await;
            set.map_err(failed(format!("the tap {} cannot be plugged in", port.tap)))?;
            if port.idle {
                continue;
            }
            self.bridge_entry(index, &port.mac).await?;
            if let (true, Some(ip)) = (overlay, port.ip) {
                self.arp(bridge_index, ip, &port.mac).await?;
            }
        }
        Ok(())
    }

    async fn network(
        &self,
        network: &NetworkWanted,
        links: &Links,
        state: &mut State,
    ) -> Result<(), NetworkError> {
        match &network.kind {
            NetworkKind::Overlay { vni, subnet, gateway, gateway_mac, .. } => {
                let of = (*subnet, *gateway, *gateway_mac);
                let bridge = self.overlay(network, *vni, of, state, links).await?;
                self.local(bridge, network.mtu, &network.local, true, links).await?;
                let ports = (&network.local[..], &network.remote[..]);
                self.remote(bridge, &tunnel_name(*vni), ports, state).await
            }
            NetworkKind::Bridge { uplink_bridge } => {
                let bridge = links.get(uplink_bridge).map(|link| link.index);
                let bridge = bridge.ok_or_else(|| NetworkError {
                    what: format!("it needs the bridge {uplink_bridge}"),
                    why: "this host has no such bridge; make it or change the network".into(),
                })?;
                self.local(bridge, network.mtu, &network.local, false, links).await
            }
        }
    }

    /// What carries one of Haven's names and is not wanted goes; what does not go is told under its own name.
    async fn remove_stale(
        &self,
        wanted: &[NetworkWanted],
        left_alone: &LeftAlone,
        links: &Links,
        state: &mut State,
    ) -> BTreeMap<String, NetworkError> {
        let mut failed = BTreeMap::new();
        let mut keep: BTreeSet<String> = BTreeSet::new();
        for network in wanted {
            if let NetworkKind::Overlay { vni, .. } = network.kind {
                keep.insert(bridge_name(vni));
                keep.insert(tunnel_name(vni));
            }
            keep.extend(network.local.iter().map(|port| port.tap.clone()));
        }
        for (name, link) in links {
            if is_ours(name) && !keep.contains(name) && !left_alone.keeps(name) {
                match self.delete(name, link.index).await {
                    Ok(()) => {
                        state.tunnels.remove(name);
                        state.bridges.remove(name);
                    }
                    Err(error) => _ = failed.insert(name.clone(), error),
                }
            }
        }
        failed
    }
}

/// Bridges and tunnels of Haven, and taps: `hv`, digits, `n`, digits.
fn is_ours(name: &str) -> bool {
    let Some(rest) = name.strip_prefix("hv") else {
        return false;
    };
    rest.starts_with('b') || rest.starts_with('x') || slot_of(name).is_some()
}

/// What the kernel must allow in this namespace.
fn sysctls() {
    for (path, value) in [
        ("/proc/sys/net/ipv4/ip_forward", "1"),
        ("/proc/sys/net/ipv4/ip_nonlocal_bind", "1"),
        // The larger of this and the card's own counts, so that this is loose for every card, whatever that says: what
        // a host asked a guest elsewhere comes back by the uplink, from an address that leads into the tunnel.
        ("/proc/sys/net/ipv4/conf/all/rp_filter", "2"),
    ] {
        if let Err(error) = std::fs::write(path, value) {
            tracing::warn!(path, %error, "cannot be set");
        }
    }
}

#[async_trait]
impl NetworkDriver for LinuxNetwork {
    async fn apply(
        &self,
        wanted: &[NetworkWanted],
        left_alone: &LeftAlone,
    ) -> Result<BTreeMap<String, NetworkError>, NetworkError> {
        let mut state = self.state.lock().await;
        if !state.prepared {
            sysctls();
            state.prepared = true;
        }
        let links = machine::links(&self.handle).await?;
        let look = state.looked.is_none_or(|at| at.elapsed() >= self.look_again);
        state.ways = if look { Some(Ways::ask(&self.handle).await?) } else { None };
        state.keeps_ways = left_alone.known_slots.is_some();
        let mut failed = self.remove_stale(wanted, left_alone, &links, &mut state).await;
        // The rules come before the ports, so that no guest sends a packet that was not looked at.
        let kept = firewall::kept(left_alone).await?;
        self.rules(firewall::ruleset(wanted, &kept), &mut state).await?;
        for network in wanted {
            if let Err(error) = self.network(network, &links, &mut state).await {
                failed.insert(network.name.clone(), error);
            }
        }
        if look {
            state.looked = Some(Instant::now());
        }
        Ok(failed)
    }
}
