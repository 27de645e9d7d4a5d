//! Launch records: what a restarted daemon needs to adopt a VM.

use super::{
    driver::VmLaunch,
    process::{is_gone, look},
    run_dir::{self, RECORD},
};
use serde::{Deserialize, Serialize};
use std::{io, path::Path};

/// What was started, by which process.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Launched {
    /// What was started.
    pub launch: VmLaunch,
    /// QEMU's process.
    pub pid: i32,
    /// When that started, which tells it from a later one of the same number.
    pub start_time: u64,
}

/// Writes the record of a VM whose process waits for its guest to be let run.
///
/// # Errors
/// When it cannot be written, or the process has ended.
pub fn write(directory: &Path, launch: &VmLaunch, pid: i32) -> io::Result<()> {
    let stat = look(Path::new("/proc"), pid)?.ok_or(io::ErrorKind::NotFound)?;
    let record = Launched { launch: launch.clone(), pid, start_time: stat.start_time };
    let text = serde_json::to_vec(&record).expect("a launch is plain data");
    run_dir::write(&directory.join(RECORD), &text, None)
}

/// The record in a VM's directory; nothing when there is none, or one that cannot be understood (its process is a
/// stray then).
///
/// # Errors
/// When it cannot be read, which says nothing about the VM.
pub fn read(directory: &Path) -> io::Result<Option<Launched>> {
    let path = directory.join(RECORD);
    let text = match std::fs::read(&path) {
        Ok(text) => text,
        Err(error) if is_gone(&error) || error.kind() == io::ErrorKind::NotADirectory => {
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    match serde_json::from_slice(&text) {
        Ok(record) => Ok(Some(record)),
        Err(error) => {
            tracing::error!(path = %path.display(), %error, "this launch record cannot be understood");
            Ok(None)
        }
    }
}

/// All records of this host, also those whose process has ended.
///
/// # Errors
/// When one cannot be read: a VM that is overlooked could be started twice.
pub fn all(run_dir: &Path) -> io::Result<Vec<Launched>> {
    let entries = match std::fs::read_dir(run_dir) {
        Ok(entries) => entries,
        Err(error) if is_gone(&error) => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut found = Vec::new();
    for entry in entries {
        found.extend(read(&entry?.path())?);
    }
    Ok(found)
}
