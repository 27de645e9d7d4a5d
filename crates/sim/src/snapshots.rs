//! Snapshots of VMs, as people ask for them: what `crates/control/src/api/snapshots.rs` writes, and when.

use crate::cluster::{Cluster, name};
use haven_model::{
    Name, PoolDriverKind, Snapshot, VmPhase, keys,
    object::Kind,
    vm_snapshot::{SnapshotDisk, SnapshotState, VmSnapshot},
};
use haven_store::raw::{Compare, Op};
use std::{sync::Arc, time::Duration};

/// The most that a VM has here.
const MOST: usize = 3;
/// How long a person waits for a VM to be stopped.
const PATIENCE: u32 = 60;
/// Between two looks.
const LOOK: Duration = Duration::from_millis(500);

/// What must be as it was for a record of its snapshots to be written; nothing while the API refuses.
fn unchanged(now: &Snapshot, vm: &Name) -> Option<(String, Vec<Compare>)> {
    let (object, placed) = (now.vms.get(vm)?, now.placements.get(vm)?);
    let rests = placed.moving_to.is_none() && placed.moved_from.is_none();
    if object.meta.deleting || !rests {
        return None;
    }
    let key = format!("{}{vm}", keys::objects(Kind::Vm));
    let over = vec![
        Compare::ModRevision(key, object.revision),
        Compare::ModRevision(keys::placement(vm), placed.revision),
    ];
    Some((object.meta.uid.clone(), over))
}

fn put(uid: &str, called: &Name, record: &VmSnapshot) -> Op {
    let value = serde_json::to_vec(record).expect("a record is plain data");
    Op::Put(keys::vm_snapshot(uid, called), value.into())
}

impl Cluster {
    fn now(&self) -> Snapshot {
        self.shared.judge.read(|facts| facts.snapshot.clone())
    }

    /// Takes one of the mirrored disks of a VM; the oldest is removed when it has enough.
    pub async fn take_snapshot(&self, vm: &str) {
        let (vm, now) = (name(vm), self.now());
        let Some((uid, mut over)) = unchanged(&now, &vm) else { return };
        let Some(object) = now.vms.get(&vm) else { return };
        let mirrored = |pool: &Name| {
            let pool = now.pools.get(pool);
            pool.is_some_and(|pool| pool.spec.driver == PoolDriverKind::Mirrored)
        };
        let disks = object.spec.disks.iter().filter(|disk| !disk.detached && mirrored(&disk.pool));
        let disks: Vec<SnapshotDisk> = disks
            .map(|disk| SnapshotDisk {
                name: disk.name.clone(),
                pool: disk.pool.clone(),
                size: disk.size,
                copies: Vec::new(),
            })
            .collect();
        let all = now.vm_snapshots.get(&uid);
        let reverts = |of: &VmSnapshot| of.state == SnapshotState::Reverting;
        if disks.is_empty() || all.is_some_and(|all| all.values().any(|of| reverts(of))) {
            return;
        }
        let there = |(_, of): &(&Name, &haven_model::Versioned<VmSnapshot>)| {
            matches!(of.state, SnapshotState::There | SnapshotState::Failed)
        };
        let ended: Vec<_> = all.into_iter().flatten().filter(there).collect();
        let mut ops = Vec::new();
        if ended.len() >= MOST
            && let Some((called, oldest)) = ended.iter().min_by_key(|(_, of)| of.at_ms)
        {
            let going = VmSnapshot { state: SnapshotState::Going, ..(*oldest.value).clone() };
            over.push(Compare::ModRevision(keys::vm_snapshot(&uid, called), oldest.revision));
            ops.push(put(&uid, called, &going));
        }
        let number = self.shared.incarnation();
        let (id, at_ms) = (format!("s{number}"), (self.shared.wall())());
        let record = VmSnapshot::wanted(id, vm, "a person".into(), at_ms, disks);
        ops.push(put(&uid, &name(&format!("s{number}")), &record));
        let _ = self.person.txn(over, ops).await;
    }

    /// Stops a VM, has its disks made what they were in its newest snapshot, and starts it.
    pub async fn revert(&self, vm: &str) {
        let key = format!("{}{vm}", keys::objects(Kind::Vm));
        let vm = name(vm);
        if self.now().vms.get(&vm).is_none_or(|object| {
            let all = self.now().vm_snapshots.get(&object.meta.uid).cloned().unwrap_or_default();
            all.is_empty()
        }) {
            return;
        }
        self.change(&key, |object| object["spec"]["running"] = false.into()).await;
        for _ in 0..PATIENCE {
            tokio::time::sleep(LOOK).await;
            if self.may_revert(&vm).await {
                break;
            }
        }
        self.change(&key, |object| object["spec"]["running"] = true.into()).await;
    }

    /// Asks for it; whether that needs no asking again.
    async fn may_revert(&self, vm: &Name) -> bool {
        let now = self.now();
        let Some((uid, mut over)) = unchanged(&now, vm) else { return false };
        let (Some(object), Some(placed)) = (now.vms.get(vm), now.placements.get(vm)) else {
            return true;
        };
        if object.spec.running {
            return true;
        }
        let told = now.told_of(vm).filter(|told| {
            told.phase == VmPhase::Stopped && told.generation >= object.meta.generation
        });
        let revision = now.vm_status.get(vm).map(|told| told.revision);
        let Some((_, revision)) = told.zip(revision) else { return false };
        let all = now.vm_snapshots.get(&uid).into_iter().flatten();
        let busy =
            |of: &VmSnapshot| matches!(of.state, SnapshotState::Wanted | SnapshotState::Reverting);
        if all.clone().any(|(_, of)| busy(of)) {
            return false;
        }
        let whole = |of: &VmSnapshot| {
            of.state == SnapshotState::There
                && of.disks.iter().all(|disk| disk.copies.contains(&placed.host))
        };
        let newest = all.filter(|(_, of)| whole(of)).max_by_key(|(_, of)| of.at_ms);
        let Some((called, there)) = newest else { return false };
        let back = there.disks.iter().map(|disk| disk.name.clone()).collect();
        let state = SnapshotState::Reverting;
        let record = VmSnapshot { state, back, ..(*there.value).clone() };
        over.push(Compare::ModRevision(keys::vm_snapshot(&uid, called), there.revision));
        over.push(Compare::ModRevision(keys::vm_status(vm), revision));
        let asked = self.person.txn(over, vec![put(&uid, called, &record)]).await;
        asked.is_ok_and(|outcome| outcome.succeeded)
    }

    /// The same beside everything else.
    pub fn revert_beside(self: &Arc<Self>, vm: &str) {
        let (cluster, vm) = (Arc::clone(self), vm.to_owned());
        tokio::spawn(async move { cluster.revert(&vm).await });
    }
}
