//! The invariants that every plan keeps, checked apart from the code that makes plans.
//!
//! The manager checks each plan before it commits; the property tests and the simulator check with the same code.

mod moves;

use crate::{placement::capacity::cost, wishes::Neighbours};
use haven_model::{Action, Name, Placement, Plan, Planned, Snapshot, Waiting, plan::MoveStep};
use std::collections::{BTreeMap, BTreeSet};

/// An invariant that a plan would break.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Broken {
    /// The VM whose placement would break it; none when it is about an action of another kind.
    pub vm: Option<Name>,
    /// In words.
    pub why: String,
}

fn of(vm: &Name, why: String) -> Broken {
    Broken { vm: Some(vm.clone()), why }
}

/// Checks.
///
/// # Errors
/// The first invariant that would be broken.
pub fn check(snapshot: &Snapshot, plan: &Plan) -> Result<(), Broken> {
    let mut placements: BTreeMap<&Name, &Placement> =
        snapshot.placements.iter().map(|(n, p)| (n, &*p.value)).collect();
    let (mut touched, mut new) = (Vec::new(), BTreeSet::new());
    let mut neighbours = Neighbours::of(snapshot);
    for planned in &plan.actions {
        if planned.reason.is_empty() {
            let why = format!("an action on {} has no reason", planned.object);
            return Err(Broken { vm: vm_of(&planned.action).cloned(), why });
        }
        if let Action::MoveVm { vm, placement, expected_revision, step, .. } = &planned.action {
            if !new.insert(vm) {
                return Err(of(vm, format!("{vm} is placed twice in one plan")));
            }
            moves::check(snapshot, vm, placement, *expected_revision, step)
                .map_err(|why| of(vm, why))?;
            if let (MoveStep::Begin, Some(to)) = (step, &placement.moving_to) {
                touched.push(vm);
                neighbours.add(vm, &to.host).map_err(|why| of(vm, why))?;
            }
            placements.insert(vm, placement);
            continue;
        }
        let Action::PlaceVm { vm, placement, expected_revision, taken_from } = &planned.action
        else {
            continue;
        };
        if !new.insert(vm) {
            return Err(of(vm, format!("{vm} is placed twice in one plan")));
        }
        touched.push(vm);
        let old = placements.get(vm).copied();
        if placement.epoch != old.map_or(0, |p| p.epoch) + 1 {
            let from = old.map(|p| p.epoch);
            return Err(of(vm, format!("{vm} goes from epoch {from:?} to {}", placement.epoch)));
        }
        if *expected_revision != snapshot.placements.get(vm).map_or(0, |p| p.revision) {
            return Err(of(vm, format!("{vm} is placed over a revision that was not read")));
        }
        if old.is_some_and(|old| old.moved_from.is_some()) {
            return Err(of(vm, format!("{vm} is placed while its copy elsewhere may run")));
        }
        if placement.moving_to.is_some() || placement.moved_from.is_some() {
            return Err(of(vm, format!("{vm} is placed as if it were moved live")));
        }
        if let Some(old) = old
            && old.host != placement.host
        {
            proven(snapshot, vm, old, taken_from.as_ref()).map_err(|why| of(vm, why))?;
        }
        neighbours.add(vm, &placement.host).map_err(|why| of(vm, why))?;
        placements.insert(vm, placement);
    }
    unique(&placements, &touched)?;
    // What stays where it is takes no more room there than it did.
    let on = |p: &Placement| (p.host.clone(), p.moving_to.as_ref().map(|to| to.host.clone()));
    let stays = |vm: &&Name| {
        snapshot.placements.get(*vm).map(|p| on(p)) == placements.get(*vm).map(|p| on(p))
    };
    let added: Vec<&Name> = touched.iter().copied().filter(|vm| !stays(vm)).collect();
    capacity(snapshot, &placements, &added)
}

