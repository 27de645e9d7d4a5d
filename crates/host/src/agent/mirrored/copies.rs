//! Copies of mirrored disks that snapshots are: a host with a replica fetches what it has no copy of from one that has, and
//! removes what no snapshot names any more. One copy at a time.

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
    Name, PoolDriverKind, PoolSpec, Snapshot, keys,
    vm_snapshot::{SnapshotState, VmSnapshot},
    volume::{Volume, VolumeRef},
};
use haven_store::raw::{Compare, Op};
use std::{io, ops::Not, sync::Arc, time::Duration};
use tokio_util::sync::CancellationToken;

/// The net under lost wake-ups.
const NET: Duration = Duration::from_secs(60);
/// The pause before it is known what is wanted.
const AGAIN: Duration = Duration::from_secs(1);
/// The pause after something that failed: what was fetched in vain took its time from guests.
const FAILED: Duration = Duration::from_secs(30);
/// How long a pool may take to be swept.
const HANGS: Duration = Duration::from_secs(300);
/// The shortest between two looks: most changes are of other things.
const LEAST: Duration = Duration::from_secs(1);
/// How long a host may take for one part.
const PATIENCE: Duration = Duration::from_secs(30);
/// Under which name this stands among the host's problems.
const PART: &str = "copies of snapshots";

/// One of the two things that are done.
#[derive(Clone, Copy)]
enum Work {
    Fetch,
    Sweep,
}

/// Fetches and removes until `cancel`; what takes long to fetch keeps nothing from being removed.
pub async fn run(parts: Arc<AgentParts>, cancel: CancellationToken) {
    let sweeps = again_and_again(Arc::clone(&parts), cancel.clone(), Work::Sweep);
    tokio::join!(again_and_again(parts, cancel, Work::Fetch), sweeps);
}

