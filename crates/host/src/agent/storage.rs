//! What a VM's task asks of storage: volumes, image files, seeds. The seam between the agent and the pools.

use crate::{
    storage::{backup::restore::Progress, nfs::node::NfsLaunch, rbd::node::RbdLaunch},
    vm::snapshots::Keeps,
};
use async_trait::async_trait;
use haven_model::{Name, PoolSpec, backup::BackupRef, image::ImageFile, pool::PoolRoom};
use haven_store::seal::Plain;
use serde::{Deserialize, Serialize};
use std::{collections::BTreeSet, fmt, path::PathBuf};

/// Something of a disk, an image or a seed could not be done.
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
pub struct StorageFailure {
    /// A sentence: what, where, what to do.
    pub what: String,
}

/// Which volume: of which disk of which VM. The VM's uid tells it from a VM of the same name that was deleted.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct VolumeName {
    /// The VM.
    pub vm: Name,
    /// Its disk.
    pub disk: Name,
    /// The VM's uid.
    pub vm_uid: String,
}

impl VolumeName {
    /// Reads `<vm>.<disk>.<uid>`; nothing when it is something else.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        // No name can hold a dot.
        let mut parts = text.splitn(3, '.');
        let (vm, disk, vm_uid) = (parts.next()?, parts.next()?, parts.next()?);
        is_uid(vm_uid).then_some(())?;
        Some(Self {
            vm: Name::new(vm).ok()?,
            disk: Name::new(disk).ok()?,
            vm_uid: vm_uid.to_owned(),
        })
    }
}

/// Whether this can stand in the name of a file.
fn is_uid(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
}

impl fmt::Display for VolumeName {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(to, "{}.{}.{}", self.vm, self.disk, self.vm_uid)
    }
}

/// A disk of another VM, as a snapshot in it keeps it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CopyFrom {
    /// The disk, which is in the same pool.
    pub name: VolumeName,
    /// What the snapshot is called in it, or in Ceph; of a mirrored one, what its copies are called.
    pub tag: String,
}

/// A volume that a VM needs.
#[derive(Clone, Debug)]
pub struct VolumeWanted {
    /// Unique in its pool.
    pub name: VolumeName,
    /// How large the guest sees it, bytes.
    pub size_bytes: u64,
    /// What it is made from, with the format of the image.
    pub image: Option<(ImageFile, String)>,
    /// The disk of a backup that it is made from.
    pub backup: Option<BackupRef>,
    /// The disk of another VM that it is made from.
    pub copy: Option<CopyFrom>,
    /// The key under which it is encrypted; nothing when it is not.
    pub key: Option<Plain>,
    /// How far it is made.
    pub progress: Progress,
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
    /// It is an image of a Ceph cluster, and no file.
    pub rbd: Option<Box<RbdLaunch>>,
    /// A filer keeps it.
    pub filer: Option<Box<FilerLaunch>>,
}

/// How a process reaches a disk that a filer keeps.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum FilerLaunch {
    /// As a file of an NFS server, by itself.
    Nfs(NfsLaunch),
    /// As a file of this host, where the filer is mounted.
    Mounted,
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

/// What is done with a snapshot in a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SnapshotStep {
    /// The volume keeps what it holds under a name that it has not.
    Take,
    /// It holds again what it keeps.
    Revert,
    /// It keeps it no more.
    Remove,
}

