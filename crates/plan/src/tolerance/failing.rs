//! A VM that keeps failing on a host that is well: it is tried on another host, once, and told of as long as it fails.
//!
//! The host lives and may start it at any moment, so there is no proof of a loss. What takes its place: the host has
//! said that no process of the VM is there, and says otherwise in the store *before* it starts one. The new placement
//! is committed only over those very words, so the two exclude each other (see `start` of the agent's VM task).

use crate::{
    placement::choose_other,
    tolerance::recovery::bound_by,
    work::{Work, vm_ref},
};
use haven_model::{
    Action, Name, Placement, Versioned, VmPhase, VmSpec, VmStatus,
    object::Stored,
    placement::FailedOn,
    vm::{KEEPS_FAILING, KEEPS_HANGING},
};

/// A VM is not taken to another host again within so long, milliseconds.
const AGAIN_MS: i64 = 3_600_000;

/// What keeps failing, with what is said of it.
pub(crate) fn failing<'a>(
    work: &Work<'a>,
) -> Vec<(&'a Name, &'a Stored<VmSpec>, &'a Versioned<Placement>, &'a VmStatus)> {
    let snapshot = work.snapshot;
    let keeps = |told: &VmStatus| told.failures >= KEEPS_FAILING || told.hung >= KEEPS_HANGING;
    let often = snapshot.vm_status.iter().filter(|(_, status)| keeps(status));
    let known = often.filter_map(|(name, _)| {
        let vm = snapshot.vms.get(name).filter(|vm| vm.spec.running && !vm.meta.deleting)?;
        let told = snapshot.told_of(name).filter(|told| keeps(told))?;
        Some((name, &*vm.value, snapshot.placements.get(name)?, told))
    });
    known.collect()
}

/// What it does again and again.
pub(crate) fn words(told: &VmStatus) -> String {
    match told.hung >= KEEPS_HANGING {
        true => format!("hung {} times", told.hung),
        false => format!("failed {} times in a row", told.failures),
    }
}

/// Tries each on another host, or says why it stays.
pub(crate) fn plan(work: &mut Work<'_>) {
    for (name, vm, placement, told) in failing(work) {
        if let Err(stays) = elsewhere(work, name, vm, placement, told) {
            let why = if told.message.is_empty() { "" } else { ", the last time: " };
            let words = format!(
                "{name} {} on {}{why}{}; {stays}",
                words(told),
                placement.host,
                told.message
            );
            work.wait(vm_ref(name), words);
        }
    }
}

/// Takes it to another host.
///
/// # Errors
/// Why not, as the end of a sentence.
fn elsewhere<'a>(
    work: &mut Work<'a>,
    name: &Name,
    vm: &'a Stored<VmSpec>,
    old: &Versioned<Placement>,
    told: &VmStatus,
) -> Result<(), String> {
    let again = format!("it is tried further, with pauses; `haven vm log {name}` may tell why");
    let recently = |failed: &&FailedOn| work.seen.now_ms - failed.at_ms < AGAIN_MS;
    if let Some(failed) = old.failed_on.as_ref().filter(recently) {
        return Err(format!("it failed on {}, too: {again}", failed.host));
    }
    if let Some((disk, pool)) = bound_by(work.snapshot, vm) {
        return Err(format!(
            "its disk `{disk}` lives in the local pool `{pool}`, so it stays: {again}"
        ));
    }
    if old.moving_to.is_some() || old.moved_from.is_some() {
        return Err("it is being moved".into());
    }
    if crate::storage::shutting::fenced(work, name) {
        return Err(format!("it starts elsewhere because {} is not heard", old.host));
    }
    if !old.fits(&vm.spec) {
        return Err("it takes up its changed network cards first".into());
    }
    if told.phase != VmPhase::Failed || !told.idle {
        return Err("it is tried on another host once it has failed again".into());
    }
    // Rather one on which it was not yet.
    let before = old.failed_on.as_ref().map(|failed| &failed.host);
    let choice = choose_other(work, vm, &old.host, &|other| Some(other) != before)
        .or_else(|_| choose_other(work, vm, &old.host, &|_| true));
    let choice = choice.map_err(|why| {
        let why = why.strip_prefix("waiting: ").unwrap_or(&why).to_owned();
        format!("no other host takes it ({why}): {again}")
    })?;
    let failed_on = Some(FailedOn { host: old.host.clone(), at_ms: work.seen.now_ms });
    let placement = Placement {
        failed_on,
        ..Placement::new(choice.host.clone(), old.epoch + 1, old.slot, old.nics.clone())
    };
    work.room.take_away(&old.host, vm);
    work.room.use_up(&choice.host, vm);
    let reason = format!(
        "{name} is tried on {} because it {} on {}: {}",
        choice.host,
        words(told),
        old.host,
        choice.reason
    );
    let told = work.snapshot.vm_status.get(name).map_or(0, |status| status.revision);
    let action =
        Action::TryElsewhere { vm: name.clone(), placement, expected_revision: old.revision, told };
    work.act(vm_ref(name), reason, action);
    Ok(())
}
