//! Images: made, cloned, grown, removed, listed.

use super::{
    pool::is_name,
    program::{CHANGE, COPY, Ended, Programs, QUESTION},
    snapshots::BASE,
};
use crate::{
    agent::storage::StorageFailure,
    storage::{in_words, says},
};
use haven_model::{Bytes, pool::PoolRoom};
use serde::Deserialize;
use std::{collections::BTreeMap, path::Path};

/// What a disk's size is a multiple of, bytes.
const SECTOR: u64 = 512;
/// A client that nobody is: an address for documentation (RFC 5737).
const NOBODY: &str = "192.0.2.1:0/1";

/// The images of one pool.
#[derive(Debug)]
pub struct Images {
    pub(super) programs: Programs,
}

/// What an image takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageUse {
    /// Its name.
    pub name: String,
    /// How large a guest sees it, bytes.
    pub size_bytes: u64,
    /// What it and its snapshots hold, bytes, before copies.
    pub used_bytes: u64,
}

#[derive(Deserialize)]
struct Info {
    size: u64,
}

#[derive(Deserialize)]
pub(super) struct Usages {
    images: Vec<Usage>,
}

#[derive(Deserialize)]
struct Usage {
    name: String,
    provisioned_size: u64,
    used_size: u64,
}

#[derive(Deserialize)]
pub(super) struct Rooms {
    pools: Vec<Room>,
}

#[derive(Deserialize)]
struct Room {
    name: String,
    stats: RoomStats,
}

#[derive(Deserialize)]
struct RoomStats {
    stored: u64,
    max_avail: u64,
    #[serde(default)]
    quota_bytes: u64,
}

#[derive(Deserialize)]
struct Identity {
    fsid: String,
}

#[derive(Deserialize)]
struct Child {
    image: String,
}

impl Images {
    /// Writes what the programs need into `directory`; nothing is asked of the cluster.
    ///
    /// # Errors
    /// When the pool makes no sense, or the directory cannot be written.
    pub fn new(pool: &super::pool::RbdPool, directory: &Path) -> Result<Self, StorageFailure> {
        Ok(Self { programs: Programs::prepare(pool, directory)? })
    }

    /// The path of an image.
    pub(super) fn path(&self, image: &str) -> Result<String, StorageFailure> {
        if !is_name(image) {
            return Err(says(format!("`{image}` is no name of an image")));
        }
        Ok(format!("{}/{image}", self.programs.pool.path()))
    }

    pub(super) fn failed(&self, image: &str, what: &str, ended: &Ended) -> StorageFailure {
        let path = self.programs.pool.path();
        self.programs.failed(&format!("the image {path}/{image}: {what}"), ended)
    }

    /// Looks whether all that is needed of the pool can be done, within 10 s or little more. It shuts a client out
    /// that nobody is. Which cluster it is.
    ///
    /// # Errors
    /// One sentence on the first thing that is wrong.
    pub async fn check(&self) -> Result<String, StorageFailure> {
        let work = async {
            self.room().await?;
            let path = self.programs.pool.path();
            let seen = self.programs.rbd(&["ls", &path], QUESTION).await;
            seen.map_err(|ended| self.programs.failed("the pool cannot be read", &ended))?;
            let shut = ["osd", "blocklist", "add", NOBODY, "1"];
            let shut = self.programs.ceph(&shut, QUESTION).await;
            shut.map_err(|ended| self.programs.failed("no client can be shut out", &ended))?;
            let is = self.programs.ask_ceph::<Identity>(&["fsid"]).await;
            let is = is.map_err(|ended| {
                self.programs.failed("the Ceph cluster does not say which it is", &ended)
            });
            is.map(|is| is.fsid)
        };
        let late = |_| {
            says(format!(
                "the Ceph cluster of the pool {} takes longer than 10 s for four questions; see `ceph health detail`",
                self.programs.pool.pool
            ))
        };
        tokio::time::timeout(std::time::Duration::from_secs(10), work).await.map_err(late)?
    }

