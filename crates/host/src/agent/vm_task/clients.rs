//! The disks of a VM that runs in pools of Ceph clusters: it is noted by which clients its process has them open, so that they can
//! be shut to it when this host is not heard; and a process to which they were shut is ended.

use super::VmTask;
use crate::agent::{chain, clients, storage::VolumeName};
use haven_model::{
    Name, PoolDriverKind, PoolSpec, Snapshot, VmSpec,
    clients::{DiskClients, OpenDisk},
    keys,
    vm::DiskSpec,
};
use std::{collections::BTreeSet, sync::Arc, time::Duration};

/// How soon a process that was ended is seen to.
const AT_ONCE: Duration = Duration::from_millis(10);
/// When Ceph is asked again that did not say by which clients a disk is open.
const PAUSE: Duration = Duration::from_secs(2);
/// When the record is looked at again after a word that the store did not take.
const SOON: Duration = Duration::from_millis(100);
/// From so many per cent on a filer counts as full.
const FULL: u64 = 99;
/// So long may whoever speaks to a filer that answers again need to have what was open before open again.
const MENDS: Duration = Duration::from_secs(10);
/// How soon a process to which its disks give nothing but errors is started anew.
const ANEW: Duration = Duration::from_secs(2);

/// The disks of a VM in pools of Ceph clusters that its process has or should have, with their pools.
fn in_ceph<'a>(
    snapshot: &'a Snapshot,
    spec: &'a VmSpec,
) -> impl Iterator<Item = (&'a DiskSpec, &'a PoolSpec)> {
    spec.disks.iter().filter_map(|disk| {
        let pool = &snapshot.pools.get(&disk.pool)?.spec;
        (pool.driver == PoolDriverKind::Rbd).then_some((disk, pool))
    })
}

/// The disks of a VM that filers keep, with their pools.
fn on_filers<'a>(
    snapshot: &'a Snapshot,
    spec: &'a VmSpec,
) -> impl Iterator<Item = (&'a DiskSpec, &'a PoolSpec)> {
    spec.plugged().filter_map(|disk| {
        let pool = &snapshot.pools.get(&disk.pool)?.spec;
        matches!(pool.driver, PoolDriverKind::Nfs | PoolDriverKind::Gluster).then_some((disk, pool))
    })
}

impl VmTask {
    /// Sees to it that the record of who has its disks in Ceph open is right.
    pub(super) async fn keep_clients(&mut self) {
        let snapshot = &*Arc::clone(&self.parts.live.borrow());
        let record = snapshot.clients.get(&self.vm);
        let Some(object) = snapshot.vms.get(&self.vm) else { return };
        let (Some(record), Some(placed)) = (record, snapshot.placements.get(&self.vm)) else {
            return;
        };
        if record.vm_uid != object.meta.uid {
            return;
        }
        if record.shut.is_some() {
            return self.shut_out_of_ceph().await;
        }
        // A disk that is plugged in is opened after it was written that somebody begins to.
        if self.hot.is_busy() {
            return;
        }
        let me = self.parts.me.clone();
        let plugged: BTreeSet<&Name> = in_ceph(snapshot, &object.spec)
            .filter(|(disk, _)| !disk.detached)
            .map(|(disk, _)| &disk.name)
            .collect();
        let noted: BTreeSet<&Name> =
            record.open.iter().filter(|one| one.host == me).map(|one| &one.disk).collect();
        let alone = placed.moving_to.is_none() && placed.moved_from.is_none();
        // Who is to take its guest has them open, too, and is not told apart yet.
        if placed.moving_to.is_some() && record.begins.iter().any(|host| *host != me) {
            return;
        }
        let now = match record.begins.contains(&me) || noted != plugged {
            true => match self.note_clients(snapshot, record, &object.spec, alone).await {
                Some(now) => now,
                None => return,
            },
            false => (*record.value).clone(),
        };
        // Whoever else had them open has been shut out, has handed its guest over, or never ran it.
        let now = if alone { now.alone(&me) } else { now };
        if now == *record.value {
            return;
        }
        match clients::put(&self.parts, &self.vm, record.revision, placed, &now).await {
            Ok(Some(_)) => {}
            Ok(None) => self.look_again(SOON),
            Err(error) => {
                tracing::debug!(vm = %self.vm, %error, "who has its disks open could not be written");
                self.look_again(PAUSE);
            }
        }
    }

