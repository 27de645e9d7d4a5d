//! Copies of mirrored disks that snapshots are: a host with a replica fetches what it has no copy of from one that has, and
//! removes what no snapshot names any more. One task for all, one copy at a time.

use super::name;
use crate::{
    agent::{AgentParts, storage::StorageFailure},
    storage::{
        files,
        mirrored::kept::{KeptOf, Part, Source},
    },
};
use async_trait::async_trait;
use haven_model::{
    Name, PoolDriverKind, Snapshot, keys,
    vm_snapshot::{SnapshotState, VmSnapshot},
    volume::{Volume, VolumeRef},
};
use haven_store::raw::{Compare, Op};
use std::{io, ops::Not, sync::Arc, time::Duration};
use tokio_util::sync::CancellationToken;

/// The net under lost wake-ups.
const NET: Duration = Duration::from_secs(60);
/// The pause after something that failed.
const AGAIN: Duration = Duration::from_secs(10);
/// The shortest between two looks: most changes are of other things.
const LEAST: Duration = Duration::from_secs(1);
/// How long a host may take for one part.
const PATIENCE: Duration = Duration::from_secs(30);
/// Under which name this stands among the host's problems.
const PART: &str = "copies of snapshots";

/// Fetches and removes until `cancel`.
pub async fn run(parts: Arc<AgentParts>, cancel: CancellationToken) {
    let mut live = parts.live.clone();
    while !cancel.is_cancelled() {
        let now = Arc::clone(&live.borrow_and_update());
        let pause = tokio::select! {
            biased;
            () = cancel.cancelled() => return,
            pause = round(&parts, &now) => pause,
        };
        let woken = async {
            parts.clock.sleep(LEAST).await;
            while !concerns(&live.borrow_and_update(), &now) {
                if live.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
            }
        };
        tokio::select! {
            biased;
            () = cancel.cancelled() => return,
            () = woken => {}
            () = parts.clock.sleep(pause) => {}
        }
    }
}

/// Whether something has changed that this is about.
fn concerns(now: &Snapshot, before: &Snapshot) -> bool {
    let revisions = |of: &Snapshot| -> Vec<i64> {
        let all = of.vm_snapshots.values().flat_map(|all| all.values());
        all.map(|record| record.revision).collect()
    };
    let hosts = |of: &Snapshot| -> Vec<(VolumeRef, Vec<Name>)> {
        let all = of.volumes.iter();
        all.map(|(of, volume)| (of.clone(), volume.replicas.keys().cloned().collect())).collect()
    };
    revisions(now) != revisions(before)
        || !now.vm_snapshots.is_empty() && hosts(now) != hosts(before)
}

/// One round; how long until the next.
async fn round(parts: &AgentParts, now: &Snapshot) -> Duration {
    if now.revision == 0 || parts.current_session().is_none() {
        return AGAIN;
    }
    let mut failed = sweep(parts, now).await.err();
    for (volume, record) in now.volumes.iter().filter(|(_, v)| v.replicas.contains_key(&parts.me)) {
        let all = now.vm_snapshots.get(&record.vm_uid).into_iter().flatten();
        for (called, of) in all.filter(|(_, of)| of.vm == volume.vm) {
            let revision = of.revision;
            let done = keep_up(parts, now, (volume, &**record), (called, &**of, revision)).await;
            failed = done.err().or(failed);
        }
    }
    if let Some(failure) = failed {
        parts.problem(PART, &failure);
        return AGAIN;
    }
    parts.solved(PART);
    NET
}

/// Fetches a copy that this host has not, or says that it has it no more.
async fn keep_up(
    parts: &AgentParts,
    now: &Snapshot,
    (volume, record): (&VolumeRef, &Volume),
    (called, of, revision): (&Name, &VmSnapshot, i64),
) -> Result<(), StorageFailure> {
    let copies = of.copies(&volume.disk);
    if !matches!(of.state, SnapshotState::There | SnapshotState::Reverting) || copies.is_empty() {
        return Ok(());
    }
    let Some(pool) = super::pool(now, record) else { return Ok(()) };
    let (file, me) = (name(volume, record), &parts.me);
    let placed = now.placements.get(&volume.vm);
    let owner = placed.map_or(0, |placed| placed.unix_uid());
    // Its replica tells that the pool is there, and not another disk.
    let Some(replica) = parts.storage.has_volume(&pool, &file, owner).await? else { return Ok(()) };
    let here = parts.kept.of(&file, &replica).await?;
    let (here, said) = (here.get(&of.id), copies.contains(me));
    let mut next = of.clone();
    let disk = next.disks.iter_mut().find(|disk| disk.name == volume.disk);
    let Some(disk) = disk else { return Ok(()) };
    match (here, said) {
        (Some(_), true) => return Ok(()),
        (Some(_), false) => disk.copies.push(me.clone()),
        (None, true) => {
            tracing::warn!(volume = %volume, snapshot = %called, "the copy here is gone");
            disk.copies.retain(|host| host != me);
        }
        (None, false) => {
            let from = copies.iter().find(|host| now.session_open(host));
            let Some(from) = from else { return Ok(()) };
            let kept = KeptOf { replica, volume: file, snapshot: of.id.clone() };
            fetch(parts, from, &kept, of.of_ms.unwrap_or(of.at_ms)).await?;
            disk.copies.push(me.clone());
        }
    }
    let key = keys::vm_snapshot(&record.vm_uid, called);
    let value = serde_json::to_vec(&next).expect("a record is plain data");
    let over = vec![Compare::ModRevision(key.clone(), revision)];
    // Whoever came between is heard of, and then it is looked at again.
    if let Err(error) = parts.store.txn(over, vec![Op::Put(key, value.into())]).await {
        tracing::debug!(%error, "who has a copy could not be written");
    }
    Ok(())
}

