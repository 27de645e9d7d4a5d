//! Replicas of this host whose VMs run elsewhere are served to them: one task for each.

use super::{base, name, open::wanted, pool};
use crate::{
    agent::{AgentParts, chain, own_record::OwnRecord, storage::StorageFailure},
    storage::mirrored::{
        driver::{ReplicaWanted, Served},
        steps::{self, Serve},
    },
};
use haven_model::{
    Handover, Placement, Snapshot, Versioned, keys,
    volume::{ReplicaIs, ReplicaStatus, Volume, VolumeRef},
};
use haven_store::{
    clock::Mono,
    raw::{Compare, Op},
};
use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    path::Path,
    sync::Arc,
    time::Duration,
};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// The net under lost wake-ups, and how soon a process that ended is noticed.
const NET: Duration = Duration::from_secs(5);
/// After something that failed.
const AGAIN: Duration = Duration::from_secs(1);
/// After a word that the store did not take.
const TELL_AGAIN: Duration = Duration::from_millis(100);

/// Serves until `cancel`.
pub async fn run(parts: Arc<AgentParts>, cancel: CancellationToken) {
    let mut live = parts.live.clone();
    let mut tasks: BTreeMap<VolumeRef, JoinHandle<()>> = BTreeMap::new();
    let mut swept = false;
    while !cancel.is_cancelled() {
        let now = Arc::clone(&live.borrow_and_update());
        tasks.retain(|_, task| !task.is_finished());
        if now.revision > 0 {
            if !swept {
                end_nameless(&parts, &now).await;
                swept = true;
            }
            for (of, _) in now.volumes.iter().filter(|(_, v)| v.replicas.contains_key(&parts.me)) {
                if let Entry::Vacant(free) = tasks.entry(of.clone()) {
                    let task = one(Arc::clone(&parts), of.clone(), cancel.clone());
                    free.insert(tokio::spawn(task));
                }
            }
        }
        tokio::select! {
            biased;
            () = cancel.cancelled() => {}
            _ = live.changed() => {}
            () = parts.clock.sleep(NET) => {}
        }
    }
    for task in tasks.into_values() {
        task.abort();
    }
}

/// Ends what an earlier daemon served of volumes that are no more, or are not here any more.
async fn end_nameless(parts: &AgentParts, now: &Snapshot) {
    if now.unreadable_under("volumes/").is_some() {
        return;
    }
    let here = now.volumes.iter().filter(|(_, v)| v.replicas.contains_key(&parts.me));
    let here: BTreeSet<String> = here.map(|(of, v)| name(of, v).to_string()).collect();
    for volume in parts.replicas.known().await.difference(&here) {
        if let Err(error) = parts.replicas.end(volume).await {
            tracing::warn!(volume, why = chain(&error), "what serves it cannot be ended");
        }
    }
}

/// What is known of one replica.
#[derive(Default)]
struct Told {
    record: OwnRecord,
    /// What was written last.
    said: Option<ReplicaStatus>,
}

/// A replica that was served.
struct Done {
    /// The revisions of the volume's record and of the placement for which it was.
    stands: (i64, i64),
    /// When that was found last.
    at: Mono,
    is: ReplicaIs,
}

impl Done {
    /// When it was found last to stand as it did, with its process; nothing when something is to be done about it.
    async fn still(
        &self,
        parts: &AgentParts,
        of: &VolumeRef,
        volume: &Volume,
        stands: (i64, i64),
    ) -> Option<Mono> {
        if self.stands != stands {
            return None;
        }
        let clock = parts.clock.now();
        if clock.since(self.at) < NET {
            return Some(self.at);
        }
        let ReplicaIs::Served { run, port, instance, .. } = &self.is else { return None };
        let now = parts.replicas.served(&name(of, volume).to_string()).await?;
        let same = (now.run, now.port) == (*run, *port) && now.instance == *instance;
        same.then_some(clock)
    }
}

