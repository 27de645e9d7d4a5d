//! Volumes as files of a directory: the pools `local` and `shared`.

use super::{
    aside,
    backup::{restore::Restore, target::Targets},
    busy::Busy,
    copies,
    images::ImageStore,
    in_words, luks,
    masters::{self, Masters},
    mirrored::{
        daemon,
        kept::{self, KeptOf},
        runs,
    },
    pool,
    qemu_img::{self, Failure},
    says, seed, snapshots,
};
use crate::{
    agent::storage::{
        SeedWanted, SnapshotStep, Storage, StorageFailure, VolumeName, VolumeReady, VolumeWanted,
    },
    vm::{run_dir, snapshots::Keeps},
};
use async_trait::async_trait;
use haven_model::{
    Name, PoolDriverKind, PoolSpec, backup::BackupRef, image::ImageFile, pool::PoolRoom,
    volume::LUKS_HEAD_BYTES,
};
use haven_store::seal::Plain;
use std::{
    collections::BTreeSet,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::SystemTime,
};

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
    /// Where backups are.
    pub targets: Targets,
    /// Steps that wait for a disk.
    busy: Busy,
    /// Images as its pools keep them.
    masters: Masters,
    /// The images that were here when they could last be listed.
    listed: Mutex<BTreeSet<String>>,
}

impl FileStorage {
    /// Puts it together; nothing is asked of any disk.
    #[must_use]
    pub fn new(
        images: ImageStore,
        run_dir: PathBuf,
        peers: Arc<dyn Fetch>,
        targets: Targets,
    ) -> Self {
        let (busy, masters, listed) = (Busy::default(), Masters::default(), Mutex::default());
        Self { images, run_dir, peers, targets, busy, masters, listed }
    }

    /// Makes the content of a volume that is not there, under a name that says that it is not finished.
    async fn make(
        &self,
        pool: &PoolSpec,
        wanted: &VolumeWanted,
        part: &Path,
    ) -> Result<(), Failure> {
        let path = part;
        let made = pool::format(pool);
        let key = wanted.key.as_ref();
        if let Some(of) = &wanted.backup {
            return self.restore(of, wanted, path, made).await;
        }
        if let Some(of) = &wanted.copy {
            let source = self::path(pool, &of.name);
            if pool.driver == PoolDriverKind::Mirrored {
                let (volume, copy) = (of.name.clone(), of.tag.clone());
                kept::copy_to(&KeptOf { replica: source, volume, copy }, path).await?;
                return self.enlarge(pool, wanted, path).await;
            }
            copies::make(&self.busy, of, &source, path, key, &wanted.progress).await?;
            return self.enlarge(pool, wanted, path).await;
        }
        let Some((file, format)) = &wanted.image else {
            return self.empty(path, made, wanted, &[]).await;
        };
        let image = self.image_file(file).await?;
        let of = masters::Image { sha256: &file.sha256, path: &image, format };
        let holds = match pool.driver {
            PoolDriverKind::Local => None,
            _ => self.masters.size(&self.busy, of, made, path).await?,
        };
        let holds = match holds {
            Some(holds) => holds,
            None => qemu_img::size_of(&image, format).await?,
        };
        if holds > wanted.size_bytes {
            return Err(too_small(wanted, holds).into());
        }
        if pool.driver == PoolDriverKind::Local {
            let image = qemu_img::text(&image)?;
            return self.empty(path, made, wanted, &["-b", image, "-F", format]).await;
        }
        // It must not stand on a file that only this host has.
        match key {
            None => self.masters.disk(&self.busy, of, made, path, wanted.size_bytes).await?,
            Some(_) if made == "qcow2" => {
                let master = self.masters.beneath(&self.busy, of, made, path).await?;
                self.empty(path, made, wanted, &["-b", &master, "-F", made]).await?;
            }
            Some(key) => {
                self.empty(path, made, wanted, &[]).await?;
                // Also its zeros are written: what nobody wrote reads as anything.
                let (secret, to) = (luks::secret(), luks::opened(path, made)?);
                let from = qemu_img::text(&image)?;
                let args = [
                    "convert",
                    "-n",
                    "--object",
                    &secret,
                    "-f",
                    format,
                    from,
                    "--target-image-opts",
                    &to,
                ];
                qemu_img::make_with(&args, Some(key)).await?;
            }
        }
        self.enlarge(pool, wanted, path).await
    }