/// Another host's copy.
struct Theirs<'a> {
    parts: &'a AgentParts,
    host: &'a Name,
    of: &'a KeptOf,
    size: u64,
    first: Option<Part>,
}

impl Theirs<'_> {
    async fn part(&self, from: u64) -> Result<Part, StorageFailure> {
        let asked = self.parts.pieces.kept(self.host, &self.of.volume, &self.of.snapshot, from);
        tokio::select! {
            told = asked => told,
            () = self.parts.clock.sleep(PATIENCE) => {
                Err(StorageFailure { what: format!("{} does not answer", self.host) })
            }
        }
    }
}

#[async_trait]
impl Source for Theirs<'_> {
    fn size(&self) -> u64 {
        self.size
    }

    async fn next(&mut self, from: u64) -> io::Result<Option<(u64, Vec<u8>)>> {
        let begun = self.parts.clock.now();
        let part = match self.first.take() {
            Some(first) => first,
            None => self.part(from).await.map_err(io::Error::other)?,
        };
        let fits = part.size == self.size
            && part.offset >= from
            && part.offset.saturating_add(part.content.len() as u64) <= self.size;
        if !fits {
            return Err(io::Error::other(format!("the copy on {} is another one", self.host)));
        }
        if part.content.is_empty() {
            return Ok(None);
        }
        // Guests have the other half of the network and of the disk.
        let took = self.parts.clock.now().since(begun);
        self.parts.clock.sleep(took).await;
        Ok(Some((part.offset, part.content)))
    }
}

async fn fetch(
    parts: &AgentParts,
    from: &Name,
    of: &KeptOf,
    at_ms: i64,
) -> Result<(), StorageFailure> {
    let mut theirs = Theirs { parts, host: from, of, size: 0, first: None };
    let first = theirs.part(0).await?;
    (theirs.size, theirs.first) = (first.size, Some(first));
    let fetched = parts.kept.keep_from(of, at_ms, &mut theirs).await;
    if fetched.is_err() {
        let _ = parts.kept.forget(of).await;
    }
    fetched
}

/// Whether a copy here is named by no snapshot any more.
fn is_nobodys(now: &Snapshot, of: &VolumeRef, kept: &KeptOf) -> bool {
    let (uid, snapshot) = (kept.volume.vm_uid.as_str(), &kept.snapshot);
    if now.unreadable_under(&format!("snapshots/{uid}/")).is_some()
        || now.unreadable_under("volumes/").is_some()
    {
        return false;
    }
    let volume = now.volumes.get(of).filter(|volume| volume.vm_uid == uid);
    let mut all = now.vm_snapshots.get(uid).into_iter().flat_map(|all| all.values());
    let named = all.any(|record| {
        record.id == *snapshot && record.disks.iter().any(|disk| disk.name == of.disk)
    });
    !(named && volume.is_some())
}

/// Whether the replica here has not been made what it was in this snapshot, and is to be.
async fn waits(parts: &AgentParts, now: &Snapshot, of: &VolumeRef, kept: &KeptOf) -> bool {
    let based = now.volumes.get(of).and_then(|volume| volume.based(&parts.me));
    let Some(based) = based.filter(|based| based.snapshot == kept.snapshot) else { return false };
    let lowest = parts.replicas.lowest(&kept.volume.to_string(), &kept.replica).await;
    lowest.is_ok_and(|lowest| lowest >= based.run).not()
}

/// Removes what no snapshot names.
async fn sweep(parts: &AgentParts, before: &Snapshot) -> Result<(), StorageFailure> {
    let pools = before.pools.values().map(|pool| &pool.spec);
    for pool in pools.filter(|pool| pool.driver == PoolDriverKind::Mirrored) {
        let found = parts.kept.all(pool).await?;
        // Whoever made one had heard of its snapshot before.
        let now = Arc::clone(&parts.live.borrow());
        for (volume, snapshot) in found {
            let of = VolumeRef { vm: volume.vm.clone(), disk: volume.disk.clone() };
            let replica = files::path(pool, &volume);
            let kept = KeptOf { replica, volume, snapshot };
            if !is_nobodys(&now, &of, &kept) || waits(parts, &now, &of, &kept).await {
                continue;
            }
            let KeptOf { volume, snapshot, .. } = &kept;
            tracing::info!(%volume, snapshot, "no snapshot names this copy any more: it is removed");
            parts.kept.forget(&kept).await?;
        }
    }
    Ok(())
}
