//! All pools of the cluster: those that are directories of this host ([`FileStorage`]), those of Ceph clusters ([`RbdPools`]) those of
//! NFS servers ([`NfsPools`]), and those of Gluster volumes, which are directories as well once they are mounted ([`GlusterMounts`]).

use super::{
    files::FileStorage, gluster::GlusterMounts, nfs::volumes::NfsPools, rbd::volumes::RbdPools,
    says,
};
use crate::{
    agent::storage::{
        FilerLaunch, SeedWanted, SnapshotStep, Storage, StorageFailure, VolumeName, VolumeReady,
        VolumeWanted,
    },
    vm::snapshots::Keeps,
};
use async_trait::async_trait;
use haven_model::{Name, PoolDriverKind, PoolSpec, image::ImageFile, pool::PoolRoom};
use haven_store::seal::Plain;
use std::{borrow::Cow, collections::BTreeSet, path::PathBuf};

/// Asks the one that a pool is of.
pub struct Pools {
    /// Directories, and what is of no pool.
    pub files: FileStorage,
    /// Those of Ceph clusters.
    pub rbd: RbdPools,
    /// Those of NFS servers.
    pub nfs: NfsPools,
    /// Where Gluster volumes are mounted.
    pub gluster: GlusterMounts,
}

/// Who keeps the volumes of a pool.
enum Keeper {
    Ceph,
    Nfs,
    Files,
}

fn keeper(pool: &PoolSpec) -> Keeper {
    match pool.driver {
        PoolDriverKind::Rbd => Keeper::Ceph,
        PoolDriverKind::Nfs => Keeper::Nfs,
        PoolDriverKind::Local
        | PoolDriverKind::Shared
        | PoolDriverKind::Mirrored
        | PoolDriverKind::Gluster => Keeper::Files,
    }
}

impl Pools {
    /// A pool that is a directory of this host, with that directory.
    async fn mounted<'a>(&self, pool: &'a PoolSpec) -> Result<Cow<'a, PoolSpec>, StorageFailure> {
        match pool.driver {
            PoolDriverKind::Gluster => self.gluster.ready(pool).await.map(Cow::Owned),
            _ => Ok(Cow::Borrowed(pool)),
        }
    }

    /// What a volume is to be made from that is not there.
    async fn image(
        &self,
        pool: &PoolSpec,
        wanted: &VolumeWanted,
    ) -> Result<Option<(PathBuf, String)>, StorageFailure> {
        let Some((file, format)) = &wanted.image else { return Ok(None) };
        if self.has_volume(pool, &wanted.name, wanted.owner_uid).await?.is_some() {
            return Ok(None);
        }
        Ok(Some((self.files.image_file(file).await?, format.clone())))
    }
}

#[async_trait]
impl Storage for Pools {
    async fn volume(
        &self,
        pool: &PoolSpec,
        wanted: &VolumeWanted,
    ) -> Result<VolumeReady, StorageFailure> {
        match keeper(pool) {
            Keeper::Ceph => {
                let image = self.image(pool, wanted).await?;
                self.rbd.volume(pool, wanted, image, &self.files.run_dir).await
            }
            Keeper::Nfs => self.nfs.volume(pool, wanted, self.image(pool, wanted).await?).await,
            Keeper::Files => {
                let mut ready = self.files.volume(&*self.mounted(pool).await?, wanted).await?;
                let is = pool.driver == PoolDriverKind::Gluster;
                ready.filer = is.then(|| Box::new(FilerLaunch::Mounted));
                Ok(ready)
            }
        }
    }

    async fn has_volume(
        &self,
        pool: &PoolSpec,
        name: &VolumeName,
        owner_uid: u32,
    ) -> Result<Option<PathBuf>, StorageFailure> {
        match keeper(pool) {
            Keeper::Ceph => self.rbd.has(pool, name).await,
            Keeper::Nfs => self.nfs.has(pool, name).await,
            Keeper::Files => {
                self.files.has_volume(&*self.mounted(pool).await?, name, owner_uid).await
            }
        }
    }

    async fn grow(
        &self,
        pool: &PoolSpec,
        name: &VolumeName,
        size_bytes: u64,
        key: Option<&Plain>,
    ) -> Result<(), StorageFailure> {
        match keeper(pool) {
            Keeper::Ceph => self.rbd.grow(pool, name, size_bytes).await,
            Keeper::Nfs => self.nfs.grow(pool, name, size_bytes).await,
            Keeper::Files => {
                self.files.grow(&*self.mounted(pool).await?, name, size_bytes, key).await
            }
        }
    }

