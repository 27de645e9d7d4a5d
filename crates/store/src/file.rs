//! Small files that must survive a power cut: what a host knows of itself, its certificates, its counters.

use std::{
    fs::File,
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

/// Writes a file that only its owner can read. A power cut at any moment leaves the old content or the new, never a
/// part; the new one is on the disk when this returns.
///
/// # Errors
/// When the file system does not let it; the old content stands then.
pub fn write_whole(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_owned();
    name.push(".new");
    let new = path.with_file_name(name);
    // What an interrupted write left may have other rights.
    match std::fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(&new)?;
    file.write_all(content)?;
    file.sync_all()?;
    std::fs::rename(&new, path)?;
    File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::write_whole;
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    #[test]
    fn a_file_is_replaced_whole_never_written_in_place() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("host.json");
        write_whole(&path, b"old").unwrap();
        let held = std::fs::File::open(&path).unwrap();
        std::fs::write(directory.path().join("host.json.new"), "cut off").unwrap();
        write_whole(&path, b"new").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
        // Whoever reads the old one reads it to its end.
        assert_eq!(std::io::read_to_string(held).unwrap(), "old");
        let there = std::fs::metadata(&path).unwrap();
        assert_eq!((there.permissions().mode() & 0o777, there.nlink()), (0o600, 1));
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }
}
