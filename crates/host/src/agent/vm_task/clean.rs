//! What is left of a VM on this host when it is deleted or lives elsewhere.

use super::{NET, VmTask};
use crate::agent::{
    storage::{StorageFailure, VolumeName},
    vm_step::Wanted,
    volumes::{self, Known},
};
use haven_model::{PoolDriverKind, PoolSpec, Snapshot};
use std::time::Duration;

impl VmTask {
    /// Removes what this host has of it, as far as the store lets go of it.
    pub(super) async fn clean(&mut self, snapshot: &Snapshot, wanted: Wanted) {
        let known = match Known::ask(&self.parts, &self.vm).await {
            Ok(known) => known,
            Err(error) => return self.failed("ask the store for", &error),
        };
        match self.volumes(snapshot).await {
            Ok(volumes) => {
                for (pool, name) in volumes {
                    // A replica is no volume of the past when its VM runs elsewhere.
                    let everywhere = pool.driver != PoolDriverKind::Local;
                    if !known.lets_go(&self.parts.me, &name.vm_uid, everywhere) {
                        if matches!(wanted, Wanted::Delete) {
                            tracing::warn!(volume = %name, "it is kept: the store does not say clearly that its VM is deleted");
                            return self.retry_in(NET);
                        }
                        continue;
                    }
                    if let Err(error) = self.parts.storage.delete_volume(&pool, &name).await {
                        return self.failed("remove a volume of", &error);
                    }
                }
            }
            Err(error) => return self.failed("look for volumes of", &error),
        }
        if let Err(error) = self.parts.storage.forget(self.vm.as_str()).await {
            return self.failed("clean up after", &error);
        }
        self.deleted = true;
        self.retry_in(Duration::from_millis(1));
    }

    /// All its volumes that this host can reach: those found in local pools, of whatever VM of its name, and those that
    /// its disks had.
    async fn volumes(
        &self,
        snapshot: &Snapshot,
    ) -> Result<Vec<(PoolSpec, VolumeName)>, StorageFailure> {
        let mut all = Vec::new();
        for pool in volumes::local_pools(snapshot) {
            let here = self.parts.storage.volumes(pool).await?;
            let its = here.into_iter().filter(|name| name.vm == self.vm);
            all.extend(its.map(|name| (pool.clone(), name)));
        }
        let Some((object, _)) = &self.last else { return Ok(all) };
        for disk in &object.spec.disks {
            let Some(pool) = snapshot.pools.get(&disk.pool) else { continue };
            let (vm, disk) = (self.vm.clone(), disk.name.clone());
            let known =
                (pool.spec.clone(), VolumeName { vm, disk, vm_uid: object.meta.uid.clone() });
            if !all.contains(&known) {
                all.push(known);
            }
        }
        Ok(all)
    }
}
