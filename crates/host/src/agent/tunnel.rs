//! The seam: the way by which a guest's memory reaches another host.

use async_trait::async_trait;
use haven_model::Name;
use std::path::PathBuf;

/// A way to another host could not be made.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {why}")]
pub struct TunnelError {
    /// What was tried.
    pub what: String,
    /// What was said.
    pub why: String,
}

/// Joins a socket of this host with the process on another host that takes a guest.
#[async_trait]
pub trait Tunnel: Send + Sync {
    /// The socket through which the process of `vm`, which runs as `uid`, reaches its taker on `host`. An earlier one
    /// of this VM ends.
    async fn open(&self, vm: &str, uid: u32, host: &Name) -> Result<PathBuf, TunnelError>;
    /// Ends it. Fine when there is none.
    fn close(&self, vm: &str);
}

/// No way at all: the name of the other host, for drivers that move records.
pub struct NoTunnel;

#[async_trait]
impl Tunnel for NoTunnel {
    async fn open(&self, _vm: &str, _uid: u32, host: &Name) -> Result<PathBuf, TunnelError> {
        Ok(PathBuf::from(host.as_str()))
    }
    fn close(&self, _vm: &str) {}
}
