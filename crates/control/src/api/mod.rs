//! The API: REST under `/v1`, problems as RFC 9457, one table of routes and roles.
//!
//! Served twice: on a unix socket, where the caller is root of this host and therefore an admin, and over TLS, where
//! people bring a token and hosts their certificate. Every write is checked against what the writer saw (a conflict
//! is 409 with both versions) and stands in the audit log.

mod admission;
pub mod apply;
pub mod auth;
mod backups;
#[cfg(test)]
mod backups_test;
pub mod balance;
#[cfg(test)]
mod balance_test;
mod body;
mod certificates;
mod chosen;
mod clones;
#[cfg(test)]
mod clones_test;
mod cluster;
mod drains;
pub mod error;
mod maintenance;
#[cfg(test)]
mod maintenance_test;
mod migrations;
pub mod objects;
pub mod openapi;
pub mod overview;
mod pools;
mod power;
mod promises;
mod rehearsals;
mod route;
pub mod routes;
pub mod serve;
mod snapshots;
pub mod table;
mod table_disks;
mod targets;
pub mod validate;
mod validate_after;
mod validate_disks;
mod validate_snapshots;
mod validate_update;
mod volumes;

#[cfg(test)]
mod admission_test;
#[cfg(test)]
mod certificates_test;
#[cfg(test)]
mod drains_test;
#[cfg(test)]
mod migrations_test;
#[cfg(test)]
mod openapi_test;
#[cfg(test)]
mod pools_test;
#[cfg(test)]
mod power_test;
#[cfg(test)]
mod promote_test;
#[cfg(test)]
mod rehearsals_test;
#[cfg(test)]
mod routes_test;
#[cfg(test)]
mod snapshots_test;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod validate_test;
#[cfg(test)]
mod volumes_test;

use crate::manager::{effects::Power, promises::Promises};
use async_trait::async_trait;
use haven_model::{
    Name, ObjectRef, Observations, PoolSpec, RbdSpec, Snapshot,
    api::{BackupFiles, BackupList, JoinAnswer, JoinRequest},
    image::ImageFile,
    keys,
    volume::VolumeRef,
};
use haven_store::{raw::EtcdStore, seal::ClusterKey};
use std::{path::PathBuf, sync::Arc, time::Duration};
use tokio::{io::AsyncRead, sync::watch};