    /// The room of the pool, by what guests can write: without Ceph's copies.
    ///
    /// # Errors
    /// When the cluster does not tell, or has no such pool.
    pub async fn room(&self) -> Result<PoolRoom, StorageFailure> {
        let rooms = self.programs.ask_ceph::<Rooms>(&["df", "detail"]).await;
        let rooms = rooms.map_err(|ended| {
            self.programs.failed("the room of the Ceph cluster cannot be told", &ended)
        })?;
        let pool = &self.programs.pool.pool;
        room(&rooms, pool).ok_or_else(|| {
            says(format!(
                "Ceph has no pool {pool}; correct `pool`, or make it: `ceph osd pool create {pool} && rbd pool init {pool}`"
            ))
        })
    }

    /// How large an image is, bytes; nothing when it is not there.
    ///
    /// # Errors
    /// When it is not known.
    pub async fn size(&self, image: &str) -> Result<Option<u64>, StorageFailure> {
        let path = self.path(image)?;
        match self.programs.ask_rbd::<Info>(&["info", &path]).await {
            Ok(info) => Ok(Some(info.size)),
            Err(Ended::Failed { code: libc::ENOENT, said })
                if said.contains("error opening image") =>
            {
                Ok(None)
            }
            Err(ended) => Err(self.failed(image, "it cannot be looked at", &ended)),
        }
    }

    /// Makes an empty image; room is taken as it is written.
    ///
    /// # Errors
    /// When there is one of this name, or it cannot be made.
    pub async fn create(&self, image: &str, size_bytes: u64) -> Result<(), StorageFailure> {
        let (path, size) = (self.path(image)?, bytes(size_bytes));
        // The exclusive lock is what live migration and the map of its objects need.
        let features = "layering,exclusive-lock,object-map,fast-diff,deep-flatten";
        let args = ["create", &path, "--size", &size, "--image-feature", features];
        self.change(image, "it cannot be made", &args).await
    }

    /// Makes an image of a file, `raw` or `qcow2`, and what clones are made of. Under another name first: a whole one
    /// or none.
    ///
    /// # Errors
    /// When the file is no such disk, or it cannot be copied.
    pub async fn import(
        &self,
        file: &Path,
        format: &str,
        image: &str,
    ) -> Result<(), StorageFailure> {
        let path = self.path(image)?;
        let part = format!("{image}.part");
        let size = self.size_of_file(file, format).await?;
        // Left by a daemon that was killed.
        self.remove(&part).await?;
        self.create(&part, size).await?;
        let made = async {
            self.fill(file, format, &part).await?;
            self.snapshot(&part, BASE).await?;
            self.change(image, "it cannot be named", &["mv", &self.path(&part)?, &path]).await
        };
        let made = made.await;
        if made.is_err()
            && let Err(failure) = self.remove(&part).await
        {
            tracing::warn!(%failure, "an unfinished image cannot be removed");
        }
        made
    }

    /// Makes an image of a file, `raw` or `qcow2`, so large. Under the name `part` first: a whole one or none. If another attempt was
    /// quicker, its image is as good.
    ///
    /// # Errors
    /// When the file is no such disk or larger, or it cannot be copied.
    pub async fn copy(
        &self,
        file: &Path,
        format: &str,
        part: &str,
        image: &str,
        size_bytes: u64,
    ) -> Result<(), StorageFailure> {
        let holds = self.size_of_file(file, format).await?;
        if holds > size_bytes {
            return Err(says(format!(
                "the image {}/{image} would be {} and what it is made from holds {}; make the disk at least that large",
                self.programs.pool.path(),
                in_words(size_bytes),
                in_words(holds)
            )));
        }
        let made = async {
            self.create(part, holds).await?;
            self.fill(file, format, part).await?;
            self.grow(part, size_bytes).await?;
            self.named(part, image).await
        };
        let made = made.await;
        if !matches!(made, Ok(true))
            && let Err(failure) = self.remove(part).await
        {
            tracing::warn!(%failure, "an unfinished image cannot be removed");
        }
        made.map(drop)
    }

    /// Gives an image that is whole its name. False when there is one of that name.
    pub(super) async fn named(&self, part: &str, image: &str) -> Result<bool, StorageFailure> {
        let mv = ["mv", &self.path(part)?, &self.path(image)?];
        match self.programs.rbd(&mv, CHANGE).await {
            Ok(_) => Ok(true),
            Err(ended) if ended.is(libc::EEXIST) => Ok(false),
            Err(ended) => Err(self.failed(image, "it cannot be named", &ended)),
        }
    }