    /// Makes an empty disk; `on`: what it stands on, as `qemu-img create` is told.
    async fn empty(
        &self,
        path: &Path,
        format: &str,
        wanted: &VolumeWanted,
        on: &[&str],
    ) -> Result<(), Failure> {
        let (text, size) = (qemu_img::text(path)?, wanted.size_bytes.to_string());
        let Some(key) = &wanted.key else {
            let args = [&["create", "-q", "-f", format], on, &[text, &size]].concat();
            return qemu_img::make(&args).await;
        };
        if format == "qcow2" {
            let (secret, options) = (luks::secret(), luks::created());
            let how = ["create", "-q", "-f", format, "--object", &secret, "-o", &options];
            return qemu_img::make_with(&[&how, on, &[text, &size]].concat(), Some(key)).await;
        }
        let size = wanted.size_bytes + LUKS_HEAD_BYTES;
        qemu_img::make(&["create", "-q", "-f", format, text, &size.to_string()]).await?;
        let (head, asked) = (luks::head(key)?, path.to_owned());
        let put = self.busy.run(path, move || Ok(luks::put_head(&asked, &head))).await?;
        put.map_err(|error| match error.kind() {
            io::ErrorKind::StorageFull => Failure::Full,
            _ => unwritable(path)(error).into(),
        })
    }

    async fn enlarge(
        &self,
        pool: &PoolSpec,
        wanted: &VolumeWanted,
        path: &Path,
    ) -> Result<(), Failure> {
        self.enlarge_to(pool, &wanted.name, path, wanted.size_bytes, wanted.key.as_ref()).await
    }

    /// Makes a disk that nobody has open at least so large. One that is larger stays so: the rest of it may hold what somebody
    /// wrote.
    async fn enlarge_to(
        &self,
        pool: &PoolSpec,
        name: &VolumeName,
        path: &Path,
        size_bytes: u64,
        key: Option<&Plain>,
    ) -> Result<(), Failure> {
        let (format, asked) = (pool::format(pool), path.to_owned());
        let head = key.filter(|_| format == "raw").map(luks::head).transpose()?;
        let stored = size_bytes + if head.is_some() { LUKS_HEAD_BYTES } else { 0 };
        // A replica may be open at a storage daemon, whose locks this does not mind: it takes it up with its next run.
        let look = move || {
            if let Some(head) = &head {
                luks::has_head(&asked, head)?;
            }
            match pool::size(&asked, format).map_err(unwritable(&asked))? {
                size if size >= stored => Ok(true),
                _ if format == "raw" => {
                    pool::lengthen(&asked, stored).map_err(unwritable(&asked)).map(|()| true)
                }
                _ => Ok(false),
            }
        };
        if self.busy.run(&self::key(pool, name), look).await? {
            return Ok(());
        }
        let (text, size) = (qemu_img::text(path)?, size_bytes.to_string());
        let Some(key) = key else {
            return qemu_img::make(&["resize", "-q", "-f", format, text, &size]).await;
        };
        let (secret, of) = (luks::secret(), luks::opened(path, format)?);
        let args = ["resize", "-q", "--object", &secret, "--image-opts", &of, &size];
        qemu_img::make_with(&args, Some(key)).await.map_err(|failure| luks::told(failure, path))
    }

