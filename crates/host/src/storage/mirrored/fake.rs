//! Replicas that are records, for the simulator and for tests: [`crate::vm::fake_mirrors`] has them.

use super::{
    driver::{Base, ReplicaDriver, ReplicaError, ReplicaWanted, Served},
    kept::{Kept, KeptCopies, KeptOf, Part, Source},
    pieces::{Hash, Pieces},
};
use crate::{
    agent::storage::{StorageFailure, VolumeName},
    vm::fake::{Fails, World},
};
use async_trait::async_trait;
use haven_model::{Name, PoolSpec, volume::VolumeRef};
use haven_store::clock::Clock;
use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    path::Path,
    sync::Arc,
};

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

    fn put_back(&self, base: Option<&Base>, run: u64) -> Result<(), ReplicaError> {
        let Some(base) = base.filter(|base| run >= base.run) else { return Ok(()) };
        let (volume, snapshot) = (base.kept.volume.to_string(), base.kept.copy.as_str());
        let put = self.world.mirrors.put_back(&self.host, &volume, snapshot, base.run);
        put.map_err(|what| ReplicaError::NotBack { volume, failure: StorageFailure { what } })
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
        self.put_back(wanted.base.as_ref(), run)?;
        match self.world.mirrors.serve(&self.host, &volume, run) {
            Ok(instance) => Ok(Served { run, port: 1, instance, file: self.file(&wanted.volume) }),
            Err(Some(lowest)) => Err(ReplicaError::Over { volume, run, lowest }),
            Err(None) => Err(ReplicaError::Died { volume, said: "the file is locked".into() }),
        }
    }
    async fn own(
        &self,
        volume: &str,
        _path: &Path,
        run: u64,
        base: Option<&Base>,
    ) -> Result<(), ReplicaError> {
        self.clock.pass().await;
        self.put_back(base, run)?;
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

    async fn kept(
        &self,
        host: &Name,
        volume: &VolumeName,
        snapshot: &str,
        from: u64,
    ) -> Result<Part, StorageFailure> {
        self.clock.pass().await;
        let volume = volume.to_string();
        let kept = self.world.mirrors.kept(host.as_str(), &volume, snapshot);
        let what = || StorageFailure { what: format!("{host} has no copy of {volume}") };
        let content = kept.ok_or_else(what)?;
        let size = content.len() as u64;
        let at = usize::try_from(from.min(size)).unwrap_or(usize::MAX);
        Ok(Part { size, takes: size, offset: from.min(size), content: content[at..].to_vec() })
    }
}

/// Keeps copies of the replicas of one host.
pub struct FakeKeptCopies {
    /// This host.
    pub host: String,
    /// Shared by all hosts.
    pub world: Arc<World>,
    /// The clock of the daemon that drives it.
    pub clock: Clock,
}

#[async_trait]
impl KeptCopies for FakeKeptCopies {
    async fn of(
        &self,
        volume: &VolumeName,
        _replica: &Path,
    ) -> Result<BTreeMap<String, Kept>, StorageFailure> {
        self.clock.pass().await;
        let all = self.world.mirrors.all_kept(&self.host).into_iter();
        let of = all.filter(|(of, ..)| *of == volume.to_string());
        Ok(of.map(|(_, id, at_ms, size)| (id, Kept { at_ms, size })).collect())
    }
    async fn keep(&self, of: &KeptOf, at_ms: i64) -> Result<(), StorageFailure> {
        self.clock.pass().await;
        self.world.mirrors.keep(&self.host, &of.volume.to_string(), &of.copy, at_ms);
        Ok(())
    }
    async fn keep_from(
        &self,
        of: &KeptOf,
        at_ms: i64,
        source: &mut dyn Source,
    ) -> Result<(), StorageFailure> {
        let says = |error: io::Error| StorageFailure { what: error.to_string() };
        let mut content = vec![0; usize::try_from(source.size()).unwrap_or_default()];
        let mut at = 0;
        while let Some((offset, part)) = source.next(at).await.map_err(says)? {
            let from = usize::try_from(offset).unwrap_or(usize::MAX);
            content[from..from + part.len()].copy_from_slice(&part);
            at = offset + part.len() as u64;
        }
        let volume = of.volume.to_string();
        self.world.mirrors.put_kept(&self.host, &volume, &of.copy, at_ms, content);
        Ok(())
    }
    async fn prepare(&self, of: &KeptOf) -> Result<(), StorageFailure> {
        self.clock.pass().await;
        if let Some(what) = self.world.kept.refusal(of.volume.disk.as_str()) {
            return Err(StorageFailure { what });
        }
        let kept = self.world.mirrors.kept(&self.host, &of.volume.to_string(), &of.copy);
        let what =
            || StorageFailure { what: format!("{} has no copy of {}", self.host, of.volume) };
        kept.map(drop).ok_or_else(what)
    }
    async fn forget(&self, of: &KeptOf) -> Result<(), StorageFailure> {
        self.clock.pass().await;
        self.world.mirrors.forget_kept(&self.host, &of.volume.to_string(), &of.copy);
        Ok(())
    }
    async fn all(&self, _pool: &PoolSpec) -> Result<Vec<(VolumeName, String)>, StorageFailure> {
        self.clock.pass().await;
        let all = self.world.mirrors.all_kept(&self.host).into_iter();
        Ok(all.filter_map(|(of, id, ..)| Some((VolumeName::parse(&of)?, id))).collect())
    }
}
