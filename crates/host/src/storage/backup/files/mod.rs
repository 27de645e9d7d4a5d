//! Single files out of a backup, read from its chunks as they are needed, without restoring anything.
//!
//! ```text
//!   DISK[:PARTITION]:/PATH ─► disk.rs (chunks, checked) ─► partitions.rs ─► ext2, ext3 or ext4 ─► a list, or a file
//! ```
//!
//! The file systems of a guest that ran are as a power cut would have left them: what stands in their journal yet counts.
//! Others than these are named, and not read: a VM that is made from the backup reads them.

mod disk;
mod partitions;

#[cfg(test)]
mod files_test;

use super::repository::Repository;
use crate::{agent::storage::StorageFailure, storage::says};
use disk::Disk;
use ext4_view::{Ext4, Ext4Error, PathBuf};
use haven_model::{
    Bytes, Name,
    api::{BackupFile, BackupSystem},
    backup::Backup,
};
use partitions::{Part, parts};
use std::io::Write;
use tokio::{
    io::{AsyncRead, DuplexStream},
    sync::oneshot,
};
use tokio_util::io::SyncIoBridge;

/// So many entries of a directory are told at most.
const MOST: usize = 10_000;
/// Of a file that is on its way, bytes.
const ON_ITS_WAY: usize = 1 << 20;
/// So much is read at once, bytes.
const AT_ONCE: usize = 1 << 18;

/// Where a file is: `DISK[:PARTITION]:/PATH`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct At {
    disk: Name,
    partition: Option<u32>,
    path: String,
}

impl At {
    /// Reads it.
    ///
    /// # Errors
    /// A sentence that says how it is written.
    pub fn parse(text: &str) -> Result<Self, StorageFailure> {
        let wrong = || {
            says(format!(
                "`{text}` is no place of a file: write DISK:/PATH, or DISK:PARTITION:/PATH, as `haven backup files` names them"
            ))
        };
        let (head, path) = text.split_once(":/").ok_or_else(wrong)?;
        let (disk, partition) = match head.split_once(':') {
            Some((disk, number)) => (disk, Some(number.parse().map_err(|_| wrong())?)),
            None => (head, None),
        };
        let disk = Name::new(disk).map_err(|_| wrong())?;
        Ok(Self { disk, partition, path: format!("/{path}") })
    }
}

/// What a file system says of something that is wrong with it, or with what was asked of it.
fn unread(at: &At, error: &Ext4Error) -> StorageFailure {
    says(format!("{} cannot be read in the backup ({error})", at.path))
}

/// The disks of a backup with what stands on them.
///
/// # Errors
/// A sentence, when one cannot be read.
pub async fn systems(
    repository: &Repository,
    backup: &Backup,
) -> Result<Vec<BackupSystem>, StorageFailure> {
    let mut found = Vec::new();
    for disk in &backup.disks {
        let mut read = Disk::open(repository, backup, &disk.name).await?;
        let parts = apart(move || parts(&mut read)).await?;
        found.extend(parts.into_iter().map(|part| BackupSystem {
            at: match part.number {
                Some(number) => format!("{}:{number}:/", disk.name),
                None => format!("{}:/", disk.name),
            },
            holds: part.holds.to_owned(),
            size: Bytes(part.length),
        }));
    }
    Ok(found)
}

async fn apart<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StorageFailure> + Send + 'static,
) -> Result<T, StorageFailure> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|error| Err(says(format!("the backup could not be read: {error}"))))
}

/// Opens the file system that a place is in.
fn system(mut disk: Disk, at: &At) -> Result<Ext4, StorageFailure> {
    let parts = parts(&mut disk)?;
    let asked = |part: &&Part| match at.partition {
        Some(number) => part.number == Some(number),
        None => part.number.is_none() || part.holds == partitions::EXT,
    };
    let mut fitting = parts.iter().filter(asked);
    let part = fitting.next().ok_or_else(|| {
        says(format!(
            "the disk `{}` has no such partition; `haven backup files` without a place names what is there",
            at.disk
        ))
    })?;
    if fitting.next().is_some() {
        return Err(says(format!(
            "the disk `{}` has several partitions with files: name one, {}:NUMBER:{}",
            at.disk, at.disk, at.path
        )));
    }
    if part.holds != partitions::EXT {
        return Err(says(format!(
            "what is asked for stands on {}, of which Haven reads no single files: make a VM from the backup (`haven backup restore … --as NAME`) and take them from there",
            part.holds
        )));
    }
    let within = disk.within(part.from, part.length);
    Ext4::load(Box::new(within)).map_err(|error| unread(at, &error))
}

