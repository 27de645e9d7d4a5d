//! A file of a disk that no VM has open, served by `qemu-nbd` for as long as somebody reads or fills it.
//!
//! Its locks keep a VM from starting on the file meanwhile; whoever starts VMs ends this first.

use crate::{
    agent::storage::StorageFailure,
    storage::{luks, qemu_img, says},
    vm::{
        nbd::Nbd,
        views::{DiskView, Extent},
    },
};
use async_trait::async_trait;
use haven_store::seal::Plain;
use std::{
    io,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};
use tokio::{
    io::AsyncReadExt,
    net::UnixStream,
    process::{Child, Command},
};

/// How long it may take to begin.
const BEGINS: Duration = Duration::from_secs(15);
/// How long a disk may take for one request: to bring to it what was written, say.
const PATIENCE: Duration = Duration::from_secs(600);
/// So much is written before it is brought to the disk, bytes.
const FLUSHES: u64 = 256 << 20;
/// How long a process that was killed may take to end.
const ENDS: u32 = 250;
/// Between two looks.
const LOOK: Duration = Duration::from_millis(10);

/// A file that is served; no longer once this is dropped.
pub struct Served {
    nbd: Option<Nbd<UnixStream>>,
    child: Child,
    /// Since the last flush, bytes.
    unflushed: u64,
    /// Its socket's directory.
    _directory: tempfile::TempDir,
}

impl Served {
    /// Serves the file at `path`, of this format.
    ///
    /// # Errors
    /// A sentence, when it cannot be opened: it is missing, damaged, or a VM has it open.
    pub async fn open(
        path: &Path,
        format: &str,
        writable: bool,
        key: Option<&Plain>,
    ) -> Result<Self, StorageFailure> {
        let failed = |why: String| match luks::in_words(&why, path) {
            Some(words) => says(words),
            None => says(format!("{} cannot be opened ({why})", path.display())),
        };
        let directory = tempfile::tempdir().map_err(|error| failed(error.to_string()))?;
        let socket = directory.path().join("nbd.sock");
        let mut command = Command::new("qemu-nbd");
        command.arg(format!("--socket={}", socket.display()));
        command.args(["--export-name=disk", "--discard=unmap", "--cache=writeback", "--shared=1"]);
        if writable {
            command.arg("--detect-zeroes=unmap");
        } else {
            command.arg("--read-only");
        }
        if key.is_some() {
            let of = luks::opened(path, format)?;
            command.args(["--object", &luks::secret(), "--image-opts", &of]);
        } else {
            command.args(["--format", format, "--"]).arg(path);
        }
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = qemu_img::spawn(&mut command, key).await.map_err(|error| {
            says(format!("qemu-nbd cannot be started ({error}); install the package qemu-utils"))
        })?;
        let stream = connect(&mut child, &socket).await.map_err(failed)?;
        let nbd = Nbd::connect_within(stream, "disk", None, PATIENCE).await;
        let nbd = match nbd {
            Ok(nbd) => nbd,
            // It listens before it has looked at the file, and says then what is wrong with that.
            Err(error) => {
                let ended = tokio::time::timeout(BEGINS, child.wait()).await;
                let said = if ended.is_ok() { said(&mut child).await } else { String::new() };
                return Err(failed(if said.is_empty() { error.to_string() } else { said }));
            }
        };
        Ok(Self { nbd: Some(nbd), child, unflushed: 0, _directory: directory })
    }

    /// Writes.
    ///
    /// # Errors
    /// When the file does not take it.
    pub async fn write(&mut self, offset: u64, from: &[u8]) -> io::Result<()> {
        let nbd = self.nbd.as_mut().ok_or(io::ErrorKind::NotConnected)?;
        nbd.write(offset, from).await?;
        self.unflushed += from.len() as u64;
        if self.unflushed >= FLUSHES {
            self.unflushed = 0;
            nbd.flush().await?;
        }
        Ok(())
    }

    /// Brings all to the disk and ends; only then all is there.
    ///
    /// # Errors
    /// When the disk does not take it.
    pub async fn finish(mut self) -> io::Result<()> {
        let mut nbd = self.nbd.take().ok_or(io::ErrorKind::NotConnected)?;
        nbd.flush().await?;
        nbd.disconnect().await?;
        let status = tokio::time::timeout(PATIENCE, self.child.wait()).await??;
        match status.success() {
            true => Ok(()),
            false => Err(io::Error::other(format!("qemu-nbd ended with {status}"))),
        }
    }
}

/// Whoever goes on after it finds the file closed.
impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.start_kill();
        for _ in 0..ENDS {
            match self.child.try_wait() {
                Ok(None) => std::thread::sleep(Duration::from_millis(2)),
                _ => return,
            }
        }
        tracing::warn!("a qemu-nbd does not end; it waits for a disk");
    }
}

/// What a process that has ended said.
async fn said(child: &mut Child) -> String {
    let mut said = String::new();
    if let Some(stderr) = child.stderr.take() {
        let _ = stderr.take(4096).read_to_string(&mut said).await;
    }
    said.trim().trim_start_matches("qemu-nbd: ").to_owned()
}

/// Waits until it listens.
async fn connect(child: &mut Child, socket: &PathBuf) -> Result<UnixStream, String> {
    let until = tokio::time::Instant::now() + BEGINS;
    loop {
        if let Ok(stream) = UnixStream::connect(socket).await {
            return Ok(stream);
        }
        if let Ok(Some(_)) = child.try_wait() {
            return Err(said(child).await);
        }
        if tokio::time::Instant::now() >= until {
            return Err(format!("qemu-nbd did not begin within {} s", BEGINS.as_secs()));
        }
        tokio::time::sleep(LOOK).await;
    }
}

#[async_trait]
impl DiskView for Served {
    fn size(&self) -> u64 {
        self.nbd.as_ref().map_or(0, Nbd::size)
    }
    fn is_marked(&self) -> bool {
        false
    }
    async fn status(&mut self, offset: u64, length: u32) -> io::Result<Vec<Extent>> {
        self.nbd.as_mut().ok_or(io::ErrorKind::NotConnected)?.status(offset, length).await
    }
    async fn read(&mut self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.nbd.as_mut().ok_or(io::ErrorKind::NotConnected)?.read(offset, into).await
    }
    async fn release(&mut self, _: u64, _: u32) -> io::Result<()> {
        Ok(())
    }
}
