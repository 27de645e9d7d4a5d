//! The disks that go along with a guest that moves live: those that only its host has.
//!
//! ```text
//!   sent while the guest runs ─► a copy follows what it writes ─► memory ─► the guest stops ─► the rest is flushed there
//! ```
//!
//! Only then does its owner say `Stopped`, by which its owner may change. So whoever owns it has its disks whole.

use super::{
    VmTask,
    moves::{Disks, Outgoing, TELL, WATCH},
};
use crate::agent::tunnel::Load;
use haven_model::{
    MigrationPhase, MovingTo, Name, Placement, PoolDriverKind, Snapshot,
    migration::Progress,
    vm::{DiskLimits, DiskSpec},
};
use std::{collections::BTreeMap, time::Duration};

/// How much a guest may have written that is still to be sent when its memory begins; and four times as much when it
/// stops, which is what a wire of 1 Gbit/s carries in 2 s. Bytes.
const LEFT: u64 = 64 << 20;

/// When it is asked again what a process has.
pub(super) const AGAIN: Duration = Duration::from_millis(500);

/// What a process was told that its guest may use of its disks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Limited {
    /// Which process: its epoch, and when it was started.
    run: (Option<u64>, Option<i64>),
    limits: Vec<(Name, DiskLimits)>,
}

impl VmTask {
    /// Whether it is wanted otherwise than its process was started.
    pub(super) fn was_changed(&self, snapshot: &Snapshot) -> bool {
        let Some(object) = snapshot.vms.get(&self.vm) else { return false };
        let placement = snapshot.placements.get(&self.vm);
        let known = !self.started_with.is_empty();
        known && self.started_with != object.spec.hardware()
            || placement.is_some_and(|placement| !placement.fits(&object.spec))
    }

    /// Limits what the guest may use of its disks, as its spec says by now.
    pub(super) async fn limit_disks(&mut self, snapshot: &Snapshot) {
        let Some(object) = snapshot.vms.get(&self.vm) else { return };
        // Its process may not have the disks that are wanted by now.
        if self.was_changed(snapshot) {
            return;
        }
        let limit = |disk: &DiskSpec| (disk.name.clone(), disk.limits.unwrap_or_default());
        let limits = object.spec.plugged().map(limit).collect();
        let wanted = Limited { run: (self.running, self.started_ms), limits };
        if self.limited.as_ref() == Some(&wanted) {
            return;
        }
        let new = self.limited.as_ref().is_none_or(|told| told.run != wanted.run);
        let places = match self.places().await {
            Ok(places) => places,
            Err(why) => {
                tracing::warn!(vm = %self.vm, why, "which disks its process has cannot be told");
                return self.look_again(AGAIN);
            }
        };
        for (name, limits) in &wanted.limits {
            // A process begins without any.
            if new && *limits == DiskLimits::default() && self.limited.is_some() {
                continue;
            }
            let Some(place) = places.get(name.as_str()) else { continue };
            if let Err(error) = self.parts.vms.limit(self.vm.as_str(), *place, limits).await {
                let why = crate::agent::chain(&error);
                tracing::warn!(vm = %self.vm, disk = %name, why, "its disk cannot be limited; tried again at its next start");
            }
        }
        self.limited = Some(wanted);
    }

    /// The places of its disks, by their names.
    async fn places(&self) -> Result<BTreeMap<String, usize>, String> {
        let has = self.parts.vms.has(self.vm.as_str()).await;
        let has = has.map_err(|error| crate::agent::chain(&error))?;
        Ok(has.disks.into_iter().map(|disk| (disk.name, disk.place)).collect())
    }

    /// The places of the disks that only this host has.
    pub(super) async fn disks_of_this_host(
        &self,
        snapshot: &Snapshot,
    ) -> Result<Vec<usize>, String> {
        let Some((object, _)) = &self.last else { return Ok(Vec::new()) };
        let local = |disk: &&DiskSpec| {
            let pool = snapshot.pools.get(&disk.pool);
            pool.is_some_and(|pool| pool.spec.driver == PoolDriverKind::Local)
        };
        let names: Vec<&Name> = object.spec.plugged().filter(local).map(|d| &d.name).collect();
        if names.is_empty() {
            return Ok(Vec::new());
        }
        let places = self.places().await?;
        let place = |name: &&Name| {
            let place = places.get(name.as_str()).copied();
            place.ok_or_else(|| format!("its process does not have its disk `{name}`"))
        };
        names.iter().map(place).collect()
    }

    /// Begins to send them.
    pub(super) async fn send_disks(
        &mut self,
        placement: &Placement,
        to: &MovingTo,
        places: &[usize],
    ) -> Result<(), String> {
        let vm = self.vm.as_str();
        let (uid, host) = (placement.unix_uid(), &to.host);
        let socket = self.parts.tunnel.open(vm, uid, host, Load::Disks).await;
        let socket = socket.map_err(|error| crate::agent::chain(&error))?;
        let begun = self.parts.vms.send_disks(vm, &socket, places).await;
        self.look_again(WATCH);
        begun.map_err(|error| crate::agent::chain(&error))
    }

    /// They are being sent; once all are there the memory begins.
    pub(super) async fn watch_disks(
        &mut self,
        placement: &Placement,
        attempt: i64,
        mut copy: Outgoing,
    ) {
        let Disks::Going(count) = copy.disks else { return };
        let sent = match self.parts.vms.disks_sent(self.vm.as_str(), count).await {
            Ok(sent) => sent,
            // It waits for somebody who does not answer, and its guest with it.
            Err(error) => {
                return self.give_back(attempt, &broke(&crate::agent::chain(&error))).await;
            }
        };
        if let Some(why) = sent.broken {
            return self.give_back(attempt, &broke(&why)).await;
        }
        if sent.whole && sent.left <= LEFT {
            let Some(to) = &placement.moving_to else { return };
            copy.disks = Disks::Follow(count);
            if let Err(why) = self.send_memory(placement, to, copy).await {
                self.give_back(attempt, &why).await;
            }
            return;
        }
        self.look_again(WATCH);
        let now = self.parts.clock.now();
        if now.since(copy.told) >= TELL {
            copy.told = now;
            self.outgoing = Some(copy);
            let progress =
                Progress { disk_total: sent.total, disk_left: sent.left, ..Progress::default() };
            self.tell_copy(attempt, MigrationPhase::Copying, progress).await;
        }
    }

    /// Why a copy that follows does so no more.
    pub(super) async fn disks_broke(&self, count: usize) -> Option<String> {
        let sent = self.parts.vms.disks_sent(self.vm.as_str(), count).await.ok()?;
        sent.broken.map(|why| broke(&why))
    }

    /// The guest is stopped: what it wrote last is sent and brought to the other side's disks.
    pub(super) async fn finish_disks(&mut self, attempt: i64, mut copy: Outgoing) {
        let Disks::Follow(count) = copy.disks else { return };
        let sent = self.parts.vms.disks_sent(self.vm.as_str(), count).await;
        if sent.is_ok_and(|sent| sent.left > 4 * LEFT) {
            let why = "its guest writes to its disk faster than that is sent";
            return self.give_back(attempt, why).await;
        }
        match self.parts.vms.finish_disks(self.vm.as_str()).await {
            Ok(()) => {
                copy.disks = Disks::There;
                self.outgoing = Some(copy);
                self.look_again(std::time::Duration::ZERO);
            }
            Err(error) => self.give_back(attempt, &broke(&crate::agent::chain(&error))).await,
        }
    }
}

fn broke(why: &str) -> String {
    format!("the copy of its disks broke: {why}")
}
