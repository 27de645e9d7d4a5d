//! What pieces of replicas hold: of this host from its disk, of others by their daemons.

use super::local::Peers;
use async_trait::async_trait;
use haven_host::{
    agent::{
        mirrored::name,
        storage::{StorageFailure, VolumeName},
    },
    storage::{
        files,
        mirrored::{
            kept::{self, KeptOf, Part},
            pieces::{self, Hash, Pieces},
        },
    },
};
use haven_model::{Name, Snapshot, volume::VolumeRef};
use std::{sync::Arc, time::Duration};
use tokio::sync::watch;

/// How long a disk may take for one answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// This host and its peers.
#[derive(Clone)]
pub struct ReplicaPieces {
    /// This host.
    pub me: Name,
    /// The live copy.
    pub live: watch::Receiver<Arc<Snapshot>>,
    /// The others.
    pub peers: Peers,
}

fn says(what: String) -> StorageFailure {
    StorageFailure { what }
}

impl ReplicaPieces {
    /// Those of this host's replica.
    ///
    /// # Errors
    /// In words, when it is not here or its disk does not answer.
    pub async fn here(
        &self,
        of: &VolumeRef,
        from: u64,
        count: u64,
    ) -> Result<Vec<Hash>, StorageFailure> {
        let me = &self.me;
        let path = {
            let live = self.live.borrow();
            let volume = live.volumes.get(of).filter(|volume| volume.replicas.contains_key(me));
            let volume = volume.ok_or_else(|| says(format!("{me} has no replica of {of}")))?;
            let pool = live.pools.get(&volume.pool);
            let pool =
                pool.ok_or_else(|| says(format!("the pool `{}` is not known", volume.pool)))?;
            files::path(&pool.spec, &name(of, volume))
        };
        let file = path.display().to_string();
        let read = tokio::task::spawn_blocking(move || pieces::read(&path, from, count));
        match tokio::time::timeout(PATIENCE, read).await {
            Ok(Ok(Ok(hashes))) => Ok(hashes),
            Ok(Ok(Err(error))) => Err(says(format!(
                "{file} on {me} cannot be read ({error}); look at its disk (`dmesg`)"
            ))),
            Ok(Err(error)) => Err(says(format!("{file} on {me} was not read ({error})"))),
            Err(_) => Err(says(format!("the disk of {file} on {me} does not answer"))),
        }
    }
}

impl ReplicaPieces {
    /// The next part of this host's copy of a replica, as it was in a snapshot.
    ///
    /// # Errors
    /// In words, when it is not here or its disk does not answer.
    pub async fn kept_here(
        &self,
        volume: &VolumeName,
        copy: &str,
        from: u64,
    ) -> Result<Part, StorageFailure> {
        let me = &self.me;
        let of = VolumeRef { vm: volume.vm.clone(), disk: volume.disk.clone() };
        let replica = {
            let live = self.live.borrow();
            let record = live.volumes.get(&of).filter(|record| record.vm_uid == volume.vm_uid);
            let pool = record.and_then(|record| live.pools.get(&record.pool));
            let pool =
                pool.ok_or_else(|| says(format!("{of} and its pool are not known to {me}")))?;
            files::path(&pool.spec, volume)
        };
        let kept = KeptOf { replica, volume: volume.clone(), copy: copy.to_owned() };
        let read = tokio::task::spawn_blocking(move || kept::read(&kept, from));
        match tokio::time::timeout(PATIENCE, read).await {
            Ok(Ok(Ok(part))) => Ok(part),
            Ok(Ok(Err(error))) => {
                Err(says(format!("the copy of {of} on {me} cannot be read ({error})")))
            }
            Ok(Err(error)) => Err(says(format!("the copy of {of} on {me} was not read ({error})"))),
            Err(_) => Err(says(format!("the disk of the copy of {of} on {me} does not answer"))),
        }
    }
}

#[async_trait]
impl Pieces for ReplicaPieces {
    async fn hashes(
        &self,
        host: &Name,
        volume: &VolumeRef,
        from: u64,
        count: u64,
    ) -> Result<Vec<Hash>, StorageFailure> {
        if *host == self.me {
            return self.here(volume, from, count).await;
        }
        let path = format!("/v1/volumes/{volume}/pieces?from={from}&count={count}");
        let asked = tokio::time::timeout(PATIENCE, self.peers.get(host, &path)).await;
        let told = asked.unwrap_or_else(|_| Err("it does not answer".into()));
        let told = told
            .map_err(|why| says(format!("{host} does not tell what its replica holds: {why}")))?;
        let (hashes, rest) = told.as_chunks::<32>();
        match rest {
            [] => Ok(hashes.to_vec()),
            _ => Err(says(format!("{host} broke off in the middle of its answer"))),
        }
    }

    async fn kept(
        &self,
        host: &Name,
        volume: &VolumeName,
        copy: &str,
        from: u64,
    ) -> Result<Part, StorageFailure> {
        if *host == self.me {
            return self.kept_here(volume, copy, from).await;
        }
        let VolumeName { vm, disk, vm_uid } = volume;
        let path = format!("/v1/volumes/{vm}.{disk}/kept?uid={vm_uid}&copy={copy}&from={from}");
        let asked = tokio::time::timeout(PATIENCE, self.peers.get(host, &path)).await;
        let told = asked.unwrap_or_else(|_| Err("it does not answer".into()));
        let told = told.map_err(|why| says(format!("{host} does not give its copy: {why}")))?;
        let cut = || says(format!("{host} broke off in the middle of its answer"));
        Part::from_bytes(&told).ok_or_else(cut)
    }
}
