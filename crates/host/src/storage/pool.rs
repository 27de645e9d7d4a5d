//! The directory of a pool: is it what it should be, and has it room.
//!
//! A shared pool holds the file [`MARK`] with the pool's path in it. Without it, or with another path, nothing is
//! written there. It is made only on request ([`create_shared`]), once in a pool's life, and never on first use: an
//! empty directory is what an unmounted mount point looks like, and also what a filer exports whose own disk is not
//! mounted. A mark written there would make VMs start on new, empty volumes while theirs are somewhere else. The path
//! is what names a pool here: within a cluster it is the same on every host and no two pools share one.

use super::{in_words, masters, says};
use crate::{
    agent::storage::{StorageFailure, VolumeName},
    vm::run_dir,
};
use haven_model::{Bytes, PoolDriverKind, PoolSpec, pool::PoolRoom};
use std::{
    fs::{DirBuilder, File, OpenOptions, Permissions},
    io::{self, Read},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown},
    path::{Path, PathBuf},
};

/// The file that says which shared pool a directory is.
pub const MARK: &str = ".haven-pool";
/// What a volume needs beside its content at least, bytes: QEMU's tables.
const OVERHEAD_BYTES: u64 = 1 << 20;

/// The command that marks a directory.
fn by_hand(pool: &PoolSpec) -> String {
    format!("`haven pool mark {}` on one host", pool.path)
}

/// Makes a shared pool of an empty directory, which must be mounted. Fine when it is this pool already.
///
/// # Errors
/// When it is another pool, or holds other files.
pub fn create_shared(pool: &PoolSpec) -> Result<(), StorageFailure> {
    let path = Path::new(&pool.path);
    match mark(pool)? {
        Some(named) if named == pool.path => return Ok(()),
        Some(named) => return Err(another(pool, &named)),
        None => {}
    }
    let mut entries = std::fs::read_dir(path).map_err(|error| unreadable(pool, &error))?;
    let foreign = entries.find_map(|entry| {
        let name = entry.ok()?.file_name();
        (name != "lost+found").then_some(name)
    });
    if let Some(name) = foreign {
        return Err(says(format!(
            "{} is not empty (it holds {}), so no pool is made of it; empty it, or name another directory",
            pool.path,
            name.display()
        )));
    }
    run_dir::write(&path.join(MARK), format!("{}\n", pool.path).as_bytes(), None)
        .and_then(|()| sync(path))
        .map_err(|error| says(format!("{} is not writable ({error})", pool.path)))
}

/// The format of a pool's volumes, which is the ending of their files too. A replica is the same on all hosts, byte for
/// byte, so it is nothing but what the guest wrote.
#[must_use]
pub fn format(pool: &PoolSpec) -> &'static str {
    match pool.driver {
        PoolDriverKind::Local | PoolDriverKind::Shared | PoolDriverKind::Gluster => "qcow2",
        PoolDriverKind::Mirrored | PoolDriverKind::Rbd | PoolDriverKind::Nfs => "raw",
    }
}

/// How large a guest sees the disk in a file of this format, bytes. Of `qcow2` its head tells that (QEMU's
/// `docs/interop/qcow2.rst`).
///
/// # Errors
/// When the file cannot be read, or is no such disk.
pub fn size(path: &Path, format: &str) -> io::Result<u64> {
    let mut file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)?;
    if format != "qcow2" {
        return Ok(file.metadata()?.len());
    }
    let mut head = [0; 32];
    file.read_exact(&mut head)?;
    if head[..4] != *b"QFI\xfb" {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "it is no disk of QEMU's"));
    }
    let size = head[24..].try_into().map_err(io::Error::other)?;
    Ok(u64::from_be_bytes(size))
}

/// Makes a file longer.
///
/// # Errors
/// When the file system does not let it.
pub fn lengthen(path: &Path, size_bytes: u64) -> io::Result<()> {
    let file = OpenOptions::new()
        .write(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)?;
    file.set_len(size_bytes)
}

