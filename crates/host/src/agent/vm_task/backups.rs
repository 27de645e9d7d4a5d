//! The backup of a VM that its host makes, while its guest runs or not.

use super::VmTask;
use crate::agent::backup::job::{self, Job};
use haven_model::Snapshot;

impl VmTask {
    /// Has the backup made that is wanted, and ends one that is not any more. A guest that is to move goes first: it cannot
    /// while its disks are read, and the backup begins anew where it is then.
    pub(super) async fn keep_backup(&mut self, snapshot: &Snapshot) {
        let moves = snapshot.placements.get(&self.vm).is_some_and(|p| p.moving_to.is_some());
        let due = job::due(&self.parts, snapshot, &self.vm).filter(|_| !moves);
        let wanted = due.as_ref().map(|(run, _)| run.id.as_str());
        if self.backup.as_ref().is_some_and(|job| job.is_over() || Some(job.id()) != wanted) {
            self.drop_backup().await;
        }
        let Some((due, object)) = due.zip(snapshot.vms.get(&self.vm)) else { return };
        if self.backup.is_none() {
            let runs = self.running.is_some();
            self.backup = Some(Job::begin(&self.parts, object.value.clone(), due, runs));
        }
    }

    /// Ends the one that is made, so that nobody reads the disks any more.
    pub(super) async fn drop_backup(&mut self) {
        let Some(job) = self.backup.take() else { return };
        job.end().await;
        self.close_views().await;
    }

    /// Closes what an earlier daemon, or a backup that was given up, has left open of its process.
    pub(super) async fn close_views(&self) {
        if self.running.is_none() {
            return;
        }
        if let Err(error) = self.parts.vms.close_view(self.vm.as_str()).await {
            let why = crate::agent::chain(&error);
            tracing::warn!(vm = %self.vm, why, "its disks are still held as they were");
        }
    }
}
