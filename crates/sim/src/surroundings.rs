//! What a simulated daemon finds around it beside VMs and network: disks, guests that answer, power controllers.

use crate::{judge::Judge, net::Net};
use async_trait::async_trait;
use haven_control::manager::effects;
use haven_host::{
    agent::storage::{SeedWanted, Storage, StorageFailure, VolumeName, VolumeReady, VolumeWanted},
    health::{Prober, Target},
};
use haven_model::{Name, PoolSpec, host::PowerSpec, image::ImageFile};
use haven_store::clock::Clock;
use std::{
    collections::BTreeSet,
    net::IpAddr,
    path::PathBuf,
    sync::{Arc, Weak},
    time::Duration,
};
use tokio::time::Instant;

/// How long a guest boots.
const BOOT: Duration = Duration::from_secs(2);

/// Disks that are always there, unless the storage fails.
pub struct SimStorage(pub Arc<Net>);

impl SimStorage {
    fn works(&self) -> Result<(), StorageFailure> {
        let what = || "the disk cannot be read: the simulator lets it fail".to_owned();
        if self.0.driver_fails() { Err(StorageFailure { what: what() }) } else { Ok(()) }
    }
}

#[async_trait]
impl Storage for SimStorage {
    async fn volume(
        &self,
        _pool: &PoolSpec,
        wanted: &VolumeWanted,
    ) -> Result<VolumeReady, StorageFailure> {
        self.works()?;
        Ok(VolumeReady { path: PathBuf::from(wanted.name.to_string()), format: "raw".into() })
    }
    async fn delete_volume(
        &self,
        _pool: &PoolSpec,
        _name: &VolumeName,
    ) -> Result<(), StorageFailure> {
        self.works()?;
        Ok(())
    }
    async fn volumes(&self, _pool: &PoolSpec) -> Result<Vec<VolumeName>, StorageFailure> {
        self.works()?;
        Ok(Vec::new())
    }
    async fn put_aside(
        &self,
        _pool: &PoolSpec,
        _names: &[VolumeName],
    ) -> Result<(), StorageFailure> {
        self.works()?;
        Ok(())
    }
    async fn image_file(&self, _file: &ImageFile) -> Result<PathBuf, StorageFailure> {
        self.works()?;
        Ok(PathBuf::from("image"))
    }
    async fn copy_image(&self, _file: &ImageFile) -> Result<(), StorageFailure> {
        self.works()?;
        Ok(())
    }
    async fn seed(&self, _wanted: &SeedWanted) -> Result<PathBuf, StorageFailure> {
        self.works()?;
        Ok(PathBuf::from("seed"))
    }
    async fn forget(&self, _vm: &str) -> Result<(), StorageFailure> {
        self.works()?;
        Ok(())
    }
    async fn images(&self) -> BTreeSet<String> {
        BTreeSet::new()
    }
}

/// Guests that answer once they have booted.
pub struct SimProber {
    /// The host that asks.
    pub host: String,
    /// Knows what runs where, since when.
    pub judge: Arc<Judge>,
    /// The clock of the daemon that asks.
    pub clock: Clock,
}

#[async_trait]
impl Prober for SimProber {
    async fn probe(&self, target: &Target) -> bool {
        self.clock.sleep(Duration::from_millis(2)).await;
        let IpAddr::V4(ip) = target.address.ip() else { return false };
        let since = self.judge.guest_since(&self.host, ip);
        since.is_some_and(|since| Instant::now() >= since + BOOT)
    }
}

/// Cuts a host's power, for the power controllers.
pub trait PowerSwitch: Send + Sync {
    /// Every process of it is gone when this returns true.
    fn off(&self, host: &str) -> bool;
}

/// Power controllers on a network of their own.
pub struct SimPower {
    /// The network.
    pub net: Arc<Net>,
    /// The clock of the daemon that asks.
    pub clock: Clock,
    /// Cuts the power.
    pub switch: Weak<dyn PowerSwitch>,
}

#[async_trait]
impl effects::Power for SimPower {
    async fn off(&self, host: &Name, _power: &PowerSpec) -> Result<(), String> {
        self.clock.pass().await;
        let takes = Duration::from_millis(100 + self.net.random(500));
        if !self.net.controller_answers(host.as_str()) {
            self.clock.sleep(Duration::from_secs(2)).await;
            return Err("the power controller does not answer".into());
        }
        // The command is on its way even when the one who sent it dies now.
        tokio::time::sleep(takes).await;
        let done = self.switch.upgrade().is_some_and(|switch| switch.off(host.as_str()));
        if !done {
            return Err("the host is being switched by somebody else".into());
        }
        self.clock.sleep(Duration::from_millis(20)).await;
        Ok(())
    }
}
