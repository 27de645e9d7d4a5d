//! Networks and addresses that are only records, for the simulator.

use super::{
    address::AddressDriver,
    driver::{LeftAlone, NetworkDriver, NetworkError, NetworkWanted},
    uplink::{Uplink, UplinkDriver},
};
use async_trait::async_trait;
use haven_store::clock::Clock;
use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    sync::{Arc, Mutex, PoisonError},
};
use tokio::sync::Notify;

/// Takes everything.
pub struct FakeNetwork;

#[async_trait]
impl NetworkDriver for FakeNetwork {
    async fn apply(
        &self,
        _wanted: &[NetworkWanted],
        _left_alone: &LeftAlone,
    ) -> Result<BTreeMap<String, NetworkError>, NetworkError> {
        Ok(BTreeMap::new())
    }
}

/// Uplinks that have a link, or none, as it was set.
#[derive(Default)]
pub struct FakeUplinks {
    cut: Mutex<BTreeMap<Uplink, String>>,
    changed: Notify,
}

impl FakeUplinks {
    /// From now on these have none.
    pub fn set(&self, cut: BTreeMap<Uplink, String>) {
        *self.cut.lock().unwrap_or_else(PoisonError::into_inner) = cut;
        self.changed.notify_one();
    }
}

#[async_trait]
impl UplinkDriver for FakeUplinks {
    async fn cut(
        &self,
        wanted: &BTreeSet<Uplink>,
    ) -> Result<BTreeMap<Uplink, String>, NetworkError> {
        let mut cut = self.cut.lock().unwrap_or_else(PoisonError::into_inner).clone();
        cut.retain(|uplink, _| wanted.contains(uplink));
        Ok(cut)
    }
    async fn changed(&self) {
        self.changed.notified().await;
    }
}

/// The segment that all simulated hosts share: who holds which address.
#[derive(Default)]
pub struct Segment {
    held: Mutex<BTreeMap<String, BTreeSet<Ipv4Addr>>>,
}

impl Segment {
    /// Who holds an address.
    #[must_use]
    pub fn holders(&self, ip: Ipv4Addr) -> Vec<String> {
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.iter().filter(|(_, ips)| ips.contains(&ip)).map(|(host, _)| host.clone()).collect()
    }
    /// Everything that a host holds.
    #[must_use]
    pub fn held_by(&self, host: &str) -> BTreeSet<Ipv4Addr> {
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.get(host).cloned().unwrap_or_default()
    }
    /// A host is gone.
    pub fn drop_host(&self, host: &str) {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).remove(host);
    }
}

/// Tells whether one host reaches another.
pub type Reaches = Arc<dyn Fn(&str, &str) -> bool + Send + Sync>;

/// Addresses of one simulated host.
pub struct FakeAddress {
    /// This host.
    pub host: String,
    /// Shared by all.
    pub segment: Arc<Segment>,
    /// Who reaches whom now.
    pub reaches: Reaches,
    /// The clock of the daemon that drives it.
    pub clock: Clock,
}

#[async_trait]
impl AddressDriver for FakeAddress {
    async fn probe(&self, ip: Ipv4Addr) -> Result<Option<[u8; 6]>, NetworkError> {
        self.clock.sleep(std::time::Duration::from_millis(150)).await;
        let answers = |other: &String| {
            *other != self.host
                && (self.reaches)(&self.host, other)
                && (self.reaches)(other, &self.host)
        };
        Ok(self.segment.holders(ip).iter().any(answers).then_some([2; 6]))
    }
    async fn announce(&self) -> Result<(), NetworkError> {
        self.clock.pass().await;
        Ok(())
    }
    async fn pass_on(&self, _to: &BTreeMap<Ipv4Addr, Ipv4Addr>) -> Result<(), NetworkError> {
        Ok(())
    }
    async fn hold(&self, wanted: &BTreeSet<Ipv4Addr>) -> Result<(), NetworkError> {
        self.clock.pass().await;
        let mut held = self.segment.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.insert(self.host.clone(), wanted.clone());
        Ok(())
    }
}
