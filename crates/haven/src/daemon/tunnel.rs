//! The way of a guest's memory, and of disks that go along, to another host: from a socket that only its QEMU reaches,
//! over mutual TLS, into the process that takes it.

use super::local::Peers;
use async_trait::async_trait;
use haven_host::agent::tunnel::{Load, Tunnel, TunnelError};
use haven_model::Name;
use std::{
    collections::BTreeMap,
    os::unix::fs::{PermissionsExt, chown},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::Duration,
};
use tokio::{
    net::{UnixListener, UnixStream},
    task::{JoinHandle, JoinSet},
};

/// How long what was sent may take to arrive once its process has ended.
const ARRIVES: Duration = Duration::from_secs(30);

/// The socket's name in a VM's directory.
fn socket(load: Load) -> &'static str {
    match load {
        Load::Memory => "outgoing.sock",
        Load::Disks => "outgoing-disks.sock",
    }
}

/// Tunnels of this host's daemon.
pub struct Tunnels {
    /// `RUN/vms`.
    run_dir: PathBuf,
    peers: Peers,
    open: Mutex<BTreeMap<(String, Load), JoinHandle<()>>>,
}

impl Tunnels {
    /// None yet.
    pub fn new(run_dir: PathBuf, peers: Peers) -> Self {
        Self { run_dir, peers, open: Mutex::default() }
    }
}

/// Root's socket, to which this VM's QEMU alone may connect.
fn listen(path: &Path, uid: u32) -> std::io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    chown(path, Some(uid), None)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

impl Tunnels {
    /// Ends the one that carries this.
    fn end(&self, vm: &str, load: Load) {
        if let Some(carry) = self.take(vm, load) {
            carry.abort();
        }
    }

    /// Forgets it; nobody connects to it any more.
    fn take(&self, vm: &str, load: Load) -> Option<JoinHandle<()>> {
        let key = (vm.to_owned(), load);
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner).remove(&key)?;
        // Fine when it is gone with the VM's directory.
        let _ = std::fs::remove_file(self.run_dir.join(vm).join(socket(load)));
        Some(open)
    }
}

/// Carries one connection to its end.
async fn carry(vm: &str, mut near: UnixStream, mut far: Box<dyn haven_client::Duplex>) {
    if let Err(error) = tokio::io::copy_bidirectional(&mut near, &mut far).await {
        tracing::warn!(vm, %error, "the way of a guest to another host broke");
    }
}

/// Carries one connection for each disk, until it is dropped.
async fn carry_disks(listener: UnixListener, peers: Peers, host: Name, vm: String) {
    let mut ways = JoinSet::new();
    while let Ok((near, _)) = listener.accept().await {
        let far = match peers.way_into(&host, &vm, Load::Disks).await {
            Ok(far) => far,
            Err(why) => {
                tracing::warn!(vm, why, "the contents of a disk cannot be sent to {host}");
                continue;
            }
        };
        let vm = vm.clone();
        ways.spawn(async move { carry(&vm, near, far).await });
    }
}

#[async_trait]
impl Tunnel for Tunnels {
    async fn open(
        &self,
        vm: &str,
        uid: u32,
        host: &Name,
        load: Load,
    ) -> Result<PathBuf, TunnelError> {
        self.end(vm, load);
        let path = self.run_dir.join(vm).join(socket(load));
        let failed = |error: std::io::Error| TunnelError {
            what: format!("the socket {} cannot be made", path.display()),
            why: error.to_string(),
        };
        let listener = listen(&path, uid).map_err(failed)?;
        let name = vm.to_owned();
        let carries = match load {
            Load::Disks => {
                tokio::spawn(carry_disks(listener, self.peers.clone(), host.clone(), name))
            }
            Load::Memory => {
                // Before QEMU begins, so that a host that cannot be reached costs no copy.
                let far = self.peers.way_into(host, vm, load).await.map_err(|why| TunnelError {
                    what: format!("{host} does not take {vm}"),
                    why,
                })?;
                tokio::spawn(async move {
                    if let Ok((near, _)) = listener.accept().await {
                        carry(&name, near, far).await;
                    }
                })
            }
        };
        let key = (vm.to_owned(), load);
        self.open.lock().unwrap_or_else(PoisonError::into_inner).insert(key, carries);
        Ok(path)
    }

    fn close(&self, vm: &str) {
        self.end(vm, Load::Memory);
        self.end(vm, Load::Disks);
    }

    fn finish(&self, vm: &str) {
        for load in [Load::Memory, Load::Disks] {
            let Some(mut carry) = self.take(vm, load) else { continue };
            tokio::spawn(async move {
                if tokio::time::timeout(ARRIVES, &mut carry).await.is_err() {
                    carry.abort();
                }
            });
        }
    }
}