/// What only the daemon of a host can do.
#[async_trait]
pub trait LocalHost: Send + Sync {
    /// Takes in a file of an image.
    async fn import(
        &self,
        from: Box<dyn AsyncRead + Send + Unpin>,
        expected: Option<String>,
    ) -> Result<ImageFile, String>;
    /// The format of an imported disk as QEMU names it.
    async fn disk_format(&self, file: &ImageFile) -> Result<String, String>;
    /// Where a file of an image stands, if it is here.
    fn blob(&self, sha256: &str) -> Option<PathBuf>;
    /// The socket of a VM's console.
    fn console(&self, vm: &str) -> PathBuf;
    /// What a VM's console said.
    fn log(&self, vm: &str) -> PathBuf;
    /// The way into the process here that takes a guest, once.
    fn way_in(&self, vm: &str) -> Result<Box<dyn serve::Duplex>, String>;
    /// The socket at which the process of a VM that comes in takes the contents of its disks; nothing when it takes none.
    fn disks_in(&self, vm: &str) -> Option<PathBuf>;
    /// Makes another host part of the cluster; its token was checked.
    async fn admit(&self, request: &JoinRequest) -> Result<JoinAnswer, String>;
    /// Opens a byte stream to a path of another host's API (a console).
    async fn relay(
        &self,
        host: std::net::Ipv4Addr,
        path: &str,
    ) -> Result<Box<dyn serve::Duplex>, String>;
    /// The hashes of so many pieces of this host's replica of a mirrored disk, one after another, from number `from` on.
    async fn pieces(&self, volume: &VolumeRef, from: u64, count: u64) -> Result<Vec<u8>, String>;
    /// The next part of this host's copy of a mirrored disk as it was in a snapshot, from `from` on.
    async fn kept(
        &self,
        volume: &VolumeRef,
        vm_uid: &str,
        copy: &str,
        from: u64,
    ) -> Result<Vec<u8>, String>;
    /// The whole answer of another host's API to a GET.
    async fn fetch(&self, host: std::net::Ipv4Addr, path: &str) -> Result<Vec<u8>, String>;
    /// Looks whether a pool of a Ceph cluster can be used from this host; its key is sealed.
    async fn check_ceph(&self, pool: &Name, rbd: &RbdSpec) -> Result<String, String>;
    /// Looks whether a pool of a filer can be used from this host, and what its directory says that it is; nothing is written there if
    /// it is `only_asked`.
    async fn check_filer(&self, pool: &PoolSpec, only_asked: bool) -> Result<String, String>;
    /// Makes a target of what is there, when it is empty.
    async fn mark_target(&self, target: &Name) -> Result<(), String>;
    /// The backups in a target, of one VM or of all.
    async fn backups(&self, target: &Name, vm: Option<&Name>) -> Result<BackupList, String>;
    /// What stands at a place of a backup, `DISK[:PARTITION]:/PATH`; which places there are when none is named.
    async fn backup_files(
        &self,
        target: &Name,
        vm: &Name,
        id: &str,
        at: Option<&str>,
    ) -> Result<BackupFiles, String>;
    /// A file of a backup, and its length.
    async fn backup_file(
        &self,
        target: &Name,
        vm: &Name,
        id: &str,
        at: &str,
    ) -> Result<(u64, Box<dyn AsyncRead + Send + Unpin>), String>;
    /// Removes a backup.
    async fn remove_backup(&self, target: &Name, vm: &Name, id: &str) -> Result<(), String>;
}

/// What the API stands on.
#[derive(Clone)]
pub struct ApiState {
    /// This host.
    pub me: Name,
    /// The store.
    pub store: EtcdStore,
    /// The live copy.
    pub live: watch::Receiver<Arc<Snapshot>>,
    /// What this daemon observes now.
    pub seen: Arc<dyn Fn() -> Observations + Send + Sync>,
    /// What this daemon promised to hosts that cannot renew.
    pub promises: Promises,
    /// This host's own doings.
    pub local: Arc<dyn LocalHost>,
    /// Reads the power of hosts.
    pub power: Arc<dyn Power>,
    /// Under which secrets are sealed; nothing on a host that cannot derive it.
    pub secrets: Option<ClusterKey>,
    /// The address and the authority's fingerprint that go into join tokens.
    pub invite: Arc<InviteFacts>,
}

/// What a join token carries beside its secret.
#[derive(Clone, Debug, Default)]
pub struct InviteFacts {
    /// SHA-256 of the authority's certificate.
    pub fingerprint: String,
}

impl ApiState {
    /// The live copy now.
    #[must_use]
    pub fn snapshot(&self) -> Arc<Snapshot> {
        Arc::clone(&self.live.borrow())
    }

    /// The live copy once it holds everything that was written before this call, so that what somebody wrote a
    /// moment ago counts, on whichever host. Behind a store that hangs it is the copy as it is: every write compares
    /// what it read, so an old one can only be refused.
    ///
    /// # Errors
    /// 503 when the store does not answer.
    pub async fn current(&self) -> error::ApiResult<Arc<Snapshot>> {
        let now = self.store.range(keys::CLUSTER, None, 1, 0).await?.revision;
        let follow = async {
            while self.live.borrow().revision < now {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let _ = tokio::time::timeout(Duration::from_secs(1), follow).await;
        Ok(self.snapshot())
    }

    /// What there is to say of an object.
    #[must_use]
    pub fn explain(&self, object: &ObjectRef) -> Vec<String> {
        haven_plan::explain(&self.snapshot(), &(self.seen)(), object)
    }
}
