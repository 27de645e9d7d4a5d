//! The backup of a VM that its host makes, while its guest runs or not.

use super::VmTask;
use crate::agent::backup::job::{self, Job};
use haven_model::Snapshot;
use std::time::Duration;

/// How long a turn waits until its disks are not held any more.
const CLOSES: Duration = Duration::from_millis(300);
/// When it is tried again.
const AGAIN: Duration = Duration::from_millis(300);

impl VmTask {
    /// Has the backup made that is wanted, and ends one that is not any more. A guest that is to move goes first: it cannot
    /// while its disks are read, and the backup begins anew where it is then.
    pub(super) async fn keep_backup(&mut self, snapshot: &Snapshot) {
        self.close_views().await;
        let moves = snapshot.placements.get(&self.vm).is_some_and(|p| p.moving_to.is_some());
        // Disks of which some are of a snapshot and some of now are no backup.
        let rests = !moves && !self.is_reverting(snapshot);
        let due = job::due(&self.parts, snapshot, &self.vm).filter(|_| rests);
        let wanted = due.as_ref().map(|due| due.run.id.as_str());
        if self.backup.as_ref().is_some_and(|job| job.is_over() || Some(job.id()) != wanted) {
            self.drop_backup().await;
        }
        let Some((due, object)) = due.zip(snapshot.vms.get(&self.vm)) else { return };
        let disks_rest = !self.unclosed && !self.hot.is_busy() && self.copying.is_none();
        if self.backup.is_none() && (self.running.is_none() || disks_rest) {
            let runs = self.running.is_some();
            self.backup = Some(Job::begin(&self.parts, object.value.clone(), due, runs));
        }
    }

    /// Whatever is done with its disks beside its guest ends. What makes them what they were goes on when it is to start: that waits.
    pub(super) async fn leave_disks(&mut self, starts: bool) {
        self.drop_backup().await;
        self.drop_copies().await;
        self.putting = self.putting.take().filter(|_| starts);
    }

    /// Ends the one that is made, so that nobody reads the disks any more.
    pub(super) async fn drop_backup(&mut self) {
        let Some(job) = self.backup.take() else { return };
        job.end().await;
        self.unclosed = true;
        self.close_views().await;
    }

    /// Closes what an earlier daemon, or a backup that was given up, may have left open of its process. What takes long is
    /// tried again in the next turn: its disks need this task, too.
    pub(super) async fn close_views(&mut self) {
        if !self.unclosed || self.running.is_none() {
            return;
        }
        let closed = tokio::select! {
            biased;
            closed = self.parts.vms.close_view(self.vm.as_str()) => closed.map_err(|e| crate::agent::chain(&e)),
            () = self.parts.clock.sleep(CLOSES) => Err("it takes long".to_owned()),
        };
        match closed {
            Ok(()) => self.unclosed = false,
            Err(why) => {
                tracing::warn!(vm = %self.vm, why, "its disks may still be held as they were");
                self.look_again(AGAIN);
            }
        }
    }

    /// Whether its guest may be sent to another host: QEMU does not let one go whose disks are held.
    pub(super) fn may_go(&self) -> bool {
        let rests = !self.unclosed && self.backup.is_none() && self.copying.is_none();
        !self.hot.stands() && (rests && !self.hot.is_busy() || self.is_sent())
    }
}
