//! A disk that is closed and opened again under its device, with QEMU: so a mirrored one grows while its guest runs, whose quorum
//! cannot be made larger (docs/decisions/0025-hot-disks.md).
//!
//! ```text
//!   park:    the guest stops ─► p0 is made ─► the launch record ─► device ─► p0 ─► the disk's nodes are closed
//!   unpark:  its new nodes ─► p0 is made as large, which the guest is told ─► the launch record ─► device ─► d0 ─► the guest runs
//! ```
//!
//! `p0` fails every request, so that one that came through by whatever way would be kept by its device and done once the disk is
//! back: nothing is lost. Below it lies an empty file without a name: what is made larger must be something that can be.
//!
//! Whoever comes later finds a parked disk by the launch record, or by its device, and goes on from the beginning; a guest that
//! stands and has no parked disk is let run by the note that views leave, too.

use super::{
    commands,
    driver::{DiskLaunch, GuestState, VmError},
    launch::system,
    qemu::QemuDriver,
    qemu_views::{Asked, HELD, scratch},
    qmp::{DEADLINE, QmpError},
    record, run_dir,
};
use serde_json::{Value, json};
use std::io;

/// The node of a parked disk, and what it stands on.
fn nodes(place: usize) -> (String, String) {
    (format!("p{place}"), format!("q{place}"))
}

/// Whether a node stands in for a parked disk at this place.
pub(super) fn is_parked(node: &str, place: usize) -> bool {
    let (parked, beneath) = nodes(place);
    node == parked || node == beneath
}

fn failing(place: usize) -> Value {
    let (parked, beneath) = nodes(place);
    let fails =
        |what: &str| json!({ "event": "none", "iotype": what, "errno": 5, "immediately": true });
    let all = ["read", "write", "write-zeroes", "discard", "flush", "block-status"].map(fails);
    json!({ "driver": "blkdebug", "node-name": parked, "image": beneath, "inject-error": all })
}