/// Serves one replica as long as it is here.
async fn one(parts: Arc<AgentParts>, of: VolumeRef, cancel: CancellationToken) {
    let mut live = parts.live.clone();
    let mut sessions = parts.session.clone();
    let mut told = Told::default();
    let mut last: Option<String> = None;
    let mut done: Option<Done> = None;
    while !cancel.is_cancelled() {
        let now = Arc::clone(&live.borrow_and_update());
        sessions.borrow_and_update();
        let mut pause = NET;
        let volume = now.volumes.get(&of).filter(|v| v.replicas.contains_key(&parts.me));
        match volume {
            None if now.unreadable.contains_key(&format!("volumes/{of}")) => {}
            None => {
                if let Some(volume) = &last
                    && let Err(error) = parts.replicas.end(volume).await
                {
                    tracing::warn!(volume, why = chain(&error), "what serves it cannot be ended");
                    parts.clock.sleep(AGAIN).await;
                    continue;
                }
                return;
            }
            Some(volume) => {
                let named = name(&of, volume).to_string();
                if let Some(before) = last.replace(named.clone()).filter(|last| *last != named)
                    && let Err(error) = parts.replicas.end(&before).await
                {
                    tracing::warn!(before, why = chain(&error), "what serves it cannot be ended");
                }
                if let Some((run, placed)) = to_whom(&parts, &now, &of, volume) {
                    let stands = (volume.revision, placed.revision);
                    let before = done.take();
                    let looked = match &before {
                        Some(before) => before.still(&parts, &of, volume, stands).await,
                        None => None,
                    };
                    let is = match before.zip(looked) {
                        Some((before, _)) => before.is,
                        None => is(&parts, &now, &of, volume, run, placed.unix_uid()).await,
                    };
                    if matches!(is, ReplicaIs::Failed { .. }) {
                        pause = AGAIN;
                    } else {
                        let at = looked.unwrap_or(parts.clock.now());
                        done = Some(Done { stands, at, is: is.clone() });
                    }
                    if !tell(&parts, &now, &of, volume.revision, is, &mut told).await {
                        pause = TELL_AGAIN;
                    }
                } else {
                    done = None;
                }
            }
        }
        tokio::select! {
            biased;
            () = cancel.cancelled() => {}
            _ = live.changed() => {}
            _ = sessions.changed() => {}
            () = parts.clock.sleep(pause) => {}
        }
    }
}

/// The run that it is to be served to, and the placement by which that is so; nothing when nobody else has its VM.
fn to_whom<'a>(
    parts: &AgentParts,
    now: &'a Snapshot,
    of: &VolumeRef,
    volume: &Volume,
) -> Option<(u64, &'a Versioned<Placement>)> {
    // Whose it is to be is not known before its VM has its place.
    let placed = now.placements.get(&of.vm)?;
    // Its guest is being handed over, and the process that has the file open is the one that does it.
    if let Some(from) = placed.moved_from.as_ref().filter(|from| from.host == parts.me)
        && now.handover(&of.vm, from) == Handover::Pending
    {
        return None;
    }
    match steps::serve(volume, &parts.me, &placed.host) {
        Serve::Own(_) => None,
        Serve::To(run) => Some((run, placed)),
    }
}

/// Serves it to a run, if it can be.
async fn is(
    parts: &AgentParts,
    now: &Snapshot,
    of: &VolumeRef,
    volume: &Volume,
    run: u64,
    owner_uid: u32,
) -> ReplicaIs {
    match serve(parts, now, of, volume, run, owner_uid).await {
        Ok(Some(Served { run, port, instance, file })) => {
            let boot = parts.facts.borrow().as_ref().map(|facts| facts.boot_id.clone());
            // What was noted for a file is of no use for another one.
            let boot = format!("{}/{file}", boot.unwrap_or_default());
            ReplicaIs::Served { run, port, instance, boot }
        }
        Ok(None) => ReplicaIs::Failed {
            why: format!(
                "its file is not there, on {}; it is made anew once it counts no more",
                parts.me
            ),
        },
        Err(failure) => ReplicaIs::Failed { why: failure.what },
    }
}

