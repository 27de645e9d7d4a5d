//! Snapshots of disks in pools of Ceph clusters, whose images keep them (docs/decisions/0026-rbd.md).
//!
//! ```text
//!   guest runs:  attempt is named in the record ─► guest stands ─► `rbd snap create` of each image ─► it goes on ─► there
//!   guest rests: attempt is named ─► whoever may have the image open is shut out ─► `rbd snap create` of each ─► there
//! ```
//!
//! Each attempt has a name of its own. A daemon may be killed while `rbd` asks, and what it asked for is done later all the same, when
//! the guest has gone on: that is never taken for a part of the next attempt.

use super::{At, Disk, Due, LONGEST, LOOK, VmTask};
use crate::{
    agent::{
        chain,
        storage::{SnapshotStep, VolumeName},
    },
    vm::snapshots::{Beside, Keeps},
};
use futures::future::try_join_all;
use haven_model::{
    Name, PoolSpec, backup::Moment, clients::DiskClients, keys, vm_snapshot::VmSnapshot,
};
use std::{collections::BTreeSet, sync::Arc, time::Duration};

/// So long a guest stands at most for Ceph to keep its disks.
const STANDS: Duration = Duration::from_secs(15);
/// So long a disk may take whose guest runs and needs this task.
const RUNS: Duration = Duration::from_secs(60);
/// So long it may take to make an image what it was: each of its objects is put back.
const REVERTS: Duration = Duration::from_secs(6 * 60 * 60);

/// A disk in Ceph.
#[derive(Clone)]
pub(in crate::agent::vm_task) struct Image {
    pool: PoolSpec,
    volume: VolumeName,
    /// What it keeps of any attempt of this snapshot.
    pub attempts: Vec<String>,
}

impl VmTask {
    /// A disk of it in Ceph, and what it keeps; nothing when it is not there.
    pub(super) async fn image(
        &self,
        due: &Due,
        name: &Name,
        pool: &PoolSpec,
    ) -> Result<Option<Disk>, String> {
        let record = &due.record;
        let is_wanted = record.state == haven_model::vm_snapshot::SnapshotState::Wanted;
        if self.running.is_some() && is_wanted {
            let has = self.parts.vms.has(self.vm.as_str()).await.map_err(|error| chain(&error))?;
            if !has.disks.iter().any(|disk| disk.name == name.as_str()) {
                return Err(format!(
                    "the disk `{name}` is not attached; that is done once it is, or once the VM is stopped"
                ));
            }
        }
        let (vm, disk) = (self.vm.clone(), name.clone());
        let volume = VolumeName { vm, disk, vm_uid: due.object.meta.uid.clone() };
        let kept = tokio::select! {
            biased;
            kept = self.parts.storage.keeps(pool, &volume) => kept.map_err(|failure| failure.what)?,
            () = self.parts.clock.sleep(LOOK) => {
                return Err(format!("the disk `{name}` does not answer"));
            }
        };
        let Some(kept) = kept else { return Ok(None) };
        // What other attempts have left shows other moments.
        let tag = record.tag_in_ceph();
        let at = tag.and_then(|tag| kept.snapshots.get(&tag).copied());
        let snapshots = at.map(|at| (record.tag(), at)).into_iter().collect();
        let attempts = kept.snapshots.into_keys().filter(|tag| record.is_attempt(tag)).collect();
        let image = Image { pool: pool.clone(), volume, attempts };
        let keeps = Keeps { size: kept.size, snapshots };
        Ok(Some(Disk { name: name.clone(), at: At::Image(image), keeps }))
    }

    /// Takes it of a VM of which disks are in Ceph, and none is mirrored. Nothing is left of attempts before this one.
    pub(super) async fn take_in_ceph(&mut self, due: &Due, disks: &[Disk], attempt: &str) -> bool {
        let moment = match self.running {
            Some(_) => self.take_held(due, disks, &VmSnapshot::tag_of(attempt)).await,
            None => self.take_at_rest(due, disks).await,
        };
        self.taken(due, moment).await
    }

