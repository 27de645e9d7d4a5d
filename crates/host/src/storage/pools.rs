//! All pools of the cluster: those that are directories of this host ([`FileStorage`]), and those of Ceph clusters ([`RbdPools`]).

use super::{files::FileStorage, rbd::volumes::RbdPools};
use crate::{
    agent::storage::{
        SeedWanted, SnapshotStep, Storage, StorageFailure, VolumeName, VolumeReady, VolumeWanted,
    },
    vm::snapshots::Keeps,
};
use async_trait::async_trait;
use haven_model::{Name, PoolDriverKind, PoolSpec, image::ImageFile, pool::PoolRoom};
use haven_store::seal::Plain;
use std::{collections::BTreeSet, path::PathBuf};

/// Asks the one that a pool is of.
pub struct Pools {
    /// Directories, and what is of no pool.
    pub files: FileStorage,
    /// Those of Ceph clusters.
    pub rbd: RbdPools,
}

fn in_ceph(pool: &PoolSpec) -> bool {
    pool.driver == PoolDriverKind::Rbd
}

#[async_trait]
impl Storage for Pools {
    async fn volume(
        &self,
        pool: &PoolSpec,
        wanted: &VolumeWanted,
    ) -> Result<VolumeReady, StorageFailure> {
        if !in_ceph(pool) {
            return self.files.volume(pool, wanted).await;
        }
        // It is needed only where the volume is not there.
        let file = match &wanted.image {
            Some((file, format)) if self.rbd.has(pool, &wanted.name).await?.is_none() => {
                Some((self.files.image_file(file).await?, format.clone()))
            }
            _ => None,
        };
        self.rbd.volume(pool, wanted, file, &self.files.run_dir).await
    }

    async fn has_volume(
        &self,
        pool: &PoolSpec,
        name: &VolumeName,
        owner_uid: u32,
    ) -> Result<Option<PathBuf>, StorageFailure> {
        match in_ceph(pool) {
            true => self.rbd.has(pool, name).await,
            false => self.files.has_volume(pool, name, owner_uid).await,
        }
    }

    async fn grow(
        &self,
        pool: &PoolSpec,
        name: &VolumeName,
        size_bytes: u64,
    ) -> Result<(), StorageFailure> {
        match in_ceph(pool) {
            true => self.rbd.grow(pool, name, size_bytes).await,
            false => self.files.grow(pool, name, size_bytes).await,
        }
    }

    async fn keeps(
        &self,
        pool: &PoolSpec,
        name: &VolumeName,
    ) -> Result<Option<Keeps>, StorageFailure> {
        match in_ceph(pool) {
            true => self.rbd.keeps(pool, name).await,
            false => self.files.keeps(pool, name).await,
        }
    }

    async fn snapshot(
        &self,
        pool: &PoolSpec,
        name: &VolumeName,
        step: SnapshotStep,
        snapshot: &str,
    ) -> Result<(), StorageFailure> {
        match in_ceph(pool) {
            true => self.rbd.snapshot(pool, name, step, snapshot).await,
            false => self.files.snapshot(pool, name, step, snapshot).await,
        }
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
        match in_ceph(pool) {
            true => self.rbd.delete(pool, name).await,
            false => self.files.delete_volume(pool, name).await,
        }
    }

    async fn volumes(&self, pool: &PoolSpec) -> Result<Vec<VolumeName>, StorageFailure> {
        match in_ceph(pool) {
            // They are no host's.
            true => Ok(Vec::new()),
            false => self.files.volumes(pool).await,
        }
    }

    async fn put_aside(&self, pool: &PoolSpec, names: &[VolumeName]) -> Result<(), StorageFailure> {
        match in_ceph(pool) {
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
        self.rbd.shut_out(pool, name, noted, shut).await
    }

    async fn shut_client(&self, pool: &PoolSpec, client: &str) -> Result<(), StorageFailure> {
        self.rbd.shut_client(pool, client).await
    }

    async fn room(&self, pool: &PoolSpec) -> Result<Option<PoolRoom>, StorageFailure> {
        match in_ceph(pool) {
            true => self.rbd.room(pool).await.map(Some),
            false => self.files.room(pool).await,
        }
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
