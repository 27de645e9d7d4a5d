//! Works on this host when it is its turn: once, and what came of it is told.
//!
//! It says that it begins before it begins, over the record that gave it the turn. A daemon that is killed in between leaves
//! work of which nobody knows whether it began; the next one says so, and does not begin it again.

use super::{AgentParts, own_record::OwnRecord};
use crate::machine::Outcome;
use haven_model::{
    Snapshot, keys,
    maintenance::{Work, WorkState, WorkStatus},
};
use haven_store::raw::{Compare, Op};
use std::{sync::Arc, time::Duration};
use tokio_util::sync::CancellationToken;

/// Between two looks at work that is under way.
const LOOK: Duration = Duration::from_secs(1);

/// Works until `cancel`.
pub async fn run(parts: Arc<AgentParts>, cancel: CancellationToken) {
    let mut live = parts.live.clone();
    let mut told = OwnRecord::default();
    while !cancel.is_cancelled() {
        let snapshot = Arc::clone(&live.borrow_and_update());
        let busy = match turn(&parts, &snapshot) {
            Some((id, work, revision)) => {
                attend(&parts, &snapshot, &mut told, (&id, work, revision)).await
            }
            None => false,
        };
        tokio::select! {
            biased;
            () = cancel.cancelled() => {}
            changed = live.changed() => if changed.is_err() { return },
            () = parts.clock.sleep(LOOK), if busy => {}
        }
    }
}

/// The work that it is this host's turn for, with the revision of the record.
fn turn(parts: &AgentParts, snapshot: &Snapshot) -> Option<(String, Work, i64)> {
    let of = snapshot.maintenance.as_ref().filter(|of| of.works_on(&parts.me))?;
    Some((of.id.clone(), of.work, of.revision))
}

/// One step; whether there is more to look at.
async fn attend(
    parts: &AgentParts,
    snapshot: &Snapshot,
    told: &mut OwnRecord,
    (id, work, revision): (&str, Work, i64),
) -> bool {
    if parts.current_session().is_none() {
        return true;
    }
    let there = snapshot.work_status.get(&parts.me);
    match there.filter(|told| told.maintenance == id).map(|told| told.state) {
        None => {
            // Empty it was when it got its turn; and it is still if nobody has ended its drain and nothing runs here.
            let Some(drain) = snapshot.drains.get(&parts.me).filter(|drain| !drain.bringing_back)
            else {
                return true;
            };
            match occupied(parts, snapshot).await {
                Occupied::No => {}
                // The plan gives up if it never ends.
                Occupied::ByWhatEnds => return true,
                Occupied::By(why) => {
                    say(parts, snapshot, told, (id, WorkState::Failed, &why), vec![]).await;
                    return true;
                }
            }
            let turn = Compare::ModRevision(keys::MAINTENANCE.into(), revision);
            let drained = Compare::ModRevision(keys::drain(&parts.me), drain.revision);
            if !say(parts, snapshot, told, (id, WorkState::Begun, ""), vec![turn, drained]).await {
                return true;
            }
            if let Err(error) = parts.machine.begin(work, id).await {
                let why = format!("it could not begin: {error}");
                say(parts, snapshot, told, (id, WorkState::Failed, &why), vec![]).await;
            }
            true
        }
        Some(WorkState::Begun) => {
            let (state, why) = match (parts.machine.outcome(id).await, work) {
                // That it is back is seen by its boot.
                (Outcome::Runs, _) | (Outcome::Done | Outcome::Unknown, Work::Reboot) => {
                    return true;
                }
                (Outcome::Done, Work::Upgrade) => (WorkState::Done, String::new()),
                (Outcome::Failed(why), _) => (WorkState::Failed, why),
                (Outcome::Unknown, Work::Upgrade) => (
                    WorkState::Failed,
                    "it was broken off, and nobody knows how far it had come: look at the host"
                        .to_owned(),
                ),
            };
            say(parts, snapshot, told, (id, state, &why), vec![]).await;
            true
        }
        Some(WorkState::Done | WorkState::Failed) => false,
    }
}

/// What runs here although this host should be empty.
enum Occupied {
    /// Nothing.
    No,
    /// What is left of VMs that have moved away: it runs no guest, and ends by itself.
    ByWhatEnds,
    /// Something else; what, in words.
    By(String),
}

async fn occupied(parts: &AgentParts, snapshot: &Snapshot) -> Occupied {
    let vms = match parts.vms.list().await {
        Ok(vms) => vms,
        Err(error) => {
            let why = format!("nobody knows whether it is empty: {}", super::chain(&error));
            return Occupied::By(why);
        }
    };
    let moved = |vm: &str| {
        let placed = snapshot.placements.get(vm);
        placed.is_some_and(|placed| placed.hosts().all(|host| *host != parts.me))
    };
    match vms.iter().find(|vm| !moved(&vm.vm)) {
        Some(vm) => Occupied::By(format!("it is not empty: {} runs there", vm.vm)),
        None if vms.is_empty() => Occupied::No,
        None => Occupied::ByWhatEnds,
    }
}

async fn say(
    parts: &AgentParts,
    snapshot: &Snapshot,
    told: &mut OwnRecord,
    (id, state, message): (&str, WorkState, &str),
    mut compares: Vec<Compare>,
) -> bool {
    let status = WorkStatus { maintenance: id.into(), state, message: message.into() };
    let key = keys::work_status(&parts.me);
    let there = snapshot.work_status.get(&parts.me).map(|told| told.revision);
    compares.extend(told.compare(snapshot, key.clone(), there));
    let value = serde_json::to_vec(&status).expect("a status is plain data");
    match parts.store.txn(compares, vec![Op::Put(key, value.into())]).await {
        Ok(outcome) if outcome.succeeded => {
            told.written(outcome.revision);
            true
        }
        Ok(_) => false,
        Err(error) => {
            tracing::debug!(%error, "how the work on this host stands could not be written");
            false
        }
    }
}
