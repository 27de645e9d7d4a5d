//! Volumes as files of a directory: the pools `local` and `shared`.

use super::{images::ImageStore, seed};
use crate::agent::storage::{SeedWanted, Storage, StorageFailure, VolumeReady, VolumeWanted};
use async_trait::async_trait;
use haven_model::{PoolDriverKind, PoolSpec, image::ImageFile};
use std::{
    collections::BTreeSet,
    os::unix::fs::{MetadataExt, PermissionsExt, chown},
    path::{Path, PathBuf},
    sync::Arc,
};
use tokio::process::Command;

/// Fetches the content of an image from another host into the store.
#[async_trait]
pub trait Fetch: Send + Sync {
    /// Fetches.
    async fn fetch(&self, file: &ImageFile, into: &ImageStore) -> Result<(), StorageFailure>;
}

/// Keeps everything in files.
pub struct FileStorage {
    /// Images of this host.
    pub images: ImageStore,
    /// `RUN/vms`: where seeds stand.
    pub run_dir: PathBuf,
    /// Other hosts.
    pub peers: Arc<dyn Fetch>,
}

/// A shared pool holds this file, so that a path that is not mounted is noticed.
const MARK: &str = ".haven-pool";

fn says(what: impl Into<String>) -> StorageFailure {
    StorageFailure { what: what.into() }
}

/// Makes sure that a pool's directory is what it should be.
fn ready(pool: &PoolSpec) -> Result<PathBuf, StorageFailure> {
    let path = PathBuf::from(&pool.path);
    if pool.driver == PoolDriverKind::Local {
        std::fs::create_dir_all(&path).map_err(|error| {
            says(format!("the pool's directory {} cannot be made ({error})", pool.path))
        })?;
        let _ = std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o711));
        return Ok(path);
    }
    let mark = path.join(MARK);
    if mark.exists() {
        return Ok(path);
    }
    let entries = std::fs::read_dir(&path).map_err(|error| {
        says(format!(
            "the shared pool's directory {} cannot be read ({error}); mount it on every host",
            pool.path
        ))
    })?;
    if entries.flatten().next().is_some() {
        return Err(says(format!(
            "{} has files but no {MARK}: it is not this pool, or not mounted; mount it, or put an empty file {MARK} there",
            pool.path
        )));
    }
    // An unmounted mount point is an empty directory, too. It is told by the file system that it is on.
    if device(&path) == device(Path::new("/")) {
        return Err(says(format!(
            "{} is empty and on this host's own root file system: mount what all hosts share there, or put an empty file {MARK} there if this is it",
            pool.path
        )));
    }
    std::fs::write(&mark, "")
        .map_err(|error| says(format!("{} is not writable ({error})", pool.path)))?;
    Ok(path)
}

fn device(path: &Path) -> Option<u64> {
    std::fs::metadata(path).ok().map(|meta| meta.dev())
}

/// Bytes free in the file system of a path.
fn free(path: &Path) -> u64 {
    nix::sys::statvfs::statvfs(path).map_or(u64::MAX, |s| s.blocks_available() * s.fragment_size())
}

async fn qemu_img(args: &[&str]) -> Result<(), StorageFailure> {
    let output = Command::new("qemu-img").args(args).output().await;
    let output = output.map_err(|error| {
        says(format!("qemu-img cannot be started ({error}); install the package qemu-utils"))
    })?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; ");
    let hint =
        if said.contains("No space left") { "; the pool is full, free some space" } else { "" };
    Err(says(format!("the volume cannot be made: {said}{hint}")))
}

fn path_text(path: &Path) -> Result<&str, StorageFailure> {
    path.to_str().ok_or_else(|| says(format!("{} is not a path that QEMU takes", path.display())))
}

/// The whole file is on the disk before it has its name, and the name before anybody relies on it.
fn keep(directory: &Path, part: &Path, path: &Path) -> Result<(), StorageFailure> {
    let sync = |path: &Path| std::fs::File::open(path).and_then(|file| file.sync_all());
    sync(part)
        .and_then(|()| std::fs::rename(part, path))
        .and_then(|()| sync(directory))
        .map_err(|error| says(format!("{} cannot be written ({error})", path.display())))
}

