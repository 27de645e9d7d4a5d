//! Steps on a disk that may hang, each on a thread that may wait for ever. A step that was given up goes on there until
//! the disk answers; until then no other begins on the same file, so that a late end of the first cannot spoil it, and
//! so that a hanging disk holds one thread per file and not one per try.

use super::says;
use crate::agent::storage::StorageFailure;
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

/// How long a step may take until it is given up; it goes on by itself.
const DEADLINE: Duration = Duration::from_secs(30);
/// How long a step waits for another on the same file.
const PATIENCE: Duration = Duration::from_secs(2);
/// How often it looks.
const TICK: Duration = Duration::from_millis(10);

fn silent(path: &Path, since: Instant) -> StorageFailure {
    says(format!(
        "the disk under {} has not answered for {} s; mend it, or reset this host",
        path.display(),
        since.elapsed().as_secs()
    ))
}

/// The files on which a step is under way, and since when.
#[derive(Clone, Debug, Default)]
pub struct Busy(Arc<Mutex<BTreeMap<PathBuf, Instant>>>);

/// One of them, until this is dropped.
#[derive(Debug)]
struct Hold {
    busy: Busy,
    path: PathBuf,
}

impl Busy {
    /// Takes the file, or tells since when another step has it.
    fn take(&self, path: &Path) -> Result<Hold, Instant> {
        let mut busy = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(since) = busy.get(path) {
            return Err(*since);
        }
        busy.insert(path.to_owned(), Instant::now());
        Ok(Hold { busy: self.clone(), path: path.to_owned() })
    }

    /// Takes the file as soon as it is free.
    async fn hold(&self, path: &Path) -> Result<Hold, StorageFailure> {
        let until = Instant::now() + PATIENCE;
        loop {
            match self.take(path) {
                Ok(hold) => return Ok(hold),
                Err(since) if Instant::now() >= until => return Err(silent(path, since)),
                Err(_) => tokio::time::sleep(TICK).await,
            }
        }
    }

    /// Runs what may wait for a disk or a filer, for long or for ever, where the daemon's other work does not wait for
    /// it. It goes on when this is dropped.
    ///
    /// # Errors
    /// Those of `work`; and when this step, or an earlier one on the same path, does not end in time.
    pub async fn run<T: Send + 'static>(
        &self,
        path: &Path,
        work: impl FnOnce() -> Result<T, StorageFailure> + Send + 'static,
    ) -> Result<T, StorageFailure> {
        let hold = self.hold(path).await?;
        let since = Instant::now();
        let done = tokio::task::spawn_blocking(move || {
            let done = work();
            drop(hold);
            done
        });
        match tokio::time::timeout(DEADLINE, done).await {
            Ok(done) => {
                done.unwrap_or_else(|_| Err(says("the daemon ends; the next one tries again")))
            }
            Err(_) => Err(silent(path, since)),
        }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.busy.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::Busy;
    use std::{path::Path, sync::mpsc, time::Duration};

    #[tokio::test]
    async fn a_step_that_hangs_keeps_the_next_on_its_file_from_beginning_and_no_other() {
        let (busy, file) = (Busy::default(), Path::new("/pool/a"));
        let (end, ends) = mpsc::channel::<()>();
        let hangs = busy.run(file, move || {
            let _ = ends.recv();
            Ok(())
        });
        assert!(tokio::time::timeout(Duration::from_millis(50), hangs).await.is_err());
        let said = busy.run(file, || Ok(())).await.unwrap_err().what;
        assert!(said.contains("the disk under /pool/a has not answered for 2 s"), "{said}");
        busy.run(Path::new("/pool/b"), || Ok(())).await.unwrap();
        drop(end);
        busy.run(file, || Ok(())).await.unwrap();
    }
}
