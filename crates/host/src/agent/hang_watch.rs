//! Watches a guest for its task: whether it hangs. Only while somebody asks for it, and rarely.

use super::AgentParts;
use crate::{
    health::hang::{Judge, Look},
    vm::driver::{GuestState, Signs, VmError},
};
use haven_model::{Name, vm::HangSpec};
use std::{sync::Arc, time::Duration};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// What is watched.
#[derive(Clone, PartialEq, Eq)]
pub struct Asked {
    /// Tells this run of the guest from others: its epoch, when its process started, how often it was reset, and how
    /// often it was found hung.
    pub run: (u64, Option<i64>, u64, u32),
    /// What counts.
    pub spec: HangSpec,
    /// Its health check passes.
    pub well: bool,
    /// Its agent or its check has answered in this run, as far as was known before.
    pub heard: bool,
}

/// What was found out about a run.
#[derive(Clone, PartialEq, Eq)]
pub struct Found {
    /// Of which.
    pub asked: Asked,
    /// It hangs; otherwise its agent or its check has answered for the first time.
    pub hangs: bool,
}

/// Starts watching; send what is watched, read what was found out last.
pub fn spawn(
    parts: &Arc<AgentParts>,
    vm: &Name,
    cancel: &CancellationToken,
) -> (watch::Sender<Option<Asked>>, watch::Receiver<Option<Found>>) {
    let (asked, wanted) = watch::channel(None);
    let (out, hung) = watch::channel(None);
    tokio::spawn(follow(Arc::clone(parts), vm.clone(), wanted, out, cancel.clone()));
    (asked, hung)
}

async fn follow(
    parts: Arc<AgentParts>,
    vm: Name,
    mut wanted: watch::Receiver<Option<Asked>>,
    out: watch::Sender<Option<Found>>,
    cancel: CancellationToken,
) {
    let mut current: Option<(Asked, Judge)> = None;
    // Until its task is over.
    while wanted.has_changed().is_ok() {
        let asked = wanted.borrow_and_update().clone();
        let Some(asked) = asked else {
            current = None;
            tokio::select! {
                biased;
                () = cancel.cancelled() => return,
                changed = wanted.changed() => if changed.is_err() { return },
            }
            continue;
        };
        let pause = pause(&asked.spec);
        let fresh = current.as_ref().is_none_or(|(old, _)| old.run != asked.run);
        let mut judge = match current.take().filter(|_| !fresh) {
            Some((_, judge)) => judge,
            None => Judge::new(asked.heard, asked.run.3 > 0),
        };
        match look(&parts, &vm).await {
            // One that is stopped on purpose, or waits for its disk, does not hang.
            Ok(None) => {}
            Ok(Some(signs)) => {
                let look = Look { signs, well: asked.well, passed: pause };
                let hangs = judge.look(&asked.spec, &look);
                if hangs || judge.heard() != asked.heard {
                    out.send_replace(Some(Found { asked: asked.clone(), hangs }));
                }
            }
            Err(error) => {
                tracing::debug!(%vm, why = super::chain(&error), "it cannot be told whether it lives");
            }
        }
        current = Some((asked, judge));
        // Changes are looked at with the next look: only the pause counts as time.
        tokio::select! {
            biased;
            () = cancel.cancelled() => return,
            () = parts.clock.sleep(pause) => {}
        }
    }
}

/// What a guest that runs shows of itself.
async fn look(parts: &AgentParts, vm: &Name) -> Result<Option<Signs>, VmError> {
    match parts.vms.state(vm.as_str()).await? {
        GuestState::Running => parts.vms.signs(vm.as_str()).await.map(Some),
        _ => Ok(None),
    }
}

/// How long between two looks: a sixth of what is waited for, at most 10 s.
fn pause(spec: &HangSpec) -> Duration {
    (spec.after.duration() / 6).clamp(Duration::from_secs(1), Duration::from_secs(10))
}
