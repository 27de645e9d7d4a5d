//! Files of images, kept under their SHA-256. A file that is not here is fetched from a host that has it, and is
//! believed only when its content has that sum.

use super::{in_words, says};
use crate::agent::storage::StorageFailure;
use sha2::{Digest, Sha256};
use std::{
    collections::BTreeSet,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};

/// The images of this host.
#[derive(Clone, Debug)]
pub struct ImageStore {
    directory: PathBuf,
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

/// What to say when the disk had no room for an image of which so much came.
fn full(directory: &Path, came: u64) -> StorageFailure {
    let room = nix::sys::statvfs::statvfs(directory).map_or_else(
        |error| error.to_string(),
        |stat| in_words(stat.blocks_available().saturating_mul(stat.fragment_size())) + " free",
    );
    says(format!(
        "the disk of the images, {}, is full ({room}, more than {} needed): free some space there, or enlarge it",
        directory.display(),
        in_words(came)
    ))
}

impl ImageStore {
    /// Images under this directory.
    #[must_use]
    pub fn new(directory: PathBuf) -> Self {
        Self { directory }
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
        let copied = copy(&mut from, &part, &mut came).await;
        unfinished.0 = None;
        let imported = match copied {
            Ok(imported) => imported,
            Err(error) => {
                let _ = tokio::fs::remove_file(&part).await;
                let (is, directory) = (error.kind(), self.directory.clone());
                if is != std::io::ErrorKind::StorageFull {
                    return Err(failed(&part)(error));
                }
                let said = tokio::task::spawn_blocking(move || full(&directory, came)).await;
                return Err(said.unwrap_or_else(|_| failed(&part)(error)));
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

/// Counts in `came` what was read, also when it fails.
async fn copy(
    from: &mut (impl AsyncRead + Unpin),
    to: &Path,
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
        *came += read as u64;
        sum.update(&buffer[..read]);
        file.write_all(&buffer[..read]).await?;
    }
    file.sync_all().await?;
    // QEMU reads it as a user of its own.
    file.set_permissions(std::fs::Permissions::from_mode(0o644)).await?;
    let sha256 = sum.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(Imported { sha256, size: *came })
}
