//! Volumes of the cluster's pools as images of Ceph's.

use super::{
    clients::Client,
    images::Images,
    node::{self, RbdLaunch},
    pool::RbdPool,
};
use crate::{
    agent::storage::{SnapshotStep, StorageFailure, VolumeName, VolumeReady, VolumeWanted},
    storage::{says, was_there},
    vm::{run_dir, snapshots::Keeps},
};
use haven_model::{Name, ObjectRef, PoolSpec, RbdSpec, Snapshot, object::Kind, pool::PoolRoom};
use haven_store::seal::ClusterKey;
use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    sync::Arc,
};
use tokio::sync::watch;

/// What an image that is being filled is called, behind the name that it will have; each attempt has one of its own.
const PART: &str = ".part-";
/// The longest name of an image, with what stands behind it while it is filled, bytes: what Ceph's own limit is.
const LONGEST: usize = 96 - PART.len() - 8;

/// The pools of Ceph clusters, as the live copy has them.
#[derive(Clone)]
pub struct RbdPools {
    live: watch::Receiver<Arc<Snapshot>>,
    secrets: Option<ClusterKey>,
    /// Where the programs find keys and monitors.
    directory: PathBuf,
}

/// The image of a volume. The uid alone tells it from all others; the names are for people.
fn image(name: &VolumeName) -> String {
    let whole = name.to_string();
    if whole.len() <= LONGEST { whole } else { format!("{}.{}", name.vm_uid, name.disk) }
}

/// Whether an image of this name is one of a VM, or was to become one.
fn is_ours(name: &str) -> bool {
    let whole = name.split_once(PART).map_or(name, |(whole, _)| whole);
    let short = || whole.split_once('.').is_some_and(|(uid, _)| uuid::Uuid::try_parse(uid).is_ok());
    VolumeName::parse(whole).is_some_and(|of| uuid::Uuid::try_parse(&of.vm_uid).is_ok()) || short()
}

impl RbdPools {
    /// Puts it together; nothing is asked of anybody.
    #[must_use]
    pub fn new(
        live: watch::Receiver<Arc<Snapshot>>,
        secrets: Option<ClusterKey>,
        directory: PathBuf,
    ) -> Self {
        Self { live, secrets, directory }
    }

    /// A pool with its key in the clear. The key is sealed for the pool of this name.
    fn open(&self, name: &Name, rbd: &RbdSpec) -> Result<RbdPool, StorageFailure> {
        let secrets = self.secrets.as_ref().ok_or_else(|| {
            says(format!("this host cannot derive the cluster's key, so it cannot use the pool `{name}`; look at `haven host ls`"))
        })?;
        let key = secrets.open(&ObjectRef::new(Kind::Pool, name.clone()), &rbd.key);
        let key = key.map_err(|error| {
            says(format!("the key of the pool `{name}` cannot be opened ({error}); give it again: `haven edit pool/{name}`"))
        })?;
        Ok(RbdPool::of(rbd, key))
    }

    /// A pool that the cluster has.
    fn known(&self, pool: &PoolSpec) -> Result<(Name, RbdPool), StorageFailure> {
        let live = Arc::clone(&self.live.borrow());
        let found = live.pools.iter().find(|(_, one)| one.spec == *pool);
        let (name, rbd) = found
            .and_then(|(name, _)| Some((name.clone(), pool.rbd.as_ref()?)))
            .ok_or_else(|| {
                says(format!(
                    "the pool {} has just been changed; it is tried again by itself",
                    pool.place()
                ))
            })?;
        let open = self.open(&name, rbd)?;
        Ok((name, open))
    }

    fn images(&self, pool: &PoolSpec) -> Result<Images, StorageFailure> {
        let (name, pool) = self.known(pool)?;
        Images::new(&pool, &self.directory.join(name.as_str()))
    }

