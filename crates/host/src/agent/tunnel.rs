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

/// What goes through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Load {
    /// The guest's memory and devices: one connection.
    Memory,
    /// The contents of its disks: a connection for each.
    Disks,
}

/// Joins a socket of this host with the process on another host that takes a guest.
#[async_trait]
pub trait Tunnel: Send + Sync {
    /// The socket through which the process of `vm`, which runs as `uid`, reaches its taker on `host`. An earlier one
    /// of this VM for the same load ends.
    async fn open(
        &self,
        vm: &str,
        uid: u32,
        host: &Name,
        load: Load,
    ) -> Result<PathBuf, TunnelError>;
    /// Ends all of them at once: what is under way is lost. Fine when there is none.
    fn close(&self, vm: &str);
    /// Lets what is under way arrive, for a while, and ends all of them then. The process of `vm` has ended.
    fn finish(&self, vm: &str);
}

/// No way at all: the name of the other host, for drivers that move records.
pub struct NoTunnel;

#[async_trait]
impl Tunnel for NoTunnel {
    async fn open(
        &self,
        _vm: &str,
        _uid: u32,
        host: &Name,
        _load: Load,
    ) -> Result<PathBuf, TunnelError> {
        Ok(PathBuf::from(host.as_str()))
    }
    fn close(&self, _vm: &str) {}
    fn finish(&self, _vm: &str) {}
}
