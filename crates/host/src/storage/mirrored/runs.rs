//! The lowest run of its volume that a replica may be served to. It stands beside the replica on its disk, and only rises.

use crate::storage::pool;
use haven_store::file::write_whole;
use std::{
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

/// The file beside that of the replica.
#[must_use]
pub fn beside(replica: &Path) -> PathBuf {
    let mut name = replica.file_name().unwrap_or_default().to_owned();
    name.push(".run");
    replica.with_file_name(name)
}

/// The lowest that may be served; 0 when none was yet.
///
/// # Errors
/// When that cannot be told: then none may be.
pub fn lowest(replica: &Path) -> io::Result<u64> {
    match std::fs::read_to_string(beside(replica)) {
        Ok(text) => text.trim().parse().map_err(|_| io::Error::from(io::ErrorKind::InvalidData)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
        Err(error) => Err(error),
    }
}

/// Raises it; when it returns that is on the disk. True unless a later one stands there already.
///
/// # Errors
/// When the disk does not take it; this one or the one before stands then.
pub fn raise(replica: &Path, run: u64) -> io::Result<bool> {
    let now = lowest(replica)?;
    let path = beside(replica);
    let directory = path.parent().unwrap_or(Path::new("/"));
    if now > run {
        return Ok(false);
    }
    if now == run {
        // Whoever wrote it may have been killed before its name was on the disk.
        return pool::sync(directory).map(|()| true);
    }
    match write_whole(&path, run.to_string().as_bytes()) {
        Err(error) if error.kind() == io::ErrorKind::StorageFull && now > 0 => {
            // A disk that is full takes no new file; a few bytes within one sector are written whole or not.
            let file = std::fs::File::options().write(true).open(&path)?;
            file.write_all_at(run.to_string().as_bytes(), 0)?;
            file.sync_all()?;
        }
        written => written?,
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::{beside, lowest, raise};

    #[test]
    fn it_only_rises_and_what_cannot_be_read_serves_nobody() {
        let disk = tempfile::tempdir().unwrap();
        let replica = disk.path().join("db.data.u1");
        assert_eq!(lowest(&replica).unwrap(), 0);
        assert!(raise(&replica, 7).unwrap());
        assert!(raise(&replica, 7).unwrap(), "the same once more");
        assert!(!raise(&replica, 6).unwrap());
        assert_eq!(lowest(&replica).unwrap(), 7);
        // Half of one that a power cut left is no run.
        std::fs::write(disk.path().join("db.data.u1.run.new"), "9").unwrap();
        assert_eq!(lowest(&replica).unwrap(), 7);
        assert!(raise(&replica, 8).unwrap());
        std::fs::write(beside(&replica), "nonsense").unwrap();
        assert!(lowest(&replica).is_err());
        assert!(raise(&replica, 9).is_err());
    }
}
