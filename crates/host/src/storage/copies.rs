//! A disk that is made from a disk of another VM, as a snapshot in its file keeps it (docs/decisions/0028-clones.md).
//!
//! ```text
//!   the file of the source, which its VM's process may have open and write to
//!        │ reflink: a second file with the same blocks; what it holds is made what the snapshot keeps, and all snapshots in it go
//!        └ else a copy of what the snapshot keeps and is not in what the source stands on; the copy stands on that, too
//! ```
//!
//! What a snapshot keeps is never written again as long as it is there, so both may be done beside a running guest. Everything
//! else in such a file is as a power cut would leave it, which `qcow2` is made for.

use super::{
    busy::Busy,
    luks,
    masters::reflink,
    qemu_img::{self, Failure},
    says, snapshots,
};
use crate::{
    agent::storage::{CopyFrom, StorageFailure},
    storage::backup::restore::Progress,
};
use haven_store::seal::Plain;
use serde::Deserialize;
use std::{io, path::Path};

/// What `qemu-img info` tells.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Told {
    #[serde(default)]
    backing_filename: Option<String>,
    #[serde(default)]
    backing_filename_format: Option<String>,
    #[serde(default)]
    snapshots: Vec<Named>,
}

#[derive(Debug, Deserialize)]
struct Named {
    name: String,
}

/// Asks what a file is that somebody may have open.
async fn told(path: &Path) -> Result<Told, StorageFailure> {
    let text = qemu_img::text(path)?;
    let unreadable = |why: String| {
        says(format!("{text}, from which a disk is to be made, cannot be read ({why})"))
    };
    let told = qemu_img::run(&["info", "-U", "--output=json", "-f", "qcow2", text]).await;
    serde_json::from_slice(&told.map_err(unreadable)?)
        .map_err(|error| unreadable(error.to_string()))
}

fn gone(of: &CopyFrom) -> StorageFailure {
    says(format!(
        "the disk `{}` of {} does not keep any more what a disk is to be made from; delete the VM and clone it again",
        of.name.disk, of.name.vm
    ))
}

/// Makes `part` a disk that holds what the snapshot in `source` keeps.
///
/// # Errors
/// [`Failure::Full`], or a sentence.
pub async fn make(
    busy: &Busy,
    of: &CopyFrom,
    source: &Path,
    part: &Path,
    key: Option<&Plain>,
    progress: &Progress,
) -> Result<(), Failure> {
    let asked = source.to_owned();
    let there = busy.run(part, move || Ok(asked.try_exists())).await?;
    if !there.is_ok_and(|there| there) {
        return Err(says(format!(
            "the disk `{}` of {}, from which a disk is to be made, is not on this host; start the VM where {} is",
            of.name.disk, of.name.vm, of.name.vm
        ))
        .into());
    }
    let (from, to) = (source.to_owned(), part.to_owned());
    let shared = busy.run(part, move || Ok(reflink(&from, &to))).await?;
    let shared = shared.map_err(|error| match error.kind() {
        io::ErrorKind::StorageFull => Failure::Full,
        _ => says(format!("{} cannot be read ({error})", source.display())).into(),
    })?;
    // What the copy is known to hold it holds: the source may come to other snapshots at any moment.
    let is = told(if shared { part } else { source }).await?;
    if is.snapshots.iter().all(|snapshot| snapshot.name != of.tag) {
        return Err(gone(of).into());
    }
    let made = match shared {
        true => put_back(of, &is, part, key).await,
        false => copy(of, source, &is, part, key, progress).await,
    };
    made.map_err(|failure| luks::told(failure, source))
}

/// Makes a file with the blocks of the source what it was in the snapshot; it keeps none itself.
async fn put_back(
    of: &CopyFrom,
    is: &Told,
    part: &Path,
    key: Option<&Plain>,
) -> Result<(), Failure> {
    snapshots::tell(part, "-a", &of.tag, key).await?;
    for snapshot in &is.snapshots {
        snapshots::tell(part, "-d", &snapshot.name, key).await?;
    }
    Ok(())
}

/// Copies what the snapshot keeps.
async fn copy(
    of: &CopyFrom,
    source: &Path,
    is: &Told,
    part: &Path,
    key: Option<&Plain>,
    progress: &Progress,
) -> Result<(), Failure> {
    let snapshot = format!("snapshot.name={}", of.tag);
    let (mut from, to) = (qemu_img::text(source)?.to_owned(), qemu_img::text(part)?);
    let (secret, options) = (luks::secret(), luks::created());
    let mut args = vec!["convert", "-p", "-U", "-l", &snapshot, "-O", "qcow2"];
    match key {
        None => args.extend(["-f", "qcow2"]),
        Some(_) => {
            from = luks::opened(source, "qcow2")?;
            args.extend(["--object", &secret, "--image-opts", "-o", &options]);
        }
    }
    // An image, or the pool's master of one: neither is ever written again.
    if let (Some(on), Some(format)) = (&is.backing_filename, &is.backing_filename_format) {
        args.extend(["-B", on, "-F", format]);
    }
    args.extend([from.as_str(), to]);
    qemu_img::make_slowly(&args, key, |percent| progress.is_at(percent)).await
}
