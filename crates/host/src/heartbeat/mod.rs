//! Suspicion (DESIGN.md section 4): small authenticated datagrams between hosts, and what follows from their absence.
//!
//! Every host sends every other one a datagram each 200 ms with the list of hosts it does not hear itself, so that
//! each host can count for itself whether a majority of a host's watchers does not hear it. Suspicion proves nothing.

pub mod suspect;
#[cfg(test)]
mod suspect_test;

use async_trait::async_trait;
use haven_model::{Name, Timers};
use haven_store::clock::Clock;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};
use suspect::Watchers;
use tokio::{net::UdpSocket, sync::watch};
use tokio_util::sync::CancellationToken;

/// UDP port of heartbeats.
pub const PORT: u16 = 7381;

/// What a datagram says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Beat {
    /// Who.
    pub from: Name,
    /// Grows with each datagram of a boot; the daemon's start time in its upper half, so that a restart is newer.
    pub number: u64,
    /// Whom the sender does not hear.
    pub unheard: BTreeSet<Name>,
    /// The sender's next beat comes well before so many milliseconds have passed: hosts that live by shorter timers,
    /// because they have not heard of a change yet, do not suspect it sooner.
    #[serde(default)]
    pub silence_ms: u64,
}

/// Carries datagrams.
#[async_trait]
pub trait Wire: Send + Sync {
    /// Sends to a host; losses are not noticed.
    async fn send(&self, to: Ipv4Addr, packet: &[u8]);
    /// The next one that arrives.
    async fn receive(&self) -> Vec<u8>;
}

/// Carries datagrams over UDP.
pub struct UdpWire(UdpSocket);

impl UdpWire {
    /// Listens on this host's address, at [`PORT`].
    ///
    /// # Errors
    /// When the port is in use.
    pub async fn bind(address: SocketAddr) -> std::io::Result<Self> {
        Ok(Self(UdpSocket::bind(address).await?))
    }
}

