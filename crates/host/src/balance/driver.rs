//! The seam: the whole wanted state of a host's frontends.

use async_trait::async_trait;
use haven_model::service::{ProxyProtocol, Sticky, TlsVersion};
use haven_store::seal::Plain;
use std::{collections::BTreeMap, net::IpAddr};

/// HTTP or TCP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrontendMode {
    /// Requests.
    Http,
    /// Connections.
    Tcp,
}

/// What a member gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemberState {
    /// Its share, as long as HAProxy's own checks pass.
    Ready,
    /// Nothing new.
    Drain,
    /// Nothing.
    Down,
}

/// One guest behind a frontend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// The VM.
    pub name: String,
    /// Its address.
    pub ip: IpAddr,
    /// Its port.
    pub port: u16,
    /// What it gets.
    pub state: MemberState,
    /// Its own host has found it healthy. HAProxy then need not wait for its own next check to send to it; whether it
    /// stays healthy is for that check to say.
    pub healthy: bool,
    /// Its share, 1 to 256.
    pub weight: u32,
}

/// How HAProxy checks members.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// A page or a connection.
    pub mode: FrontendMode,
    /// The guest's port.
    pub port: u16,
    /// The page.
    pub path: String,
    /// Milliseconds.
    pub interval_ms: u64,
    /// Milliseconds.
    pub timeout_ms: u64,
}

/// What else is wanted of a frontend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Whether a client stays with its member.
    pub sticky: Sticky,
    /// Connections at once at most.
    pub max_connections: Option<u32>,
    /// Connections to each member at once at most.
    pub max_connections_per_member: Option<u32>,
    /// The PROXY protocol.
    pub proxy_protocol: ProxyProtocol,
}

/// A certificate with its key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The chain and nothing else, PEM, the leaf first.
    pub chain: String,
    /// Its key, PEM.
    pub key: Plain,
    /// Another chain has another: lower-case hexadecimal.
    pub fingerprint: String,
}

/// TLS that ends here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsWanted {
    /// The certificate's name.
    pub certificate: String,
    /// The certificate, or why there is none.
    pub identity: Result<Identity, String>,
    /// Older versions are refused.
    pub min_version: TlsVersion,
}

/// One frontend as this host shall serve it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FrontendWanted {
    /// The address from which members are reached: this host's own. The gateway's is the same on every host, so a
    /// guest elsewhere would answer to its own host.
    pub source: IpAddr,
    /// The service.
    pub service: String,
    /// The address it is reached at.
    pub address: IpAddr,
    /// The port there.
    pub port: u16,
    /// HTTP or TCP.
    pub mode: FrontendMode,
    /// The guests.
    pub members: Vec<Member>,
    /// How they are checked.
    pub check: Option<Check>,
    /// What else is wanted.
    pub options: Options,
    /// TLS, if it ends here.
    pub tls: Option<TlsWanted>,
}

/// The services whose frontends were left out, and why.
pub type LeftOut = BTreeMap<String, BalanceError>;

/// Something of the balancer could not be done.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {why}")]
pub struct BalanceError {
    /// What was tried.
    pub what: String,
    /// What was said.
    pub why: String,
}

/// Balances.
#[async_trait]
pub trait BalanceDriver: Send + Sync {
    /// Makes the balancer match; cheap when it does already. A frontend whose certificate cannot be used is left out and
    /// harms no other.
    async fn apply(&self, wanted: &[FrontendWanted]) -> Result<LeftOut, BalanceError>;
}
