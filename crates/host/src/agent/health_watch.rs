//! Follows a guest's health for its task: asks while there is a target, forgets when there is none.

use super::AgentParts;
use crate::health::{Counter, Target};
use std::sync::Arc;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Who is asked.
#[derive(Clone)]
pub struct Asked {
    /// Where and how.
    pub target: Target,
    /// What another host knew of it when it came from there: it holds until this one knows better.
    pub known: Option<bool>,
}

/// What is known of a guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Health {
    /// Whether it is well; nothing while unknown.
    pub state: Option<bool>,
    /// It has answered well since this target was asked first.
    pub answered: bool,
}

/// Starts following; send the target, read the health. `before` is what an earlier daemon knew of the first target: it
/// holds until this one knows better.
pub fn spawn(
    parts: &Arc<AgentParts>,
    before: Option<bool>,
    cancel: &CancellationToken,
) -> (watch::Sender<Option<Asked>>, watch::Receiver<Health>) {
    let (target, wanted) = watch::channel(None);
    let (out, health) = watch::channel(Health { state: before, answered: false });
    tokio::spawn(follow(Arc::clone(parts), wanted, out, cancel.clone()));
    (target, health)
}

async fn follow(
    parts: Arc<AgentParts>,
    mut wanted: watch::Receiver<Option<Asked>>,
    out: watch::Sender<Health>,
    cancel: CancellationToken,
) {
    let mut current: Option<Target> = None;
    let mut counter = Counter::default();
    let mut before = out.borrow().state;
    loop {
        let asked = wanted.borrow_and_update().clone();
        let (target, known) = asked.map(|asked| (asked.target, asked.known)).unzip();
        if target != current {
            current = target;
            let known = before.take().or(known.flatten());
            counter = Counter::of(known);
            tell(&out, Health { state: known, answered: false });
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
        let answered = answered || out.borrow().answered;
        tell(&out, Health { state, answered });
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

fn tell(out: &watch::Sender<Health>, health: Health) {
    out.send_if_modified(|now| std::mem::replace(now, health) != health);
}

/// How often a guest that does not answer is asked.
const FAST: std::time::Duration = std::time::Duration::from_millis(200);
