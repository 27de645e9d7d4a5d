//! The directory of a VM, `RUN/vms/<vm>/`, and files that root writes.
//!
//! It belongs to root (0711), and so does all in it. The VM's own user can create nothing there: QEMU gets its sockets,
//! its console log and its messages as open descriptors. So a guest that broke out of QEMU finds no place where it
//! could lay a link for root, or a socket for the daemon, to follow.

use std::{
    ffi::OsString,
    fs::{DirBuilder, File, OpenOptions, Permissions},
    io::{self, Write},
    os::{
        fd::OwnedFd,
        unix::{
            fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown},
            net::UnixListener,
        },
    },
    path::{Path, PathBuf},
};

/// What was started, by which process.
pub const RECORD: &str = "launch.json";
/// QEMU's control socket.
pub const QMP_SOCKET: &str = "qmp.sock";
/// The socket of the serial console.
pub const CONSOLE_SOCKET: &str = "console.sock";
/// The socket of the guest agent.
pub const AGENT_SOCKET: &str = "agent.sock";
/// The socket at which QEMU takes the contents of disks.
pub const DISKS_SOCKET: &str = "disks.sock";
/// The socket at which QEMU serves disks as they were.
pub const VIEW_SOCKET: &str = "view.sock";
/// The guest stands until all its disks are seen at one instant.
pub const HELD: &str = "held";
/// Its file systems are frozen for that.
pub const FROZEN: &str = "frozen";
/// What QEMU said.
pub const MESSAGES: &str = "stderr";
/// The NoCloud seed.
pub const SEED: &str = "seed.img";

/// Root writes; a VM's user passes through to the files that it may read.
const MODE: u32 = 0o711;

/// Makes the directory of a VM that does not run. One that belongs to somebody else, or is no directory, goes first:
/// what is in it cannot be trusted.
///
/// # Errors
/// When the file system does not let it.
pub fn prepare(run_dir: &Path, vm: &str) -> io::Result<PathBuf> {
    std::fs::create_dir_all(run_dir)?;
    let path = run_dir.join(vm);
    match std::fs::symlink_metadata(&path) {
        Ok(found) if found.is_dir() && found.uid() == nix::unistd::geteuid().as_raw() => {}
        Ok(found) if found.is_dir() => std::fs::remove_dir_all(&path)?,
        Ok(_) => std::fs::remove_file(&path)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    match DirBuilder::new().mode(MODE).create(&path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let directory = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_DIRECTORY)
        .open(&path)?;
    directory.set_permissions(Permissions::from_mode(MODE))?;
    Ok(path)
}

/// Writes a file whole: either the old content is there or the new. Readable for root, and for `reader` if there is one.
///
/// # Errors
/// When the file system does not let it; nothing of the new content is left then.
pub fn write(path: &Path, content: &[u8], reader: Option<u32>) -> io::Result<()> {
    let mut name = OsString::from(path.file_name().ok_or(io::ErrorKind::InvalidInput)?);
    name.push(".new");
    let new = path.with_file_name(name);
    remove(&new)?;
    let written = write_new(&new, content, reader).and_then(|()| std::fs::rename(&new, path));
    if written.is_err() {
        remove(&new)?;
    }
    written
}

fn write_new(path: &Path, content: &[u8], reader: Option<u32>) -> io::Result<()> {
    let mode = if reader.is_some() { 0o640 } else { 0o600 };
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
    file.write_all(content)?;
    match reader {
        Some(gid) => fchown(&file, None, Some(gid)),
        None => Ok(()),
    }
}

/// Removes a file; fine when it is not there. A link is removed, not what it names.
///
/// # Errors
/// When the file system does not let it.
pub fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Opens a file of root's to append to; a link in its place is refused.
///
/// # Errors
/// When the file system does not let it.
pub fn append(path: &Path) -> io::Result<File> {
    let options = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .custom_flags(options)
        .open(path)?;
    // A pipe or a device in its place could stop the daemon, or worse.
    if file.metadata()?.is_file() { Ok(file) } else { Err(io::ErrorKind::InvalidInput.into()) }
}

/// Listens at a socket that only root can reach; whoever listened there before does no more.
///
/// # Errors
/// When the path is too long, or the file system does not let it.
pub fn listen(path: &Path) -> io::Result<OwnedFd> {
    remove(path)?;
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, Permissions::from_mode(0o600))?;
    Ok(listener.into())
}

#[cfg(test)]
mod tests {
    use super::{append, listen, prepare, write};
    use std::os::unix::fs::{MetadataExt, symlink};

    #[test]
    fn a_directory_of_somebody_else_is_made_anew_and_belongs_to_root() {
        let run = tempfile::tempdir().unwrap();
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: needs root");
            return;
        }
        let theirs = run.path().join("web-1");
        std::fs::create_dir(&theirs).unwrap();
        symlink("/etc/passwd", theirs.join("launch.json")).unwrap();
        std::os::unix::fs::chown(&theirs, Some(200_001), Some(200_001)).unwrap();
        let made = prepare(run.path(), "web-1").unwrap();
        let found = std::fs::symlink_metadata(&made).unwrap();
        assert_eq!((found.uid(), found.mode() & 0o7777), (0, 0o711));
        assert_eq!(std::fs::read_dir(&made).unwrap().count(), 0);
        // A link in the directory's place is not followed either.
        let elsewhere = tempfile::tempdir().unwrap();
        std::fs::remove_dir(&made).unwrap();
        symlink(elsewhere.path(), &made).unwrap();
        prepare(run.path(), "web-1").unwrap();
        assert!(std::fs::symlink_metadata(&made).unwrap().is_dir());
        // A second time keeps what is there: the seed is written before the start.
        write(&made.join("seed.img"), b"seed", Some(200_001)).unwrap();
        prepare(run.path(), "web-1").unwrap();
        let seed = std::fs::metadata(made.join("seed.img")).unwrap();
        assert_eq!((seed.uid(), seed.gid(), seed.mode() & 0o777), (0, 200_001, 0o640));
    }

    #[test]
    fn links_are_replaced_or_refused_but_never_followed() {
        let directory = tempfile::tempdir().unwrap();
        let victim = directory.path().join("victim");
        std::fs::write(&victim, "as it was").unwrap();
        for name in ["file", "file.new"] {
            symlink(&victim, directory.path().join(name)).unwrap();
        }
        write(&directory.path().join("file"), b"new", None).unwrap();
        assert_eq!(std::fs::read(directory.path().join("file")).unwrap(), b"new");
        symlink(&victim, directory.path().join("log")).unwrap();
        assert!(append(&directory.path().join("log")).is_err());
        symlink(&victim, directory.path().join("socket")).unwrap();
        listen(&directory.path().join("socket")).unwrap();
        assert_eq!(std::fs::read(&victim).unwrap(), b"as it was");
        let mode = std::fs::symlink_metadata(directory.path().join("socket")).unwrap().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}
