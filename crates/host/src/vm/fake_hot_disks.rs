//! Disks that come, go and grow, of VMs that are records.

use super::{
    driver::{DiskLaunch, VmDriver, VmError, VmLaunch},
    fake::{FakeVmDriver, World},
    hot_disks::{Has, HasDisk, HotDisks, LetGo},
};
use async_trait::async_trait;
use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

/// Which VM on which host.
type Process = (String, String);

/// With what the processes of all hosts were started, and which guests let no disk go.
#[derive(Default)]
pub struct PluggedDisks {
    launched: Mutex<BTreeMap<Process, VmLaunch>>,
    deaf: Mutex<BTreeSet<Process>>,
}

impl PluggedDisks {
    fn launched(&self) -> MutexGuard<'_, BTreeMap<Process, VmLaunch>> {
        self.launched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn deaf(&self) -> MutexGuard<'_, BTreeSet<Process>> {
        self.deaf.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A process begins.
    pub(super) fn started(&self, host: &str, launch: &VmLaunch) {
        self.launched().insert((host.to_owned(), launch.vm.clone()), launch.clone());
    }

    /// It has ended.
    pub(super) fn ended(&self, host: &str, vm: &str) {
        let process = (host.to_owned(), vm.to_owned());
        self.launched().remove(&process);
        self.deaf().remove(&process);
    }

    /// Whether its guest keeps the disks that it is asked for.
    pub fn set_deaf(&self, host: &str, vm: &str, deaf: bool) {
        let process = (host.to_owned(), vm.to_owned());
        let mut all = self.deaf();
        if deaf {
            all.insert(process);
        } else {
            all.remove(&process);
        }
    }
}

impl World {
    /// The disks that a process has, by name, with their sizes in bytes.
    #[must_use]
    pub fn plugged(&self, host: &str, vm: &str) -> Vec<(String, u64)> {
        let all = self.plugged.launched();
        let launch = all.get(&(host.to_owned(), vm.to_owned()));
        let disks = launch.into_iter().flat_map(|launch| &launch.disks);
        disks.map(|disk| (disk.name.clone(), disk.size_bytes)).collect()
    }
}

impl FakeVmDriver {
    fn change<T>(&self, vm: &str, change: impl FnOnce(&mut VmLaunch) -> T) -> Result<T, VmError> {
        let mut all = self.world.plugged.launched();
        let launch = all.get_mut(&(self.host.clone(), vm.to_owned()));
        launch.map(change).ok_or_else(|| VmError::NotHere(vm.into()))
    }

    fn answers(&self, vm: &str) -> Result<(), VmError> {
        match self.world.is_silent(&self.host, vm) {
            true => {
                let source = super::qmp::QmpError::Closed;
                Err(VmError::Qmp { vm: vm.into(), source })
            }
            false => Ok(()),
        }
    }
}

#[async_trait]
impl HotDisks for FakeVmDriver {
    async fn has(&self, vm: &str) -> Result<Has, VmError> {
        self.clock.pass().await;
        self.change(vm, |launch| Has {
            ports: launch.ports,
            disks: launch
                .placed()
                .map(|(place, disk)| HasDisk {
                    name: disk.name.clone(),
                    place,
                    size_bytes: disk.size_bytes,
                    mirrored: disk.mirror.is_some() || disk.parked,
                    parked: disk.parked,
                    plugged: true,
                    ported: disk.slot.is_some(),
                })
                .collect(),
            named: launch.disks_as.clone(),
        })
    }

    async fn plug(&self, vm: &str, disk: &DiskLaunch, named: &str) -> Result<(), VmError> {
        self.state(vm).await?;
        self.answers(vm)?;
        let mut with = self.change(vm, |launch| launch.clone())?;
        let taken = with.disks.iter().any(|one| one.slot == disk.slot && one.name != disk.name);
        if !with.ports || disk.slot.is_none() || taken {
            let what = format!("the disk `{}` of {vm} has no port to be plugged into", disk.name);
            return Err(VmError::System { what, source: io::ErrorKind::AddrNotAvailable.into() });
        }
        if with.disks.iter().any(|one| one.name == disk.name) {
            return Ok(());
        }
        with.disks.push(disk.clone());
        named.clone_into(&mut with.disks_as);
        self.plug_mirror(&with, &disk.name)?;
        self.world.local_disks.plugged(&self.host, vm, disk.path.to_str());
        self.change(vm, |launch| *launch = with)
    }

    async fn unplug(
        &self,
        vm: &str,
        place: usize,
        named: &str,
        _patience: Duration,
    ) -> Result<LetGo, VmError> {
        self.state(vm).await?;
        self.answers(vm)?;
        if self.world.plugged.deaf().contains(&(self.host.clone(), vm.to_owned())) {
            return Ok(LetGo::NotYet);
        }
        let whole = self.world.mirrors.unplugged(&self.host, vm, place);
        let gone = self.change(vm, |launch| {
            named.clone_into(&mut launch.disks_as);
            Some(launch.disks.remove(launch.at(place)?))
        })?;
        if let Some(gone) = gone {
            self.world.local_disks.unplugged(&self.host, vm, gone.path.to_str());
        }
        Ok(LetGo::Yes { whole })
    }

    async fn grow(&self, vm: &str, place: usize, size: u64, named: &str) -> Result<(), VmError> {
        self.state(vm).await?;
        self.answers(vm)?;
        self.change(vm, |launch| {
            named.clone_into(&mut launch.disks_as);
            if let Some(at) = launch.at(place) {
                launch.disks[at].size_bytes = size;
            }
        })
    }

    async fn park(&self, vm: &str, place: usize) -> Result<bool, VmError> {
        self.state(vm).await?;
        self.answers(vm)?;
        let whole = self.world.mirrors.unplugged(&self.host, vm, place);
        self.change(vm, |launch| {
            let at = launch.at(place)?;
            let begins = !std::mem::replace(&mut launch.disks[at].parked, true);
            launch.disks[at].mirror = None;
            Some(begins && whole)
        })?
        .ok_or_else(|| VmError::NotHere(vm.into()))
    }

    async fn unpark(&self, vm: &str, disk: &DiskLaunch, named: &str) -> Result<(), VmError> {
        self.state(vm).await?;
        self.answers(vm)?;
        let mut with = self.change(vm, |launch| launch.clone())?;
        let Some(at) = with.disks.iter().position(|one| one.name == disk.name && one.parked) else {
            return Ok(());
        };
        with.disks[at] = disk.clone();
        named.clone_into(&mut with.disks_as);
        self.plug_mirror(&with, &disk.name)?;
        self.change(vm, |launch| *launch = with)
    }
}
