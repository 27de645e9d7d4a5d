//! A disk made from a backup.

use super::{
    repository::{CHUNK, Index, Repository},
    served::Served,
};
use crate::{agent::storage::StorageFailure, storage::says};
use futures::{StreamExt, stream};
use haven_model::backup::BackupRef;
use haven_store::seal::Plain;
use std::{
    fmt,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

/// So many chunks are fetched at once.
const AT_ONCE: usize = 4;

/// How far a disk is, in per mille.
#[derive(Clone, Debug, Default)]
pub struct Progress(Arc<AtomicU64>);

impl Progress {
    /// It is so far, per cent.
    pub fn is_at(&self, percent: f64) {
        self.0.store((percent.clamp(0.0, 100.0) * 10.0) as u64, Ordering::Relaxed);
    }
    /// Per cent.
    #[must_use]
    pub fn percent(&self) -> u64 {
        self.0.load(Ordering::Relaxed) / 10
    }
}

/// What a disk is made from.
#[derive(Clone)]
pub struct Restore {
    /// Where it is.
    pub repository: Repository,
    /// Which disk of which backup.
    pub of: BackupRef,
    /// How far it is.
    pub progress: Progress,
}

impl fmt::Debug for Restore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Restore").field("of", &self.of).finish_non_exhaustive()
    }
}

impl Restore {
    /// Fills the empty file at `path`, of this format, which is of `size_bytes`.
    ///
    /// # Errors
    /// A sentence: the backup is gone, damaged, or larger than the disk; or the disk does not take it.
    pub async fn fill(
        &self,
        path: &Path,
        format: &str,
        size_bytes: u64,
        key: Option<&Plain>,
    ) -> Result<(), StorageFailure> {
        let Self { repository, of, progress } = self;
        repository.ready().await?;
        let backup = repository.read(&of.vm, &of.id).await?;
        let index = repository.index(&backup, &of.disk).await?;
        if index.size > size_bytes {
            return Err(says(format!(
                "the {of} is of {} bytes, and the disk that is to be made from it of {size_bytes}; make the disk at least that large",
                index.size
            )));
        }
        let mut file = Served::open(path, format, true, key).await?;
        if key.is_some() && format == "raw" {
            self.zeros(&mut file, path, &index).await?;
        }
        let total = index.chunks.len().max(1) as u64;
        let named = index.chunks.iter().enumerate().filter_map(|(i, id)| Some((i as u64, (*id)?)));
        let named: Vec<_> = named.collect();
        let fetched = named
            .into_iter()
            .map(|(i, id)| async move { repository.get(&id).await.map(|content| (i, content)) });
        let mut fetched = stream::iter(fetched).buffered(AT_ONCE);
        while let Some(chunk) = fetched.next().await {
            let (i, content) = chunk?;
            let offset = i * CHUNK;
            let fits = offset + content.len() as u64 <= index.size;
            if !fits {
                return Err(says(format!("the {of} is damaged: a chunk reaches beyond its end")));
            }
            file.write(offset, &content).await.map_err(|error| unwritten(path, &error))?;
            progress.0.store(i * 1000 / total, Ordering::Relaxed);
        }
        drop(fetched);
        file.finish().await.map_err(|error| unwritten(path, &error))
    }
}

impl Restore {
    /// Writes the zeros of a disk of which nobody knows otherwise what it reads as where nothing was written.
    async fn zeros(
        &self,
        file: &mut Served,
        path: &Path,
        index: &Index,
    ) -> Result<(), StorageFailure> {
        let zeros = vec![0; CHUNK as usize];
        let empty = index.chunks.iter().enumerate().filter(|(_, id)| id.is_none());
        for offset in empty.map(|(i, _)| i as u64 * CHUNK) {
            let length = CHUNK.min(index.size.saturating_sub(offset)) as usize;
            let written = file.write(offset, &zeros[..length]).await;
            written.map_err(|error| unwritten(path, &error))?;
        }
        Ok(())
    }
}

fn unwritten(path: &Path, error: &std::io::Error) -> StorageFailure {
    says(format!("{} does not take what is restored ({error}); is its pool full?", path.display()))
}
