//! Snapshots of disks of guests that run nowhere.

use super::{
    driver::VmError,
    fake::FakeVmDriver,
    qmp::QmpError,
    snapshots::{Beside, Keeps, Snapshots},
};
use async_trait::async_trait;
use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
};

/// By VM and disk, and the name of the snapshot: when it was taken, and what the disk held.
type Kept = BTreeMap<(String, String), BTreeMap<String, (i64, Vec<u8>)>>;

/// What disks keep.
#[derive(Default)]
pub struct FakeKept {
    kept: Mutex<Kept>,
    /// Why something cannot be done with a disk: the pool is full, say.
    refuses: Mutex<BTreeMap<String, String>>,
    /// Whether file systems are frozen for it.
    freezes: Mutex<bool>,
}

impl FakeKept {
    fn kept<T>(&self, change: impl FnOnce(&mut Kept) -> T) -> T {
        change(&mut self.kept.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Has a disk refuse what is asked of its snapshots, or no more.
    pub fn refuse(&self, disk: &str, why: Option<&str>) {
        let mut refuses = self.refuses.lock().unwrap_or_else(PoisonError::into_inner);
        match why {
            Some(why) => _ = refuses.insert(disk.to_owned(), why.to_owned()),
            None => _ = refuses.remove(disk),
        }
    }

    /// Guests' file systems are frozen from now on.
    pub fn freeze(&self) {
        *self.freezes.lock().unwrap_or_else(PoisonError::into_inner) = true;
    }

    pub(super) fn frozen(&self) -> bool {
        *self.freezes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why this disk refuses, if so.
    #[must_use]
    pub fn refusal(&self, disk: &str) -> Option<String> {
        self.refuses.lock().unwrap_or_else(PoisonError::into_inner).get(disk).cloned()
    }

    /// A disk keeps this content.
    pub fn keep(&self, vm: &str, disk: &str, snapshot: &str, of: (i64, Vec<u8>)) {
        self.kept(|kept| {
            let disk = kept.entry((vm.to_owned(), disk.to_owned())).or_default();
            disk.insert(snapshot.to_owned(), of);
        });
    }

    /// It keeps it no more; whether it did.
    pub fn drop_kept(&self, vm: &str, disk: &str, snapshot: &str) -> bool {
        let key = (vm.to_owned(), disk.to_owned());
        self.kept(|kept| kept.get_mut(&key).and_then(|disk| disk.remove(snapshot)).is_some())
    }

    /// What a disk keeps under this name.
    #[must_use]
    pub fn content(&self, vm: &str, disk: &str, snapshot: &str) -> Option<Vec<u8>> {
        let key = (vm.to_owned(), disk.to_owned());
        self.kept(|kept| kept.get(&key)?.get(snapshot).map(|(_, content)| content.clone()))
    }

    /// What it keeps.
    #[must_use]
    pub fn of(&self, vm: &str, disk: &str, size: u64) -> Keeps {
        let key = (vm.to_owned(), disk.to_owned());
        let snapshots = self.kept(|kept| kept.get(&key).cloned().unwrap_or_default());
        Keeps { size, snapshots: snapshots.into_iter().map(|(name, (at, _))| (name, at)).collect() }
    }
}

fn refused(vm: &str, said: String) -> VmError {
    let source = QmpError::Refused { command: "transaction".into(), said };
    VmError::Qmp { vm: vm.into(), source }
}

#[async_trait]
impl Snapshots for FakeVmDriver {
    async fn keeps(&self, vm: &str) -> Result<BTreeMap<String, Keeps>, VmError> {
        self.clock.pass().await;
        if self.world.is_silent(&self.host, vm) {
            return Err(VmError::Qmp { vm: vm.into(), source: QmpError::Closed });
        }
        let disks = self.world.disks.content(vm).into_iter();
        Ok(disks
            .map(|(name, content)| {
                let keeps = self.world.kept.of(vm, &name, content.len() as u64);
                (name, keeps)
            })
            .collect())
    }

    async fn take_snapshot(
        &self,
        vm: &str,
        disks: &[String],
        snapshot: &str,
    ) -> Result<bool, VmError> {
        self.clock.pass().await;
        let held: BTreeMap<_, _> = self.world.disks.content(vm).into_iter().collect();
        for disk in disks {
            if let Some(why) = self.world.kept.refusal(disk) {
                return Err(refused(vm, why));
            }
            if !held.contains_key(disk) {
                return Err(refused(vm, format!("Cannot find device='{disk}'")));
            }
        }
        for disk in disks {
            self.world.kept.keep(vm, disk, snapshot, (7, held[disk].clone()));
        }
        Ok(self.world.kept.frozen())
    }

    async fn take_held(
        &self,
        vm: &str,
        disks: &[String],
        snapshot: &str,
        beside: Beside,
    ) -> Result<bool, VmError> {
        let frozen = self.take_snapshot(vm, disks, snapshot).await?;
        beside.await.map_err(VmError::Beside)?;
        Ok(frozen)
    }

    async fn remove_snapshot(&self, vm: &str, disk: &str, snapshot: &str) -> Result<(), VmError> {
        self.clock.pass().await;
        if let Some(why) = self.world.kept.refusal(disk) {
            return Err(refused(vm, why));
        }
        match self.world.kept.drop_kept(vm, disk, snapshot) {
            true => Ok(()),
            false => Err(refused(vm, format!("Snapshot '{snapshot}' does not exist"))),
        }
    }
}