/// The plan without what would break an invariant: one VM that cannot be placed must not keep the others from being
/// placed. What was left out waits, and says why.
#[must_use]
pub fn sound(snapshot: &Snapshot, mut plan: Plan) -> (Plan, Vec<Broken>) {
    let mut left_out = Vec::new();
    while let Err(broken) = check(snapshot, &plan) {
        let before = plan.actions.len();
        match &broken.vm {
            // The last one: of two for one VM the first stands.
            Some(vm) => {
                let places = |planned: &Planned| vm_of(&planned.action) == Some(vm);
                if let Some(index) = plan.actions.iter().rposition(places) {
                    let object = plan.actions.remove(index).object;
                    let reason = format!(
                        "waiting: {}; this is a defect of Haven, please report it",
                        broken.why
                    );
                    plan.waiting.push(Waiting { object, reason });
                }
            }
            None => plan.actions.retain(|planned| !planned.reason.is_empty()),
        }
        if plan.actions.len() == before {
            plan.actions.clear();
        }
        left_out.push(broken);
    }
    (plan, left_out)
}

/// The VM that an action gives an owner to.
fn vm_of(action: &Action) -> Option<&Name> {
    match action {
        Action::PlaceVm { vm, .. } | Action::MoveVm { vm, .. } => Some(vm),
        _ => None,
    }
}

fn proven(
    snapshot: &Snapshot,
    vm: &Name,
    old: &Placement,
    proof: Option<&haven_model::plan::TakenFrom>,
) -> Result<(), String> {
    let proof = proof.ok_or_else(|| format!("{vm} is taken from {} without a proof", old.host))?;
    let lease = snapshot.leases.get(&old.host);
    let closed = lease.is_some_and(|l| {
        l.closed
            && l.revision == proof.lease_revision
            && snapshot.lost.get(&old.host).is_some_and(|lost| lost.session == l.session)
    });
    if proof.host == old.host && closed {
        Ok(())
    } else {
        Err(format!("{vm} is taken from {} whose session is not closed under a proof", old.host))
    }
}

/// No VM gets a number or an address that another has. What stands in the store already is not this plan's doing.
fn unique(placements: &BTreeMap<&Name, &Placement>, touched: &[&Name]) -> Result<(), Broken> {
    let (mut slots, mut addresses) = (BTreeMap::new(), BTreeMap::new());
    let new: BTreeSet<&Name> = touched.iter().copied().collect();
    // Those that stood before come first, so that a newcomer is named; of two newcomers the later one.
    let old = placements.keys().copied().filter(|vm| !new.contains(vm));
    for vm in old.chain(touched.iter().copied()) {
        let Some(placement) = placements.get(vm) else { continue };
        let newcomer = new.contains(vm);
        if let Some(other) = slots.insert(placement.slot, vm)
            && newcomer
        {
            let why = format!("{vm} and {other} have the same slot {}", placement.slot);
            return Err(of(vm, why));
        }
        for nic in &placement.nics {
            if let Some(other) = addresses.insert((&nic.network, nic.ip), vm)
                && newcomer
            {
                return Err(of(vm, format!("{vm} and {other} have the same address {}", nic.ip)));
            }
        }
    }
    Ok(())
}

/// The hosts on which a VM takes room: the one that makes ready for it comes last.
fn takes(placement: &Placement) -> impl Iterator<Item = &Name> {
    std::iter::once(&placement.host).chain(placement.moving_to.iter().map(|to| &to.host))
}

/// No host that this plan adds to is promised more memory than it has.
fn capacity(
    snapshot: &Snapshot,
    placements: &BTreeMap<&Name, &Placement>,
    touched: &[&Name],
) -> Result<(), Broken> {
    let mut used: BTreeMap<&Name, u64> = BTreeMap::new();
    for (name, placement) in placements {
        if let Some(vm) = snapshot.vms.get(*name) {
            for host in takes(placement) {
                *used.entry(host).or_default() += cost(&vm.spec).memory;
            }
        }
    }
    // The last one placed on a host is the one too many.
    let added: BTreeMap<&Name, &Name> =
        touched.iter().filter_map(|vm| Some((takes(placements.get(vm)?).last()?, *vm))).collect();
    for (host, vm) in added {
        let Some((status, object)) = snapshot.host_status.get(host).zip(snapshot.hosts.get(host))
        else {
            return Err(of(vm, format!("{vm} is placed on {host}, which has not reported")));
        };
        let has = status.memory.0.saturating_sub(object.spec.reserved_memory.0);
        let promised = used.get(host).copied().unwrap_or(0);
        if promised > has {
            let why =
                format!("{vm} is placed on {host}, which is promised {promised} bytes of {has}");
            return Err(of(vm, why));
        }
    }
    Ok(())
}
