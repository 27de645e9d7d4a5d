//! Launch records: what a restarted daemon needs to adopt a VM.

use super::{
    driver::VmLaunch,
    mirrors::MirrorLaunch,
    process::{is_gone, look},
    run_dir::{self, RECORD},
};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, io, path::Path};

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
    put(directory, &Launched { launch: launch.clone(), pid, start_time: stat.start_time })
}

fn put(directory: &Path, record: &Launched) -> io::Result<()> {
    let text = serde_json::to_vec(record).expect("a launch is plain data");
    run_dir::write(&directory.join(RECORD), &text, None)
}

/// Notes that no memory of its guest is yet to come; fine when there is no record.
///
/// # Errors
/// When it cannot be read or written.
pub fn note_whole(directory: &Path) -> io::Result<()> {
    let Some(mut record) = read(directory)?.filter(|record| record.launch.postcopy) else {
        return Ok(());
    };
    record.launch.postcopy = false;
    put(directory, &record)
}

/// Notes how a process has a mirrored disk open by now.
///
/// # Errors
/// When it cannot be read or written, or there is none.
pub fn note_mirror(directory: &Path, place: usize, mirror: &MirrorLaunch) -> io::Result<()> {
    let mut record = read(directory)?.ok_or(io::ErrorKind::NotFound)?;
    let at = record.launch.at(place).ok_or(io::ErrorKind::NotFound)?;
    record.launch.disks[at].mirror = Some(mirror.clone());
    put(directory, &record)
}

/// Changes which disks a process has, and how they are.
///
/// # Errors
/// When it cannot be read or written, or there is none.
pub fn note_disks(directory: &Path, change: impl FnOnce(&mut VmLaunch)) -> io::Result<()> {
    let mut record = read(directory)?.ok_or(io::ErrorKind::NotFound)?;
    change(&mut record.launch);
    put(directory, &record)
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

/// A record as far as it can be read.
pub type Read = io::Result<Option<Launched>>;

/// The records of this host by VM, also those whose process has ended. One that cannot be read says so by itself.
///
/// # Errors
/// When it cannot be told which there are.
pub fn all(run_dir: &Path) -> io::Result<BTreeMap<String, Read>> {
    let entries = match std::fs::read_dir(run_dir) {
        Ok(entries) => entries,
        Err(error) if is_gone(&error) => return Ok(BTreeMap::new()),
        Err(error) => return Err(error),
    };
    let mut found = BTreeMap::new();
    for entry in entries {
        let entry = entry?;
        found.insert(entry.file_name().to_string_lossy().into_owned(), read(&entry.path()));
    }
    Ok(found)
}
