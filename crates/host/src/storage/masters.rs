//! Masters: an image as a pool of one format keeps it, so that the disks made from it need no copying.
//!
//! ```text
//!   <pool>/.masters/<SHA-256 of the image>.<format of the pool>       made once, never written again, readable by all
//!        │ reflink, where the file system has it: the disk stands alone and shares blocks until they are written
//!        └ else an overlay over it (`qcow2` only): the disk reads from it what its guest has not written yet
//! ```
//!
//! A `local` pool needs none: its disks are overlays over the image of their host, which is never removed from there. A `shared`
//! pool has them beside its disks, so that every host finds what a disk stands on under the same name; they stay as long as the
//! pool does, since only the disks know which of them is needed. Replicas of a `mirrored` volume are the same on all hosts byte
//! for byte and stand on nothing: there a master is only made where it can be reflinked, and is removed after it was not used for
//! 30 days (docs/decisions/0028-clones.md).

use super::{
    busy::Busy,
    pool,
    qemu_img::{self, Failure},
    says,
};
use crate::{agent::storage::StorageFailure, vm::run_dir};
use std::{
    collections::BTreeMap,
    fs::{DirBuilder, File, OpenOptions, Permissions},
    io,
    os::{
        fd::AsRawFd,
        unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    },
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

/// The directory in a pool.
pub const DIRECTORY: &str = ".masters";
/// The ending of one that is not finished.
const UNFINISHED: &str = ".part";
/// What a daemon that was killed has left is removed after so long.
const LEFT: Duration = Duration::from_secs(24 * 3600);
/// A master on which nothing stands is removed when it was not used for so long.
const UNUSED: Duration = Duration::from_secs(30 * 24 * 3600);

/// Those that are being made, so that two disks wait for one copy.
#[derive(Debug, Default)]
pub struct Masters(Mutex<BTreeMap<PathBuf, Arc<tokio::sync::Mutex<()>>>>);

/// An image, as its host has it.
#[derive(Clone, Copy, Debug)]
pub struct Image<'a> {
    /// SHA-256 of its file.
    pub sha256: &'a str,
    /// The file.
    pub path: &'a Path,
    /// Its format, as QEMU names it.
    pub format: &'a str,
}

/// The master of an image for disks in the directory of `part`.
fn beside(image: Image<'_>, format: &str, part: &Path) -> PathBuf {
    let directory = part.parent().unwrap_or(Path::new("/"));
    directory.join(DIRECTORY).join(format!("{}.{format}", image.sha256))
}

/// Makes `to` a file with the blocks of `from`, which both share until one of them is written. False when the file system
/// cannot; then nothing is left of `to`.
///
/// # Errors
/// When `from` cannot be read or `to` cannot be made.
pub fn reflink(from: &Path, to: &Path) -> io::Result<bool> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let source = OpenOptions::new().read(true).custom_flags(flags).open(from)?;
    let target =
        OpenOptions::new().write(true).create_new(true).mode(0o600).custom_flags(flags).open(to)?;
    // SAFETY: both descriptors are open until the call returns, and it reads no memory.
    let done =
        unsafe { libc::ioctl(target.as_raw_fd(), libc::FICLONE as _, source.as_raw_fd()) } == 0;
    let error = io::Error::last_os_error();
    if done {
        return Ok(true);
    }
    std::fs::remove_file(to)?;
    match error.kind() {
        io::ErrorKind::StorageFull => Err(error),
        _ => Ok(false),
    }
}

/// Whether files in this directory can share blocks.
fn reflinks(directory: &Path) -> io::Result<bool> {
    let id = uuid::Uuid::now_v7();
    let [from, to] = ["a", "b"].map(|end| directory.join(format!("{id}{end}{UNFINISHED}")));
    std::fs::write(&from, [1; 4096])?;
    let can = reflink(&from, &to);
    run_dir::remove(&from)?;
    run_dir::remove(&to)?;
    can
}

fn unwritable(path: &Path) -> impl Fn(io::Error) -> Failure {
    let path = path.display().to_string();
    move |error| match error.kind() {
        io::ErrorKind::StorageFull => Failure::Full,
        _ => {
            says(format!("{path} cannot be written ({error}); check the pool's file system")).into()
        }
    }
}

/// What a look at a master found.
enum Found {
    /// It is there.
    There,
    /// It is to be made.
    Missing,
    /// It would be of no use.
    Useless,
}

/// Looks for a master, and tidies up before one is made.
fn look(master: &Path, raw: bool) -> io::Result<Found> {
    let directory = master.parent().unwrap_or(Path::new("/"));
    if let Ok(file) = File::open(master) {
        // By which it is known to be in use; a file system that is full does not matter to that.
        let _ = file.set_modified(SystemTime::now());
        return Ok(Found::There);
    }
    match DirBuilder::new().mode(0o755).create(directory) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        let path = entry.path();
        let age = entry.metadata().and_then(|of| of.modified());
        let age = age.ok().and_then(|at| at.elapsed().ok()).unwrap_or_default();
        let kept = match path.extension().and_then(|ending| ending.to_str()) {
            Some("part") => LEFT,
            Some("raw") => UNUSED,
            _ => continue,
        };
        if age >= kept {
            run_dir::remove(&path)?;
        }
    }
    Ok(if raw && !reflinks(directory)? { Found::Useless } else { Found::Missing })
}

