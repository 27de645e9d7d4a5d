//! Snapshots of images, and images that are made of them (docs/decisions/0026-rbd.md).

use super::{
    images::Images,
    pool::is_name,
    program::{COPY, Ended},
};
use crate::{
    agent::storage::StorageFailure,
    storage::{in_words, says},
};
use serde::Deserialize;

/// What clones are made of.
pub const BASE: &str = "haven-base";

/// A snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Snapshot {
    /// Its name.
    pub name: String,
    /// How large the image was, bytes.
    #[serde(rename = "size")]
    pub size_bytes: u64,
    /// When it was taken, as `rbd` says it: `Mon Nov 30 18:53:24 2026`.
    #[serde(default)]
    timestamp: String,
}

impl Snapshot {
    /// When it was taken, wall clock, milliseconds since 1970; 0 when that is not known.
    #[must_use]
    pub fn at_ms(&self) -> i64 {
        let words = self.timestamp.split_whitespace().collect::<Vec<_>>().join(" ");
        let time = jiff::civil::DateTime::strptime("%a %b %d %H:%M:%S %Y", words);
        let time = time.and_then(|time| time.to_zoned(jiff::tz::TimeZone::UTC));
        time.map_or(0, |time| time.timestamp().as_millisecond())
    }
}

#[derive(Deserialize)]
struct Hidden {
    id: String,
    name: String,
}

#[derive(Deserialize)]
struct Info {
    #[serde(default)]
    parent: Option<serde::de::IgnoredAny>,
}

impl Images {
    fn snapshot_path(&self, image: &str, name: &str) -> Result<String, StorageFailure> {
        if !is_name(name) {
            return Err(says(format!("`{name}` is no name of a snapshot")));
        }
        Ok(format!("{}@{name}", self.path(image)?))
    }

    /// Keeps an image as it is now. While a guest runs it is as after a power cut, unless the guest was made to
    /// settle first.
    ///
    /// # Errors
    /// When there is one of this name, or it cannot be made.
    pub async fn snapshot(&self, image: &str, name: &str) -> Result<(), StorageFailure> {
        let path = self.snapshot_path(image, name)?;
        let what = format!("no snapshot `{name}` can be made");
        self.change(image, &what, &["snap", "create", &path, "--no-progress"]).await
    }

    /// Its snapshots, the oldest first.
    ///
    /// # Errors
    /// When they are not known.
    pub async fn snapshots(&self, image: &str) -> Result<Vec<Snapshot>, StorageFailure> {
        let path = self.path(image)?;
        let known = self.programs.ask_rbd(&["snap", "ls", &path]).await;
        known.map_err(|ended| self.failed(image, "its snapshots are not known", &ended))
    }

    /// Removes a snapshot; fine when it is not there.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub async fn remove_snapshot(&self, image: &str, name: &str) -> Result<(), StorageFailure> {
        let path = self.snapshot_path(image, name)?;
        match self.programs.rbd(&["snap", "rm", &path, "--no-progress"], COPY).await {
            Ok(_) => Ok(()),
            Err(Ended::Failed { code: libc::ENOENT, said }) if !said.contains("error opening") => {
                Ok(())
            }
            Err(ended) => {
                Err(self.failed(image, &format!("its snapshot `{name}` cannot be removed"), &ended))
            }
        }
    }

    /// Makes an image of a snapshot of another one, so large; they share what neither writes. Under the name `part` first: a whole one
    /// or none; if another attempt was quicker, its image is as good. The snapshot may go afterwards, and so may the other image:
    /// Ceph keeps of them what is needed. One that is itself such an image is copied, so that no disk is read through a
    /// chain of others.
    ///
    /// # Errors
    /// When the snapshot is not there or larger, or it cannot be made.
    pub async fn make_of(
        &self,
        (of, name): (&str, &str),
        part: &str,
        image: &str,
        size_bytes: u64,
    ) -> Result<(), StorageFailure> {
        let (from, path) = (self.path(of)?, self.path(image)?);
        let snapshots = self.snapshots(of).await?;
        let Some(snapshot) = snapshots.into_iter().find(|one| one.name == name) else {
            return Err(says(format!(
                "the image {from} does not keep `{name}` any more, from which {path} is to be made; delete the VM and clone it again"
            )));
        };
        if snapshot.size_bytes > size_bytes {
            return Err(says(format!(
                "the image {path} would be {} and {from}@{name} holds {}; make the disk at least that large",
                in_words(size_bytes),
                in_words(snapshot.size_bytes)
            )));
        }
        let made = async {
            let (of, to) = (self.snapshot_path(of, name)?, self.path(part)?);
            self.change(part, "it cannot be cloned", &["clone", &of, &to]).await?;
            if self.is_clone(&from).await? {
                let flattened = self.programs.rbd(&["flatten", &to, "--no-progress"], COPY).await;
                let what = format!("it cannot be copied from {from}, which is a clone itself");
                flattened.map_err(|ended| self.failed(part, &what, &ended))?;
            }
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

    async fn is_clone(&self, path: &str) -> Result<bool, StorageFailure> {
        let info = self.programs.ask_rbd::<Info>(&["info", path]).await;
        let info = info.map_err(|ended| {
            self.programs.failed(&format!("the image {path} cannot be looked at"), &ended)
        })?;
        Ok(info.parent.is_some())
    }

    /// Removes images of Haven's that were hidden because clones needed them, and that none needs any more. What people have put into
    /// Ceph's trash is theirs.
    ///
    /// # Errors
    /// When the pool cannot be read.
    pub async fn sweep(&self, is_ours: impl Fn(&str) -> bool) -> Result<(), StorageFailure> {
        let path = self.programs.pool.path();
        let hidden = self.programs.ask_rbd::<Vec<Hidden>>(&["trash", "ls", &path]).await;
        let hidden = hidden.map_err(|ended| {
            self.programs.failed("the hidden images of the pool cannot be listed", &ended)
        })?;
        for image in hidden.iter().filter(|image| is_ours(&image.name)) {
            let of = format!("{path}/{}", image.id);
            match self.programs.rbd(&["trash", "rm", &of, "--no-progress"], COPY).await {
                Ok(_) => {
                    tracing::info!(image = image.name, "an image that no clone needs is removed")
                }
                // Those that are needed stay.
                Err(ended) => tracing::debug!(image = image.name, ?ended, "a hidden image stays"),
            }
        }
        Ok(())
    }

    /// Brings an image back to a snapshot; what was written since is gone.
    ///
    /// # Errors
    /// When it is open, and to whom; or it cannot be done.
    pub async fn revert(&self, image: &str, name: &str) -> Result<(), StorageFailure> {
        const WHAT: &str = "cannot be brought back to its snapshot";
        let path = self.snapshot_path(image, name)?;
        let who = self.clients(image).await?;
        if !who.is_empty() {
            return Err(self.refused_to(image, WHAT, &who));
        }
        match self.programs.rbd(&["snap", "rollback", &path, "--no-progress"], COPY).await {
            Ok(_) => Ok(()),
            Err(ended) if ended.is(libc::EROFS) || ended.is(libc::EBUSY) => {
                Err(self.in_use(image, WHAT, &ended).await)
            }
            Err(ended) => Err(self.failed(image, WHAT, &ended)),
        }
    }
}
