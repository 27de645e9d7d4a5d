//! Follows a guest's health for its task: asks while there is a target, forgets when there is none.

use super::AgentParts;
use crate::health::{Counter, Target};
use std::sync::Arc;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Starts following; send the target, read the health (nothing while unknown). `before` is what an earlier daemon knew
/// of the first target: it holds until this one knows better.
pub fn spawn(
    parts: &Arc<AgentParts>,
    before: Option<bool>,
    cancel: &CancellationToken,
) -> (watch::Sender<Option<Target>>, watch::Receiver<Option<bool>>) {
    let (target, wanted) = watch::channel(None);
    let (out, health) = watch::channel(before);
    tokio::spawn(follow(Arc::clone(parts), wanted, out, cancel.clone()));
    (target, health)
}

async fn follow(
    parts: Arc<AgentParts>,
    mut wanted: watch::Receiver<Option<Target>>,
    out: watch::Sender<Option<bool>>,
    cancel: CancellationToken,
) {
    let mut current: Option<Target> = None;
    let mut counter = Counter::default();
    let mut before = *out.borrow();
    loop {
        let target = wanted.borrow_and_update().clone();
        if target != current {
            current = target;
            let known = before.take();
            counter = Counter::of(known);
            out.send_if_modified(|now| std::mem::replace(now, known) != known);
        }
        let Some(target) = &current else {
            tokio::select! {
                biased;
                () = cancel.cancelled() => return,
                changed = wanted.changed() => if changed.is_err() { return },
            }
            continue;
        };
        let answered = parts.prober.probe(target).await;
        let state = counter.count(answered);
        out.send_if_modified(|now| std::mem::replace(now, state) != state);
        // A guest that never answered yet is asked more often: it is booting and somebody waits for it.
        let pause = if state == Some(true) { target.interval } else { target.interval.min(FAST) };
        tokio::select! {
            biased;
            () = cancel.cancelled() => return,
            changed = wanted.changed() => if changed.is_err() { return },
            () = parts.clock.sleep(pause) => {}
        }
    }
}

/// How often a guest that does not answer is asked.
const FAST: std::time::Duration = std::time::Duration::from_millis(200);