    async fn size_of_file(&self, file: &Path, format: &str) -> Result<u64, StorageFailure> {
        let text = file.display().to_string();
        let wrong = |why: String| {
            says(format!("{text} is not a disk of the format {format} ({why}); import it again"))
        };
        let told =
            self.programs.qemu_img(&["info", "--output=json", "-f", format, &text], QUESTION).await;
        let told = match told {
            Ok(told) => told,
            Err(Ended::Failed { said, .. }) => return Err(wrong(said)),
            Err(ended) => {
                return Err(self.programs.failed("the image file cannot be read", &ended));
            }
        };
        let told: serde_json::Value =
            serde_json::from_slice(&told).map_err(|error| wrong(error.to_string()))?;
        told["virtual-size"].as_u64().ok_or_else(|| wrong("it tells no size".into()))
    }

    async fn fill(&self, file: &Path, format: &str, image: &str) -> Result<(), StorageFailure> {
        let text = file.display().to_string();
        let pool = &self.programs.pool;
        let mut to = format!(
            "driver=raw,file.driver=rbd,file.pool={},file.image={image},file.user={},file.conf={}",
            pool.pool,
            pool.user,
            self.programs.conf().display()
        );
        if let Some(namespace) = &pool.namespace {
            to.push_str(&format!(",file.namespace={namespace}"));
        }
        // Nothing is written over, so in any order; what is zero is not written.
        let args = [
            "convert",
            "-n",
            "--target-is-zero",
            "-W",
            "-t",
            "none",
            "-f",
            format,
            "--target-image-opts",
            &text,
            &to,
        ];
        let copied = self.programs.qemu_img(&args, COPY).await;
        copied.map(drop).map_err(|ended| match ended {
            Ended::Failed { said, .. } if said.contains("Unknown driver 'rbd'") => {
                says("qemu-img of this host knows no RBD; run `apt install qemu-block-extra` on every host")
            }
            ended => self.failed(image, &format!("{text} cannot be copied to it"), &ended),
        })
    }

    /// Makes an image of another that was imported; they share what neither writes.
    ///
    /// # Errors
    /// When the other is larger, or it cannot be made.
    pub async fn clone(
        &self,
        of: &str,
        image: &str,
        size_bytes: u64,
    ) -> Result<(), StorageFailure> {
        let (from, path) = (self.path(of)?, self.path(image)?);
        let Some(holds) = self.size(of).await? else {
            return Err(says(format!("the image {from} is not there; import it again")));
        };
        if holds > size_bytes {
            return Err(says(format!(
                "the image {path} would be {} and {from} holds {}; make the disk at least that large",
                in_words(size_bytes),
                in_words(holds)
            )));
        }
        let base = format!("{from}@{BASE}");
        self.change(image, "it cannot be cloned", &["clone", &base, &path]).await?;
        self.grow(image, size_bytes).await
    }

    /// Makes an image at least so large; one that is larger stays so. While a guest has it open, QEMU does this
    /// (`block_resize`).
    ///
    /// # Errors
    /// When it is not there, or cannot be grown.
    pub async fn grow(&self, image: &str, size_bytes: u64) -> Result<(), StorageFailure> {
        let (path, size) = (self.path(image)?, bytes(size_bytes));
        match self.size(image).await? {
            None => {
                return Err(says(format!("the image {path} is not there, so it cannot be grown")));
            }
            Some(is) if is >= size_bytes => return Ok(()),
            Some(_) => {}
        }
        self.change(
            image,
            "it cannot be grown",
            &["resize", &path, "--size", &size, "--no-progress"],
        )
        .await
    }

