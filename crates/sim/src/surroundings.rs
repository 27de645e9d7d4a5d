//! What a simulated daemon finds around it beside VMs and network: disks, guests that answer, power controllers.

use crate::{
    judge::Judge,
    net::{Controller, Net, Power},
};
use async_trait::async_trait;
use haven_control::manager::effects;
use haven_host::{
    agent::storage::{
        SeedWanted, SnapshotStep, Storage, StorageFailure, VolumeName, VolumeReady, VolumeWanted,
    },
    health::{Prober, Target},
    machine::{Machine, Outcome},
    monitor::{Meter, Stalled, Used},
    vm::{driver::RunningVm, fake::World, fake_disks::LOCAL, snapshots::Keeps},
};
use haven_model::{
    Name, PoolDriverKind, PoolSpec, PowerProblem, PowerSpec, PowerState, image::ImageFile,
    maintenance::Work, pool::PoolRoom,
};
use haven_store::{clock::Clock, seal::Plain};
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

/// Disks that are always there, unless the storage fails; and those of local pools, which only their host has.
pub struct SimStorage {
    /// This host.
    pub host: String,
    /// Whether it works.
    pub net: Arc<Net>,
    /// Who has which disk.
    pub world: Arc<World>,
}

impl SimStorage {
    fn works(&self) -> Result<(), StorageFailure> {
        let what = || "the disk cannot be read: the simulator lets it fail".to_owned();
        if self.net.driver_fails() { Err(StorageFailure { what: what() }) } else { Ok(()) }
    }
}