/// Gives a finished master its name, which reaches the disk before any disk stands on it.
fn put(part: &Path, master: &Path) -> io::Result<()> {
    let file =
        OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOFOLLOW).open(part)?;
    // Each VM's QEMU reads it as a user of its own, and nobody writes it again.
    file.set_permissions(Permissions::from_mode(0o444))?;
    file.sync_all()?;
    // Another host may have made it meanwhile, and its guests have that file open.
    match std::fs::hard_link(part, master) {
        Ok(()) => run_dir::remove(part)?,
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => run_dir::remove(part)?,
        Err(_) => std::fs::rename(part, master)?,
    }
    pool::sync(master.parent().unwrap_or(Path::new("/")))
}

/// A file that is removed when whoever makes it is given up.
struct Unfinished(Option<PathBuf>);

impl Drop for Unfinished {
    fn drop(&mut self) {
        if let Some(path) = self.0.take() {
            // Its disk may hang, and nobody waits.
            std::thread::spawn(move || run_dir::remove(&path));
        }
    }
}

impl Masters {
    /// How large a guest sees the disk of an image, bytes, as the master for disks beside `part` tells; nothing when there is
    /// none yet.
    ///
    /// # Errors
    /// When the pool's disk does not answer.
    pub async fn size(
        &self,
        busy: &Busy,
        image: Image<'_>,
        format: &'static str,
        part: &Path,
    ) -> Result<Option<u64>, StorageFailure> {
        let master = beside(image, format, part);
        busy.run(part, move || Ok(pool::size(&master, format).ok())).await
    }

    /// Makes `part`, in the pool's directory, a disk in the pool's format that holds what the image holds; at most of
    /// `size_bytes`, which may be more than that.
    ///
    /// # Errors
    /// [`Failure::Full`], or a sentence.
    pub async fn disk(
        &self,
        busy: &Busy,
        image: Image<'_>,
        format: &'static str,
        part: &Path,
        size_bytes: u64,
    ) -> Result<(), Failure> {
        let master = beside(image, format, part);
        if self.is_ready(busy, image, format, &master).await? {
            let (from, to) = (master.clone(), part.to_owned());
            let shared = busy.run(part, move || Ok(reflink(&from, &to))).await?;
            if shared.map_err(unwritable(part))? {
                return Ok(());
            }
            if format == "qcow2" {
                // By a name that is the same wherever the pool is mounted.
                let (on, part) =
                    (format!("{DIRECTORY}/{}.{format}", image.sha256), qemu_img::text(part)?);
                let size = size_bytes.to_string();
                let args = ["create", "-q", "-f", format, "-b", &on, "-F", format, part, &size];
                return qemu_img::make(&args).await;
            }
        }
        let (from, to) = (qemu_img::text(image.path)?, qemu_img::text(part)?);
        qemu_img::make(&["convert", "-f", image.format, "-O", format, from, to]).await
    }

    /// The master of an image, made now if it has to be, as a disk beside it that stands on it names it.
    ///
    /// # Errors
    /// [`Failure::Full`], or a sentence.
    pub async fn beneath(
        &self,
        busy: &Busy,
        image: Image<'_>,
        format: &'static str,
        part: &Path,
    ) -> Result<String, Failure> {
        self.is_ready(busy, image, format, &beside(image, format, part)).await?;
        Ok(format!("{DIRECTORY}/{}.{format}", image.sha256))
    }

    /// Whether the master is there, made now if it has to be. False where it would be of no use.
    async fn is_ready(
        &self,
        busy: &Busy,
        image: Image<'_>,
        format: &'static str,
        master: &Path,
    ) -> Result<bool, Failure> {
        let making = {
            let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(all.entry(master.to_owned()).or_default())
        };
        let _alone = making.lock().await;
        let asked = master.to_owned();
        let found = busy.run(master, move || Ok(look(&asked, format == "raw"))).await?;
        match found.map_err(unwritable(master))? {
            Found::There => return Ok(true),
            Found::Useless => return Ok(false),
            Found::Missing => {}
        }
        let part = master.with_extension(format!("{}{UNFINISHED}", uuid::Uuid::now_v7()));
        let (from, to) = (qemu_img::text(image.path)?, qemu_img::text(&part)?);
        let mut unfinished = Unfinished(Some(part.clone()));
        let made = qemu_img::make(&["convert", "-f", image.format, "-O", format, from, to]).await;
        unfinished.0 = None;
        let (done, asked) = (part.clone(), master.to_owned());
        let put = match made {
            Ok(()) => busy.run(master, move || Ok(put(&done, &asked))).await.map_err(Failure::from),
            Err(failure) => Err(failure),
        };
        let put = put.and_then(|put| put.map_err(unwritable(master)));
        if put.is_err() {
            let left = move || run_dir::remove(&part).map_err(|error| says(error.to_string()));
            let removed: Result<(), StorageFailure> = busy.run(master, left).await;
            if let Err(failure) = removed {
                tracing::warn!(%failure, "an unfinished master cannot be removed");
            }
        }
        put.map(|()| true)
    }
}
