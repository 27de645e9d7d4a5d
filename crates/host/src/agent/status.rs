//! What this host is and what is wrong with it, written when it changes.

use super::{AgentParts, HostFacts, StoreMember, own_record::OwnRecord};
use haven_model::{Bytes, HostStatus, Snapshot, host::SPEAKS, keys};
use haven_store::raw::Op;
use std::{sync::Arc, time::Duration};
use tokio_util::sync::CancellationToken;

/// How often this host looks at itself: images, facts. Nothing is written unless something changed.
const LOOK: Duration = Duration::from_secs(10);
/// The pause after a write that failed.
const RETRY: Duration = Duration::from_millis(300);

/// Writes until `cancel`.
pub async fn run(parts: Arc<AgentParts>, cancel: CancellationToken) {
    let mut known = parts.facts.clone();
    let facts = tokio::select! {
        biased;
        () = cancel.cancelled() => return,
        facts = known.wait_for(Option::is_some) => match facts {
            Ok(facts) => facts.clone().unwrap_or_default(),
            Err(_) => return,
        },
    };
    let mut session = parts.session.clone();
    let mut member = parts.store_member.clone();
    let mut written: Option<HostStatus> = None;
    let mut told = OwnRecord::default();
    let key = keys::host_status(&parts.me);
    while !cancel.is_cancelled() {
        let open = *session.borrow_and_update();
        let here = *member.borrow_and_update();
        let mut pause = LOOK;
        if let Some(open) = open {
            let status = compose(&parts, &facts, open.number, here).await;
            let live = Arc::clone(&parts.live.borrow());
            let there = live.host_status.get(&parts.me).map(|status| status.revision);
            if written.as_ref() != Some(&status) || told.overwritten(&live, there) {
                let value = serde_json::to_vec(&status).expect("a status is plain data");
                let compare = told.compare(&live, key.clone(), there).into_iter().collect();
                match parts.store.txn(compare, vec![Op::Put(key.clone(), value.into())]).await {
                    Ok(outcome) if outcome.succeeded => {
                        told.written(outcome.revision);
                        written = Some(status);
                    }
                    // One of before was carried out after all: the live copy will show it.
                    Ok(_) => pause = RETRY,
                    Err(error) => {
                        tracing::debug!(%error, "the status of this host could not be written");
                        pause = RETRY;
                    }
                }
            }
        } else {
            written = None;
        }
        tokio::select! {
            biased;
            () = cancel.cancelled() => {}
            _ = session.changed() => {}
            _ = member.changed() => {}
            () = parts.problems.changed.notified() => {}
            () = parts.clock.sleep(pause) => {}
        }
    }
}

async fn compose(
    parts: &AgentParts,
    facts: &HostFacts,
    session: u64,
    here: StoreMember,
) -> HostStatus {
    let mut problems = facts.problems.clone();
    problems.extend(parts.problems.list());
    problems.extend(unreadable(&parts.live.borrow()));
    HostStatus {
        session,
        version: facts.version.clone(),
        speaks: SPEAKS,
        cpus: facts.cpus,
        memory: Bytes(facts.memory_bytes),
        accel: if facts.kvm { "kvm" } else { "tcg" }.into(),
        qemu: facts.qemu.clone(),
        boot_id: facts.boot_id.clone(),
        images: parts.storage.images().await,
        etcd_member: here.id,
        etcd_silent: here.silent,
        facts: std::collections::BTreeMap::new(),
        cut_off: parts.cut_off.list(),
        problems,
    }
}

/// What cannot be read of the store here.
fn unreadable(snapshot: &Snapshot) -> Option<String> {
    let first = snapshot.unreadable.keys().next()?;
    let count = snapshot.unreadable.len();
    Some(format!(
        "records of the store that this host's version of Haven cannot read: {count}, the first is {first}; what they are about is left as it is: update this host"
    ))
}
