//! Services: N like VMs, spread over hosts, behind one address.

use crate::{name::Name, units::Millis, vm::VmSpec};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, net::Ipv4Addr};

/// HTTP or plain TCP.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// Requests.
    #[default]
    Http,
    /// Connections.
    Tcp,
}

/// How a member's health is known.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct HealthCheck {
    /// Ask for a page or only connect.
    #[serde(default)]
    pub mode: Protocol,
    /// The guest's port.
    pub port: u16,
    /// The page, for HTTP.
    #[serde(default = "root")]
    pub path: String,
    /// How often.
    #[serde(default = "default_interval")]
    pub interval: Millis,
    /// How long an answer may take.
    #[serde(default = "default_timeout")]
    pub timeout: Millis,
}

fn root() -> String {
    "/".into()
}
fn default_interval() -> Millis {
    Millis(500)
}
fn default_timeout() -> Millis {
    Millis(1000)
}

/// The members' hosts must differ in this.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct SpreadSpec {
    /// `host`, or the key of a host label such as `zone`.
    #[serde(default = "by_host")]
    pub by: String,
    /// When true no two members may share it; else it is a wish.
    #[serde(default)]
    pub required: bool,
}

fn by_host() -> String {
    "host".into()
}

impl Default for SpreadSpec {
    fn default() -> Self {
        Self { by: by_host(), required: false }
    }
}

/// In which order a new template takes the place of the old one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum UpdateStrategy {
    /// One after another; traffic goes to all of them evenly.
    #[default]
    Rolling,
    /// All new members beside the old ones, then all traffic to them at once.
    BlueGreen,
    /// A few new members get a part of the traffic first; then as `rolling`.
    Canary,
}

impl UpdateStrategy {
    /// As it is written.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Rolling => "rolling",
            Self::BlueGreen => "blue-green",
            Self::Canary => "canary",
        }
    }
    fn is_rolling(&self) -> bool {
        *self == Self::Rolling
    }
}

/// The part of an update that goes first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub struct CanarySpec {
    /// So many new members are made beside the old ones.
    pub members: u32,
    /// Percent of the traffic that they get together, 1 to 99.
    pub weight: u32,
    /// Once they have all been ready for so long without a break the others are replaced; without it a person promotes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hold: Option<Millis>,
}

impl Default for CanarySpec {
    fn default() -> Self {
        Self { members: 1, weight: 10, hold: None }
    }
}

/// Who lets a blue-green update go on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Promote {
    /// Haven, once all new members are ready.
    #[default]
    Automatic,
    /// A person, by `haven service promote`.
    Manual,
}

/// How members are replaced when the template changes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub struct UpdateSpec {
    /// So many members may be missing during the update.
    pub max_unavailable: u32,
    /// So many members more than wanted may exist during a rolling update.
    pub max_surge: u32,
    /// In which order.
    #[serde(skip_serializing_if = "UpdateStrategy::is_rolling")]
    pub strategy: UpdateStrategy,
    /// For `canary`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub canary: Option<CanarySpec>,
    /// For `blue-green`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub promote: Option<Promote>,
    /// For `blue-green`: so long the old members stay after the switch, so that going back takes no time; 30 s when
    /// absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep_old: Option<Millis>,
}

impl Default for UpdateSpec {
    fn default() -> Self {
        Self {
            max_unavailable: 0,
            max_surge: 1,
            strategy: UpdateStrategy::Rolling,
            canary: None,
            promote: None,
            keep_old: None,
        }
    }
}

impl UpdateSpec {
    /// Most members, of `replicas` wanted, that there are at once during an update.
    #[must_use]
    pub fn most_members(&self, replicas: u32) -> u32 {
        let more = match self.strategy {
            UpdateStrategy::Rolling => self.max_surge,
            UpdateStrategy::BlueGreen => replicas,
            UpdateStrategy::Canary => {
                self.max_surge.max(self.canary.clone().unwrap_or_default().members)
            }
        };
        replicas.saturating_add(more)
    }
}