/// Makes sure that a pool's directory is what it should be.
///
/// # Errors
/// A sentence that says what it is instead and what to do.
pub fn ready(pool: &PoolSpec) -> Result<PathBuf, StorageFailure> {
    let path = PathBuf::from(&pool.path);
    let Some(wanted) = says_it_is(pool) else {
        local(&path).map_err(|error| {
            says(format!(
                "the pool's directory {} cannot be made ({error}); check the path and its file system",
                pool.path
            ))
        })?;
        return Ok(path);
    };
    match mark(pool)? {
        Some(named) if named == wanted => Ok(path),
        Some(_) if pool.driver == PoolDriverKind::Gluster => Err(says(format!(
            "{} is not this pool but another one; correct where it is reached",
            pool.place()
        ))),
        Some(named) => Err(another(pool, &named)),
        None if pool.driver == PoolDriverKind::Gluster => Err(says(format!(
            "{} holds no {MARK}: it is not mounted at {}, or its files were removed; it is tried again by itself",
            pool.place(),
            pool.path
        ))),
        None => Err(says(format!(
            "{} holds no {MARK}: the shared pool is not mounted there, or is new; mount it on every host, and if it is new and empty run {}",
            pool.path,
            by_hand(pool)
        ))),
    }
}

/// What the mark of a pool must say whose directory may not be mounted; nothing of one that is its host's own.
fn says_it_is(pool: &PoolSpec) -> Option<&str> {
    match pool.driver {
        PoolDriverKind::Shared => Some(&pool.path),
        PoolDriverKind::Gluster => Some(pool.mark().unwrap_or_default()),
        _ => None,
    }
}

/// Makes a local pool's directory. VMs' users must pass through it to their own volumes.
fn local(path: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o711).create(path) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(_) => {
            std::fs::create_dir_all(path)?;
            std::fs::set_permissions(path, Permissions::from_mode(0o711))?;
        }
    }
    let mode = std::fs::metadata(path)?.permissions().mode();
    if mode & 0o011 == 0o011 {
        return Ok(());
    }
    std::fs::set_permissions(path, Permissions::from_mode(mode | 0o011))
}

fn another(pool: &PoolSpec, named: &str) -> StorageFailure {
    let is = if named.is_empty() { "no pool by name".into() } else { format!("the pool {named}") };
    says(format!(
        "what is mounted at {} is not this pool: its {MARK} names {is}; mount the right file system there, or if this is the pool run {}",
        pool.path,
        by_hand(pool)
    ))
}

fn unreadable(pool: &PoolSpec, error: &io::Error) -> StorageFailure {
    if pool.driver == PoolDriverKind::Gluster {
        return says(format!(
            "{} does not answer ({error}); look at `gluster volume status` there, it is tried again by itself",
            pool.place()
        ));
    }
    says(format!(
        "the shared pool's directory {} cannot be read ({error}); mount it on every host",
        pool.path
    ))
}

/// Which pool a directory says to be.
fn mark(pool: &PoolSpec) -> Result<Option<String>, StorageFailure> {
    let path = Path::new(&pool.path);
    // Asked first, so that a directory that is missing is told from a mark that is.
    std::fs::metadata(path).map_err(|error| unreadable(pool, &error))?;
    let opened = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW).open(path.join(MARK));
    let file = match opened {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(unreadable(pool, &error)),
    };
    let mut text = String::new();
    file.take(4096).read_to_string(&mut text).map_err(|error| unreadable(pool, &error))?;
    Ok(Some(text.trim().to_owned()))
}