#[async_trait]
impl Storage for SimStorage {
    async fn volume(
        &self,
        pool: &PoolSpec,
        wanted: &VolumeWanted,
    ) -> Result<VolumeReady, StorageFailure> {
        self.works()?;
        let mut path = wanted.name.to_string();
        if pool.driver == PoolDriverKind::Mirrored {
            self.world.mirrors.make(&self.host, &path);
        }
        if pool.driver == PoolDriverKind::Local {
            self.world.local_disks.make(&self.host, &path);
            path = format!("{LOCAL}{path}");
        }
        Ok(VolumeReady { path: PathBuf::from(path), format: "raw".into(), rbd: None, filer: None })
    }
    async fn has_volume(
        &self,
        _pool: &PoolSpec,
        name: &VolumeName,
        _owner_uid: u32,
    ) -> Result<Option<PathBuf>, StorageFailure> {
        self.works()?;
        let there = self.world.mirrors.is_there(&self.host, &name.to_string());
        Ok(there.then(|| PathBuf::from(name.to_string())))
    }
    async fn grow(
        &self,
        _pool: &PoolSpec,
        _name: &VolumeName,
        _size_bytes: u64,
        _key: Option<&Plain>,
    ) -> Result<(), StorageFailure> {
        Ok(())
    }
    // The API is not simulated, so nobody asks for a snapshot.
    async fn keeps(
        &self,
        _pool: &PoolSpec,
        _name: &VolumeName,
    ) -> Result<Option<Keeps>, StorageFailure> {
        self.works()?;
        Ok(None)
    }
    async fn snapshot(
        &self,
        _pool: &PoolSpec,
        name: &VolumeName,
        _step: SnapshotStep,
        _snapshot: &str,
        _key: Option<&Plain>,
    ) -> Result<(), StorageFailure> {
        Err(StorageFailure { what: format!("{name} keeps no snapshots in the simulator") })
    }
    async fn disk_secret(
        &self,
        _vm: &str,
        disk: &Name,
        _key: &Plain,
        _owner_uid: u32,
    ) -> Result<PathBuf, StorageFailure> {
        Ok(PathBuf::from(format!("{disk}.luks")))
    }
    async fn volume_keys(
        &self,
        _vm: &str,
        _disk: &Name,
        _key: &Plain,
        _owner_uid: u32,
    ) -> Result<PathBuf, StorageFailure> {
        self.works()?;
        Ok(PathBuf::from("keys"))
    }
    async fn delete_volume(
        &self,
        pool: &PoolSpec,
        name: &VolumeName,
    ) -> Result<(), StorageFailure> {
        self.works()?;
        match pool.driver {
            PoolDriverKind::Local => self.world.local_disks.remove(&self.host, &name.to_string()),
            PoolDriverKind::Mirrored => self.world.mirrors.remove(&self.host, &name.to_string()),
            PoolDriverKind::Shared
            | PoolDriverKind::Rbd
            | PoolDriverKind::Nfs
            | PoolDriverKind::Gluster => {}
        }
        Ok(())
    }
    async fn volumes(&self, pool: &PoolSpec) -> Result<Vec<VolumeName>, StorageFailure> {
        self.works()?;
        let here = match pool.driver {
            PoolDriverKind::Mirrored => self.world.mirrors.on(&self.host),
            _ => self.world.local_disks.on(&self.host),
        };
        Ok(here.iter().filter_map(|name| VolumeName::parse(name)).collect())
    }
    async fn put_aside(&self, pool: &PoolSpec, names: &[VolumeName]) -> Result<(), StorageFailure> {
        self.works()?;
        for name in names {
            if pool.driver == PoolDriverKind::Mirrored {
                self.world.mirrors.remove(&self.host, &name.to_string());
                continue;
            }
            self.world.local_disks.remove(&self.host, &name.to_string());
        }
        Ok(())
    }
    // No Ceph cluster is simulated.
    async fn clients(
        &self,
        _: &PoolSpec,
        _: &VolumeName,
    ) -> Result<BTreeSet<String>, StorageFailure> {
        Ok(BTreeSet::new())
    }
    async fn shut_out(
        &self,
        _: &PoolSpec,
        _: &VolumeName,
        _: &BTreeSet<String>,
        _: &BTreeSet<String>,
    ) -> Result<(), StorageFailure> {
        Ok(())
    }
    async fn shut_client(&self, _: &PoolSpec, _: &str) -> Result<(), StorageFailure> {
        Ok(())
    }
    async fn room(&self, _pool: &PoolSpec) -> Result<Option<PoolRoom>, StorageFailure> {
        self.works()?;
        Ok(None)
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

/// A host that restarts itself when it is its turn.
pub struct SimMachine {
    /// Which host.
    pub host: String,
    /// Restarts it.
    pub switch: Option<Weak<dyn PowerSwitch>>,
    /// Whether its command fails.
    pub net: Arc<Net>,
}

#[async_trait]
impl Machine for SimMachine {
    async fn begin(&self, _work: Work, _id: &str) -> std::io::Result<()> {
        if self.net.driver_fails() {
            return Err(std::io::Error::other("the simulator lets it fail"));
        }
        if let Some(switch) = self.switch.as_ref().and_then(Weak::upgrade) {
            switch.restart(&self.host);
        }
        Ok(())
    }
    async fn outcome(&self, _id: &str) -> Outcome {
        Outcome::Done
    }
}

/// Guests that each work as hard as their name says: from nothing to half of a host's CPUs.
pub struct SimMeter {
    /// Milliseconds of the simulation.
    pub now_ms: Arc<dyn Fn() -> i64 + Send + Sync>,
}

impl Meter for SimMeter {
    fn used(&self, vm: &RunningVm) -> std::io::Result<Option<Used>> {
        let hash = vm
            .vm
            .bytes()
            .fold(7_u32, |hash, byte| hash.wrapping_mul(31).wrapping_add(u32::from(byte)));
        let now = u64::try_from((self.now_ms)()).unwrap_or(0);
        let cpu = Duration::from_micros(now.saturating_mul(u64::from(hash % 4000)));
        Ok(Some(Used { cpu, memory: 128 << 20 }))
    }
    fn stalled(&self) -> Option<Stalled> {
        None
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
    /// It goes off and on again.
    fn restart(&self, host: &str);
}

/// Power controllers on a network of their own.
pub struct SimPower {
    /// The network.
    pub net: Arc<Net>,
    /// The clock of the daemon that asks.
    pub clock: Clock,
    /// Cuts the power.
    pub switch: Weak<dyn PowerSwitch>,
    /// It tells only what it has read back; a command is taken for its effect otherwise: broken on purpose.
    pub reads_back: bool,
}

impl SimPower {
    /// How long the controller takes; an error when it is dead, and no end when it hangs.
    async fn takes(&self, host: &Name) -> Result<Duration, PowerProblem> {
        self.clock.pass().await;
        let takes = Duration::from_millis(100 + self.net.random(500));
        match self.net.controller(host.as_str()) {
            Controller::Well => Ok(takes),
            Controller::Hung => std::future::pending().await,
            Controller::Dead => {
                self.clock.sleep(Duration::from_secs(2)).await;
                Err(problem("the power controller does not answer"))
            }
        }
    }
}

fn problem(message: &str) -> PowerProblem {
    PowerProblem { message: message.into(), hint: "it is the simulator's".into() }
}

#[async_trait]
impl effects::Power for SimPower {
    async fn state(&self, host: &Name, _power: &PowerSpec) -> Result<PowerState, PowerProblem> {
        let takes = self.takes(host).await?;
        self.clock.sleep(takes / 4).await;
        let off = self.net.power(host.as_str()) == Power::Off;
        Ok(if off { PowerState::Off } else { PowerState::On })
    }

    async fn off(&self, host: &Name, _power: &PowerSpec) -> Result<(), PowerProblem> {
        if !self.reads_back {
            return Ok(());
        }
        let takes = self.takes(host).await?;
        // The command is on its way even when the one who sent it dies now.
        tokio::time::sleep(takes).await;
        let done = self.switch.upgrade().is_some_and(|switch| switch.off(host.as_str()));
        if !done {
            return Err(problem("the host is being switched by somebody else"));
        }
        self.clock.sleep(Duration::from_millis(20)).await;
        Ok(())
    }
}