    /// Makes it from a backup.
    async fn restore(
        &self,
        of: &BackupRef,
        wanted: &VolumeWanted,
        part: &Path,
        format: &str,
    ) -> Result<(), Failure> {
        let repository = self.targets.repository(&of.target)?;
        self.empty(part, format, wanted, &[]).await?;
        let from = Restore { repository, of: of.clone(), progress: wanted.progress.clone() };
        Ok(from.fill(part, format, wanted.size_bytes, wanted.key.as_ref()).await?)
    }

    /// Makes a volume whole: its content, its owner, its name.
    async fn finish(
        &self,
        pool: &PoolSpec,
        wanted: &VolumeWanted,
        path: &Path,
        part: &Path,
    ) -> Result<(), Failure> {
        self.make(pool, wanted, part).await?;
        let (to, part, owner) = (path.to_owned(), part.to_owned(), wanted.owner_uid);
        let put = self
            .busy
            .run(&key(pool, &wanted.name), move || Ok(pool::put(&part, &to, owner)))
            .await?;
        put.map_err(|error| match error.kind() {
            io::ErrorKind::StorageFull => Failure::Full,
            _ => unwritable(path)(error).into(),
        })
    }
}

/// What a file is called among the steps that wait for a disk; known without asking the disk.
fn key(pool: &PoolSpec, name: &VolumeName) -> PathBuf {
    Path::new(&pool.path).join(name.to_string())
}

/// The file of a volume.
#[must_use]
pub fn path(pool: &PoolSpec, name: &VolumeName) -> PathBuf {
    file(pool, Path::new(&pool.path), name)
}

fn file(pool: &PoolSpec, directory: &Path, name: &VolumeName) -> PathBuf {
    directory.join(format!("{name}.{}", pool::format(pool)))
}

/// The guest would find its file systems cut off.
fn too_small(wanted: &VolumeWanted, holds: u64) -> StorageFailure {
    let VolumeName { vm, disk, .. } = &wanted.name;
    says(format!(
        "the disk `{disk}` of {vm} is {} and its image holds {}; make the disk at least that large",
        in_words(wanted.size_bytes),
        in_words(holds)
    ))
}

fn unwritable(path: &Path) -> impl Fn(std::io::Error) -> StorageFailure {
    let path = path.display().to_string();
    move |error| {
        says(format!(
            "{path} cannot be written or given to its VM ({error}); check the pool's file system"
        ))
    }
}

/// Where a volume stands; with it where it must be made first, if it is not there and there is room for it.
fn find(
    pool: &PoolSpec,
    wanted: &VolumeWanted,
) -> Result<(PathBuf, Option<PathBuf>), StorageFailure> {
    let directory = pool::ready(pool)?;
    let path = file(pool, &directory, &wanted.name);
    if path.try_exists().map_err(unwritable(&path))? {
        pool::own(&path, wanted.owner_uid).map_err(unwritable(&path))?;
        return Ok((path, None));
    }
    let VolumeName { vm, disk, .. } = &wanted.name;
    let nameless = directory.join(format!("{vm}.{disk}.qcow2"));
    if nameless.try_exists().map_err(unwritable(&nameless))? {
        return Err(says(format!(
            "{} was made by an earlier build of Haven and does not tell whose it is; if it is this VM's, rename it to {}, else remove it",
            nameless.display(),
            path.display()
        )));
    }
    pool::has_room(pool, &directory, &wanted.name, wanted.size_bytes)?;
    let part = directory.join(format!("{}.part", wanted.name));
    // Left by a daemon that was killed; QEMU would write through a link.
    run_dir::remove(&part).map_err(unwritable(&part))?;
    Ok((path, Some(part)))
}

