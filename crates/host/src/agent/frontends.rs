//! The frontends of this host: the balancer's configuration, and the service addresses (DESIGN.md sections 4 and 9).
//!
//! An address moves faster than a VM. When its holder is suspected, the next candidate probes for it on the segment;
//! if nobody answers it claims the placement in the store, takes the address and announces it. If somebody still
//! answers, nothing is done until a proof makes the manager move it. A host without a session holds no address.

use super::{AgentParts, lease::Session, wanted};
use haven_model::{FrontendPlacement, Name, Snapshot, keys};
use haven_store::raw::{Compare, Op};
use std::{collections::BTreeSet, net::Ipv4Addr, sync::Arc, time::Duration};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// How long a claim that met an answering holder, or failed, rests before the next.
const CLAIM_AGAIN: Duration = Duration::from_millis(250);
/// The pause after the balancer refused something.
const RETRY: Duration = Duration::from_millis(500);
/// The net under lost wake-ups, and the rhythm in which the machine is compared with what is wanted.
const NET: Duration = Duration::from_secs(10);

/// Keeps the balancer and the addresses until `cancel`.
pub async fn run(parts: Arc<AgentParts>, cancel: CancellationToken) {
    let mut inputs = Inputs {
        live: parts.live.clone(),
        suspected: parts.suspected.clone(),
        session: parts.session.clone(),
    };
    while !cancel.is_cancelled() {
        let pause = step(&parts, &mut inputs).await;
        tokio::select! {
            biased;
            () = cancel.cancelled() => {}
            _ = inputs.live.changed() => {}
            _ = inputs.suspected.changed() => {}
            _ = inputs.session.changed() => {}
            () = parts.clock.sleep(pause) => {}
        }
    }
}

struct Inputs {
    live: watch::Receiver<Arc<Snapshot>>,
    suspected: watch::Receiver<BTreeSet<Name>>,
    session: watch::Receiver<Option<Session>>,
}

async fn step(parts: &AgentParts, inputs: &mut Inputs) -> Duration {
    let snapshot = Arc::clone(&inputs.live.borrow_and_update());
    let suspected = inputs.suspected.borrow_and_update().clone();
    let session = *inputs.session.borrow_and_update();
    let frontends = wanted::frontends(&snapshot, &parts.me, &suspected);
    if let Err(error) = parts.balance.apply(&frontends).await {
        parts.problem("balance", &error);
        parts.clock.sleep(RETRY).await;
    } else {
        parts.solved("balance");
    }
    let current = session.is_some_and(|s| snapshot.revision >= s.since_revision);
    let held = if current { wanted::addresses(&snapshot, &parts.me) } else { BTreeSet::new() };
    match parts.address.hold(&held).await {
        Ok(()) => parts.solved("address"),
        Err(error) => parts.problem("address", &error),
    }
    let mut pause = NET;
    if !current {
        return pause;
    }
    for (service, placement) in &snapshot.frontends {
        if placement.claimant(&suspected) != Some(&parts.me) {
            continue;
        }
        let Some(address) = address_of(&snapshot, service) else {
            continue;
        };
        claim(parts, service, placement, placement.revision, address).await;
        pause = CLAIM_AGAIN;
    }
    pause
}

fn address_of(snapshot: &Snapshot, service: &Name) -> Option<Ipv4Addr> {
    snapshot.services.get(service)?.spec.frontend.as_ref().map(|f| f.address)
}

/// Probes, and if nobody answers writes itself as the holder. The live copy then shows it, and the next step takes
/// the address.
async fn claim(
    parts: &AgentParts,
    service: &Name,
    placement: &FrontendPlacement,
    revision: i64,
    address: Ipv4Addr,
) {
    match parts.address.probe(address).await {
        Ok(None) => {}
        Ok(Some(_)) => {
            tracing::info!(%service, %address, holder = %placement.holder, "the suspected holder still answers; waiting for a proof");
            return;
        }
        Err(error) => return parts.problem("address", &error),
    }
    let key = keys::frontend(service);
    let claimed = placement.claimed_by(&parts.me);
    let value = serde_json::to_vec(&claimed).expect("a placement is plain data");
    let event = parts.event(
        &haven_model::ObjectRef::new(haven_model::object::Kind::Service, service.clone()),
        haven_model::Severity::Warning,
        format!(
            "{} takes {address}: {} is suspected and nobody answers for the address",
            parts.me, placement.holder
        ),
    );
    let compare = vec![Compare::ModRevision(key.clone(), revision)];
    match parts.store.txn(compare, vec![Op::Put(key, value.into()), event]).await {
        Ok(outcome) if outcome.succeeded => {
            tracing::warn!(%service, %address, "took the address from a suspected holder");
        }
        Ok(_) => {}
        Err(error) => tracing::debug!(%service, %error, "could not claim the address"),
    }
}
