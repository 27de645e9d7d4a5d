//! What a local pool holds, and volumes that no VM has any more: they are put aside under the name `<volume>.aside`,
//! which no VM is ever given, and removed a day later.
//!
//! Rejected: removing them at once. A host that was taken into a new cluster, or a store that was set up anew after a
//! disaster, knows none of the volumes that are there, and they may be all that is left.

use super::{mirrored::runs, pool, says};
use crate::{
    agent::storage::{StorageFailure, VolumeName},
    vm::run_dir,
};
use haven_model::PoolSpec;
use nix::sys::statfs::{FsType, statfs};
use std::{
    collections::BTreeSet,
    io,
    os::unix::fs::MetadataExt,
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// How long a volume that was put aside is kept.
const KEPT: Duration = Duration::from_secs(24 * 3600);
/// The ending of its name.
const ENDING: &str = ".aside";

fn unreadable(pool: &PoolSpec) -> impl Fn(io::Error) -> StorageFailure {
    let path = pool.path.clone();
    move |error| {
        says(format!(
            "the pool's directory {path} cannot be tidied ({error}); check its file system"
        ))
    }
}

/// The names of files in the directory; none when there is no directory.
fn files(directory: &Path) -> io::Result<Vec<String>> {
    let entries = match std::fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let names = entries.map(|entry| Ok(entry?.file_name().into_string().ok()));
    names.filter_map(io::Result::transpose).collect()
}

/// File systems that several hosts may have mounted. What is there may be another host's, whatever the pool is called.
const OF_SEVERAL_HOSTS: [(FsType, &str); 8] = [
    (FsType(0x6969), "NFS"),
    (FsType(0xff53_4d42), "CIFS"),
    (FsType(0xfe53_4d42), "SMB"),
    (FsType(0x00c3_6400), "Ceph"),
    (FsType(0x6573_5546), "FUSE"),
    (FsType(0x7461_636f), "OCFS2"),
    (FsType(0x0116_1970), "GFS2"),
    (FsType(0x0102_1997), "9P"),
];

/// The kind of file system, if several hosts may have it mounted.
#[must_use]
pub fn of_several_hosts(kind: FsType) -> Option<&'static str> {
    OF_SEVERAL_HOSTS.iter().find(|(several, _)| *several == kind).map(|(_, name)| *name)
}

/// The volumes in a pool, finished or not; none where other hosts may have theirs.
///
/// # Errors
/// When its directory cannot be read.
pub fn volumes(pool: &PoolSpec) -> Result<Vec<VolumeName>, StorageFailure> {
    let directory = Path::new(&pool.path);
    let files = files(directory).map_err(unreadable(pool))?;
    if files.is_empty() {
        return Ok(Vec::new());
    }
    let kind = statfs(directory).map_err(|error| unreadable(pool)(error.into()))?;
    if let Some(kind) = of_several_hosts(kind.filesystem_type()) {
        tracing::warn!(
            pool = pool.path,
            kind,
            "the pool is called local and is on a file system that other hosts may use: old volumes there are not removed; make it a shared pool"
        );
        return Ok(Vec::new());
    }
    let names: BTreeSet<VolumeName> = files
        .iter()
        .filter_map(|file| {
            let whole = format!(".{}", pool::format(pool));
            file.strip_suffix(&whole).or_else(|| file.strip_suffix(".part"))
        })
        .filter_map(VolumeName::parse)
        .collect();
    Ok(names.into_iter().collect())
}

/// Puts volumes aside, and removes those that were put aside a day before `now`.
///
/// # Errors
/// When the file system does not let it.
pub fn put(pool: &PoolSpec, names: &[VolumeName], now: SystemTime) -> Result<(), StorageFailure> {
    let directory = Path::new(&pool.path);
    let failed = unreadable(pool);
    for name in names {
        run_dir::remove(&directory.join(format!("{name}.part"))).map_err(&failed)?;
        let aside = directory.join(format!("{name}{ENDING}"));
        let file = directory.join(format!("{name}.{}", pool::format(pool)));
        run_dir::remove(&runs::beside(&file)).map_err(&failed)?;
        match std::fs::rename(file, &aside) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
    }
    let mut changed = !names.is_empty();
    for file in files(directory).map_err(&failed)? {
        let ours = file.strip_suffix(ENDING).and_then(VolumeName::parse).is_some();
        let path = directory.join(&file);
        if ours && old(&path, now).map_err(&failed)? {
            tracing::warn!(path = %path.display(), "a volume that no VM has was put aside a day ago: removed");
            run_dir::remove(&path).map_err(&failed)?;
            changed = true;
        }
    }
    if changed { pool::sync(directory).map_err(&failed) } else { Ok(()) }
}

/// Renaming sets the time of a file's last change of state.
fn old(path: &Path, now: SystemTime) -> io::Result<bool> {
    let seconds = u64::try_from(std::fs::symlink_metadata(path)?.ctime()).unwrap_or_default();
    let since = UNIX_EPOCH + Duration::from_secs(seconds);
    Ok(now.duration_since(since).is_ok_and(|age| age >= KEPT))
}