/// Whether a client stays with its member.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Sticky {
    /// Every connection, or request, may go to another.
    #[default]
    None,
    /// By a cookie that the balancer sets, for HTTP; also after the address has moved to another host.
    Cookie,
    /// By the client's address.
    Source,
}

impl Sticky {
    fn is_none(&self) -> bool {
        *self == Self::None
    }
}

/// The PROXY protocol, which tells the client's address over a hop.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ProxyProtocol {
    /// Who connects to the frontend speaks it (version 1 or 2), and must.
    pub accept: bool,
    /// Members are told by it (version 2).
    pub send: bool,
}

impl ProxyProtocol {
    fn is_unused(&self) -> bool {
        *self == Self::default()
    }
}

/// A version of TLS.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
pub enum TlsVersion {
    /// 1.2, which everything speaks that is not long out of date.
    #[default]
    #[serde(rename = "1.2")]
    V12,
    /// 1.3.
    #[serde(rename = "1.3")]
    V13,
}

impl TlsVersion {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// TLS that ends at the balancer; the members are spoken to without it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct TlsSpec {
    /// The certificate.
    pub certificate: Name,
    /// Clients that speak no version as high as this are refused.
    #[serde(default, skip_serializing_if = "TlsVersion::is_default")]
    pub min_version: TlsVersion,
}

/// Where the world reaches a service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct FrontendSpec {
    /// A free address of the hosts' own network.
    pub address: Ipv4Addr,
    /// The port there.
    pub port: u16,
    /// HTTP or TCP.
    #[serde(default)]
    pub mode: Protocol,
    /// The guests' port; the same as `port` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_port: Option<u16>,
    /// Whether a client stays with its member.
    #[serde(default, skip_serializing_if = "Sticky::is_none")]
    pub sticky: Sticky,
    /// So many connections at once, 1 to 4000; further ones wait to be taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_connections: Option<u32>,
    /// So many connections at once to each member; what comes beyond waits up to 30 s for one that is free.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_connections_per_member: Option<u32>,
    /// The PROXY protocol, before and behind.
    #[serde(default, skip_serializing_if = "ProxyProtocol::is_unused")]
    pub proxy_protocol: ProxyProtocol,
    /// TLS, ended at the balancer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<Box<TlsSpec>>,
}

/// What each member is made from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VmTemplate {
    /// Labels of the members.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Their spec.
    pub spec: VmSpec,
}

/// What is wanted of a service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct ServiceSpec {
    /// How many members.
    pub replicas: u32,
    /// What each is made from.
    pub template: VmTemplate,
    /// How they are spread.
    #[serde(default)]
    pub spread: SpreadSpec,
    /// How their health is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub check: Option<HealthCheck>,
    /// How they are replaced.
    #[serde(default)]
    pub update: Box<UpdateSpec>,
    /// Where the world reaches them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frontend: Option<FrontendSpec>,
    /// Counts requested rolling restarts.
    #[serde(default)]
    pub restarts: u64,
    /// The template, as a short hash, that a person has promoted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub promoted: Option<String>,
}

impl ServiceSpec {
    /// The certificate that its frontend proves itself with.
    #[must_use]
    pub fn certificate(&self) -> Option<&Name> {
        Some(&self.frontend.as_ref()?.tls.as_ref()?.certificate)
    }
}

/// Label on every member: the template it was made from, as a short hash.
pub const TEMPLATE_LABEL: &str = "haven/template";
/// Label on every member: the service's name.
pub const SERVICE_LABEL: &str = "haven/service";
/// Label set on a member that is being replaced: the balancer sends it nothing new.
pub const DRAIN_LABEL: &str = "haven/drain";
/// Label on a member whose template was let into the whole service, and when, wall clock, milliseconds since 1970.
/// Going back to such a template waits for nobody.
pub const RELEASE_LABEL: &str = "haven/release";
