//! Heartbeats between simulated hosts.

use crate::net::Net;
use async_trait::async_trait;
use haven_host::heartbeat::Wire;
use haven_store::clock::Clock;
use std::{
    collections::BTreeMap,
    net::Ipv4Addr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::sync::mpsc;

/// Datagrams that a host's kernel keeps for it.
const BUFFER: usize = 64;

/// Where each host's daemon listens now.
#[derive(Default)]
pub struct Segment(Mutex<BTreeMap<Ipv4Addr, (String, mpsc::Sender<Vec<u8>>)>>);

/// One daemon's end.
pub struct SimWire {
    host: String,
    net: Arc<Net>,
    clock: Clock,
    segment: Arc<Segment>,
    inbox: tokio::sync::Mutex<mpsc::Receiver<Vec<u8>>>,
}

impl SimWire {
    /// Listens at `address`; a daemon that listened there before hears no more.
    #[must_use]
    pub fn new(
        host: &str,
        address: Ipv4Addr,
        net: &Arc<Net>,
        clock: &Clock,
        segment: &Arc<Segment>,
    ) -> Self {
        let (sender, inbox) = mpsc::channel(BUFFER);
        let mut listening = segment.0.lock().unwrap_or_else(PoisonError::into_inner);
        listening.insert(address, (host.to_owned(), sender));
        Self {
            host: host.to_owned(),
            net: Arc::clone(net),
            clock: clock.clone(),
            segment: Arc::clone(segment),
            inbox: tokio::sync::Mutex::new(inbox),
        }
    }
}

#[async_trait]
impl Wire for SimWire {
    async fn send(&self, to: Ipv4Addr, packet: &[u8]) {
        self.clock.pass().await;
        let target = {
            let listening = self.segment.0.lock().unwrap_or_else(PoisonError::into_inner);
            listening.get(&to).cloned()
        };
        let Some((name, inbox)) = target else { return };
        if self.net.loses() {
            return;
        }
        let (net, host, packet) = (Arc::clone(&self.net), self.host.clone(), packet.to_vec());
        let delay = Duration::from_micros(100 + net.random(2_000));
        tokio::spawn(async move {
            tokio::time::sleep(delay).await;
            if net.carries(&host, &name) {
                // A full buffer drops what comes, as the kernel's does.
                let _ = inbox.try_send(packet);
            }
        });
    }

    async fn receive(&self) -> Vec<u8> {
        let packet = self.inbox.lock().await.recv().await;
        self.clock.pass().await;
        match packet {
            Some(packet) => packet,
            None => std::future::pending().await,
        }
    }
}
