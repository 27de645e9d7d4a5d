//! What the pieces of a replica hold, as hashes: two replicas are compared without sending them.

use super::kept::Part;
use crate::agent::storage::{StorageFailure, VolumeName};
use async_trait::async_trait;
use haven_model::{Name, volume::VolumeRef};
use nix::unistd::{Whence, lseek64};
use sha2::{Digest, Sha256};
use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
};

/// Bytes of a piece.
pub const PIECE: u64 = 64 << 10;
/// What a direct read must be aligned to at most.
const ALIGNED: usize = 4096;

/// The SHA-256 of a piece.
pub type Hash = [u8; 32];

/// Tells what pieces of replicas hold, on this host and on others.
#[async_trait]
pub trait Pieces: Send + Sync {
    /// The hashes of so many pieces of a host's replica, the first of which is number `from`; fewer at its end.
    ///
    /// # Errors
    /// In words, when that host does not tell.
    async fn hashes(
        &self,
        host: &Name,
        volume: &VolumeRef,
        from: u64,
        count: u64,
    ) -> Result<Vec<Hash>, StorageFailure>;
    /// What a host's copy of a replica as it was holds from `from` on: its next part.
    ///
    /// # Errors
    /// In words, when that host does not tell, or has no such copy.
    async fn kept(
        &self,
        host: &Name,
        volume: &VolumeName,
        copy: &str,
        from: u64,
    ) -> Result<Part, StorageFailure>;
}

/// The hashes of so many pieces of a file, the first of which is number `from`; fewer at its end. It is read past the page
/// cache where its file system does that: what its disk has.
///
/// # Errors
/// When it cannot be read.
pub fn read(path: &Path, from: u64, count: u64) -> io::Result<Vec<Hash>> {
    let direct = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path);
    let file = match direct {
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => File::open(path),
        other => other,
    }?;
    let size = file.metadata()?.len();
    let whole = usize::try_from(PIECE).unwrap_or(usize::MAX);
    let mut room = vec![0; whole + ALIGNED];
    let skip = room.as_ptr().align_offset(ALIGNED).min(ALIGNED);
    let piece = &mut room[skip..skip + whole];
    let empty: Hash = Sha256::digest(vec![0; whole]).into();
    let mut hashes = Vec::new();
    for begin in (from..from.saturating_add(count)).map(|number| number * PIECE) {
        if begin >= size {
            break;
        }
        // What was never written takes no room, and need not be read.
        let end = (begin + PIECE).min(size);
        if end == begin + PIECE && data_from(&file, begin).is_none_or(|data| data >= end) {
            hashes.push(empty);
            continue;
        }
        let has = fill(&file, piece, begin)?;
        hashes.push(Sha256::digest(&piece[..has]).into());
    }
    Ok(hashes)
}

/// Where a file holds something from here on; nothing when it does not, or its file system does not tell.
pub(in crate::storage) fn data_from(file: &File, begin: u64) -> Option<u64> {
    let begin = i64::try_from(begin).ok()?;
    match lseek64(file, begin, Whence::SeekData) {
        Ok(data) => u64::try_from(data).ok(),
        Err(nix::Error::ENXIO) => None,
        Err(_) => u64::try_from(begin).ok(),
    }
}

/// Where the next hole of a file begins; its end at the latest.
pub(in crate::storage) fn hole_from(file: &File, begin: u64) -> u64 {
    let at = i64::try_from(begin).ok().and_then(|at| lseek64(file, at, Whence::SeekHole).ok());
    at.and_then(|at| u64::try_from(at).ok()).unwrap_or(u64::MAX)
}

fn fill(file: &File, piece: &mut [u8], begin: u64) -> io::Result<usize> {
    let mut has = 0;
    while has < piece.len() {
        match file.read_at(&mut piece[has..], begin + has as u64) {
            Ok(0) => break,
            Ok(more) => has += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(has)
}

#[cfg(test)]
mod tests {
    use super::{PIECE, read};
    use sha2::{Digest, Sha256};
    use std::os::unix::fs::FileExt;

    #[test]
    fn pieces_are_told_whether_or_not_they_were_ever_written() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("replica.raw");
        let file = std::fs::File::create(&path).unwrap();
        file.set_len(4 * PIECE + 512).unwrap();
        let empty = read(&path, 0, 9).unwrap();
        assert_eq!(empty.len(), 5);
        assert!(empty[..4].iter().all(|hash| *hash == empty[0]));
        assert_eq!(empty[0], <[u8; 32]>::from(Sha256::digest(vec![0; PIECE as usize])));
        // Written with nothing, it is the same as never written.
        file.write_all_at(&[0; 4096], 2 * PIECE).unwrap();
        assert_eq!(read(&path, 0, 9).unwrap(), empty);
        file.write_all_at(&[1], 2 * PIECE + 70).unwrap();
        file.sync_all().unwrap();
        let now = read(&path, 1, 2).unwrap();
        assert_eq!((now.len(), now[0]), (2, empty[0]));
        assert_ne!(now[1], empty[0]);
        assert!(read(&path, 5, 3).unwrap().is_empty());
    }
}