#[async_trait]
impl Storage for FileStorage {
    async fn volume(
        &self,
        pool: &PoolSpec,
        wanted: &VolumeWanted,
    ) -> Result<VolumeReady, StorageFailure> {
        let (asked, of) = (pool.clone(), wanted.clone());
        let key = key(pool, &wanted.name);
        let (path, part) = self.busy.run(&key, move || find(&asked, &of)).await?;
        let ready = VolumeReady {
            path: path.clone(),
            format: pool::format(pool).into(),
            rbd: None,
            filer: None,
        };
        let Some(part) = part else {
            self.grow(pool, &wanted.name, wanted.size_bytes, wanted.key.as_ref()).await?;
            return Ok(ready);
        };
        let Err(failure) = self.finish(pool, wanted, &path, &part).await else { return Ok(ready) };
        // What a failed step leaves goes with it; the failure itself is what is told.
        let left = move || run_dir::remove(&part).map_err(unwritable(&part));
        if let Err(failure) = self.busy.run(&key, left).await {
            tracing::warn!(%failure, "an unfinished volume cannot be removed");
        }
        Err(match failure {
            Failure::Other(failure) => failure,
            Failure::Full => {
                let (pool, of) = (pool.clone(), wanted.clone());
                self.busy.run(&key, move || Ok(pool::full(&pool, &of.name, of.size_bytes))).await?
            }
        })
    }

    async fn has_volume(
        &self,
        pool: &PoolSpec,
        name: &VolumeName,
        owner_uid: u32,
    ) -> Result<Option<PathBuf>, StorageFailure> {
        let (key, pool, of) = (key(pool, name), pool.clone(), name.clone());
        let look = move || {
            let path = file(&pool, &pool::ready(&pool)?, &of);
            if !path.try_exists().map_err(unwritable(&path))? {
                return Ok(None);
            }
            pool::own(&path, owner_uid).map_err(unwritable(&path))?;
            Ok(Some(path))
        };
        self.busy.run(&key, look).await
    }

    async fn grow(
        &self,
        pool: &PoolSpec,
        name: &VolumeName,
        size_bytes: u64,
        key: Option<&Plain>,
    ) -> Result<(), StorageFailure> {
        match self.enlarge_to(pool, name, &path(pool, name), size_bytes, key).await {
            Ok(()) => Ok(()),
            Err(Failure::Full) => Err(pool::full(pool, name, size_bytes)),
            Err(Failure::Other(failure)) => Err(failure),
        }
    }

