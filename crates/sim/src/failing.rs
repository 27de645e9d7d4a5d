//! Drivers that fail now and then: each of them is whole again as soon as its call comes through.

use crate::net::Net;
use async_trait::async_trait;
use haven_host::{
    balance::driver::{BalanceDriver, BalanceError, FrontendWanted, LeftOut},
    network::{
        address::AddressDriver,
        driver::{LeftAlone, NetworkDriver, NetworkError, NetworkWanted},
        uplink::{Uplink, UplinkDriver},
    },
};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    sync::Arc,
};

/// A driver, and what decides whether a call of it fails.
pub struct Failing<D> {
    /// What does the work.
    pub driver: D,
    /// Decides.
    pub net: Arc<Net>,
}

impl<D> Failing<D> {
    fn network(&self, what: &str) -> Result<(), NetworkError> {
        let why = "the simulator lets it fail".to_owned();
        if self.net.driver_fails() { Err(NetworkError { what: what.into(), why }) } else { Ok(()) }
    }
}

#[async_trait]
impl<D: NetworkDriver> NetworkDriver for Failing<D> {
    async fn apply(
        &self,
        wanted: &[NetworkWanted],
        left_alone: &LeftAlone,
    ) -> Result<BTreeMap<String, NetworkError>, NetworkError> {
        self.network("the links cannot be read")?;
        let mut failed = self.driver.apply(wanted, left_alone).await?;
        for network in wanted {
            if let Err(error) = self.network("the network cannot be made") {
                failed.insert(network.name.clone(), error);
            }
        }
        Ok(failed)
    }
}

#[async_trait]
impl<D: AddressDriver> AddressDriver for Failing<D> {
    async fn probe(&self, ip: Ipv4Addr) -> Result<Option<[u8; 6]>, NetworkError> {
        self.network("the address cannot be asked for")?;
        self.driver.probe(ip).await
    }
    async fn hold(&self, wanted: &BTreeSet<Ipv4Addr>) -> Result<(), NetworkError> {
        self.network("the address cannot be set")?;
        self.driver.hold(wanted).await
    }
    async fn announce(&self) -> Result<(), NetworkError> {
        self.network("the address cannot be announced")?;
        self.driver.announce().await
    }
    async fn pass_on(&self, to: &BTreeMap<Ipv4Addr, Ipv4Addr>) -> Result<(), NetworkError> {
        self.network("nothing can be passed on")?;
        self.driver.pass_on(to).await
    }
}

#[async_trait]
impl<D: BalanceDriver> BalanceDriver for Failing<D> {
    async fn apply(&self, wanted: &[FrontendWanted]) -> Result<LeftOut, BalanceError> {
        if self.net.driver_fails() {
            let why = "the simulator lets it fail".to_owned();
            return Err(BalanceError { what: "the balancer does not start".into(), why });
        }
        self.driver.apply(wanted).await
    }
}

/// The uplinks of a simulated host: all have a link, or none has.
pub struct SimUplinks {
    /// Which host.
    pub host: String,
    /// Knows.
    pub net: Arc<Net>,
}

#[async_trait]
impl UplinkDriver for SimUplinks {
    async fn cut(
        &self,
        wanted: &BTreeSet<Uplink>,
    ) -> Result<BTreeMap<Uplink, String>, NetworkError> {
        if self.net.driver_fails() {
            let what = "the network cards cannot be listed".to_owned();
            return Err(NetworkError { what, why: "the simulator lets it fail".into() });
        }
        let cut = wanted.iter().filter(|_| self.net.is_unplugged(&self.host));
        Ok(cut.map(|uplink| (uplink.clone(), "eth1 has no link".to_owned())).collect())
    }

    async fn changed(&self) {
        _ = self.net.changes().changed().await;
    }
}