    /// Its guest stands until all have it.
    async fn take_held(&mut self, due: &Due, disks: &[Disk], tag: &str) -> Result<Moment, String> {
        let others = disks.iter().filter(|disk| disk.image().is_none());
        let others: Vec<String> = others.map(|disk| disk.name.to_string()).collect();
        let images: Vec<Image> = disks.iter().filter_map(|disk| disk.image().cloned()).collect();
        let (parts, tag) = (Arc::clone(&self.parts), tag.to_owned());
        let beside: Beside = Box::pin(async move {
            let kept = images.iter().map(|image| {
                parts.storage.snapshot(&image.pool, &image.volume, SnapshotStep::Take, &tag, None)
            });
            tokio::select! {
                biased;
                kept = try_join_all(kept) => kept.map(drop).map_err(|failure| failure.what),
                () = parts.clock.sleep(STANDS) => Err(format!(
                    "Ceph did not keep its disks within {} s, and its guest goes on; see `ceph health detail`",
                    STANDS.as_secs()
                )),
            }
        });
        let (vm, snapshot) = (self.vm.as_str(), due.record.tag());
        let frozen = self.parts.vms.take_held(vm, &others, &snapshot, beside).await;
        match frozen {
            Ok(true) => Ok(Moment::Frozen),
            Ok(false) => Ok(Moment::Running),
            Err(error) => {
                // It may stand yet.
                self.unclosed = true;
                self.close_views().await;
                Err(chain(&error))
            }
        }
    }

    async fn take_at_rest(&self, due: &Due, disks: &[Disk]) -> Result<Moment, String> {
        // All of them, before the first one is kept: they are to show one instant.
        for image in disks.iter().filter_map(Disk::image) {
            let name = &image.volume.disk;
            self.as_long_as_ours(due, name, LONGEST, self.shut_image(due, image)).await?;
        }
        for disk in disks {
            self.step_on(due, disk, SnapshotStep::Take).await?;
        }
        // One that shall run has not come to its end as it should.
        Ok(if due.object.spec.running { Moment::Running } else { Moment::Stopped })
    }

    /// Shuts out whoever has it open, or may have it, as before a start.
    async fn shut_image(&self, due: &Due, image: &Image) -> Result<(), String> {
        let key = keys::clients(&self.vm);
        let there = self.parts.store.get(&key).await.map_err(|error| chain(&error))?;
        let record = match &there {
            None => DiskClients::default(),
            Some(kv) => serde_json::from_slice::<DiskClients>(&kv.value).map_err(|_| {
                format!("the record {key} cannot be read by this host's version of Haven; update this host")
            })?,
        };
        let its = record
            .open
            .iter()
            .filter(|one| record.vm_uid == due.object.meta.uid && one.disk == image.volume.disk);
        let its: BTreeSet<String> = its.map(|one| one.client.clone()).collect();
        let shut = if record.is_shut() { its.clone() } else { BTreeSet::new() };
        let done = self.parts.storage.shut_out(&image.pool, &image.volume, &its, &shut).await;
        done.map_err(|failure| failure.what)
    }

    /// A step on one, as long as the VM is this host's and nobody takes the task back.
    pub(super) async fn step_on_image(
        &self,
        due: &Due,
        image: &Image,
        step: SnapshotStep,
    ) -> Result<(), String> {
        let storage = &self.parts.storage;
        let tag = due.record.tag_in_ceph();
        let done = async {
            if step == SnapshotStep::Remove {
                for tag in &image.attempts {
                    let gone = storage.snapshot(&image.pool, &image.volume, step, tag, None).await;
                    gone.map_err(|failure| failure.what)?;
                }
                return Ok(());
            }
            if step == SnapshotStep::Revert {
                self.shut_image(due, image).await?;
            }
            let tag = tag.ok_or("no attempt of it is named")?;
            let done = storage.snapshot(&image.pool, &image.volume, step, &tag, None).await;
            done.map_err(|failure| failure.what)
        };
        let longest = match step {
            SnapshotStep::Revert => REVERTS,
            _ if self.running.is_some() => RUNS,
            _ => LONGEST,
        };
        self.as_long_as_ours(due, &image.volume.disk, longest, done).await
    }
}
