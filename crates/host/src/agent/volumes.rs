//! Whose a volume is, asked of the store itself, and the sweep that puts aside those of local pools that are nobody's.
//!
//! The live copy is not asked: a record that this version cannot read is absent there. Here it is a record that is
//! there and tells nothing, and then nothing is removed. Volumes are listed before the store is asked: a VM whose uid
//! the store does not know afterwards was deleted, and its uid never comes back.

use super::{
    AgentParts, mirrored,
    storage::{StorageFailure, VolumeName},
};
use haven_model::{
    Name, ObjectRef, Placement, PoolDriverKind, PoolSpec, Snapshot, keys,
    object::Kind,
    volume::{Volume, VolumeRef},
};
use haven_store::raw::{RawKv, StoreError};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Between two sweeps.
const RHYTHM: Duration = Duration::from_secs(600);
/// After one that failed.
const RETRY: Duration = Duration::from_secs(30);

/// What the store says of a VM, of which only this is read, so that any version's record will do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record<T> {
    /// There is none.
    Absent,
    /// There is one that this version cannot read.
    Unreadable,
    /// It says this.
    Says(T),
}

impl<T> Record<T> {
    fn of(raw: Option<&RawKv>, read: impl FnOnce(&serde_json::Value) -> Option<T>) -> Self {
        let Some(raw) = raw else { return Self::Absent };
        let value = serde_json::from_slice(&raw.value).ok();
        value.and_then(|value| read(&value)).map_or(Self::Unreadable, Self::Says)
    }
}

/// A VM's uid, and whether it is being deleted.
fn identity(value: &serde_json::Value) -> Option<(String, bool)> {
    let meta = value.get("meta")?;
    let uid = meta.get("uid")?.as_str().filter(|uid| !uid.is_empty())?;
    Some((uid.to_owned(), meta.get("deleting").is_some_and(|is| is == true)))
}

/// A placement's host.
fn host(value: &serde_json::Value) -> Option<Name> {
    Name::new(value.get("host")?.as_str()?).ok()
}

/// What the store knows of one VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known {
    /// Its uid, and whether it is being deleted.
    pub vm: Record<(String, bool)>,
    /// The host that it is placed on.
    pub placed: Record<Name>,
}

impl Known {
    /// Asks the store.
    ///
    /// # Errors
    /// When it does not answer.
    pub async fn ask(parts: &AgentParts, vm: &Name) -> Result<Self, StoreError> {
        let object = keys::object(&ObjectRef::new(Kind::Vm, vm.clone()));
        let answers = parts.store.get_many(&[object, keys::placement(vm)]).await?;
        let raw = |index: usize| answers.get(index).and_then(Option::as_ref);
        Ok(Self { vm: Record::of(raw(0), identity), placed: Record::of(raw(1), host) })
    }

    /// Whether a volume on `me` of the VM with this uid may be removed; `everywhere` when all hosts see it.
    #[must_use]
    pub fn lets_go(&self, me: &Name, uid: &str, everywhere: bool) -> bool {
        match (&self.vm, &self.placed) {
            // Nobody has deleted it in so many words: the sweep puts it aside first.
            (Record::Unreadable | Record::Absent, _) => false,
            (Record::Says((now, _)), _) if now != uid => true,
            (Record::Says((_, deleting)), Record::Says(host)) if host == me => *deleting,
            // It runs elsewhere with a volume of its own, and this one is of the past.
            (Record::Says(_), Record::Says(_)) => !everywhere,
            (Record::Says(_), Record::Absent | Record::Unreadable) => false,
        }
    }
}

/// The local pools.
pub fn local_pools(snapshot: &Snapshot) -> impl Iterator<Item = &PoolSpec> {
    let specs = snapshot.pools.values().map(|pool| &pool.value.spec);
    specs.filter(|pool| pool.driver == PoolDriverKind::Local)
}

/// Sweeps until `cancel`; `left` tells the VMs that are placed elsewhere and have a volume here.
pub async fn run(
    parts: Arc<AgentParts>,
    left: watch::Sender<BTreeSet<Name>>,
    cancel: CancellationToken,
) {
    let (mut live, mut removed) = (parts.live.clone(), Removed::new());
    let mut due = parts.clock.now();
    loop {
        let mut swept = remove(&parts, &mut removed).await;
        if parts.clock.now() >= due {
            due = parts.clock.now().plus(RHYTHM);
            swept = swept.and(sweep(&parts).await.map(|names| _ = left.send_replace(names)));
        }
        let well = swept.is_ok();
        match swept {
            Ok(()) => parts.solved("volumes"),
            Err(failure) => {
                parts.problem("volumes", &failure);
                due = parts.clock.now().plus(RETRY);
            }
        }
        let pause = Duration::from_nanos(due.0.saturating_sub(parts.clock.now().0));
        tokio::select! {
            biased;
            () = cancel.cancelled() => return,
            Ok(_) = live.wait_for(|live| !to_remove(live, &parts.me, &removed).is_empty()), if well => {}
            () = parts.clock.sleep(pause) => {}
        }
    }
}

