//! The frontends of this host: the balancer's configuration, and the service addresses (DESIGN.md sections 4 and 9).
//!
//! An address moves faster than a VM. When its holder is suspected, the next candidate probes for it on the segment;
//! if nobody answers it takes the address, announces it, and claims the placement in the store: in this order, because
//! a store that has lost its leader with the holder answers only after an election, and taking an address is cheap and
//! can be taken back. A claim that the store gives to another, a holder that is heard again, and somebody who answers
//! for the address each end it. If somebody still answers, nothing is done until a proof makes the manager move it. A
//! host without a session holds no address.
//!
//! An address that is given up by plan, because its holder is drained, is held by both for a moment: the old holder goes
//! on serving until the new one has surely announced it, and what belongs to connections that only the old one knows is
//! passed on to it meanwhile.

use super::{AgentParts, lease::Session, wanted};
use crate::balance::driver::FrontendWanted;
use haven_model::{FrontendPlacement, Name, Snapshot, keys};
use haven_store::{
    clock::Mono,
    raw::{Compare, Op},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    sync::Arc,
    time::Duration,
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// How long a claim that met an answering holder, or failed, rests before the next.
const CLAIM_AGAIN: Duration = Duration::from_millis(250);
/// A host that hears the holder again has given its address back after so long.
const GIVEN_BACK: Duration = Duration::from_secs(1);
/// So long what belongs to a connection of before is passed on to the host that gave an address up by plan.
const PASSING: Duration = Duration::from_millis(1500);
/// So long an address that was given up by plan is held on: longer than anything of it is passed on.
const LINGER: Duration = Duration::from_secs(2);
/// The pause after the balancer refused something.
const RETRY: Duration = Duration::from_millis(500);
/// A host that balances looks so often whether HAProxy runs: its clients wait for it.
const ALIVE: Duration = Duration::from_secs(1);
/// The net under lost wake-ups, and the rhythm in which the machine is compared with what is wanted.
const NET: Duration = Duration::from_secs(10);

/// Keeps the balancer and the addresses until `cancel`.
pub async fn run(parts: Arc<AgentParts>, cancel: CancellationToken) {
    let mut inputs = Inputs {
        live: parts.live.clone(),
        suspected: parts.heard.suspected.clone(),
        reunions: parts.heard.reunions.clone(),
        session: parts.session.clone(),
        taken: BTreeSet::new(),
        looked: false,
        placed: BTreeSet::new(),
        lingering: BTreeMap::new(),
        passing: BTreeMap::new(),
        left_out: BTreeSet::new(),
    };
    while !cancel.is_cancelled() {
        let pause = step(&parts, &mut inputs).await;
        tokio::select! {
            biased;
            () = cancel.cancelled() => {}
            _ = inputs.live.changed() => {}
            _ = inputs.suspected.changed() => {}
            _ = inputs.session.changed() => {}
            Ok(()) = inputs.reunions.changed() => announce(&parts),
            () = parts.clock.sleep(pause) => {}
        }
    }
}

/// Another host may have taken an address of this one while they did not hear each other, and given it back: the
/// segment is told who has it, now and when the other has surely given it back.
fn announce(parts: &Arc<AgentParts>) {
    let parts = Arc::clone(parts);
    tokio::spawn(async move {
        for pause in [Duration::ZERO, GIVEN_BACK] {
            parts.clock.sleep(pause).await;
            if let Err(error) = parts.address.announce().await {
                parts.problem("address", &error);
            }
        }
    });
}

struct Inputs {
    live: watch::Receiver<Arc<Snapshot>>,
    suspected: watch::Receiver<BTreeSet<Name>>,
    reunions: watch::Receiver<u64>,
    session: watch::Receiver<Option<Session>>,
    /// Addresses taken from suspected holders whose claim the store has not shown yet.
    taken: BTreeSet<Ipv4Addr>,
    /// It has looked at the store before.
    looked: bool,
    /// Addresses that the store gave this host when it looked last.
    placed: BTreeSet<Ipv4Addr>,
    /// Those that it gave up since, and until when it holds them on.
    lingering: BTreeMap<Ipv4Addr, Mono>,
    /// Those that this host has from one that gave them up: its own address, and until when it is passed on what is its.
    passing: BTreeMap<Ipv4Addr, (Ipv4Addr, Mono)>,
    /// Services whose frontends the balancer left out.
    left_out: BTreeSet<String>,
}

async fn step(parts: &AgentParts, inputs: &mut Inputs) -> Duration {
    let snapshot = Arc::clone(&inputs.live.borrow_and_update());
    let suspected = inputs.suspected.borrow_and_update().clone();
    let session = *inputs.session.borrow_and_update();
    let current = session.is_some_and(|s| snapshot.revision >= s.since_revision);
    let claims = if current { claims(parts, &snapshot, &suspected) } else { Vec::new() };
    inputs.taken.retain(|ip| claims.iter().any(|claim| claim.address == *ip));
    let mut held = if current { wanted::addresses(&snapshot, &parts.me) } else { BTreeSet::new() };
    let lingers = linger(parts, inputs, &snapshot, &held);
    let passing = inputs.passing.iter().map(|(ip, (to, _))| (*ip, *to)).collect();
    // Before the address is taken: a connection that is not known is reset.
    if let Err(error) = parts.address.pass_on(&passing).await {
        tracing::warn!(
            why = crate::agent::chain(&error),
            "connections of an address that moves may break"
        );
    }
    held.extend(&inputs.taken);
    held.extend(inputs.lingering.keys());
    hold(parts, &held).await;
    let secrets = parts.secrets.as_ref();
    let frontends = wanted::frontends(&snapshot, &parts.me, &suspected, secrets);
    balance(parts, &frontends, &mut inputs.left_out).await;
    let pause = match (claims.is_empty(), frontends.is_empty()) {
        (false, _) => CLAIM_AGAIN,
        (true, false) => ALIVE,
        (true, true) => NET,
    };
    let pause = lingers.map_or(pause, |lingers| lingers.min(pause));
    for claim in claims {
        match parts.address.probe(claim.address).await {
            Ok(None) => {}
            Ok(Some(_)) => {
                tracing::info!(service = %claim.service, address = %claim.address, holder = %claim.placement.holder, "the suspected holder still answers; waiting for a proof");
                inputs.taken.remove(&claim.address);
                held.remove(&claim.address);
                hold(parts, &held).await;
                continue;
            }
            Err(error) => {
                parts.problem("address", &error);
                continue;
            }
        }
        // The holder may have been heard meanwhile.
        if claim.placement.claimant(&inputs.suspected.borrow()) != Some(&parts.me) {
            continue;
        }
        inputs.taken.insert(claim.address);
        held.insert(claim.address);
        hold(parts, &held).await;
        // Cut off from the store too, this host must not wait for it with the address in its hands.
        tokio::select! {
            biased;
            () = write(parts, &claim) => {}
            _ = inputs.session.wait_for(Option::is_none) => {}
        }
    }
    pause
}

/// Notes which addresses were given up by plan since the last look, here or to this host; how long until the first of
/// them is let go, or what is passed on ends.
fn linger(
    parts: &AgentParts,
    inputs: &mut Inputs,
    snapshot: &Snapshot,
    placed: &BTreeSet<Ipv4Addr>,
) -> Option<Duration> {
    let now = parts.clock.now();
    let session = inputs.session.borrow().is_some();
    let given_up = wanted::given_up(snapshot, &parts.me);
    inputs.lingering.retain(|ip, until| session && given_up.contains(ip) && *until > now);
    for ip in given_up.intersection(&inputs.placed).filter(|_| session) {
        inputs.lingering.entry(*ip).or_insert(now.plus(LINGER));
    }
    inputs.passing.retain(|ip, (_, until)| placed.contains(ip) && *until > now);
    for (ip, from) in wanted::given_by(snapshot, &parts.me) {
        // A daemon that finds an address that it held already has nothing to pass on.
        if placed.contains(&ip) && !inputs.placed.contains(&ip) && inputs.looked {
            inputs.passing.insert(ip, (from, now.plus(PASSING)));
        }
    }
    inputs.placed.clone_from(placed);
    inputs.looked = snapshot.revision > 0;
    let passing = inputs.passing.values().map(|(_, until)| until);
    let first = inputs.lingering.values().chain(passing).min()?;
    Some(first.since(now))
}

async fn hold(parts: &AgentParts, held: &BTreeSet<Ipv4Addr>) {
    match parts.address.hold(held).await {
        Ok(()) => parts.solved("address"),
        Err(error) => parts.problem("address", &error),
    }
}

/// Has the frontends served; those that were left out are told, each by itself.
async fn balance(
    parts: &AgentParts,
    frontends: &[FrontendWanted],
    left_out: &mut BTreeSet<String>,
) {
    let part = |service: &String| format!("frontend {service}");
    match parts.balance.apply(frontends).await {
        Ok(now) => {
            parts.solved("balance");
            for (service, why) in &now {
                parts.problem(&part(service), why);
            }
            let now: BTreeSet<String> = now.into_keys().collect();
            left_out.difference(&now).for_each(|service| parts.solved(&part(service)));
            *left_out = now;
        }
        Err(error) => {
            parts.problem("balance", &error);
            parts.clock.sleep(RETRY).await;
        }
    }
}

/// An address that this host may try to take.
struct Claim {
    service: Name,
    address: Ipv4Addr,
    placement: FrontendPlacement,
    revision: i64,
}

fn claims(parts: &AgentParts, snapshot: &Snapshot, suspected: &BTreeSet<Name>) -> Vec<Claim> {
    let mine = |placement: &FrontendPlacement| placement.claimant(suspected) == Some(&parts.me);
    let frontends = snapshot.frontends.iter().filter(|(_, placement)| mine(placement));
    frontends
        .filter_map(|(service, placement)| {
            Some(Claim {
                service: service.clone(),
                address: address_of(snapshot, service)?,
                placement: FrontendPlacement::clone(placement),
                revision: placement.revision,
            })
        })
        .collect()
}

fn address_of(snapshot: &Snapshot, service: &Name) -> Option<Ipv4Addr> {
    snapshot.services.get(service)?.spec.frontend.as_ref().map(|f| f.address)
}

/// Writes this host as the holder.
async fn write(parts: &AgentParts, claim: &Claim) {
    let Claim { service, address, placement, revision } = claim;
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
    let compare = vec![Compare::ModRevision(key.clone(), *revision)];
    match parts.store.txn(compare, vec![Op::Put(key, value.into()), event]).await {
        Ok(outcome) if outcome.succeeded => {
            tracing::warn!(%service, %address, "took the address from a suspected holder");
        }
        Ok(_) => {}
        Err(error) => tracing::debug!(%service, %error, "could not claim the address"),
    }
}