/// What only pools of Ceph clusters can do is asked of another one.
fn not_in_ceph(what: &str) -> StorageFailure {
    StorageFailure { what: format!("{what} is in no pool of a Ceph cluster") }
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
    /// The file of a volume, given to its VM's user; nothing when it is not there.
    async fn has_volume(
        &self,
        pool: &PoolSpec,
        name: &VolumeName,
        owner_uid: u32,
    ) -> Result<Option<PathBuf>, StorageFailure>;
    /// Makes a volume that is there at least so large, bytes as its guest sees it, while nobody has it open. One that is not
    /// encrypted under this key is refused.
    async fn grow(
        &self,
        pool: &PoolSpec,
        name: &VolumeName,
        size_bytes: u64,
        key: Option<&Plain>,
    ) -> Result<(), StorageFailure>;
    /// What a volume of a pool whose volumes can keep snapshots holds of them, while nobody has it open; nothing when it is not
    /// there. One in Ceph may be open.
    async fn keeps(
        &self,
        pool: &PoolSpec,
        name: &VolumeName,
    ) -> Result<Option<Keeps>, StorageFailure>;
    /// Takes a step with a snapshot in it, while nobody has it open. In Ceph only [`SnapshotStep::Revert`] needs that.
    async fn snapshot(
        &self,
        pool: &PoolSpec,
        name: &VolumeName,
        step: SnapshotStep,
        snapshot: &str,
        key: Option<&Plain>,
    ) -> Result<(), StorageFailure>;
    /// Writes the key of an encrypted disk where its VM's process reads it, for that alone; the file.
    async fn disk_secret(
        &self,
        vm: &str,
        disk: &Name,
        key: &Plain,
        owner_uid: u32,
    ) -> Result<PathBuf, StorageFailure>;
    /// Writes the key of a mirrored volume's run where its VM's process finds it; the directory.
    async fn volume_keys(
        &self,
        vm: &str,
        disk: &Name,
        key: &Plain,
        owner_uid: u32,
    ) -> Result<PathBuf, StorageFailure>;
    /// Removes a volume; fine when it is not there.
    async fn delete_volume(&self, pool: &PoolSpec, name: &VolumeName)
    -> Result<(), StorageFailure>;
    /// The volumes that this host has in a local pool. Of a pool whose directory is not there, or is on a file system
    /// that other hosts may use, none.
    async fn volumes(&self, pool: &PoolSpec) -> Result<Vec<VolumeName>, StorageFailure>;
    /// Puts aside volumes of a local pool that no VM has any more, so that none gets them, and removes those that were
    /// put aside a day ago. The day is for people: it is how long a disk that was deleted by mistake can be had back.
    async fn put_aside(&self, pool: &PoolSpec, names: &[VolumeName]) -> Result<(), StorageFailure>;
    /// The clients of Ceph's by which a volume of such a pool is open.
    async fn clients(
        &self,
        pool: &PoolSpec,
        name: &VolumeName,
    ) -> Result<BTreeSet<String>, StorageFailure> {
        Err(not_in_ceph(&format!("{name} in {}", pool.place())))
    }
    /// Shuts a volume of such a pool to all that have it open, and to these clients; those in `shut` are refused already. Whoever
    /// opens it afterwards is alone.
    async fn shut_out(
        &self,
        pool: &PoolSpec,
        name: &VolumeName,
        noted: &BTreeSet<String>,
        shut: &BTreeSet<String>,
    ) -> Result<(), StorageFailure> {
        let open: Vec<_> = noted.union(shut).collect();
        Err(not_in_ceph(&format!("{name} in {}, open to {open:?},", pool.place())))
    }
    /// Has Ceph refuse one client from now on: what is opened afterwards it cannot write to any more.
    async fn shut_client(&self, pool: &PoolSpec, client: &str) -> Result<(), StorageFailure> {
        Err(not_in_ceph(&format!("{client} of {}", pool.place())))
    }
    /// The room in a pool; nothing when its directory is not there yet.
    async fn room(&self, pool: &PoolSpec) -> Result<Option<PoolRoom>, StorageFailure>;
    /// Lets go what belonged to pools other than these, which are all that there are.
    async fn settle(&self, _pools: &[PoolSpec]) {}
    /// A file of an image, fetched from another host if it is not here.
    async fn image_file(&self, file: &ImageFile) -> Result<PathBuf, StorageFailure>;
    /// The same for a file that nobody waits for: only while that leaves a tenth of the file system free.
    async fn copy_image(&self, file: &ImageFile) -> Result<(), StorageFailure>;
    /// Writes the seed.
    async fn seed(&self, wanted: &SeedWanted) -> Result<PathBuf, StorageFailure>;
    /// Removes what is left of a VM beside its volumes.
    async fn forget(&self, vm: &str) -> Result<(), StorageFailure>;
    /// Contents of images that are here (SHA-256).
    async fn images(&self) -> std::collections::BTreeSet<String>;
}
