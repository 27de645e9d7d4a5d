//! A guest that hangs while its process is well (docs/decisions/0016-hung-guests.md).

use super::VmTask;
use crate::{
    agent::hang_watch::{Asked, Found},
    health::hang,
    vm::driver::Exit,
};
use haven_model::{Snapshot, VmPhase, vm::KEEPS_HANGING};
use std::{sync::Arc, time::Duration};

/// The pause after a guest was ended because it hung again: time for the manager to take it elsewhere.
const HANG_PAUSE: Duration = Duration::from_secs(5);

impl VmTask {
    /// What is watched for a hang: the guest while it runs here and does not move.
    pub(super) fn watched(&self, snapshot: &Snapshot) -> Option<Asked> {
        let epoch = self.running.filter(|_| self.incoming.is_none() && self.outgoing.is_none())?;
        let spec = snapshot.vms.get(&self.vm)?.spec.hang.clone()?;
        let run = (epoch, self.started_ms, self.resets, self.hung);
        Some(Asked { run, spec, well: self.ready == Some(true), heard: self.heard })
    }

    /// Something was found out about a run of the guest. One that hangs is reset the first time, and ended the second.
    pub(super) async fn watched_out(&mut self, found: Option<Found>) {
        let live = Arc::clone(&self.parts.live.borrow());
        // Of a run before, or it is asked for no more.
        let same =
            |found: &Found| self.watched(&live).is_some_and(|now| now.run == found.asked.run);
        let Some(found) = found.filter(same) else { return };
        self.heard = true;
        // Without a session nothing is done to any VM.
        if !found.hangs || self.parts.current_session().is_none() {
            return;
        }
        if self.waits_for_its_disk(&live).await {
            return;
        }
        let found = found.asked;
        let why = hang::words(&found.spec);
        self.hung += 1;
        self.hung_at = self.parts.clock.now();
        if self.hung < KEEPS_HANGING {
            if let Err(error) = self.parts.vms.reset(self.vm.as_str()).await {
                return self.failed("reset", &error);
            }
            (self.ready, self.ready_ms) = (None, None);
            (self.unproven, self.heard) = (false, false);
            self.runs_since = None;
            self.tell(format!("it hung on {}: {why}; it is reset", self.parts.me)).await;
            return self.report(&live, VmPhase::Running, "").await;
        }
        self.kill().await;
        if self.running.is_none() {
            let what = format!("it hung again: {why}");
            self.ended_by_itself(found.run.0, Exit::Crashed, &what).await;
            self.retry_in(HANG_PAUSE);
        }
    }

    /// It runs well.
    pub(super) fn forget_hangs(&mut self) {
        self.hung = hang::remembered(self.hung, self.parts.clock.now().since(self.hung_at));
    }
}