/// Does it whenever something has changed that it is about, and after a while.
async fn again_and_again(parts: Arc<AgentParts>, cancel: CancellationToken, work: Work) {
    let mut live = parts.live.clone();
    loop {
        let now = Arc::clone(&live.borrow_and_update());
        let round = async {
            match work {
                _ if now.revision == 0 || parts.current_session().is_none() => AGAIN,
                Work::Fetch => fetch_all(&parts, &now).await,
                Work::Sweep => sweep(&parts, &now).await,
            }
        };
        let pause = tokio::select! {
            biased;
            () = cancel.cancelled() => return,
            pause = round => pause,
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

/// Fetches what this host has no copy of; how long until the next look.
async fn fetch_all(parts: &AgentParts, now: &Snapshot) -> Duration {
    let mut failed = None;
    for (volume, record) in &now.volumes {
        let all = now.vm_snapshots.get(&record.vm_uid).into_iter().flatten();
        for (called, of) in all.filter(|(_, of)| of.vm == volume.vm) {
            let revision = of.revision;
            let done = keep_up(parts, now, (volume, &**record), (called, &**of, revision)).await;
            failed = done.err().or(failed);
        }
    }
    if let Some(failure) = failed {
        parts.problem(PART, &failure);
        return FAILED;
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
    let Some(copy) = of.copy.as_ref().filter(|_| !copies.is_empty()) else { return Ok(()) };
    if !matches!(of.state, SnapshotState::There | SnapshotState::Reverting) {
        return Ok(());
    }
    let (file, me) = (name(volume, record), &parts.me);
    let (has_replica, said) = (record.replicas.contains_key(me), copies.contains(me));
    let mut next = of.clone();
    let disk = next.disks.iter_mut().find(|disk| disk.name == volume.disk);
    let Some(disk) = disk else { return Ok(()) };
    if !has_replica {
        // Its replica is elsewhere by now; once all that have one have a copy, this one is nobody's.
        if !said || !record.replicas.keys().all(|host| copies.contains(host)) {
            return Ok(());
        }
        disk.copies.retain(|host| host != me);
    } else {
        let placed = now.placements.get(&volume.vm);
        let pool = super::pool(now, record);
        let Some((pool, placed)) = pool.zip(placed) else { return Ok(()) };
        // Its replica tells that the pool is there, and not another disk.
        let replica = parts.storage.has_volume(&pool, &file, placed.unix_uid()).await?;
        let Some(replica) = replica else { return Ok(()) };
        let here = parts.kept.of(&file, &replica).await?.contains_key(copy);
        match (here, said) {
            (true, true) => return Ok(()),
            (true, false) => disk.copies.push(me.clone()),
            (false, true) => {
                tracing::warn!(volume = %volume, snapshot = %called, "the copy here is gone");
                disk.copies.retain(|host| host != me);
            }
            (false, false) => {
                let kept = KeptOf { replica, volume: file, copy: copy.clone() };
                let from: Vec<&Name> = copies.iter().filter(|h| now.session_open(h)).collect();
                let at_ms = of.of_ms.unwrap_or(of.at_ms);
                if from.is_empty() || !fetch_from(parts, &from, &kept, at_ms).await? {
                    return Ok(());
                }
                disk.copies.push(me.clone());
            }
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

/// Fetches a copy from the first of these hosts that gives it; false when no snapshot names it any more.
async fn fetch_from(
    parts: &AgentParts,
    hosts: &[&Name],
    of: &KeptOf,
    at_ms: i64,
) -> Result<bool, StorageFailure> {
    let mut live = parts.live.clone();
    let volume = VolumeRef { vm: of.volume.vm.clone(), disk: of.volume.disk.clone() };
    let mut failed = None;
    for host in hosts {
        let fetched = tokio::select! {
            biased;
            _ = live.wait_for(|now| is_nobodys(now, &parts.me, &volume, of)) => return Ok(false),
            fetched = fetch(parts, host, of, at_ms) => fetched,
        };
        match fetched {
            Ok(()) => return Ok(true),
            Err(failure) => failed = Some(failure),
        }
    }
    failed.map_or(Ok(false), Err)
}

/// Another host's copy.
struct Theirs<'a> {
    parts: &'a AgentParts,
    host: &'a Name,
    of: &'a KeptOf,
    size: u64,
    takes: u64,
    first: Option<Part>,
}

impl Theirs<'_> {
    async fn part(&self, from: u64) -> Result<Part, StorageFailure> {
        let asked = self.parts.pieces.kept(self.host, &self.of.volume, &self.of.copy, from);
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

    fn takes(&self) -> u64 {
        self.takes
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
    let mut theirs = Theirs { parts, host: from, of, size: 0, takes: 0, first: None };
    let first = theirs.part(0).await?;
    (theirs.size, theirs.takes, theirs.first) = (first.size, first.takes, Some(first));
    let fetched = parts.kept.keep_from(of, at_ms, &mut theirs).await;
    if fetched.is_err() {
        let _ = parts.kept.forget(of).await;
    }
    fetched
}

/// Whether a copy here is named by no snapshot any more.
fn is_nobodys(now: &Snapshot, me: &Name, of: &VolumeRef, kept: &KeptOf) -> bool {
    let uid = kept.volume.vm_uid.as_str();
    if now.unreadable_under(&format!("snapshots/{uid}/")).is_some()
        || now.unreadable_under("volumes/").is_some()
    {
        return false;
    }
    let volume = now.volumes.get(of).filter(|volume| volume.vm_uid == uid);
    let Some(volume) = volume else { return true };
    let mut all = now.vm_snapshots.get(uid).into_iter().flat_map(|all| all.values());
    !all.any(|record| {
        let here = volume.replicas.contains_key(me) || record.copies(&of.disk).contains(me);
        let named = record.copy.as_ref() == Some(&kept.copy);
        named && here && record.disks.iter().any(|disk| disk.name == of.disk)
    })
}

/// Whether the replica here has not been made what this copy holds, and is to be.
async fn waits(parts: &AgentParts, now: &Snapshot, of: &VolumeRef, kept: &KeptOf) -> bool {
    let based = now.volumes.get(of).and_then(|volume| volume.based(&parts.me));
    let Some(based) = based.filter(|based| based.copy == kept.copy) else { return false };
    let lowest = parts.replicas.lowest(&kept.volume.to_string(), &kept.replica).await;
    lowest.is_ok_and(|lowest| lowest >= based.run).not()
}

/// Removes what no snapshot names; how long until the next look.
async fn sweep(parts: &AgentParts, before: &Snapshot) -> Duration {
    let mut pause = NET;
    let pools = before.pools.values().map(|pool| &pool.spec);
    for pool in pools.filter(|pool| pool.driver == PoolDriverKind::Mirrored) {
        let swept = tokio::select! {
            swept = sweep_pool(parts, pool) => swept,
            () = parts.clock.sleep(HANGS) => {
                Err(StorageFailure { what: format!("the disk of {} does not answer", pool.path) })
            }
        };
        if let Err(failure) = swept {
            tracing::warn!(pool = pool.path, %failure, "copies that no snapshot names are not removed");
            pause = FAILED;
        }
    }
    pause
}

async fn sweep_pool(parts: &AgentParts, pool: &PoolSpec) -> Result<(), StorageFailure> {
    let found = parts.kept.all(pool).await?;
    // Whoever made one had heard before that it was to be made.
    let now = Arc::clone(&parts.live.borrow());
    for (volume, copy) in found {
        let of = VolumeRef { vm: volume.vm.clone(), disk: volume.disk.clone() };
        let replica = files::path(pool, &volume);
        let kept = KeptOf { replica, volume, copy };
        if !is_nobodys(&now, &parts.me, &of, &kept) || waits(parts, &now, &of, &kept).await {
            continue;
        }
        let KeptOf { volume, copy, .. } = &kept;
        tracing::info!(%volume, copy, "no snapshot names this copy any more: it is removed");
        parts.kept.forget(&kept).await?;
    }
    Ok(())
}
