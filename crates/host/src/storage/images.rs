//! Files of images, kept under their SHA-256. A file that is not here is fetched from a host that has it, and is
//! believed only when its content has that sum.

use super::{in_words, says};
use crate::agent::storage::StorageFailure;
use sha2::{Digest, Sha256};
use std::{
    collections::BTreeSet,
    os::unix::fs::MetadataExt,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};

/// The images of this host.
#[derive(Clone, Debug)]
pub struct ImageStore {
    directory: PathBuf,
    /// What is taken in must leave room for others.
    leaves_room: bool,
}

/// A file that was taken in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Imported {
    /// SHA-256, lower-case hexadecimal.
    pub sha256: String,
    /// Bytes.
    pub size: u64,
}

/// How long whoever sends an image may send nothing.
const SILENCE: std::time::Duration = std::time::Duration::from_secs(60);

/// After so many bytes a copy looks again whether it leaves room.
const LOOK_BYTES: u64 = 1 << 20;

/// An unfinished file, which goes when nobody waits for the import any more.
struct Unfinished(Option<PathBuf>);

impl Drop for Unfinished {
    fn drop(&mut self) {
        if let Some(path) = self.0.take() {
            // A disk that hangs must hold nobody up.
            std::thread::spawn(move || std::fs::remove_file(path));
        }
    }
}

fn failed(path: &Path) -> impl FnOnce(std::io::Error) -> StorageFailure {
    let path = path.display().to_string();
    move |error| {
        let hint = match error.kind() {
            std::io::ErrorKind::TimedOut => "check who sends it and the network, and try again",
            std::io::ErrorKind::StorageFull => "free some space there, or enlarge it",
            _ => "check its file system",
        };
        says(format!("{path} cannot be written ({error}): {hint}"))
    }
}

/// What to say when the disk had no room for an image of which so much came, all of it in `part`, which is about to be removed. Its
/// room is counted as free now: a process that is just being started may hold the file for a moment longer.
fn full(directory: &Path, part: &Path, came: u64) -> StorageFailure {
    let held = std::fs::metadata(part).map_or(0, |of| of.blocks() * 512);
    let room = nix::sys::statvfs::statvfs(directory).map_or_else(
        |error| error.to_string(),
        |stat| {
            let free = stat.blocks_available().saturating_mul(stat.fragment_size());
            in_words(free.saturating_add(held)) + " free"
        },
    );
    says(format!(
        "the disk of the images, {}, is full ({room}, more than {} needed): free some space there, or enlarge it",
        directory.display(),
        in_words(came)
    ))
}

/// Whether a tenth of the file system is free beside so many bytes.
fn ample(directory: &Path, bytes: u64) -> Result<(), StorageFailure> {
    let stat = nix::sys::statvfs::statvfs(directory)
        .map_err(|error| failed(directory)(std::io::Error::from(error)))?;
    let free = stat.blocks_available().saturating_mul(stat.fragment_size());
    let keep = stat.blocks().saturating_mul(stat.fragment_size()) / 10;
    if free >= keep.saturating_add(bytes) {
        return Ok(());
    }
    Err(says(format!(
        "the disk of the images, {}, has {} free, of which {} are kept for the store and the VMs, so that images are not copied to this host before a VM needs them: free some space there, or enlarge it",
        directory.display(),
        in_words(free),
        in_words(keep)
    )))
}

impl ImageStore {
    /// Images under this directory.
    #[must_use]
    pub fn new(directory: PathBuf) -> Self {
        Self { directory, leaves_room: false }
    }

    /// The same for copies that nobody waits for: what is taken in leaves a tenth of the file system free.
    #[must_use]
    pub fn leaving_room(&self) -> Self {
        Self { leaves_room: true, ..self.clone() }
    }

    /// Refuses what would not leave a tenth of the file system free.
    ///
    /// # Errors
    /// A sentence with the figures.
    pub fn leaves_room(&self, bytes: u64) -> Result<(), StorageFailure> {
        std::fs::create_dir_all(&self.directory).map_err(failed(&self.directory))?;
        ample(&self.directory, bytes)
    }

    /// Where the content stands, or would.
    #[must_use]
    pub fn path(&self, sha256: &str) -> PathBuf {
        self.directory.join(sha256)
    }

