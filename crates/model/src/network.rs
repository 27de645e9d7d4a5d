//! Networks: what VMs are plugged into.

use ipnet::Ipv4Net;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::net::Ipv4Addr;

/// How the hosts carry a network.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum NetworkKind {
    /// VXLAN between the hosts, addresses from Haven.
    #[default]
    Overlay,
    /// An existing bridge of every host.
    Bridge,
}

/// What is wanted of a network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct NetworkSpec {
    /// How it is carried.
    #[serde(default)]
    pub driver: NetworkKind,
    /// The guests' subnet, for example `10.77.0.0/24`. Its first address is the gateway's.
    #[schemars(with = "String")]
    pub subnet: Ipv4Net,
    /// Whether guests of an overlay reach the world through their host's address.
    #[serde(default = "yes")]
    pub nat: bool,
    /// VXLAN network identifier, 1 to 16,777,215. Chosen when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vni: Option<u32>,
    /// The hosts' bridge, for `driver: bridge`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bridge: Option<String>,
    /// Name servers given to guests.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nameservers: Vec<Ipv4Addr>,
    /// Largest packet guests may send, bytes.
    #[serde(default = "default_mtu")]
    pub mtu: u32,
}

fn yes() -> bool {
    true
}
fn default_mtu() -> u32 {
    1450
}

impl NetworkSpec {
    /// The gateway's address, the same on every host.
    #[must_use]
    pub fn gateway(&self) -> Ipv4Addr {
        self.subnet.hosts().next().unwrap_or(self.subnet.addr())
    }
    /// The network identifier that the hosts use. Networks are given one when they are made; before that was so, it
    /// followed from the subnet.
    #[must_use]
    pub fn vni(&self) -> u32 {
        self.vni.unwrap_or_else(|| {
            let [a, b, c, _] = self.subnet.network().octets().map(u32::from);
            0x0010_0000 | ((a << 12) ^ (b << 8)) | c
        })
    }
    /// The same, or nothing for a network that needs none.
    #[must_use]
    pub fn vni_in_use(&self) -> Option<u32> {
        (self.driver == NetworkKind::Overlay).then(|| self.vni())
    }
    /// The gateway's MAC address, the same on every host, so that a moved guest keeps its gateway.
    #[must_use]
    pub fn gateway_mac(&self) -> [u8; 6] {
        let ip = self.gateway().octets();
        [0x02, 0x67, ip[0], ip[1], ip[2], ip[3]]
    }
}