/// What stands in a directory, or the one file that is named.
///
/// # Errors
/// A sentence.
pub async fn list(
    repository: &Repository,
    backup: &Backup,
    at: At,
) -> Result<Vec<BackupFile>, StorageFailure> {
    let disk = Disk::open(repository, backup, &at.disk).await?;
    apart(move || {
        let system = system(disk, &at)?;
        let failed = |error: Ext4Error| unread(&at, &error);
        let own = system.symlink_metadata(at.path.as_str()).map_err(failed)?;
        let leads = own.is_symlink() && at.path.ends_with('/');
        if !(own.is_dir() || leads) {
            let name = at.path.rsplit('/').next().unwrap_or_default().to_owned();
            let path = PathBuf::new(&at.path);
            return Ok(vec![entry(&system, name, &path, &own)]);
        }
        let mut files = Vec::new();
        for found in system.read_dir(at.path.as_str()).map_err(failed)? {
            let found = found.map_err(failed)?;
            let name = found.file_name().display().to_string();
            if name == "." || name == ".." {
                continue;
            }
            let about = found.metadata().map_err(failed)?;
            files.push(entry(&system, name, &found.path(), &about));
            if files.len() > MOST {
                return Err(says(format!(
                    "{} has more than {MOST} entries: name one of them",
                    at.path
                )));
            }
        }
        files.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(files)
    })
    .await
}

fn entry(system: &Ext4, name: String, path: &PathBuf, about: &ext4_view::Metadata) -> BackupFile {
    let kind = about.file_type();
    let kind = match () {
        () if kind.is_dir() => "directory",
        () if kind.is_symlink() => "link",
        () if kind.is_regular_file() => "file",
        () => "special",
    };
    let leads = about.is_symlink().then(|| system.read_link(path).ok()).flatten();
    let modified = about.modified();
    BackupFile {
        name,
        kind: kind.to_owned(),
        size: Bytes(about.len()),
        mode: about.mode(),
        uid: about.uid(),
        gid: about.gid(),
        modified_ms: modified.seconds().saturating_mul(1000),
        leads_to: leads.map(|path| path.display().to_string()),
    }
}

/// Opens a file. What cannot be read later ends it early, so its length is told, too.
///
/// # Errors
/// A sentence, when there is none, or it is no file.
pub async fn read(
    repository: &Repository,
    backup: &Backup,
    at: At,
) -> Result<(u64, Box<dyn AsyncRead + Send + Unpin>), StorageFailure> {
    let disk = Disk::open(repository, backup, &at.disk).await?;
    let (out, from) = tokio::io::duplex(ON_ITS_WAY);
    let (opened, is_open) = oneshot::channel();
    tokio::task::spawn_blocking(move || send(disk, &at, out, opened));
    let gone = |_| says("the backup could not be read: its reader ended");
    let length = is_open.await.map_err(gone)??;
    Ok((length, Box::new(from)))
}

fn send(
    disk: Disk,
    at: &At,
    out: DuplexStream,
    opened: oneshot::Sender<Result<u64, StorageFailure>>,
) {
    let open = || {
        let system = system(disk, at)?;
        let file = system.open(at.path.as_str()).map_err(|error| unread(at, &error))?;
        if !file.metadata().file_type().is_regular_file() {
            return Err(says(format!("{} is no file", at.path)));
        }
        Ok((file, system))
    };
    let (mut file, _system) = match open() {
        Ok(open) => open,
        Err(failure) => return drop(opened.send(Err(failure))),
    };
    if opened.send(Ok(file.metadata().len())).is_err() {
        return;
    }
    let (mut out, mut buffer) = (SyncIoBridge::new(out), vec![0; AT_ONCE]);
    loop {
        match file.read_bytes(&mut buffer) {
            Ok(0) => break,
            Ok(count) => {
                // Nobody wants the rest.
                if out.write_all(&buffer[..count]).is_err() {
                    return;
                }
            }
            Err(error) => {
                return tracing::warn!(path = at.path, %error, "a file of a backup cannot be read");
            }
        }
    }
    let _ = out.flush();
}