impl FileStorage {
    /// Makes a volume's file under a name of its own.
    async fn make(
        &self,
        pool: &PoolSpec,
        wanted: &VolumeWanted,
        directory: &Path,
        part: &Path,
    ) -> Result<(), StorageFailure> {
        let (size, part) = (wanted.size_bytes.to_string(), path_text(part)?);
        let Some((file, format)) = &wanted.image else {
            return qemu_img(&["create", "-q", "-f", "qcow2", part, &size]).await;
        };
        let image = self.image_file(file).await?;
        let image = path_text(&image)?;
        if pool.driver == PoolDriverKind::Local {
            let base = ["-b", image, "-F", format];
            return qemu_img(
                &[&["create", "-q", "-f", "qcow2"][..], &base, &[part, &size]].concat(),
            )
            .await;
        }
        // A shared volume must not lean on a file that only this host has.
        let left = free(directory);
        if file.size.0 > left {
            return Err(says(format!(
                "the pool {} has {} left and the image needs {}; free some space",
                pool.path,
                haven_model::Bytes::mib(left >> 20),
                file.size
            )));
        }
        qemu_img(&["convert", "-f", format, "-O", "qcow2", image, part]).await?;
        qemu_img(&["resize", "-q", part, &size]).await
    }
}

#[async_trait]
impl Storage for FileStorage {
    async fn volume(
        &self,
        pool: &PoolSpec,
        wanted: &VolumeWanted,
    ) -> Result<VolumeReady, StorageFailure> {
        let directory = ready(pool)?;
        let path = directory.join(format!("{}.qcow2", wanted.name));
        let ready = VolumeReady { path: path.clone(), format: "qcow2".into() };
        if !path.exists() {
            let part = directory.join(format!("{}.part", wanted.name));
            let made = self.make(pool, wanted, &directory, &part).await;
            if let Err(error) = made.and_then(|()| keep(&directory, &part, &path)) {
                let _ = std::fs::remove_file(&part);
                return Err(error);
            }
        }
        chown(&path, Some(wanted.owner_uid), Some(wanted.owner_uid)).map_err(|error| {
            says(format!("{} cannot be given to its VM ({error})", path.display()))
        })?;
        Ok(ready)
    }

    async fn delete_volume(&self, pool: &PoolSpec, name: &str) -> Result<(), StorageFailure> {
        let path = ready(pool)?.join(format!("{name}.qcow2"));
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(says(format!("{} cannot be removed ({error})", path.display())))
            }
            _ => Ok(()),
        }
    }

    async fn image_file(&self, file: &ImageFile) -> Result<PathBuf, StorageFailure> {
        let path = self.images.path(&file.sha256);
        if !path.exists() {
            self.peers.fetch(file, &self.images).await?;
        }
        Ok(path)
    }

    async fn seed(&self, wanted: &SeedWanted) -> Result<PathBuf, StorageFailure> {
        let directory = self.run_dir.join(&wanted.vm);
        let path = directory.join("seed.img");
        let image = seed::image(wanted).map_err(|error| {
            says(format!(
                "the seed of {} cannot be made ({error}); its user data may be too long (1 MiB)",
                wanted.vm
            ))
        })?;
        std::fs::create_dir_all(&directory)
            .and_then(|()| std::fs::write(&path, image))
            .and_then(|()| chown(&path, Some(wanted.owner_uid), Some(wanted.owner_uid)))
            .map_err(|error| says(format!("{} cannot be written ({error})", path.display())))?;
        Ok(path)
    }

    async fn forget(&self, vm: &str) -> Result<(), StorageFailure> {
        let directory = self.run_dir.join(vm);
        match std::fs::remove_dir_all(&directory) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(says(format!("{} cannot be removed ({error})", directory.display())))
            }
            _ => Ok(()),
        }
    }

    async fn images(&self) -> BTreeSet<String> {
        self.images.list()
    }
}
