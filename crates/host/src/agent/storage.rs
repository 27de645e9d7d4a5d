//! What a VM's task asks of storage: volumes, image files, seeds. The seam between the agent and the pools.

use async_trait::async_trait;
use haven_model::{PoolSpec, image::ImageFile};
use std::path::PathBuf;

/// Something of a disk, an image or a seed could not be done.
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
pub struct StorageFailure {
    /// A sentence: what, where, what to do.
    pub what: String,
}

/// A volume that a VM needs.
#[derive(Clone, Debug)]
pub struct VolumeWanted {
    /// `<vm>.<disk>`, unique in its pool: neither name can hold a dot.
    pub name: String,
    /// How large the guest sees it, bytes.
    pub size_bytes: u64,
    /// What it is made from, with the format of the image.
    pub image: Option<(ImageFile, String)>,
    /// The unix user of the VM that opens it.
    pub owner_uid: u32,
}

/// A volume that is there.
#[derive(Clone, Debug)]
pub struct VolumeReady {
    /// The file.
    pub path: PathBuf,
    /// `raw` or `qcow2`.
    pub format: String,
}

/// What a guest learns at its first boot.
#[derive(Clone, Debug)]
pub struct SeedWanted {
    /// The VM.
    pub vm: String,
    /// Changes when the guest shall take itself for a new one.
    pub instance_id: String,
    /// For cloud-init; empty when there is none.
    pub user_data: String,
    /// Its network cards.
    pub nics: Vec<SeedNic>,
    /// The unix user of the VM that opens it.
    pub owner_uid: u32,
}

/// A network card as the guest sees it.
#[derive(Clone, Debug)]
pub struct SeedNic {
    /// MAC address.
    pub mac: String,
    /// Address with prefix length.
    pub address: ipnet::Ipv4Net,
    /// Default gateway.
    pub gateway: std::net::Ipv4Addr,
    /// Name servers.
    pub nameservers: Vec<std::net::Ipv4Addr>,
}

/// Keeps volumes, images and seeds of this host.
#[async_trait]
pub trait Storage: Send + Sync {
    /// Makes the volume if it is not there.
    async fn volume(
        &self,
        pool: &PoolSpec,
        wanted: &VolumeWanted,
    ) -> Result<VolumeReady, StorageFailure>;
    /// Removes a volume; fine when it is not there.
    async fn delete_volume(&self, pool: &PoolSpec, name: &str) -> Result<(), StorageFailure>;
    /// A file of an image, fetched from another host if it is not here.
    async fn image_file(&self, file: &ImageFile) -> Result<PathBuf, StorageFailure>;
    /// Writes the seed.
    async fn seed(&self, wanted: &SeedWanted) -> Result<PathBuf, StorageFailure>;
    /// Removes what is left of a VM beside its volumes.
    async fn forget(&self, vm: &str) -> Result<(), StorageFailure>;
    /// Contents of images that are here (SHA-256).
    async fn images(&self) -> std::collections::BTreeSet<String>;
}