    async fn keeps(
        &self,
        pool: &PoolSpec,
        name: &VolumeName,
    ) -> Result<Option<Keeps>, StorageFailure> {
        let (asked, of) = (pool.clone(), name.clone());
        let look = move || {
            let path = file(&asked, &pool::ready(&asked)?, &of);
            path.try_exists().map_err(unwritable(&path))
        };
        match self.busy.run(&key(pool, name), look).await? {
            true => snapshots::of(&path(pool, name)).await.map(Some),
            false => Ok(None),
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
        snapshots::step(&path(pool, name), step, snapshot, key).await.map_err(|failure| {
            match failure {
                Failure::Full => says(format!(
                    "the pool {} is full; free some space or enlarge it, and try again",
                    pool.path
                )),
                Failure::Other(failure) => failure,
            }
        })
    }

    async fn volume_keys(
        &self,
        vm: &str,
        disk: &Name,
        key: &Plain,
        owner_uid: u32,
    ) -> Result<PathBuf, StorageFailure> {
        let directory = self.run_dir.join(vm);
        let keys = directory.join(format!("{disk}.keys"));
        run_dir::prepare(&self.run_dir, vm)
            .and_then(|_| daemon::write_key(&directory, &format!("{disk}.keys"), key, owner_uid))
            .map_err(|error| says(format!("{} cannot be written ({error})", keys.display())))?;
        Ok(keys)
    }

    async fn disk_secret(
        &self,
        vm: &str,
        disk: &Name,
        key: &Plain,
        owner_uid: u32,
    ) -> Result<PathBuf, StorageFailure> {
        let path = self.run_dir.join(vm).join(format!("{disk}.luks"));
        run_dir::prepare(&self.run_dir, vm)
            .and_then(|_| run_dir::write(&path, key.expose().as_bytes(), Some(owner_uid)))
            .map_err(|error| says(format!("{} cannot be written ({error})", path.display())))?;
        Ok(path)
    }

    async fn delete_volume(
        &self,
        pool: &PoolSpec,
        name: &VolumeName,
    ) -> Result<(), StorageFailure> {
        let (key, pool, name) = (key(pool, name), pool.clone(), name.clone());
        let remove = move || {
            let directory = pool::ready(&pool)?;
            let path = file(&pool, &directory, &name);
            let part = directory.join(format!("{name}.part"));
            for path in [runs::beside(&path), path, part] {
                run_dir::remove(&path).map_err(|error| {
                    says(format!("{} cannot be removed ({error})", path.display()))
                })?;
            }
            // Before anybody is told: a power cut must not bring back what nothing names any more.
            pool::sync(&directory)
                .map_err(|error| says(format!("{} cannot be written ({error})", pool.path)))
        };
        self.busy.run(&key, remove).await
    }

    async fn volumes(&self, pool: &PoolSpec) -> Result<Vec<VolumeName>, StorageFailure> {
        let (key, pool) = (PathBuf::from(&pool.path), pool.clone());
        self.busy.run(&key, move || aside::volumes(&pool)).await
    }

    async fn put_aside(&self, pool: &PoolSpec, names: &[VolumeName]) -> Result<(), StorageFailure> {
        let (key, pool, names) = (PathBuf::from(&pool.path), pool.clone(), names.to_vec());
        self.busy.run(&key, move || aside::put(&pool, &names, SystemTime::now())).await
    }

    async fn room(&self, pool: &PoolSpec) -> Result<Option<PoolRoom>, StorageFailure> {
        let (key, pool) = (PathBuf::from(&pool.path), pool.clone());
        self.busy.run(&key, move || pool::room(&pool)).await
    }

    async fn image_file(&self, file: &ImageFile) -> Result<PathBuf, StorageFailure> {
        let path = self.images.path(&file.sha256);
        let asked = path.clone();
        let here = move || asked.try_exists().map_err(unwritable(&asked));
        if !self.busy.run(&path, here).await? {
            self.peers.fetch(file, &self.images).await?;
        }
        Ok(path)
    }

    async fn copy_image(&self, file: &ImageFile) -> Result<(), StorageFailure> {
        let path = self.images.path(&file.sha256);
        let (asked, images, size) = (path.clone(), self.images.clone(), file.size.0);
        let needed = move || match asked.try_exists().map_err(unwritable(&asked))? {
            true => Ok(false),
            false => images.leaves_room(size).map(|()| true),
        };
        if self.busy.run(&path, needed).await? {
            self.peers.fetch(file, &self.images.leaving_room()).await?;
        }
        Ok(())
    }

    async fn seed(&self, wanted: &SeedWanted) -> Result<PathBuf, StorageFailure> {
        let image = seed::image(wanted).map_err(|error| {
            says(format!(
                "the seed of {} cannot be made ({error}); its user data may be too long (1 MiB)",
                wanted.vm
            ))
        })?;
        let path = self.run_dir.join(&wanted.vm).join(run_dir::SEED);
        // It may hold secrets: only root writes it, and only this VM's user reads it.
        run_dir::prepare(&self.run_dir, &wanted.vm)
            .and_then(|_| run_dir::write(&path, &image, Some(wanted.owner_uid)))
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
        let (images, key) = (self.images.clone(), self.images.path(""));
        let listed = self.busy.run(&key, move || Ok(images.list())).await;
        let mut last = self.listed.lock().unwrap_or_else(PoisonError::into_inner);
        match listed {
            Ok(listed) => last.clone_from(&listed),
            Err(failure) => tracing::warn!(%failure, "the images of this host cannot be listed"),
        }
        last.clone()
    }
}
