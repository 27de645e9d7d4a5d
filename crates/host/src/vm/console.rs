//! Keeps files that QEMU appends to (the console's log, its messages) from growing without bound.
//!
//! QEMU itself writes the log, so nothing is lost while no daemon runs; the daemon that runs cuts it. Rejected: a
//! daemon that reads the console's socket and writes the log (loses what is said while it restarts, and takes the
//! socket from people); renaming (QEMU goes on writing to the renamed file).
//!
//! The head of a file that has grown beyond [`LIMIT_BYTES`] moves to `<file>.1`, of which one is kept, and the tail
//! stays, so that whoever reads the log always finds the last lines. Where the file system can take a range out of a
//! file (ext4, XFS) that is one step, and not a byte is lost. Elsewhere the file is emptied after the copy, and what
//! QEMU appends between the two is lost. While no daemon runs the file may grow; the next daemon cuts it.

use super::run_dir;
use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Seek, SeekFrom},
    os::{fd::AsRawFd, unix::fs::OpenOptionsExt},
    path::{Path, PathBuf},
    time::Duration,
};

/// What a file may hold before it is cut, bytes. The old one holds no more.
pub const LIMIT_BYTES: u64 = 1 << 20;
/// What stays of it at least, where the file system can do that, bytes.
const TAIL_BYTES: u64 = 128 << 10;
/// How often the daemon looks.
pub const INTERVAL: Duration = Duration::from_secs(1);

/// Where the old part of a file goes.
#[must_use]
pub fn old(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".1");
    name.into()
}

/// Cuts a file that has grown beyond [`LIMIT_BYTES`]; true when it did. Fine when there is none.
///
/// # Errors
/// When it cannot be read or cut, or the old part cannot be written; nothing is cut then.
pub fn cut(path: &Path) -> io::Result<bool> {
    let opened = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path);
    let mut file = match opened {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    let length = file.metadata()?.len();
    if length <= LIMIT_BYTES {
        return Ok(false);
    }
    let block = nix::sys::statvfs::fstatvfs(&file)?.block_size().max(1);
    let head = (length - TAIL_BYTES) / block * block;
    let kept = last_of(&mut file, head)?;
    run_dir::write(&old(path), &kept, None)?;
    if collapse(&file, head)? {
        return Ok(true);
    }
    let kept = last_of(&mut file, length)?;
    run_dir::write(&old(path), &kept, None)?;
    file.set_len(0)?;
    Ok(true)
}

/// The last bytes before `end`, as many as an old file may hold.
fn last_of(file: &mut File, end: u64) -> io::Result<Vec<u8>> {
    let begin = end.saturating_sub(LIMIT_BYTES);
    file.seek(SeekFrom::Start(begin))?;
    let mut bytes = Vec::new();
    file.take(end - begin).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Takes the first bytes out of a file in one step; false where the file system cannot do that.
fn collapse(file: &File, bytes: u64) -> io::Result<bool> {
    let length = i64::try_from(bytes).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: a plain system call on a descriptor that is open.
    let done =
        unsafe { libc::fallocate(file.as_raw_fd(), libc::FALLOC_FL_COLLAPSE_RANGE, 0, length) };
    if done == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL) => Ok(false),
        _ => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::{LIMIT_BYTES, cut, old};
    use std::{io::Write, path::Path};

    /// Writes numbered lines as a guest would, cutting now and then; returns how many lines.
    fn fill(path: &Path) -> usize {
        let mut log = super::run_dir::append(path).unwrap();
        let mut cuts = 0;
        let lines = 30_000;
        for line in 0..lines {
            writeln!(log, "line {line:080}").unwrap();
            if line % 100 == 0 && cut(path).unwrap() {
                cuts += 1;
            }
        }
        assert!(cuts >= 2, "{cuts}");
        lines
    }

    fn check(directory: &Path) {
        let path = directory.join("console.log");
        let lines = fill(&path);
        let (now, before) = (std::fs::read(&path).unwrap(), std::fs::read(old(&path)).unwrap());
        assert!(now.len() as u64 <= LIMIT_BYTES + 20_000, "{}", now.len());
        assert!(before.len() as u64 <= LIMIT_BYTES);
        let text = [before, now].concat();
        let text = String::from_utf8_lossy(&text);
        let tail: Vec<usize> = text
            .lines()
            .filter_map(|line| line.strip_prefix("line ")?.parse().ok())
            .skip(1)
            .collect();
        assert_eq!(tail.last(), Some(&(lines - 1)));
        assert!(tail.windows(2).all(|pair| pair[1] == pair[0] + 1), "a line is missing");
    }

    #[test]
    fn a_log_is_bounded_and_keeps_its_last_lines() {
        check(tempfile::tempdir().unwrap().path());
        // A tmpfs cannot take a range out of a file.
        check(tempfile::tempdir_in("/dev/shm").unwrap().path());
    }

    #[test]
    fn a_log_that_grew_unwatched_leaves_a_bounded_old_one() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("console.log");
        std::fs::write(&path, vec![b'x'; 5 << 20]).unwrap();
        assert!(cut(&path).unwrap());
        assert!(!cut(&path).unwrap());
        assert!(std::fs::metadata(old(&path)).unwrap().len() <= LIMIT_BYTES);
        assert!(std::fs::metadata(&path).unwrap().len() <= LIMIT_BYTES);
        assert!(!cut(&directory.path().join("none")).unwrap());
    }

    #[test]
    fn a_link_in_its_place_is_not_followed() {
        let directory = tempfile::tempdir().unwrap();
        let victim = directory.path().join("victim");
        std::fs::write(&victim, vec![b'x'; 2 << 20]).unwrap();
        std::os::unix::fs::symlink(&victim, directory.path().join("log")).unwrap();
        assert!(cut(&directory.path().join("log")).is_err());
        assert_eq!(std::fs::metadata(&victim).unwrap().len(), 2 << 20);
    }
}