    /// What is here.
    #[must_use]
    pub fn list(&self) -> BTreeSet<String> {
        let Ok(entries) = std::fs::read_dir(&self.directory) else {
            return BTreeSet::new();
        };
        let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        names
            .filter(|name| name.len() == 64 && name.bytes().all(|b| b.is_ascii_hexdigit()))
            .collect()
    }

    /// Takes in a stream; with `expected` only if that is its sum.
    ///
    /// # Errors
    /// A sentence, when the disk is full or the sum is another.
    pub async fn import(
        &self,
        mut from: impl AsyncRead + Unpin,
        expected: Option<&str>,
    ) -> Result<Imported, StorageFailure> {
        tokio::fs::create_dir_all(&self.directory).await.map_err(failed(&self.directory))?;
        let part = self.directory.join(format!("{}.part", uuid::Uuid::now_v7()));
        let mut unfinished = Unfinished(Some(part.clone()));
        let mut came = 0;
        let leave = self.leaves_room.then_some(&*self.directory);
        let copied = copy(&mut from, &part, leave, &mut came).await;
        unfinished.0 = None;
        let imported = match copied {
            Ok(imported) => imported,
            Err(error) => {
                let (is, directory, held) = (error.kind(), self.directory.clone(), part.clone());
                let is_full = is == std::io::ErrorKind::StorageFull;
                let said = tokio::task::spawn_blocking(move || full(&directory, &held, came));
                let said = if is_full { Some(said.await) } else { None };
                let _ = tokio::fs::remove_file(&part).await;
                return Err(match said {
                    Some(said) => said.unwrap_or_else(|_| failed(&part)(error)),
                    None => error.downcast().unwrap_or_else(failed(&part)),
                });
            }
        };
        if expected.is_some_and(|sum| sum != imported.sha256) {
            let _ = tokio::fs::remove_file(&part).await;
            return Err(StorageFailure {
                what: format!(
                    "the image's checksum is {} and not {} as expected: the file is damaged or another one; get it again",
                    imported.sha256,
                    expected.unwrap_or_default()
                ),
            });
        }
        let path = self.path(&imported.sha256);
        let put = match tokio::fs::rename(&part, &path).await {
            // Its name reaches the disk before anybody relies on it.
            Ok(()) => match tokio::fs::File::open(&self.directory).await {
                Ok(directory) => directory.sync_all().await,
                Err(error) => Err(error),
            },
            Err(error) => Err(error),
        };
        if let Err(error) = put {
            let _ = tokio::fs::remove_file(&part).await;
            return Err(failed(&path)(error));
        }
        Ok(imported)
    }
}

fn silent(_: tokio::time::error::Elapsed) -> std::io::Error {
    let what = format!("nothing of it came for {} s", SILENCE.as_secs());
    std::io::Error::new(std::io::ErrorKind::TimedOut, what)
}

/// Counts in `came` what was read, also when it fails. Looks now and then whether it leaves room in the directory.
async fn copy(
    from: &mut (impl AsyncRead + Unpin),
    to: &Path,
    leave: Option<&Path>,
    came: &mut u64,
) -> std::io::Result<Imported> {
    let mut file = tokio::fs::File::create(to).await?;
    let mut sum = Sha256::new();
    let mut buffer = vec![0; 1 << 18];
    loop {
        let read =
            tokio::time::timeout(SILENCE, from.read(&mut buffer)).await.map_err(silent)??;
        if read == 0 {
            break;
        }
        let looked = *came / LOOK_BYTES;
        *came += read as u64;
        sum.update(&buffer[..read]);
        file.write_all(&buffer[..read]).await?;
        if let Some(leave) = leave.filter(|_| *came / LOOK_BYTES != looked) {
            let leave = leave.to_owned();
            let room = tokio::task::spawn_blocking(move || ample(&leave, 0)).await?;
            room.map_err(std::io::Error::other)?;
        }
    }
    file.sync_all().await?;
    // QEMU reads it as a user of its own.
    file.set_permissions(std::fs::Permissions::from_mode(0o644)).await?;
    let sha256 = sum.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(Imported { sha256, size: *came })
}