    /// Looks whether a pool that may be new can be used from this host.
    ///
    /// # Errors
    /// One sentence on the first thing that is wrong.
    pub async fn check(&self, name: &Name, rbd: &RbdSpec) -> Result<String, StorageFailure> {
        let pool = self.open(name, rbd)?;
        let directory = self.directory.join(format!("{name}.{}", uuid::Uuid::new_v4().simple()));
        let checked = match Images::new(&pool, &directory) {
            Ok(images) => images.check().await,
            Err(failure) => Err(failure),
        };
        if let Err(error) = std::fs::remove_dir_all(&directory)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(path = %directory.display(), %error, "it holds a key and cannot be removed");
        }
        checked
    }

    /// Makes a volume if it is not there, and at least so large as it is wanted; `file`: what it is made from.
    ///
    /// # Errors
    /// A sentence.
    pub async fn volume(
        &self,
        pool: &PoolSpec,
        wanted: &VolumeWanted,
        file: Option<(PathBuf, String)>,
        run_dir: &Path,
    ) -> Result<VolumeReady, StorageFailure> {
        let (_, of) = self.known(pool)?;
        let (images, image) = (self.images(pool)?, image(&wanted.name));
        match images.size(&image).await? {
            Some(_) => images.grow(&image, wanted.size_bytes).await?,
            None => self.make(&images, &image, wanted, file).await?,
        }
        let (vm, disk) = (wanted.name.vm.as_str(), &wanted.name.disk);
        let files = run_dir::prepare(run_dir, vm)
            .and_then(|directory| run_dir::prepare(&directory, &format!("{disk}.rbd")))
            .and_then(|directory| node::write(&directory, &of, wanted.owner_uid));
        let files = files.map_err(|error| {
            says(format!("the key of {vm} for its disk `{disk}` cannot be written ({error}); check the file system of {}", run_dir.display()))
        })?;
        let launch = RbdLaunch::of(&of, &image, files);
        let path = PathBuf::from(format!("{}/{image}", of.path()));
        Ok(VolumeReady { path, format: "raw".into(), rbd: Some(Box::new(launch)), filer: None })
    }

    async fn make(
        &self,
        images: &Images,
        image: &str,
        wanted: &VolumeWanted,
        file: Option<(PathBuf, String)>,
    ) -> Result<(), StorageFailure> {
        if let Some(of) = &wanted.backup {
            return Err(says(format!(
                "the disk `{}` cannot be made from the {of}: pools of Ceph clusters do not take that yet; restore it into another pool",
                wanted.name.disk
            )));
        }
        if wanted.image.is_some() && file.is_none() {
            return Err(was_there(&wanted.name));
        }
        self.remove_parts(images, image).await;
        let part = format!("{image}{PART}{}", &uuid::Uuid::new_v4().simple().to_string()[..8]);
        if let Some(from) = &wanted.copy {
            let of = self::image(&from.name);
            return images.make_of((&of, &from.tag), &part, image, wanted.size_bytes).await;
        }
        let Some((file, format)) = file else {
            return images.create(image, wanted.size_bytes).await;
        };
        images.copy(&file, &format, &part, image, wanted.size_bytes).await
    }

    /// What attempts before have left, as far as nobody works on it.
    async fn remove_parts(&self, images: &Images, image: &str) {
        let part = format!("{image}{PART}");
        let names = match images.names().await {
            Ok(names) => names,
            Err(failure) => {
                return tracing::warn!(%failure, "what is left of attempts is not known");
            }
        };
        for name in names.iter().filter(|name| name.starts_with(&part)) {
            if let Err(failure) = images.remove(name).await {
                tracing::warn!(%failure, "an unfinished image cannot be removed");
            }
        }
    }

    /// Whether a volume is there.
    ///
    /// # Errors
    /// When it is not known.
    pub async fn has(
        &self,
        pool: &PoolSpec,
        name: &VolumeName,
    ) -> Result<Option<PathBuf>, StorageFailure> {
        let (images, image) = (self.images(pool)?, image(name));
        let is_there = images.size(&image).await?.is_some();
        Ok(is_there.then(|| PathBuf::from(image)))
    }

    /// Makes a volume that is there at least so large.
    ///
    /// # Errors
    /// A sentence.
    pub async fn grow(
        &self,
        pool: &PoolSpec,
        name: &VolumeName,
        size_bytes: u64,
    ) -> Result<(), StorageFailure> {
        self.images(pool)?.grow(&image(name), size_bytes).await
    }

    /// Removes a volume; fine when it is not there. Whoever has it open has it no more: a process that was killed is taken for one
    /// that has it for 30 s.
    ///
    /// # Errors
    /// A sentence.
    pub async fn delete(&self, pool: &PoolSpec, name: &VolumeName) -> Result<(), StorageFailure> {
        let (images, image) = (self.images(pool)?, image(name));
        self.remove_parts(&images, &image).await;
        if images.size(&image).await?.is_none() {
            return Ok(());
        }
        if !images.clients(&image).await?.is_empty() {
            images.shut_out(&image, &BTreeSet::new(), &BTreeSet::new()).await?;
        }
        images.remove(&image).await?;
        if let Err(failure) = images.sweep(is_ours).await {
            tracing::warn!(%failure, "images that were hidden for clones may be left");
        }
        Ok(())
    }

    /// What a volume keeps, open or not; nothing when it is not there.
    ///
    /// # Errors
    /// When it is not known.
    pub async fn keeps(
        &self,
        pool: &PoolSpec,
        name: &VolumeName,
    ) -> Result<Option<Keeps>, StorageFailure> {
        let (images, image) = (self.images(pool)?, image(name));
        let Some(size) = images.size(&image).await? else { return Ok(None) };
        let kept = images.snapshots(&image).await?.into_iter();
        let snapshots = kept.map(|of| (of.name.clone(), of.at_ms())).collect();
        Ok(Some(Keeps { size, snapshots }))
    }

    /// Takes a step with a snapshot of it. Only one that nobody has open can be brought back to one.
    ///
    /// # Errors
    /// A sentence.
    pub async fn snapshot(
        &self,
        pool: &PoolSpec,
        name: &VolumeName,
        step: SnapshotStep,
        snapshot: &str,
    ) -> Result<(), StorageFailure> {
        let (images, image) = (self.images(pool)?, image(name));
        match step {
            SnapshotStep::Take => images.snapshot(&image, snapshot).await,
            SnapshotStep::Revert => images.revert(&image, snapshot).await,
            SnapshotStep::Remove => images.remove_snapshot(&image, snapshot).await,
        }
    }

    /// The room in a pool.
    ///
    /// # Errors
    /// A sentence.
    pub async fn room(&self, pool: &PoolSpec) -> Result<PoolRoom, StorageFailure> {
        self.images(pool)?.room().await
    }

    /// The clients by which a volume is open.
    ///
    /// # Errors
    /// When they are not known.
    pub async fn clients(
        &self,
        pool: &PoolSpec,
        name: &VolumeName,
    ) -> Result<BTreeSet<String>, StorageFailure> {
        let clients = self.images(pool)?.clients(&image(name)).await?;
        Ok(clients.iter().map(ToString::to_string).collect())
    }

    /// Shuts a volume to all that have it open, and to those that were noted; those in `shut` are refused already.
    ///
    /// # Errors
    /// When one of them may still write.
    pub async fn shut_out(
        &self,
        pool: &PoolSpec,
        name: &VolumeName,
        noted: &BTreeSet<String>,
        shut: &BTreeSet<String>,
    ) -> Result<(), StorageFailure> {
        let clients = |of: &BTreeSet<String>| {
            of.iter().map(|text| text.parse()).collect::<Result<BTreeSet<Client>, _>>()
        };
        let (noted, shut) = (clients(noted)?, clients(shut)?);
        self.images(pool)?.shut_out(&image(name), &noted, &shut).await.map(drop)
    }

    /// Has the cluster of a pool refuse a client from now on.
    ///
    /// # Errors
    /// When it may still write.
    pub async fn shut_client(&self, pool: &PoolSpec, client: &str) -> Result<(), StorageFailure> {
        self.images(pool)?.shut_out_client(&client.parse()?).await
    }
}

#[cfg(test)]
mod tests {
    use super::{LONGEST, PART, image, is_ours};
    use crate::agent::storage::VolumeName;
    use haven_model::Name;

    #[test]
    fn no_name_of_an_image_is_longer_than_ceph_takes() {
        let uid = "01890000-0000-7000-8000-000000000000".to_owned();
        let of = |vm: &str, disk: &str| {
            let (vm, disk) = (Name::new(vm).unwrap(), Name::new(disk).unwrap());
            image(&VolumeName { vm, disk, vm_uid: uid.clone() })
        };
        assert_eq!(of("web-1", "root"), format!("web-1.root.{uid}"));
        let long = "a".repeat(haven_model::name::NAME_MAX);
        let short = of(&long, &long);
        assert_eq!(short, format!("{uid}.{long}"));
        assert!(short.len() <= LONGEST, "{}", short.len());
        for ours in [of("web-1", "root"), short, format!("{}{PART}a1b2c3d4", of("web-1", "root"))] {
            assert!(is_ours(&ours), "{ours}");
        }
        for other in ["web-1.root", "golden", "a.b.c", "vm-100-disk-0", ""] {
            assert!(!is_ours(other), "{other}");
        }
    }
}
