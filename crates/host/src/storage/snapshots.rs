//! Snapshots that the file of a volume keeps in itself, while nobody has it open: internal ones of `qcow2`
//! (docs/decisions/0027-snapshots.md).
//!
//! `qemu-img` takes a second one of the same name without a word, so whoever has one taken looks first.

use super::{
    luks,
    qemu_img::{self, Failure},
    says,
};
use crate::{
    agent::storage::{SnapshotStep, StorageFailure},
    vm::snapshots::Keeps,
};
use haven_store::seal::Plain;
use serde::Deserialize;
use std::path::Path;

/// What `qemu-img info` tells.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Told {
    virtual_size: u64,
    #[serde(default)]
    snapshots: Vec<ToldSnapshot>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct ToldSnapshot {
    name: String,
    #[serde(default)]
    date_sec: i64,
    #[serde(default)]
    date_nsec: i64,
}

/// What the file keeps.
///
/// # Errors
/// A sentence: it is no such disk, or somebody has it open.
pub async fn of(path: &Path) -> Result<Keeps, StorageFailure> {
    let text = qemu_img::text(path)?;
    let unreadable = |why: String| says(format!("the snapshots in {text} cannot be told ({why})"));
    let told = qemu_img::run(&["info", "--output=json", "-f", "qcow2", text]).await;
    let told: Told = serde_json::from_slice(&told.map_err(unreadable)?)
        .map_err(|error| unreadable(error.to_string()))?;
    let each = told.snapshots.into_iter();
    let snapshots = each.map(|of| (of.name, of.date_sec * 1000 + of.date_nsec / 1_000_000));
    Ok(Keeps { size: told.virtual_size, snapshots: snapshots.collect() })
}

/// Tells `qemu-img snapshot` one thing about a file, with its key if it is encrypted.
///
/// # Errors
/// [`Failure::Full`], or what it said.
pub async fn tell(
    path: &Path,
    flag: &str,
    snapshot: &str,
    key: Option<&Plain>,
) -> Result<(), Failure> {
    if key.is_none() {
        return qemu_img::make(&["snapshot", "-q", flag, snapshot, qemu_img::text(path)?]).await;
    }
    let (secret, of) = (luks::secret(), luks::opened(path, "qcow2")?);
    let args = ["snapshot", "-q", "--object", &secret, "--image-opts", flag, snapshot, &of];
    qemu_img::make_with(&args, key).await
}

/// Takes one, makes the disk what it was, or removes it.
///
/// # Errors
/// [`Failure::Full`], or what `qemu-img` said.
pub async fn step(
    path: &Path,
    step: SnapshotStep,
    snapshot: &str,
    key: Option<&Plain>,
) -> Result<(), Failure> {
    let text = qemu_img::text(path)?;
    let (flag, what) = match step {
        SnapshotStep::Take => ("-c", "taken of"),
        SnapshotStep::Revert => ("-a", "put back in"),
        SnapshotStep::Remove => ("-d", "removed from"),
    };
    match tell(path, flag, snapshot, key).await.map_err(|failure| luks::told(failure, path)) {
        Err(Failure::Other(failure)) => {
            let said = failure.what.trim_start_matches("the volume cannot be made: ").to_owned();
            Err(says(format!("the snapshot cannot be {what} {text}: {said}")).into())
        }
        done => done,
    }
}