#[async_trait]
impl Wire for UdpWire {
    async fn send(&self, to: Ipv4Addr, packet: &[u8]) {
        let _ = self.0.send_to(packet, SocketAddr::from((to, PORT))).await;
    }
    async fn receive(&self) -> Vec<u8> {
        let mut packet = vec![0; 8192];
        loop {
            if let Ok((length, _)) = self.0.recv_from(&mut packet).await {
                packet.truncate(length);
                return packet;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

/// HMAC-SHA256 (RFC 2104).
fn seal(key: &[u8; 32], message: &[u8]) -> [u8; 32] {
    let pad = |byte: u8| {
        let mut block = [byte; 64];
        block.iter_mut().zip(key).for_each(|(b, k)| *b ^= k);
        block
    };
    let inner = Sha256::new().chain_update(pad(0x36)).chain_update(message).finalize();
    Sha256::new().chain_update(pad(0x5c)).chain_update(inner).finalize().into()
}

/// A datagram: seal, then the beat.
#[must_use]
pub fn pack(key: &[u8; 32], beat: &Beat) -> Vec<u8> {
    let body = serde_json::to_vec(beat).expect("a beat is plain data");
    [seal(key, &body).as_slice(), &body].concat()
}

/// The beat of a datagram, if its seal is right.
#[must_use]
pub fn unpack(key: &[u8; 32], packet: &[u8]) -> Option<Beat> {
    let (given, body) = packet.split_at_checked(32)?;
    let right = seal(key, body);
    let same = given.iter().zip(right).fold(0, |differs, (a, b)| differs | (a ^ b)) == 0;
    if same { serde_json::from_slice(body).ok() } else { None }
}

/// What the heartbeats stand on.
pub struct HeartbeatConfig {
    /// This host.
    pub me: Name,
    /// The cluster's key.
    pub key: [u8; 32],
    /// All hosts with their addresses.
    pub hosts: watch::Receiver<BTreeMap<Name, Ipv4Addr>>,
    /// The cluster's timers: how often, and after how long a host is not heard.
    pub timers: watch::Receiver<Timers>,
    /// A number larger than that of any daemon of this host before.
    pub start: u64,
    /// This daemon's clock.
    pub clock: Clock,
}

/// What the heartbeats tell.
pub struct Told {
    suspected: watch::Sender<BTreeSet<Name>>,
    silent: watch::Sender<BTreeSet<Name>>,
    reunions: watch::Sender<u64>,
}

/// What is heard of them.
#[derive(Clone)]
pub struct Heard {
    /// Whom this host suspects.
    pub suspected: watch::Receiver<BTreeSet<Name>>,
    /// Those with whom this host itself cannot speak, whatever others hear.
    pub silent: watch::Receiver<BTreeSet<Name>>,
    /// Grows when this host and another hear each other again after a silence of either.
    pub reunions: watch::Receiver<u64>,
}

/// From [`run`] to those who want to know.
#[must_use]
pub fn channels() -> (Told, Heard) {
    let (suspected, suspected_in) = watch::channel(BTreeSet::new());
    let (silent, silent_in) = watch::channel(BTreeSet::new());
    let (reunions, reunions_in) = watch::channel(0);
    let heard = Heard { suspected: suspected_in, silent: silent_in, reunions: reunions_in };
    (Told { suspected, silent, reunions }, heard)
}

/// Resolves when the timers were changed; never once nobody can change them any more.
async fn changed(timers: &mut watch::Receiver<Timers>) {
    if timers.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// Sends and listens until `cancel`; tells whom this host suspects.
pub async fn run(
    mut config: HeartbeatConfig,
    wire: Arc<dyn Wire>,
    told: Told,
    cancel: CancellationToken,
) {
    let mut timers = config.timers.borrow_and_update().clone();
    let mut watchers = Watchers::new(config.me.clone(), timers.suspect.duration());
    let mut number = config.start;
    let mut next = config.clock.now();
    let mut said = BTreeSet::new();
    loop {
        // Also when a host has just become unheard: its other watchers wait for this one's voice.
        let wake = watchers.next_unheard(config.clock.now()).map_or(next, |at| at.min(next));
        tokio::select! {
            biased;
            () = cancel.cancelled() => return,
            packet = wire.receive() => {
                let beat = unpack(&config.key, &packet);
                let news = beat.is_some_and(|beat| watchers.heard(&beat, config.clock.now()));
                // Most datagrams say what the last one said, and a cluster sends hundreds a second.
                if !news && config.clock.now() < next {
                    continue;
                }
            }
            () = changed(&mut config.timers) => {
                timers = config.timers.borrow_and_update().clone();
                watchers.set_silence(timers.suspect.duration());
                // At once, so that the others hear of it.
                next = config.clock.now();
            }
            () = config.clock.sleep_until(wake) => {}
        }
        let now = config.clock.now();
        let hosts = config.hosts.borrow().clone();
        watchers.members(hosts.keys(), now);
        let unheard = watchers.unheard(now);
        let found = watchers.suspected(now);
        let silent = watchers.silent(now);
        told.silent.send_if_modified(|shown| std::mem::replace(shown, silent.clone()) != silent);
        let reunions = watchers.reunions();
        told.reunions.send_if_modified(|shown| std::mem::replace(shown, reunions) != reunions);
        told.suspected.send_if_modified(|shown| {
            let differs = *shown != found;
            if differs {
                tracing::info!(suspected = ?found, "suspicion changed");
                *shown = found;
            }
            differs
        });
        if now < next && unheard == said {
            continue;
        }
        if now >= next {
            next = next.plus(timers.heartbeat.duration()).max(now);
        }
        said.clone_from(&unheard);
        number += 1;
        let silence_ms = timers.suspect.0;
        let beat = Beat { from: config.me.clone(), number, unheard, silence_ms };
        let packet = pack(&config.key, &beat);
        for (host, address) in &hosts {
            if *host != config.me {
                wire.send(*address, &packet).await;
            }
        }
    }
}
