//! Snapshots of images.

use super::{
    images::Images,
    pool::is_name,
    program::{COPY, Ended},
};
use crate::{agent::storage::StorageFailure, storage::says};
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