/// Disks that were removed from their VMs, with the uids of those, of which nothing is here any more.
type Removed = BTreeSet<(VolumeRef, String)>;

/// Those of which something may be here, and their pools. Not one that a record still names: what was read last may be of two
/// moments.
fn to_remove(live: &Snapshot, me: &Name, removed: &Removed) -> Vec<(PoolSpec, VolumeName)> {
    let gone = live.gone.iter().filter_map(|(of, gone)| {
        let vm = live.vms.get(&of.vm).filter(|vm| vm.meta.uid == gone.vm_uid)?;
        let named = vm.spec.disks.iter().any(|disk| disk.name == of.disk);
        let volume = live.volumes.get(of).is_some_and(|volume| volume.vm_uid == gone.vm_uid);
        let here = !named && !volume && !removed.contains(&(of.clone(), gone.vm_uid.clone()));
        let pool = live.pools.get(&gone.pool).filter(|_| here)?;
        // One is enough to remove what no host has for itself.
        let elsewhere = |placed: &Placement| placed.host != *me;
        let others = matches!(
            pool.spec.driver,
            PoolDriverKind::Rbd | PoolDriverKind::Nfs | PoolDriverKind::Gluster
        ) && live.placements.get(&of.vm).is_some_and(|placed| elsewhere(placed));
        if others {
            return None;
        }
        let (vm, disk) = (of.vm.clone(), of.disk.clone());
        Some((pool.spec.clone(), VolumeName { vm, disk, vm_uid: gone.vm_uid.clone() }))
    });
    gone.collect()
}

/// Removes what this host has of disks that people have removed; the first that could not be, in words.
async fn remove(parts: &AgentParts, removed: &mut Removed) -> Result<(), StorageFailure> {
    let live = Arc::clone(&parts.live.borrow());
    let mut failed = Ok(());
    for (pool, name) in to_remove(&live, &parts.me, removed) {
        if let Err(failure) = parts.storage.delete_volume(&pool, &name).await {
            failed = failed.and(Err(failure));
            continue;
        }
        tracing::info!(volume = %name, pool = pool.place(), "it was removed from its VM, and nothing of it is here any more");
        removed.insert((VolumeRef { vm: name.vm, disk: name.disk }, name.vm_uid));
    }
    failed
}

/// One sweep; the VMs whose tasks must clean up here.
async fn sweep(parts: &AgentParts) -> Result<BTreeSet<Name>, StorageFailure> {
    let mut live = parts.live.clone();
    let Ok(snapshot) =
        live.wait_for(|snapshot| snapshot.revision > 0).await.map(|s| Arc::clone(&s))
    else {
        return Ok(BTreeSet::new());
    };
    let mut found = Vec::new();
    for pool in local_pools(&snapshot) {
        found.push((pool, parts.storage.volumes(pool).await?));
    }
    sweep_replicas(parts, &snapshot).await?;
    if found.is_empty() {
        return Ok(BTreeSet::new());
    }
    let (uids, placed) = owners(parts).await?;
    let mut elsewhere = BTreeSet::new();
    for (pool, names) in found {
        let (owned, nobodys): (Vec<_>, Vec<_>) =
            names.into_iter().partition(|name| uids.contains(&name.vm_uid));
        for name in &nobodys {
            tracing::warn!(volume = %name, pool = pool.path, "no VM has this volume: it is put aside and removed in a day");
        }
        parts.storage.put_aside(pool, &nobodys).await?;
        let moved = |name: &VolumeName| placed.get(&name.vm).is_some_and(|host| *host != parts.me);
        elsewhere.extend(owned.into_iter().filter(moved).map(|name| name.vm));
    }
    Ok(elsewhere)
}

