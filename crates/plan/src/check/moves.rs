//! What every step of a live migration keeps, judged by the store alone.

use crate::tolerance::drain;
use haven_model::{Handover, MigrationPhase, Name, Placement, Snapshot, plan::MoveStep};

/// Checks one step against the record that it replaces.
///
/// # Errors
/// What it would break, a sentence.
pub(super) fn check(
    snapshot: &Snapshot,
    vm: &Name,
    new: &Placement,
    expected_revision: i64,
    step: &MoveStep,
) -> Result<(), String> {
    let old = snapshot.placements.get(vm).ok_or_else(|| format!("{vm} moves and has no host"))?;
    if expected_revision != old.revision {
        return Err(format!("{vm} is moved over a revision that was not read"));
    }
    if (new.slot, &new.nics) != (old.slot, &old.nics) {
        return Err(format!("{vm} changes its number or its cards while it moves"));
    }
    let same_owner = new.host == old.host && new.epoch == old.epoch;
    let right = match step {
        MoveStep::Begin => {
            same_owner
                && old.moving_to.is_none()
                && old.moved_from.is_none()
                && new.moved_from.is_none()
                && new.moving_to.as_ref().is_some_and(|to| {
                    to.host != old.host && drain::stands(snapshot, &to.host).is_none()
                })
        }
        MoveStep::TakeBack => same_owner && new.moving_to.is_none() && new.moved_from.is_none(),
        MoveStep::Restart { from, told } => {
            return restart(snapshot, vm, new, (from, *told));
        }
        MoveStep::Commit { source_told, target_told } => {
            return commit(snapshot, vm, new, (*source_told, *target_told));
        }
        MoveStep::Settle => {
            let may = old
                .moved_from
                .as_ref()
                .is_some_and(|from| snapshot.handover(vm, from) != Handover::Pending);
            same_owner && may && new.moved_from.is_none() && new.moving_to.is_none()
        }
    };
    if right { Ok(()) } else { Err(format!("{vm} takes a wrong step of its move: {step:?}")) }
}

/// The owner changes only after the one before has said that its copy is stopped, and the next one that it listens,
/// both in the sessions that are open.
fn commit(
    snapshot: &Snapshot,
    vm: &Name,
    new: &Placement,
    (source_told, target_told): (i64, i64),
) -> Result<(), String> {
    let old = &snapshot.placements[vm];
    let to =
        old.moving_to.as_ref().ok_or_else(|| format!("{vm} is handed over and does not move"))?;
    if to.restart {
        return Err(format!("{vm} is handed over live, and was to be stopped first"));
    }
    let said = |host: &Name, phase: MigrationPhase, revision: i64| {
        snapshot
            .migration_told(vm, host, old.revision)
            .is_some_and(|told| told.phase == phase && told.revision == revision)
    };
    if !said(&old.host, MigrationPhase::Stopped, source_told) {
        return Err(format!("{vm} is handed over before {} has stopped it", old.host));
    }
    let stopped = snapshot.migration_told(vm, &old.host, old.revision);
    if stopped.is_some_and(|stopped| !stopped.sent_to(target_told)) {
        return Err(format!("{vm} is handed over to a process that came after the copy"));
    }
    if !said(&to.host, MigrationPhase::Listening, target_told) {
        return Err(format!("{vm} is handed over to {}, which does not listen", to.host));
    }
    let from = new.moved_from.as_ref();
    let session = snapshot.leases.get(&old.host).map(|lease| lease.session);
    let whole = new.host == to.host
        && new.epoch == old.epoch + 1
        && new.moving_to.is_none()
        && from.is_some_and(|from| {
            from.host == old.host && from.attempt == old.revision && Some(from.session) == session
        });
    if whole { Ok(()) } else { Err(format!("{vm} is handed over otherwise than it was to be")) }
}

/// A VM that is not moved live changes its owner only after the one before has said that nothing of it runs there, in the
/// session that is open.
fn restart(
    snapshot: &Snapshot,
    vm: &Name,
    new: &Placement,
    (from, told): (&Name, i64),
) -> Result<(), String> {
    let old = &snapshot.placements[vm];
    let to = old.moving_to.as_ref().filter(|to| to.restart);
    let to = to.ok_or_else(|| format!("{vm} changes its owner and was not to be stopped"))?;
    let said = snapshot
        .migration_told(vm, &old.host, old.revision)
        .is_some_and(|said| said.phase == MigrationPhase::Gone && said.revision == told);
    if !said || *from != old.host {
        return Err(format!("{vm} changes its owner before {} has stopped it", old.host));
    }
    let whole = new.host == to.host
        && new.epoch == old.epoch + 1
        && new.moving_to.is_none()
        && new.moved_from.is_none();
    if whole { Ok(()) } else { Err(format!("{vm} is given to another owner than it was to be")) }
}
