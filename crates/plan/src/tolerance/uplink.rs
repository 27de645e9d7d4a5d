//! A host that lost only an uplink is well for the cluster, and nobody outside reaches what runs there. Its guests in
//! that network move live to hosts where it has a link, and addresses go to such hosts (`balance/frontends`). Nothing
//! is placed where it would be cut off, as long as any host reaches the network.

use crate::{
    HostState, placement,
    tolerance::migration::{self, SetOut, immovable, unfit},
    work::{Work, vm_ref},
};
use haven_model::{
    Name, ObjectRef, Placement, Snapshot, Versioned, VmPhase, VmSpec, object::Kind, object::Stored,
};
use std::collections::{BTreeMap, BTreeSet};

/// After a move that failed the next one is tried so much later, milliseconds.
const AGAIN_MS: u64 = 30_000;

/// What is cut off on which hosts and reached on another usable one. Empty nearly always.
#[derive(Default)]
pub(crate) struct CutOff<'a>(BTreeMap<&'a Name, BTreeSet<&'a ObjectRef>>);

impl<'a> CutOff<'a> {
    /// As the hosts say.
    pub fn of(snapshot: &'a Snapshot, states: &BTreeMap<Name, HostState>) -> Self {
        let cut = |host: &Name| snapshot.host_status.get(host).map(|status| &status.cut_off);
        let mut all: BTreeMap<&Name, BTreeSet<&ObjectRef>> = snapshot
            .host_status
            .iter()
            .filter(|(_, status)| !status.cut_off.is_empty())
            .map(|(host, status)| (host, status.cut_off.iter().collect()))
            .collect();
        if !all.is_empty() {
            let usable = || states.iter().filter(|(_, state)| state.usable());
            let reached = |object: &ObjectRef| {
                usable().any(|(host, _)| cut(host).is_some_and(|cut| !cut.contains(object)))
            };
            all.values_mut().for_each(|objects| objects.retain(|object| reached(object)));
            all.retain(|_, objects| !objects.is_empty());
        }
        Self(all)
    }

    /// Whether a network or a service is cut off on a host, and another host is better.
    pub fn is(&self, host: &Name, object: &ObjectRef) -> bool {
        self.0.get(host).is_some_and(|objects| objects.contains(object))
    }

    /// The network of such a VM that is cut off on a host, and that another host reaches.
    pub fn network<'s>(&self, host: &Name, spec: &'s VmSpec) -> Option<&'s Name> {
        let objects = self.0.get(host)?;
        let cut =
            |network: &&Name| objects.contains(&ObjectRef::new(Kind::Network, (*network).clone()));
        spec.networks.iter().map(|nic| &nic.network).find(cut)
    }
}

/// Lets what is cut off set out.
pub(crate) fn plan(work: &mut Work<'_>) {
    if work.cut_off.0.is_empty() {
        return;
    }
    let snapshot = work.snapshot;
    for (vm, placement) in &snapshot.placements {
        let Some(object) = snapshot.vms.get(vm) else { continue };
        if let Some(network) = work.cut_off.network(&placement.host, &object.spec)
            && let Err(why) = leave(work, vm, placement, object, network)
        {
            let host = &placement.host;
            let cut = format!("{vm} is cut off from the network `{network}` on {host}");
            work.wait(vm_ref(vm), format!("{cut}: {why}"));
        }
    }
}

/// Lets one VM set out, if it runs and does not move already.
///
/// # Errors
/// Why it stays.
fn leave<'a>(
    work: &mut Work<'a>,
    vm: &'a Name,
    placement: &Versioned<Placement>,
    object: &'a Versioned<Stored<VmSpec>>,
    network: &Name,
) -> Result<(), String> {
    let (snapshot, host) = (work.snapshot, &placement.host);
    let runs = snapshot.told_of(vm).is_some_and(|told| told.phase == VmPhase::Running);
    let wanted = object.spec.running && !object.meta.deleting;
    let moves = placement.moving_to.is_some() || placement.moved_from.is_some();
    let well = work.states.get(host).is_some_and(|state| state.well());
    if !runs || !wanted || moves || !well {
        return Ok(());
    }
    if let Some(why) = immovable(snapshot, object) {
        return Err(format!("{why}, so it stays"));
    }
    may_now(work, vm)?;
    if let Some(why) = work.moves.full([host]).or(work.moves.enough(snapshot, object)) {
        return Err(format!("it moves later: {why}"));
    }
    let may =
        |other: &Name| unfit(snapshot, host, other).is_none() && work.moves.full([other]).is_none();
    let able: BTreeSet<Name> = work.states.keys().filter(|other| may(other)).cloned().collect();
    let choice = placement::choose_other(work, object, host, &|other| able.contains(other));
    let choice = choice.map_err(|why| why.trim_start_matches("waiting: ").to_owned())?;
    let reason = format!(
        "{vm} is to move from {host} to {}, because {host} is cut off from the network `{network}`: {}",
        choice.host, choice.reason
    );
    let by = format!("the loss of {host}'s uplink");
    let mut record = migration::record(work, placement, vm, by);
    record.to = Some(choice.host.clone());
    let way = SetOut { host: choice.host, restart: false, record: None };
    migration::set_out_with(work, vm, placement, &record, way, reason);
    Ok(())
}

/// Whether a move may begin beside what was asked and tried before.
///
/// # Errors
/// Why not.
fn may_now(work: &mut Work<'_>, vm: &Name) -> Result<(), String> {
    if work.snapshot.unreadable.contains_key(&format!("migrations/{vm}")) {
        return Err(format!(
            "the record migrations/{vm} cannot be read by this version of Haven; update the managing host"
        ));
    }
    let Some(last) = work.snapshot.migrations.get(vm) else { return Ok(()) };
    let Some(outcome) = &last.outcome else {
        return Err(format!("it first moves as {} asked", last.by));
    };
    let passed = work.passed_ms(outcome.at_ms).filter(|passed| *passed < AGAIN_MS);
    let Some(passed) = passed.filter(|_| !outcome.moved) else { return Ok(()) };
    let rest = AGAIN_MS - passed;
    work.wake(rest);
    Err(format!("it is moved again in {} s: {}", rest.div_ceil(1000), outcome.message))
}