/// Puts replicas aside that no volume has here any more. Files are listed before the store is asked.
async fn sweep_replicas(parts: &AgentParts, snapshot: &Snapshot) -> Result<(), StorageFailure> {
    let specs = snapshot.pools.values().map(|pool| &pool.value.spec);
    let pools = specs.filter(|pool| pool.driver == PoolDriverKind::Mirrored);
    let mut found = Vec::new();
    for pool in pools {
        found.push((pool, parts.storage.volumes(pool).await?));
    }
    if found.iter().all(|(_, names)| names.is_empty()) {
        return Ok(());
    }
    let unanswered = |error: StoreError| StorageFailure {
        what: format!("the store does not tell whose the replicas are ({error}); none is removed"),
    };
    let records = parts.store.all(keys::VOLUMES).await.map_err(unanswered)?;
    let mut here = BTreeSet::new();
    for kv in &records.kvs {
        let of = kv.key.strip_prefix(keys::VOLUMES).and_then(VolumeRef::parse);
        let record = serde_json::from_slice::<Volume>(&kv.value).ok();
        let Some((of, record)) = of.zip(record) else {
            return Err(StorageFailure {
                what: format!(
                    "the record {} cannot be read by this version of Haven; until it can no replica is removed here: update this host",
                    kv.key
                ),
            });
        };
        if record.replicas.contains_key(&parts.me) {
            here.insert(mirrored::name(&of, &record));
        }
    }
    for (pool, names) in found {
        let nobodys: Vec<_> = names.into_iter().filter(|name| !here.contains(name)).collect();
        for name in &nobodys {
            tracing::warn!(volume = %name, pool = pool.path, "no volume has this replica here: it is put aside and removed in a day");
        }
        parts.storage.put_aside(pool, &nobodys).await?;
    }
    Ok(())
}

/// The uids of all VMs and the host of each.
async fn owners(
    parts: &AgentParts,
) -> Result<(BTreeSet<String>, BTreeMap<Name, Name>), StorageFailure> {
    let unanswered = |error: StoreError| StorageFailure {
        what: format!("the store does not tell whose the volumes are ({error}); none is removed"),
    };
    let prefix = keys::objects(Kind::Vm);
    let vms = parts.store.all(&prefix).await.map_err(unanswered)?;
    let mut uids = BTreeSet::new();
    for kv in &vms.kvs {
        let Record::Says((uid, _)) = Record::of(Some(kv), identity) else {
            return Err(StorageFailure {
                what: format!(
                    "the record {} cannot be read by this version of Haven; until it can no old volume is removed here: update this host",
                    kv.key
                ),
            });
        };
        uids.insert(uid);
    }
    let prefix = keys::PLACEMENTS;
    let placements = parts.store.all(prefix).await.map_err(unanswered)?;
    let placed = placements.kvs.iter().filter_map(|kv| {
        let Record::Says(host) = Record::of(Some(kv), host) else { return None };
        Some((Name::new(kv.key.strip_prefix(prefix)?).ok()?, host))
    });
    Ok((uids, placed.collect()))
}

#[cfg(test)]
mod tests {
    use super::{Known, Record};
    use haven_model::Name;

    fn known(vm: Record<(&str, bool)>, placed: Record<&str>) -> Known {
        let vm = match vm {
            Record::Absent => Record::Absent,
            Record::Unreadable => Record::Unreadable,
            Record::Says((uid, deleting)) => Record::Says((uid.to_owned(), deleting)),
        };
        let placed = match placed {
            Record::Absent => Record::Absent,
            Record::Unreadable => Record::Unreadable,
            Record::Says(host) => Record::Says(Name::new(host).unwrap()),
        };
        Known { vm, placed }
    }

    #[test]
    fn a_volume_goes_only_when_the_store_says_so() {
        use Record::{Absent, Says, Unreadable};
        let me = Name::new("host1").unwrap();
        let may = |known: Known| (known.lets_go(&me, "u1", false), known.lets_go(&me, "u1", true));
        for placed in [Absent, Unreadable, Says("host1"), Says("host2")] {
            assert_eq!(may(known(Unreadable, placed.clone())), (false, false), "{placed:?}");
            assert_eq!(may(known(Absent, placed.clone())), (false, false), "{placed:?}");
            assert_eq!(may(known(Says(("u2", false)), placed.clone())), (true, true), "{placed:?}");
        }
        assert_eq!(may(known(Says(("u1", false)), Says("host1"))), (false, false));
        assert_eq!(may(known(Says(("u1", true)), Says("host1"))), (true, true));
        assert_eq!(may(known(Says(("u1", false)), Says("host2"))), (true, false));
        assert_eq!(may(known(Says(("u1", false)), Absent)), (false, false));
        assert_eq!(may(known(Says(("u1", true)), Unreadable)), (false, false));
    }
}
