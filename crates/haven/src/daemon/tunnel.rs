//! The way of a guest's memory to another host: from a socket that only its QEMU reaches, over mutual TLS, into the
//! process that takes it.

use super::local::Peers;
use async_trait::async_trait;
use haven_host::agent::tunnel::{Tunnel, TunnelError};
use haven_model::Name;
use std::{
    collections::BTreeMap,
    os::unix::fs::{PermissionsExt, chown},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};
use tokio::{net::UnixListener, task::JoinHandle};

/// The socket's name in a VM's directory.
const SOCKET: &str = "outgoing.sock";

/// Tunnels of this host's daemon, one per VM.
pub struct Tunnels {
    /// `RUN/vms`.
    run_dir: PathBuf,
    peers: Peers,
    open: Mutex<BTreeMap<String, JoinHandle<()>>>,
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

#[async_trait]
impl Tunnel for Tunnels {
    async fn open(&self, vm: &str, uid: u32, host: &Name) -> Result<PathBuf, TunnelError> {
        self.close(vm);
        let path = self.run_dir.join(vm).join(SOCKET);
        let failed = |error: std::io::Error| TunnelError {
            what: format!("the socket {} cannot be made", path.display()),
            why: error.to_string(),
        };
        let listener = listen(&path, uid).map_err(failed)?;
        // Before QEMU begins, so that a host that cannot be reached costs no copy.
        let mut far = self
            .peers
            .way_into(host, vm)
            .await
            .map_err(|why| TunnelError { what: format!("{host} does not take {vm}"), why })?;
        let name = vm.to_owned();
        let carry = tokio::spawn(async move {
            let Ok((mut near, _)) = listener.accept().await else { return };
            if let Err(error) = tokio::io::copy_bidirectional(&mut near, &mut far).await {
                tracing::warn!(vm = name, %error, "the way of its memory to another host broke");
            }
        });
        self.open.lock().unwrap_or_else(PoisonError::into_inner).insert(vm.to_owned(), carry);
        Ok(path)
    }

    fn close(&self, vm: &str) {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner).remove(vm);
        if let Some(carry) = open {
            carry.abort();
            // Fine when it is gone with the VM's directory.
            let _ = std::fs::remove_file(self.run_dir.join(vm).join(SOCKET));
        }
    }
}
