//! The invariants that every plan keeps, checked apart from the code that makes plans.
//!
//! The manager checks each plan before it commits; the property tests and the simulator check with the same code.

mod moves;

use crate::{placement::capacity::cost, tolerance::order::Order, wishes::Neighbours};
use haven_model::{
    Action, Name, Placement, Plan, Planned, ProofKind, Snapshot, VmPhase, Waiting, plan::MoveStep,
};
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
            let old = placements.get(vm).copied();
            has_all(snapshot, vm, placement, old)?;
            if let (MoveStep::Begin, Some(to)) = (step, &placement.moving_to) {
                touched.push(vm);
                neighbours.add(vm, &to.host).map_err(|why| of(vm, why))?;
            }
            placements.insert(vm, placement);
            continue;
        }
        let (vm, placement, expected_revision, evidence) = match &planned.action {
            Action::PlaceVm { vm, placement, expected_revision, taken_from } => {
                (vm, placement, expected_revision, Evidence::Lost(taken_from.as_ref()))
            }
            Action::TryElsewhere { vm, placement, expected_revision, told } => {
                (vm, placement, expected_revision, Evidence::Idle(*told))
            }
            _ => continue,
        };
        if !new.insert(vm) {
            return Err(of(vm, format!("{vm} is placed twice in one plan")));
        }
        touched.push(vm);
        let old = placements.get(vm).copied();
        well_formed(snapshot, vm, placement, *expected_revision, old)?;
        has_all(snapshot, vm, placement, old)?;
        if let Some(old) = old
            && old.host != placement.host
        {
            let proven = match evidence {
                Evidence::Lost(taken_from) => proven(snapshot, vm, old, taken_from),
                Evidence::Idle(told) => idle(snapshot, vm, old, told),
            };
            proven.map_err(|why| of(vm, why))?;
        }
        let stays = old.is_some_and(|old| old.host == placement.host);
        if !stays && crate::tolerance::drain::stands(snapshot, &placement.host).is_some() {
            return Err(of(vm, format!("{vm} is placed on {}, which is drained", placement.host)));
        }
        neighbours.add(vm, &placement.host).map_err(|why| of(vm, why))?;
        placements.insert(vm, placement);
    }
    in_order(snapshot, plan)?;
    unique(&placements, &touched)?;
    // What stays where it is takes no more room there than it did.
    let on = |p: &Placement| (p.host.clone(), p.moving_to.as_ref().map(|to| to.host.clone()));
    let stays = |vm: &&Name| {
        snapshot.placements.get(*vm).map(|p| on(p)) == placements.get(*vm).map(|p| on(p))
    };
    let added: Vec<&Name> = touched.iter().copied().filter(|vm| !stays(vm)).collect();
    capacity(snapshot, &placements, &added)
}

/// A new host has all that was written to the VM's mirrored disks.
fn has_all(
    snapshot: &Snapshot,
    vm: &Name,
    placement: &Placement,
    old: Option<&Placement>,
) -> Result<(), Broken> {
    let Some(object) = snapshot.vms.get(vm) else { return Ok(()) };
    let stays = old.is_some_and(|old| old.host == placement.host);
    match crate::storage::replicas::lacks(snapshot, object, &placement.host) {
        Some(disk) if !stays => {
            let (host, disk) = (&placement.host, &disk.name);
            let why = format!(
                "{vm} is placed on {host}, whose replica of the disk `{disk}` lacks something"
            );
            Err(of(vm, why))
        }
        _ => Ok(()),
    }
}

/// A new placement follows the one that was read, and nothing of the VM is on its way.
fn well_formed(
    snapshot: &Snapshot,
    vm: &Name,
    placement: &Placement,
    expected_revision: i64,
    old: Option<&Placement>,
) -> Result<(), Broken> {
    if placement.epoch != old.map_or(0, |p| p.epoch) + 1 {
        let from = old.map(|p| p.epoch);
        return Err(of(vm, format!("{vm} goes from epoch {from:?} to {}", placement.epoch)));
    }
    if expected_revision != snapshot.placements.get(vm).map_or(0, |p| p.revision) {
        return Err(of(vm, format!("{vm} is placed over a revision that was not read")));
    }
    if old.is_some_and(|old| old.moved_from.is_some()) {
        return Err(of(vm, format!("{vm} is placed while its copy elsewhere may run")));
    }
    if placement.moving_to.is_some() || placement.moved_from.is_some() {
        return Err(of(vm, format!("{vm} is placed as if it were moved live")));
    }
    Ok(())
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
        Action::PlaceVm { vm, .. }
        | Action::TryElsewhere { vm, .. }
        | Action::MoveVm { vm, .. } => Some(vm),
        _ => None,
    }
}

/// Why a VM may change its owner.
enum Evidence<'a> {
    /// Its host is lost.
    Lost(Option<&'a haven_model::plan::TakenFrom>),
    /// Its host said at this revision that no process of it is there.
    Idle(i64),
}

/// The owner, whose session is open, said last that nothing of the VM is there.
fn idle(snapshot: &Snapshot, vm: &Name, old: &Placement, told: i64) -> Result<(), String> {
    let says = snapshot.vm_status.get(vm).is_some_and(|status| status.revision == told)
        && snapshot.told_of(vm).is_some_and(|status| {
            status.epoch == old.epoch && status.phase == VmPhase::Failed && status.idle
        });
    if says && old.moving_to.is_none() {
        Ok(())
    } else {
        Err(format!(
            "{vm} is taken from {}, which has not said that nothing of it is there",
            old.host
        ))
    }
}

fn proven(
    snapshot: &Snapshot,
    vm: &Name,
    old: &Placement,
    proof: Option<&haven_model::plan::TakenFrom>,
) -> Result<(), String> {
    let proof = proof.ok_or_else(|| format!("{vm} is taken from {} without a proof", old.host))?;
    if proof.proof == ProofKind::StorageFenced {
        let vm = snapshot.vms.get(vm).ok_or_else(|| format!("{vm} is not there"))?;
        let shut = crate::storage::shutting::shut(snapshot, vm, old);
        return match shut && proof.host == old.host {
            true => Ok(()),
            false => Err(format!(
                "{} is taken from {}, to which its disks are not shut",
                vm.meta.name, old.host
            )),
        };
    }
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

/// Those that get a host get it in their order: by priority, what others start after first, then by age.
fn in_order(snapshot: &Snapshot, plan: &Plan) -> Result<(), Broken> {
    let new = plan.actions.iter().filter_map(|planned| match &planned.action {
        Action::PlaceVm { vm, expected_revision: 0, .. }
        | Action::PlaceVm { vm, taken_from: Some(_), .. } => Some(vm),
        _ => None,
    });
    let mut new = new.filter_map(|vm| Some((vm, snapshot.vms.get(vm)?))).peekable();
    if new.peek().is_none() {
        return Ok(());
    }
    let order = Order::of(snapshot);
    let mut last = None;
    for (name, vm) in new {
        let place = order.place(name, vm);
        if let Some((before, _)) = last.filter(|(_, last)| *last > place) {
            return Err(of(
                name,
                format!("{name} gets a host after {before}, and comes before it"),
            ));
        }
        last = Some((name, place));
    }
    Ok(())
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