async fn serve(
    parts: &AgentParts,
    now: &Snapshot,
    of: &VolumeRef,
    volume: &Volume,
    run: u64,
    owner_uid: u32,
) -> Result<Option<Served>, StorageFailure> {
    let says = |what: String| StorageFailure { what };
    let pool = pool(now, volume)
        .ok_or_else(|| says(format!("the pool `{}` is not known here", volume.pool)))?;
    let address = now.hosts.get(&parts.me).map(|host| host.spec.address);
    let address = address.ok_or_else(|| says("this host is no part of the cluster".into()))?;
    if parts.facts.borrow().is_none() {
        return Err(says("this host has just started".into()));
    }
    let of = of.clone();
    // Who has nothing to make it from is copied to.
    let whole = run == 0 && (volume.cloned.is_none() || volume.counts(&parts.me));
    let key = if whole { super::key(parts, &of, volume).await? } else { None };
    let wanted = wanted(&of, volume, owner_uid, whole, key);
    // One that counts is never made anew: it would lack what was written.
    let path = if run == 0 || !volume.counts(&parts.me) {
        Some(parts.storage.volume(&pool, &wanted).await?.path)
    } else {
        parts.storage.has_volume(&pool, &wanted.name, owner_uid).await?
    };
    let Some(path) = path else { return Ok(None) };
    if volume.counts(&parts.me) {
        old(parts, volume, &wanted.name.to_string(), &path).await?;
    }
    let secrets = parts.secrets.as_ref();
    let secrets =
        secrets.ok_or_else(|| says("this host cannot derive the cluster's key".into()))?;
    let base = base(&parts.me, volume, &wanted.name, &path);
    let (volume, size_bytes) = (wanted.name.to_string(), volume.stored_bytes());
    let key = secrets.volume_key(&volume, run).map_err(|error| says(chain(&error)))?;
    let address = address.into();
    let wanted = ReplicaWanted { volume, path, owner_uid, run, size_bytes, key, address, base };
    let served = parts.replicas.serve(&wanted).await;
    served.map(Some).map_err(|error| says(chain(&error)))
}

/// Refuses a file that was not there in the last runs: what was written in them is not in it.
pub(super) async fn old(
    parts: &AgentParts,
    volume: &Volume,
    name: &str,
    path: &Path,
) -> Result<(), StorageFailure> {
    let run = volume.written_in();
    let lowest = parts.replicas.lowest(name, path).await;
    // What is put in its place was written by nobody before that run.
    let based = volume.based(&parts.me).map_or(0, |based| based.run);
    let lowest = lowest.map(|lowest| lowest.max(based)).map_err(|error| StorageFailure {
        what: format!("it cannot be told how old {} is ({error}); check its disk", path.display()),
    })?;
    if lowest + 1 >= run {
        return Ok(());
    }
    Err(StorageFailure {
        what: format!(
            "{} on {} is older than it should be (run {lowest} of {run}): another disk was mounted there when it was written; mount that, or remove this file, and it is copied anew once it counts no more",
            path.display(),
            parts.me
        ),
    })
}

/// Tells how it is, if that is news; false when it is to be tried again soon.
async fn tell(
    parts: &AgentParts,
    now: &Snapshot,
    of: &VolumeRef,
    volume: i64,
    is: ReplicaIs,
    told: &mut Told,
) -> bool {
    let Some(session) = parts.current_session() else { return false };
    let status = ReplicaStatus { session: session.number, is };
    let table = now.replica_status.get(of);
    let there = table.and_then(|hosts| hosts.get(&parts.me)).map(|status| status.revision);
    if told.said.as_ref() == Some(&status) && !told.record.overwritten(now, there) {
        return true;
    }
    if let ReplicaIs::Failed { why } = &status.is {
        tracing::warn!(volume = %of, why, "its replica here cannot be served");
    }
    let key = keys::replica_status(of, &parts.me);
    // Once the volume is no more nothing is said of it.
    let mut compare = vec![Compare::ModRevision(keys::volume(of), volume)];
    compare.extend(told.record.compare(now, key.clone(), there));
    let value = serde_json::to_vec(&status).expect("a status is plain data");
    match parts.store.txn(compare, vec![Op::Put(key, value.into())]).await {
        Ok(outcome) if outcome.succeeded => {
            told.record.written(outcome.revision);
            told.said = Some(status);
            true
        }
        Ok(_) => false,
        Err(error) => {
            tracing::debug!(%error, "how a replica is could not be written");
            false
        }
    }
}