    async fn keeps(
        &self,
        pool: &PoolSpec,
        name: &VolumeName,
    ) -> Result<Option<Keeps>, StorageFailure> {
        match keeper(pool) {
            Keeper::Ceph => self.rbd.keeps(pool, name).await,
            Keeper::Nfs => Ok(None),
            Keeper::Files => self.files.keeps(&*self.mounted(pool).await?, name).await,
        }
    }

    async fn snapshot(
        &self,
        pool: &PoolSpec,
        name: &VolumeName,
        step: SnapshotStep,
        snapshot: &str,
        key: Option<&Plain>,
    ) -> Result<(), StorageFailure> {
        match keeper(pool) {
            Keeper::Files => {
                let pool = self.mounted(pool).await?;
                self.files.snapshot(&pool, name, step, snapshot, key).await
            }
            Keeper::Ceph => self.rbd.snapshot(pool, name, step, snapshot).await,
            Keeper::Nfs => Err(says(format!(
                "disks in pools of NFS servers keep no snapshots of Haven's yet, and {name} is one; remove `{snapshot}`"
            ))),
        }
    }

    async fn disk_secret(
        &self,
        vm: &str,
        disk: &Name,
        key: &Plain,
        owner_uid: u32,
    ) -> Result<PathBuf, StorageFailure> {
        self.files.disk_secret(vm, disk, key, owner_uid).await
    }

    async fn volume_keys(
        &self,
        vm: &str,
        disk: &Name,
        key: &Plain,
        owner_uid: u32,
    ) -> Result<PathBuf, StorageFailure> {
        self.files.volume_keys(vm, disk, key, owner_uid).await
    }

    async fn delete_volume(
        &self,
        pool: &PoolSpec,
        name: &VolumeName,
    ) -> Result<(), StorageFailure> {
        match keeper(pool) {
            Keeper::Ceph => self.rbd.delete(pool, name).await,
            Keeper::Nfs => self.nfs.delete(pool, name).await,
            Keeper::Files => self.files.delete_volume(&*self.mounted(pool).await?, name).await,
        }
    }

    async fn volumes(&self, pool: &PoolSpec) -> Result<Vec<VolumeName>, StorageFailure> {
        // They are no host's.
        match pool.is_shared() {
            true => Ok(Vec::new()),
            false => self.files.volumes(pool).await,
        }
    }

    async fn put_aside(&self, pool: &PoolSpec, names: &[VolumeName]) -> Result<(), StorageFailure> {
        match pool.is_shared() {
            true => Ok(()),
            false => self.files.put_aside(pool, names).await,
        }
    }

    async fn clients(
        &self,
        pool: &PoolSpec,
        name: &VolumeName,
    ) -> Result<BTreeSet<String>, StorageFailure> {
        self.rbd.clients(pool, name).await
    }

    async fn shut_out(
        &self,
        pool: &PoolSpec,
        name: &VolumeName,
        noted: &BTreeSet<String>,
        shut: &BTreeSet<String>,
    ) -> Result<(), StorageFailure> {
        match keeper(pool) {
            Keeper::Nfs => self.nfs.shut_out(pool, name).await,
            Keeper::Ceph | Keeper::Files => self.rbd.shut_out(pool, name, noted, shut).await,
        }
    }

    async fn shut_client(&self, pool: &PoolSpec, client: &str) -> Result<(), StorageFailure> {
        self.rbd.shut_client(pool, client).await
    }

    async fn room(&self, pool: &PoolSpec) -> Result<Option<PoolRoom>, StorageFailure> {
        match keeper(pool) {
            Keeper::Ceph => self.rbd.room(pool).await.map(Some),
            Keeper::Nfs => self.nfs.room(pool).await.map(Some),
            Keeper::Files => self.files.room(&*self.mounted(pool).await?).await,
        }
    }

    async fn settle(&self, pools: &[PoolSpec]) {
        self.gluster.settle(pools).await;
    }

    async fn image_file(&self, file: &ImageFile) -> Result<PathBuf, StorageFailure> {
        self.files.image_file(file).await
    }

    async fn copy_image(&self, file: &ImageFile) -> Result<(), StorageFailure> {
        self.files.copy_image(file).await
    }

    async fn seed(&self, wanted: &SeedWanted) -> Result<PathBuf, StorageFailure> {
        self.files.seed(wanted).await
    }

    async fn forget(&self, vm: &str) -> Result<(), StorageFailure> {
        self.files.forget(vm).await
    }

    async fn images(&self) -> BTreeSet<String> {
        self.files.images().await
    }
}
