//! The program `qemu-img`: makes disks and tells their sizes. It ends when nobody waits for it any more.

use super::says;
use crate::agent::storage::StorageFailure;
use haven_store::seal::Plain;
use std::{path::Path, process::Stdio};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    process::{Child, Command},
};

/// What the file system says when there is no room, as `qemu-img` repeats it.
const FULL: &str = "No space left";

/// Why a disk could not be made.
#[derive(Debug)]
pub enum Failure {
    /// There is no room for it.
    Full,
    /// Something else.
    Other(StorageFailure),
}

impl From<StorageFailure> for Failure {
    fn from(failure: StorageFailure) -> Self {
        Self::Other(failure)
    }
}

/// Starts a program that reads the key of a disk, if it is given one, at its standard input (`luks::secret`).
///
/// # Errors
/// When it cannot be started.
pub async fn spawn(command: &mut Command, key: Option<&Plain>) -> std::io::Result<Child> {
    let input = if key.is_some() { Stdio::piped() } else { Stdio::null() };
    let mut child = command.stdin(input).kill_on_drop(true).spawn()?;
    if let (Some(key), Some(mut input)) = (key, child.stdin.take()) {
        // One that has ended already says why by itself.
        let _ = input.write_all(key.expose().as_bytes()).await;
    }
    Ok(child)
}

/// Runs it; what it printed.
///
/// # Errors
/// What it said.
pub async fn run(args: &[&str]) -> Result<Vec<u8>, String> {
    run_with(args, None).await
}

/// The same with the key of a disk.
///
/// # Errors
/// What it said.
pub async fn run_with(args: &[&str], key: Option<&Plain>) -> Result<Vec<u8>, String> {
    let mut command = Command::new("qemu-img");
    command.args(args).stdout(Stdio::piped()).stderr(Stdio::piped());
    let output = match spawn(&mut command, key).await {
        Ok(child) => child.wait_with_output().await,
        Err(error) => Err(error),
    };
    let output = output.map_err(|error| {
        format!("qemu-img cannot be started ({error}); install the package qemu-utils")
    })?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    Err(String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; "))
}

/// Runs it with `-p` to make a disk, and tells how far it is, per cent.
///
/// # Errors
/// What it said.
pub async fn make_slowly(
    args: &[&str],
    key: Option<&Plain>,
    mut is_at: impl FnMut(f64),
) -> Result<(), Failure> {
    let mut command = Command::new("qemu-img");
    command.args(args).stdout(Stdio::piped()).stderr(Stdio::piped());
    let unstarted = |error: std::io::Error| {
        says(format!("qemu-img cannot be started ({error}); install the package qemu-utils"))
    };
    let mut child = spawn(&mut command, key).await.map_err(unstarted)?;
    let mut told = child.stdout.take().expect("it was asked for");
    let mut complaints = child.stderr.take().expect("it was asked for");
    let follow = async {
        let mut buffer = [0; 256];
        while let Ok(read @ 1..) = told.read(&mut buffer).await {
            // `    (12.34/100%)` and a return, again and again.
            let text = String::from_utf8_lossy(&buffer[..read]);
            let last = text.rsplit('(').find_map(|of| of.split_once('/')?.0.parse().ok());
            last.into_iter().for_each(&mut is_at);
        }
    };
    let mut said = String::new();
    let (_, read, ended) = tokio::join!(follow, complaints.read_to_string(&mut said), child.wait());
    read.map_err(unstarted)?;
    match ended.map_err(unstarted)? {
        ended if ended.success() => Ok(()),
        _ if said.contains(FULL) => Err(Failure::Full),
        _ => {
            let said = said.trim().replace('\n', "; ");
            Err(says(format!("the volume cannot be made: {said}")).into())
        }
    }
}

/// Runs it to make or to change a disk.
///
/// # Errors
/// What it said.
pub async fn make(args: &[&str]) -> Result<(), Failure> {
    make_with(args, None).await
}

/// The same with the key of a disk.
///
/// # Errors
/// What it said.
pub async fn make_with(args: &[&str], key: Option<&Plain>) -> Result<(), Failure> {
    match run_with(args, key).await {
        Ok(_) => Ok(()),
        Err(said) if said.contains(FULL) => Err(Failure::Full),
        Err(said) => Err(says(format!("the volume cannot be made: {said}")).into()),
    }
}

/// How large a guest sees the disk in a file of this format, bytes.
///
/// # Errors
/// When it is no such disk.
pub async fn size_of(disk: &Path, format: &str) -> Result<u64, StorageFailure> {
    let path = text(disk)?;
    let unreadable = |why: &str| {
        says(format!(
            "the image {path} is not a disk of the format {format} ({why}); import it again"
        ))
    };
    let told = run(&["info", "--output=json", "-f", format, path]).await;
    let told = told.map_err(|said| unreadable(&said))?;
    let told: serde_json::Value =
        serde_json::from_slice(&told).map_err(|error| unreadable(&error.to_string()))?;
    told["virtual-size"].as_u64().ok_or_else(|| unreadable("it tells no size"))
}

/// A path as an argument.
///
/// # Errors
/// When it is not UTF-8.
pub fn text(path: &Path) -> Result<&str, StorageFailure> {
    path.to_str().ok_or_else(|| says(format!("{} is not a path that QEMU takes", path.display())))
}