    /// The record once it names the clients by which its process has its disks open; nothing when they are not known yet.
    async fn note_clients(
        &mut self,
        snapshot: &Snapshot,
        record: &DiskClients,
        spec: &VmSpec,
        alone: bool,
    ) -> Option<DiskClients> {
        let has = match self.parts.vms.has(self.vm.as_str()).await {
            Ok(has) => has,
            Err(error) => {
                tracing::debug!(vm = %self.vm, why = chain(&error), "its disks cannot be told");
                self.look_again(PAUSE);
                return None;
            }
        };
        let its = |disk: &Name| has.disks.iter().any(|one| one.name == disk.as_str());
        let noted = record.open.iter().filter(|one| one.host == self.parts.me);
        let noted: BTreeSet<&Name> = noted.map(|one| &one.disk).collect();
        let open: BTreeSet<&Name> =
            in_ceph(snapshot, spec).map(|(disk, _)| &disk.name).filter(|disk| its(disk)).collect();
        // What is wanted of it by now waits for its next start.
        if !record.begins.contains(&self.parts.me) && noted == open {
            return Some(record.clone());
        }
        let others: BTreeSet<&str> = record
            .open
            .iter()
            .filter(|one| one.host != self.parts.me && !alone)
            .map(|one| one.client.as_str())
            .collect();
        let mut open = Vec::new();
        for (disk, pool) in in_ceph(snapshot, spec) {
            if !its(&disk.name) {
                continue;
            }
            let (vm, vm_uid) = (self.vm.clone(), record.vm_uid.clone());
            let name = VolumeName { vm, disk: disk.name.clone(), vm_uid };
            let clients = match self.parts.storage.clients(pool, &name).await {
                Ok(clients) => clients,
                Err(failure) => {
                    tracing::warn!(vm = %self.vm, disk = %disk.name, %failure, "by which client it is open is not known");
                    self.look_again(PAUSE);
                    return None;
                }
            };
            let mut clients = clients;
            clients.retain(|client| !others.contains(client.as_str()));
            if clients.is_empty() {
                tracing::warn!(vm = %self.vm, disk = %disk.name, "Ceph says that no client has it open, and its process does");
                self.look_again(PAUSE);
                return None;
            }
            open.extend(clients.into_iter().map(|client| OpenDisk {
                disk: disk.name.clone(),
                pool: disk.pool.clone(),
                host: self.parts.me.clone(),
                client,
            }));
        }
        Some(record.noted_by(&self.parts.me, open))
    }

    /// Its disks were shut to this host, or are about to be, so that it can start elsewhere. If it has not, since this host is heard
    /// again, it starts anew here.
    async fn shut_out_of_ceph(&mut self) {
        // What the live copy says may be of before its process was begun, which took that back.
        let there = self.parts.store.get(&keys::clients(&self.vm)).await;
        let there = there.ok().flatten();
        let now = there.and_then(|kv| serde_json::from_slice::<DiskClients>(&kv.value).ok());
        if now.is_none_or(|now| now.shut.is_none()) {
            return self.look_again(SOON);
        }
        self.kill().await;
        if self.running.is_none() {
            self.tell(format!(
                "its process on {me} was ended: its disks in Ceph were shut to it while {me} was not heard",
                me = self.parts.me
            ))
            .await;
            self.look_again(AT_ONCE);
        }
    }

    /// Whether its guest stands because a disk in Ceph or on a filer gives nothing but errors, which only a new process mends: it is
    /// ended then.
    pub(super) async fn ended_for_its_disks(&mut self) -> bool {
        let live = Arc::clone(&self.parts.live.borrow());
        let Some(object) = live.vms.get(&self.vm) else { return false };
        // A disk elsewhere may be what is full, and it goes on by itself once there is room.
        let Ok(has) = self.parts.vms.has(self.vm.as_str()).await else { return false };
        let in_ceph: BTreeSet<&str> =
            in_ceph(&live, &object.spec).map(|(disk, _)| disk.name.as_str()).collect();
        let on_filers: Vec<_> = on_filers(&live, &object.spec).collect();
        let its = |name: &str| {
            in_ceph.contains(name) || on_filers.iter().any(|(disk, _)| disk.name.as_str() == name)
        };
        if has.disks.is_empty() || !has.disks.iter().all(|disk| its(&disk.name)) {
            return false;
        }
        for (_, pool) in &on_filers {
            // One that is full or away takes it once there is room, or it is back.
            match self.parts.storage.room(pool).await {
                Ok(Some(room)) if room.full() < FULL => {}
                _ => {
                    self.mirrors.answers = None;
                    return false;
                }
            }
        }
        if !on_filers.is_empty() {
            // What was open may yet be mended by whoever speaks to a filer that is just back.
            let now = self.parts.clock.now();
            let since = *self.mirrors.answers.get_or_insert(now);
            if now.since(since) < MENDS {
                return false;
            }
        }
        self.kill().await;
        if self.running.is_none() {
            let what = match on_filers.is_empty() {
                true => {
                    "its process was ended: Ceph takes nothing from it any more (was it shut out there? `ceph osd blocklist ls`); it starts anew"
                }
                false => {
                    "its process was ended: its filer answers and has room, and takes nothing from it any more (was its disk opened elsewhere, or its mount lost?); it starts anew"
                }
            };
            self.tell(what.to_owned()).await;
            self.retry_in(ANEW);
        }
        true
    }
}
