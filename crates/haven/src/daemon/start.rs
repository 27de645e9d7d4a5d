//! What a daemon does at its start without keeping the lease waiting, and what it remembers from start to start.

use anyhow::Context;
use haven_host::agent::{HostFacts, Problems, lease::Session};
use haven_model::Snapshot;
use haven_store::file;
use std::{
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::watch;

/// The file in the state directory that keeps the number of the last start.
const KEPT: &str = "heartbeat.start";
/// Between two tries to open the API's port.
const LISTEN_AGAIN: Duration = Duration::from_secs(1);
/// More beats than a daemon sends between two starts: 100 a second for 20 years.
const STEP: u64 = 1 << 36;

/// Looks on a thread of its own; what was found is shown once it is known. A look that panics shows nothing.
pub fn in_background(
    look: impl FnOnce() -> HostFacts + Send + 'static,
) -> watch::Receiver<Option<HostFacts>> {
    let (out, facts) = watch::channel(None);
    tokio::task::spawn_blocking(move || out.send_replace(Some(look())));
    facts
}

/// A port of this host.
pub struct Port {
    /// What it is for, a word: under it this host's status tells why it is not open.
    pub name: &'static str,
    /// Address and number.
    pub address: SocketAddr,
    /// The options with which `ss` lists its kind.
    pub ss: &'static str,
    /// What is so while it is not open, in words.
    pub without: &'static str,
}

impl Port {
    /// The API's.
    pub fn api(address: SocketAddr) -> Self {
        Self { name: "api", address, ss: "-ltnp", without: "this host answers nobody" }
    }

    /// That of the heartbeats.
    pub fn heartbeat(address: SocketAddr) -> Self {
        let without = "no other host hears this one, and all suspect it";
        Self { name: "heartbeat", address, ss: "-lunp", without }
    }
}

/// Opens a port, as soon as it is free; while it is not, this host's status says so.
pub async fn opened<T, F: Future<Output = io::Result<T>>>(
    port: Port,
    problems: &Problems,
    open: impl Fn(SocketAddr) -> F,
) -> T {
    let Port { name, address, ss, without } = port;
    loop {
        match open(address).await {
            Ok(opened) => {
                problems.set(name, None);
                return opened;
            }
            Err(error) => {
                let port = address.port();
                let why = match error.kind() {
                    io::ErrorKind::AddrInUse => format!(
                        "another program has the port {port}, so that {without}: end it; `ss {ss} sport = :{port}` names it"
                    ),
                    _ => format!("{address} cannot be opened, so that {without}: {error}"),
                };
                if problems.set(name, Some(why.clone())) {
                    tracing::error!("{why}");
                }
            }
        }
        tokio::time::sleep(LISTEN_AGAIN).await;
    }
}

/// Resolves once the live copy shows the store's contents.
pub async fn loaded(mut live: watch::Receiver<Arc<Snapshot>>) -> anyhow::Result<()> {
    let ended = "the live copy has ended";
    let shown = live.wait_for(|snapshot| snapshot.revision > 0).await.context(ended);
    let (there, unreadable) = {
        let snapshot = shown?;
        (snapshot.cluster.is_some(), snapshot.unreadable.contains_key("cluster"))
    };
    if there {
        return Ok(());
    }
    // With other timers than the cluster's the guard may act after the proof.
    if unreadable {
        tracing::error!(
            "the cluster's spec cannot be read by this version of Haven; this host begins nothing before it can: update it"
        );
    }
    live.wait_for(|snapshot| snapshot.cluster.is_some()).await.context(ended)?;
    Ok(())
}

/// Logs how long this host was without a daemon that renews its lease.
pub async fn tell_first(mut session: watch::Receiver<Option<Session>>, began: Instant) {
    if session.wait_for(Option::is_some).await.is_ok() {
        let ms = began.elapsed().as_millis();
        tracing::info!("the lease was renewed first {ms} ms after the daemon's start");
    }
}

/// The number of this daemon's first heartbeat: larger than all that a daemon of this host sent before, also when the
/// clock went back over a reboot.
pub async fn number(state: PathBuf, wall_ms: i64) -> u64 {
    let clock = u64::try_from(wall_ms).unwrap_or(0) << 16;
    let kept = tokio::task::spawn_blocking(move || next(&state.join(KEPT), clock)).await;
    match kept {
        Ok(Ok(number)) => number,
        Ok(Err(error)) => {
            tracing::warn!(%error, "{KEPT} in the state directory cannot be read or written; if the clock goes back, other hosts suspect this one until it has caught up");
            clock
        }
        Err(_) => clock,
    }
}

/// The number after the kept one, or the clock's if that is larger; it is on the disk before it is used.
pub fn next(path: &Path, clock: u64) -> io::Result<u64> {
    let kept: u64 = match std::fs::read_to_string(path) {
        Ok(text) => text.trim().parse().unwrap_or(0),
        Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
        Err(error) => return Err(error),
    };
    let number = clock.max(kept.saturating_add(STEP));
    file::write_whole(path, number.to_string().as_bytes())?;
    Ok(number)
}
