//! A process that ends by itself or is asked to: what is told of it, and how long until the next.

use super::{VmTask, moves};
use crate::{
    agent::{
        vm_step::{Wanted, backoff_ms},
        wanted,
    },
    vm::driver::Exit,
};
use haven_model::{ObjectRef, Severity, Snapshot, VmPhase, object::Kind, vm::RUNS_WELL};
use haven_store::clock::Mono;
use std::{sync::Arc, time::Duration};

impl VmTask {
    /// Asks its guest to end, and ends its process.
    pub(super) async fn stop(&mut self, snapshot: &Snapshot) {
        self.report(snapshot, VmPhase::Stopping, "").await;
        let grace = self
            .last
            .as_ref()
            .map_or(Duration::from_secs(10), |(o, _)| o.spec.stop_grace.duration());
        match self.parts.vms.stop(self.vm.as_str(), grace).await {
            Ok(()) => {
                if let Some(epoch) = self.running {
                    self.close_mirrors(epoch).await;
                }
                self.gone(snapshot, "").await;
            }
            Err(error) => self.failed("stop", &error),
        }
    }

    /// Whether what has run since then has started well: how often it failed before counts no more.
    pub(super) fn runs_well(&self, since: Mono, ready: Option<bool>) -> bool {
        let has_check = self.last.as_ref().is_some_and(|(object, _)| object.spec.check.is_some());
        let long = self.parts.clock.now().since(since) >= RUNS_WELL.duration();
        long && (!has_check || ready == Some(true))
    }

    pub(super) async fn exited(&mut self, epoch: u64, how: Exit) {
        if self.running != Some(epoch) {
            return;
        }
        // What is told may be the end of a process before the one that runs now.
        let found = self.parts.vms.find(self.vm.as_str()).await;
        if matches!(&found, Ok(Some(now)) if now.epoch == epoch) {
            return;
        }
        self.unsure = !matches!(found, Ok(None));
        let what = match how {
            Exit::PoweredOff => "the guest powered itself off",
            Exit::Crashed => "its process ended unexpectedly",
            Exit::Killed => "its process was killed",
        };
        self.close_mirrors(epoch).await;
        self.ended_by_itself(epoch, how, what).await;
    }

    pub(super) async fn ended_by_itself(&mut self, epoch: u64, how: Exit, what: &str) {
        self.running = None;
        let well = self.runs_since.take().is_some_and(|since| self.runs_well(since, self.ready));
        self.ready = None;
        self.ready_ms = None;
        self.written = None;
        self.note.clear();
        let live = Arc::clone(&self.parts.live.borrow());
        let wanted = wanted::vm(&live, &self.parts.me, &self.vm);
        if !matches!(wanted, Wanted::Run { epoch: wanted, .. } if wanted == epoch) {
            return;
        }
        // One that powers itself off has executed to its end.
        if self.following.take().is_some() && how != Exit::PoweredOff {
            // What of its memory had not come never comes: that is the move's end, and none of the guest's own.
            return self.tell(format!("{what} on {}: {}", self.parts.me, moves::LOST)).await;
        }
        self.ended = Some(how);
        self.restarts += 1;
        self.failures = if well { 1 } else { self.failures + 1 };
        self.retry_in(Duration::from_millis(backoff_ms(self.failures - 1)));
        self.tell(format!("{what} on {} (restart {})", self.parts.me, self.restarts)).await;
        self.report(&live, VmPhase::Failed, what).await;
    }

    /// Writes an event of something that should not have happened.
    pub(super) async fn tell(&self, words: String) {
        self.tell_of(Severity::Warning, words).await;
    }

    /// Writes an event.
    pub(super) async fn tell_of(&self, severity: Severity, words: String) {
        let vm = ObjectRef::new(Kind::Vm, self.vm.clone());
        let event = self.parts.event(&vm, severity, words);
        if self.parts.current_session().is_some()
            && let Err(error) = self.parts.store.txn(vec![], vec![event]).await
        {
            tracing::debug!(%error, "an event could not be written");
        }
    }
}