/// The room in a pool; nothing when its directory is not there yet, or holds another pool.
///
/// # Errors
/// A sentence, when it cannot be told.
pub fn room(pool: &PoolSpec) -> Result<Option<PoolRoom>, StorageFailure> {
    let directory = Path::new(&pool.path);
    if !directory.is_dir() && pool.driver != PoolDriverKind::Gluster {
        return Ok(None);
    }
    // Not mounted, it would tell of the disk beneath.
    let wanted = says_it_is(pool);
    if wanted.is_some() && mark(pool)?.as_deref() != wanted {
        return Ok(None);
    }
    let unknown = |error: io::Error| untold(pool, &error);
    let stat = nix::sys::statvfs::statvfs(directory).map_err(|error| unknown(error.into()))?;
    let bytes = |blocks: u64| Bytes(blocks.saturating_mul(stat.fragment_size()));
    let used = taken_in(directory).map_err(unknown)?;
    let used = used + taken_in(&directory.join(masters::DIRECTORY)).map_err(unknown)?;
    // As `df` counts: what is kept back for root is neither.
    let taken = stat.blocks().saturating_sub(stat.blocks_free());
    let (free, total) = (bytes(stat.blocks_available()), bytes(taken + stat.blocks_available()));
    Ok(Some(PoolRoom { total, free, used: Bytes(used) }))
}

/// What the files of a directory take, bytes; nothing when it is not there.
fn taken_in(directory: &Path) -> io::Result<u64> {
    let entries = match std::fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        entries => entries?,
    };
    let mut taken = 0;
    for entry in entries {
        match entry.and_then(|entry| entry.metadata()) {
            // What is taken, which a file that was never filled does not.
            Ok(of) if of.is_file() => taken += of.blocks() * 512,
            Ok(_) => {}
            // It was removed meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(taken)
}

/// Refuses what a pool could never hold. Volumes take room only as they are written, so this promises nothing about
/// later; but one that is larger than all that is left fails its guest for certain once it is filled.
///
/// # Errors
/// A sentence with both figures.
pub fn has_room(
    pool: &PoolSpec,
    directory: &Path,
    volume: &VolumeName,
    bytes: u64,
) -> Result<(), StorageFailure> {
    let free = free(pool, directory)?;
    if bytes.saturating_add(OVERHEAD_BYTES) <= free {
        return Ok(());
    }
    Err(no_room(pool, volume, bytes, free))
}

/// What to say of a volume for which the file system had no room.
#[must_use]
pub fn full(pool: &PoolSpec, volume: &VolumeName, bytes: u64) -> StorageFailure {
    match free(pool, Path::new(&pool.path)) {
        Ok(free) => no_room(pool, volume, bytes, free),
        Err(failure) => failure,
    }
}

fn no_room(pool: &PoolSpec, volume: &VolumeName, bytes: u64, free: u64) -> StorageFailure {
    says(format!(
        "the pool {} is full ({} free, {} needed for the disk `{}` of {}): free some space, enlarge the pool, or ask for a smaller disk; it is tried again by itself",
        pool.path,
        in_words(free),
        in_words(bytes.saturating_add(OVERHEAD_BYTES)),
        volume.disk,
        volume.vm
    ))
}

fn untold(pool: &PoolSpec, error: &io::Error) -> StorageFailure {
    says(format!("the room in the pool {} cannot be told ({error}); is it mounted?", pool.path))
}

fn free(pool: &PoolSpec, directory: &Path) -> Result<u64, StorageFailure> {
    let stat =
        nix::sys::statvfs::statvfs(directory).map_err(|error| untold(pool, &error.into()))?;
    Ok(stat.blocks_available().saturating_mul(stat.fragment_size()))
}

/// Gives a finished volume to its VM and its name, in this order, each on the disk before the next: after a power cut
/// there is a whole volume or none.
///
/// # Errors
/// When the file system does not let it.
pub fn put(part: &Path, path: &Path, owner: u32) -> io::Result<()> {
    let file = own(part, owner)?;
    file.sync_all()?;
    std::fs::rename(part, path)?;
    sync(path.parent().unwrap_or(Path::new("/")))
}

/// Gives a file to a VM's user and to nobody else; a link in its place is refused.
///
/// # Errors
/// When the file system does not let it.
pub fn own(path: &Path, owner: u32) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)?;
    fchown(&file, Some(owner), Some(owner))?;
    file.set_permissions(Permissions::from_mode(0o600))?;
    Ok(file)
}

/// Brings a directory's names to the disk.
///
/// # Errors
/// When the disk does not take them.
pub fn sync(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}