impl Asked {
    /// Whether a device has what stands in for its disk.
    async fn has_parked(&self, place: usize) -> Result<bool, VmError> {
        match self.has(place).await {
            Ok(node) => Ok(node.is_some_and(|node| is_parked(&node, place))),
            // It has no such device: its guest has let it go.
            Err(VmError::Qmp { source: QmpError::Refused { .. }, .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Whether a disk of its guest is parked, by the record or by its device: it must not run.
    pub(super) async fn is_parked(&self) -> Result<bool, VmError> {
        for (place, disk) in self.launched.launch.placed() {
            if disk.parked || disk.rbd.is_none() && self.has_parked(place).await? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Makes what stands in for a disk, unless it is there.
    async fn stand_in(&self, place: usize, disk: &DiskLaunch) -> Result<(), VmError> {
        let (parked, beneath) = nodes(place);
        let there = self.tell(&commands::NODES, json!({ "flat": true })).await?;
        let has = |name: &str| {
            let mut all = there.as_array().into_iter().flatten();
            all.any(|node| node["node-name"] == name)
        };
        if has(&parked) {
            return Ok(());
        }
        if has(&beneath) {
            self.tell(&commands::REMOVE_NODE, json!({ "node-name": beneath })).await?;
        }
        let uid = self.launched.launch.uid;
        let path =
            scratch(&disk.path, ".parked", uid, disk.size_bytes).map_err(system(format!(
                "no file can be made beside {}, which is needed while the disk `{}` is made larger",
                disk.path.display(),
                disk.name
            )))?;
        let file =
            json!({ "driver": "file", "node-name": beneath, "filename": path, "aio": "threads" });
        let opened = self.tell(&commands::ADD_NODE, file).await;
        // QEMU has it open, and nobody else needs to.
        let removed = std::fs::remove_file(&path);
        opened?;
        removed.map_err(system(format!("{} cannot be removed", path.display())))?;
        self.tell(&commands::ADD_NODE, failing(place)).await.map(drop)
    }

    /// Stops the guest and gives the device what stands in for its disk; all of it, or nothing but a guest that runs.
    async fn park(self, place: usize, disk: DiskLaunch) -> Result<(), VmError> {
        if self.state().await? != GuestState::Running {
            let what = format!(
                "{} does not run, so its disk `{}` cannot be opened anew under it",
                self.vm, disk.name
            );
            return Err(VmError::System { what, source: io::ErrorKind::Interrupted.into() });
        }
        self.note_held()?;
        let parked = async {
            self.tell(&commands::STOP, json!({})).await?;
            let answer = self.tell(&commands::STATUS, json!({})).await?;
            if answer["status"] != HELD {
                let what = format!("{} went on, or broke, when it was to stand", self.vm);
                return Err(VmError::System { what, source: io::ErrorKind::Interrupted.into() });
            }
            self.stand_in(place, &disk).await?;
            record::note_disks(&self.directory, |launch| {
                if let Some(at) = launch.at(place) {
                    launch.disks[at].parked = true;
                }
            })
            .map_err(system(format!("the launch record of {} cannot be written", self.vm)))
        };
        match parked.await {
            Ok(()) => self.forget_note(run_dir::HELD),
            Err(error) => {
                self.run_on().await?;
                Err(error)
            }
        }
    }

    /// Lets the guest run that stands for this, and forgets that it stood. Also after a `stop` of which nothing was heard: QEMU does
    /// one after the other.
    async fn run_on(&self) -> Result<(), VmError> {
        self.tell(&commands::CONTINUE, json!({})).await?;
        self.forget_note(run_dir::HELD)
    }

    /// From here on the guest has its disk.
    async fn give_back(self, place: usize, disk: DiskLaunch, named: String) -> Result<(), VmError> {
        let (parked, beneath) = nodes(place);
        let larger = json!({ "node-name": parked, "size": disk.size_bytes });
        self.tell(&commands::RESIZE, larger).await?;
        // Whoever finds it from now on with its disk, and standing, lets it run.
        self.note_held()?;
        record::note_disks(&self.directory, |launch| {
            launch.disks_as = named;
            if let Some(at) = launch.at(place) {
                launch.disks[at] = disk;
            }
        })
        .map_err(system(format!("the launch record of {} cannot be written", self.vm)))?;
        self.set(place, &format!("d{place}")).await?;
        // What a request that failed on the parked disk left is done now, by the disk.
        self.tell(&commands::CONTINUE, json!({})).await?;
        self.forget_note(run_dir::HELD)?;
        for node in [parked, beneath] {
            match self.tell(&commands::REMOVE_NODE, json!({ "node-name": node })).await {
                Err(VmError::Qmp { source: QmpError::Refused { said, .. }, .. }) => {
                    tracing::warn!(vm = self.vm, node, said, "what stood in for a disk stays");
                }
                other => drop(other?),
            }
        }
        Ok(())
    }
}

impl QemuDriver {
    async fn parking(&self, vm: &str) -> Result<Asked, VmError> {
        self.asked(vm).await?.ok_or_else(|| VmError::NotHere(vm.into()))
    }

    /// [`super::hot_disks::HotDisks::park`].
    pub(super) async fn park_disk(&self, vm: &str, place: usize) -> Result<bool, VmError> {
        let views = self.views(vm).ok_or_else(|| VmError::NotHere(vm.into()))?;
        let held = views.lock_owned().await;
        let asked = self.parking(vm).await?;
        let disk =
            asked.launched.launch.at(place).map(|at| asked.launched.launch.disks[at].clone());
        let disk = disk.ok_or_else(|| VmError::NotHere(vm.into()))?;
        let begins = !self.is_parked(vm, place, &disk).await?;
        let mut said = self.qmp(vm, DEADLINE).await?.events();
        if begins {
            // A guest that stands half-way would stand for ever.
            let all = tokio::spawn(async move {
                let _held = held;
                asked.park(place, disk).await
            });
            all.await.unwrap_or_else(|error| {
                let what = format!("a disk of {vm} was not parked");
                Err(VmError::System { what, source: io::Error::other(error) })
            })?;
        } else {
            // An earlier one may have been given up between any two of its steps.
            self.note_parked(vm, place, |disk| disk.parked = true)?;
            if asked.state().await? == GuestState::Running {
                asked.tell(&commands::STOP, json!({})).await?;
            }
            asked.stand_in(place, &disk).await?;
        }
        self.parking(vm).await?.set(place, &nodes(place).0).await?;
        self.end_copies(vm, place).await?;
        self.close(vm, place, true).await?;
        let whole = self.closed_whole(vm, place, &mut said).await?;
        // Until here a replica that fell silent could be cut off by it.
        self.note_parked(vm, place, |disk| disk.mirror = None)?;
        Ok(begins && whole)
    }

    /// Whether a disk of a guest is parked.
    pub(super) async fn stands_parked(&self, vm: &str) -> Result<bool, VmError> {
        self.parking(vm).await?.is_parked().await
    }

    fn note_parked(
        &self,
        vm: &str,
        place: usize,
        change: impl FnOnce(&mut DiskLaunch),
    ) -> Result<(), VmError> {
        record::note_disks(&self.directory(vm), |launch| {
            if let Some(at) = launch.at(place) {
                change(&mut launch.disks[at]);
            }
        })
        .map_err(system(format!("the launch record of {vm} cannot be written")))
    }

    /// Whether a disk is parked: its record says so, or its device.
    pub(super) async fn is_parked(
        &self,
        vm: &str,
        place: usize,
        disk: &DiskLaunch,
    ) -> Result<bool, VmError> {
        if disk.parked || disk.rbd.is_some() {
            return Ok(disk.parked);
        }
        self.parking(vm).await?.has_parked(place).await
    }

    /// [`super::hot_disks::HotDisks::unpark`].
    pub(super) async fn unpark_disk(
        &self,
        vm: &str,
        disk: &DiskLaunch,
        named: &str,
    ) -> Result<(), VmError> {
        let views = self.views(vm).ok_or_else(|| VmError::NotHere(vm.into()))?;
        let held = views.lock_owned().await;
        let asked = self.parking(vm).await?;
        let placed = asked.launched.launch.placed().find(|(_, one)| one.name == disk.name);
        let (place, before) = placed.ok_or_else(|| VmError::NotHere(vm.into()))?;
        if !self.is_parked(vm, place, before).await? {
            return match asked.noted(run_dir::HELD) {
                true => asked.run_on().await,
                false => Ok(()),
            };
        }
        self.close(vm, place, true).await?;
        // A replica that falls silent is cut off by it.
        self.note_parked(vm, place, |before| before.mirror.clone_from(&disk.mirror))?;
        if let Err(error) = self.open(vm, place, disk).await {
            // What keeps a file or a connection open is in the way of the next attempt, which closes it too.
            if let Err(left) = self.close(vm, place, true).await {
                tracing::warn!(vm, place, why = %left, "what was opened of a disk cannot be closed");
            }
            return Err(error);
        }
        let (disk, named) = (disk.clone(), named.to_owned());
        let all = tokio::spawn(async move {
            let _held = held;
            asked.give_back(place, disk, named).await
        });
        all.await.unwrap_or_else(|error| {
            let what = format!("a disk of {vm} was not put back");
            Err(VmError::System { what, source: io::Error::other(error) })
        })
    }
}
