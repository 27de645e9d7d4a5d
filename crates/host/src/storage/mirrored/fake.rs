//! Replicas that are records, for the simulator and for tests: [`crate::vm::fake_mirrors`] has them.

use super::{
    driver::{ReplicaDriver, ReplicaError, ReplicaWanted, Served},
    pieces::{Hash, Pieces},
};
use crate::{
    agent::storage::StorageFailure,
    vm::fake::{Fails, World},
};
use async_trait::async_trait;
use haven_model::{Name, volume::VolumeRef};
use haven_store::clock::Clock;
use std::{collections::BTreeSet, io, path::Path, sync::Arc};

/// Serves the replicas of one host.
pub struct FakeReplicas {
    /// This host.
    pub host: String,
    /// Shared by all hosts.
    pub world: Arc<World>,
    /// The clock of the daemon that drives it.
    pub clock: Clock,
    /// Whether a call fails.
    pub fails: Fails,
}

impl FakeReplicas {
    fn file(&self, volume: &str) -> String {
        self.world.mirrors.file(&self.host, volume).to_string()
    }
}

#[async_trait]
impl ReplicaDriver for FakeReplicas {
    async fn serve(&self, wanted: &ReplicaWanted) -> Result<Served, ReplicaError> {
        self.clock.pass().await;
        let (volume, run) = (wanted.volume.clone(), wanted.run);
        if (self.fails)() {
            return Err(ReplicaError::Died { volume, said: "simulated".into() });
        }
        match self.world.mirrors.serve(&self.host, &volume, run) {
            Ok(instance) => Ok(Served { run, port: 1, instance, file: self.file(&wanted.volume) }),
            Err(Some(lowest)) => Err(ReplicaError::Over { volume, run, lowest }),
            Err(None) => Err(ReplicaError::Died { volume, said: "the file is locked".into() }),
        }
    }
    async fn own(&self, volume: &str, _path: &Path, run: u64) -> Result<(), ReplicaError> {
        self.clock.pass().await;
        let owned = self.world.mirrors.own(&self.host, volume, run);
        owned.map_err(|lowest| ReplicaError::Over { volume: volume.into(), run, lowest })
    }
    async fn served(&self, volume: &str) -> Option<Served> {
        self.clock.pass().await;
        let (run, instance) = self.world.mirrors.served(&self.host, volume)?;
        Some(Served { run, port: 1, instance, file: self.file(volume) })
    }
    async fn lowest(&self, volume: &str, _path: &Path) -> io::Result<u64> {
        self.clock.pass().await;
        Ok(self.world.mirrors.lowest(&self.host, volume))
    }
    async fn known(&self) -> BTreeSet<String> {
        let all = self.world.mirrors.on(&self.host).into_iter();
        all.filter(|volume| self.world.mirrors.served(&self.host, volume).is_some()).collect()
    }
    async fn end(&self, volume: &str) -> Result<(), ReplicaError> {
        self.clock.pass().await;
        self.world.mirrors.end_one(&self.host, volume);
        Ok(())
    }
}

/// Tells what the replicas of all hosts hold.
pub struct FakePieces {
    /// Shared by all hosts.
    pub world: Arc<World>,
    /// The clock of the daemon that asks.
    pub clock: Clock,
}

#[async_trait]
impl Pieces for FakePieces {
    async fn hashes(
        &self,
        host: &Name,
        volume: &VolumeRef,
        from: u64,
        count: u64,
    ) -> Result<Vec<Hash>, StorageFailure> {
        self.clock.pass().await;
        let all = self.world.mirrors.hashes(host.as_str(), &volume.to_string());
        let what = || StorageFailure { what: format!("{host} has no replica of {volume}") };
        let all = all.ok_or_else(what)?.into_iter();
        let at = |number: u64| usize::try_from(number).unwrap_or(usize::MAX);
        Ok(all.skip(at(from)).take(at(count)).collect())
    }
}