    /// Removes an image with its snapshots; fine when it is not there. One that clones hang on is only hidden, and
    /// goes with [`Images::sweep`] once they have gone.
    ///
    /// # Errors
    /// When it is open, and to whom; or it cannot be removed.
    pub async fn remove(&self, image: &str) -> Result<(), StorageFailure> {
        const WHAT: &str = "cannot be removed";
        let path = self.path(image)?;
        if self.size(image).await?.is_none() {
            return Ok(());
        }
        let who = self.clients(image).await?;
        if !who.is_empty() {
            return Err(self.refused_to(image, WHAT, &who));
        }
        let needed = !self.children(image).await?.is_empty();
        // What clones are made of stays beneath them, without a name.
        let purged = self.programs.rbd(&["snap", "purge", &path, "--no-progress"], COPY).await;
        purged.map_err(|ended| self.failed(image, WHAT, &ended))?;
        if needed {
            return self.change(image, "it cannot be hidden", &["trash", "mv", &path]).await;
        }
        match self.programs.rbd(&["rm", &path, "--no-progress"], COPY).await {
            Err(ended) if ended.is(libc::ENOENT) => Ok(()),
            Err(ended) if ended.is(libc::EBUSY) => Err(self.in_use(image, WHAT, &ended).await),
            Err(ended) => Err(self.failed(image, WHAT, &ended)),
            Ok(_) => Ok(()),
        }
    }

    /// The clones of an image.
    ///
    /// # Errors
    /// When they are not known.
    pub async fn children(&self, image: &str) -> Result<Vec<String>, StorageFailure> {
        let path = self.path(image)?;
        let children = self.programs.ask_rbd::<Vec<Child>>(&["children", "--all", &path]).await;
        let children =
            children.map_err(|ended| self.failed(image, "its clones are not known", &ended))?;
        Ok(children.into_iter().map(|child| child.image).collect())
    }

    /// The names of all images of the pool.
    ///
    /// # Errors
    /// When they are not known.
    pub async fn names(&self) -> Result<Vec<String>, StorageFailure> {
        let path = self.programs.pool.path();
        self.programs.ask_rbd::<Vec<String>>(&["ls", &path]).await.map_err(|ended| {
            self.programs.failed("the images of the pool cannot be listed", &ended)
        })
    }

    /// All images of the pool with what they take.
    ///
    /// # Errors
    /// When they are not known.
    pub async fn list(&self) -> Result<Vec<ImageUse>, StorageFailure> {
        // It takes no path of a pool.
        let pool = &self.programs.pool;
        let mut args = vec!["du", "--pool", &pool.pool];
        args.extend(pool.namespace.iter().flat_map(|namespace| ["--namespace", namespace]));
        match self.programs.ask_rbd::<Usages>(&args).await {
            Ok(usages) => Ok(usage(usages)),
            Err(ended) => {
                Err(self.programs.failed("the images of the pool cannot be listed", &ended))
            }
        }
    }

    /// Runs `rbd` to change an image.
    pub(super) async fn change(
        &self,
        image: &str,
        what: &str,
        args: &[&str],
    ) -> Result<(), StorageFailure> {
        match self.programs.rbd(args, CHANGE).await {
            Ok(_) => Ok(()),
            Err(ended) if ended.is(libc::EEXIST) => Err(says(format!(
                "the image {}: {what}, since there is one already",
                self.path(image)?
            ))),
            Err(ended) => Err(self.failed(image, what, &ended)),
        }
    }
}

/// A size as an argument; without the letter it would be MiB.
fn bytes(size: u64) -> String {
    format!("{}B", size.next_multiple_of(SECTOR))
}

/// `rbd du` has a line for each snapshot and one for what was written since.
pub(super) fn usage(usages: Usages) -> Vec<ImageUse> {
    let mut images = BTreeMap::<String, ImageUse>::new();
    for line in usages.images {
        let image = images.entry(line.name.clone());
        let image = image.or_insert(ImageUse { name: line.name, size_bytes: 0, used_bytes: 0 });
        image.size_bytes = line.provisioned_size;
        image.used_bytes += line.used_size;
    }
    images.into_values().collect()
}

/// The room of a pool; within its quota, if it has one.
pub(super) fn room(rooms: &Rooms, pool: &str) -> Option<PoolRoom> {
    let stats = &rooms.pools.iter().find(|room| room.name == pool)?.stats;
    let left = match stats.quota_bytes {
        0 => u64::MAX,
        quota => quota.saturating_sub(stats.stored),
    };
    let free = stats.max_avail.min(left);
    let total = Bytes(stats.stored.saturating_add(free));
    Some(PoolRoom { total, free: Bytes(free), used: Bytes(stats.stored) })
}
