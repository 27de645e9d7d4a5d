//! Live migrations: where a VM goes, when the owner changes, and when an attempt is taken back
//! (docs/decisions/0011-live-migration.md).
//!
//! Every step is one transaction over the placement. The change of owner also compares what both sides said last, so
//! that a side that withdraws and the change exclude each other.

use crate::{
    placement, storage,
    tolerance::{drain, hosts::HostState, recovery::local_disk},
    work::{Work, vm_ref},
};
use haven_model::{
    Action, Bytes, Handover, Migration, MigrationOptions, MigrationPhase, MigrationStatus,
    MovedFrom, MovingTo, Name, Placement, PoolDriverKind, Snapshot, Versioned, VmPhase, VmSpec,
    host::{GOES_ALONG, MIRRORS_MOVE, POSTCOPY},
    object::Stored,
    plan::MoveStep,
    vm::{DISKS, DiskSpec},
};

/// Takes each migration one step further.
pub(crate) fn plan(work: &mut Work<'_>) {
    let snapshot = work.snapshot;
    for (vm, placement) in &snapshot.placements {
        if placement.moved_from.is_some() {
            settle(work, vm, placement);
        } else if let Some(to) = &placement.moving_to {
            if to.restart {
                restart_on(work, vm, placement, to);
            } else {
                go_on(work, vm, placement, to);
            }
        }
    }
    for (vm, migration) in snapshot.migrations.iter().filter(|(_, m)| m.outcome.is_none()) {
        let under_way = snapshot.placements.get(vm).is_some_and(|p| {
            p.moved_from.is_some()
                || p.moving_to.as_ref().is_some_and(|to| to.migration == migration.id)
        });
        if !under_way {
            begin(work, vm, migration);
        }
    }
}

/// Takes out where a VM came from, once its copy there can run no more and its new owner has spoken.
fn settle(work: &mut Work<'_>, vm: &Name, placement: &Versioned<Placement>) {
    let Some(from) = &placement.moved_from else { return };
    let handover = work.snapshot.handover(vm, from);
    let here = work.snapshot.told_of(vm).is_some_and(|status| status.epoch == placement.epoch);
    let lost = matches!(work.states.get(&placement.host), None | Some(HostState::Lost(_)));
    let (moved, reason) = match handover {
        Handover::Whole if here || lost => {
            let told = told(work.snapshot, vm, &from.host);
            let downtime = told
                .and_then(|told| told.progress?.downtime)
                .map(|downtime| format!("; QEMU kept it stopped for {downtime}"));
            let words = told.filter(|told| !told.message.is_empty());
            let words = words.map(|told| format!("; {}", told.message));
            let more = [downtime, words].map(Option::unwrap_or_default).concat();
            (true, format!("{vm} was moved from {} to {}{more}", from.host, placement.host))
        }
        // What was not there yet is lost with it; it starts elsewhere.
        Handover::Following if lost => {
            let reason = format!(
                "{vm} was moved from {} to {}, which was lost before all of its memory had come",
                from.host, placement.host
            );
            (true, reason)
        }
        Handover::Following => {
            let left = told(work.snapshot, vm, &from.host).and_then(|told| told.progress);
            let left = left.map(|p| format!(", {} left", Bytes::mib(p.left >> 20)));
            let why = format!(
                "waiting: {vm} runs on {}, and its memory follows from {}{}",
                placement.host,
                from.host,
                left.unwrap_or_default()
            );
            return work.wait(vm_ref(vm), why);
        }
        Handover::Broken => {
            let reason = format!(
                "{vm} starts anew on {}: it was handed over, and its copy on {} ended before all of it had come",
                placement.host, from.host
            );
            (false, reason)
        }
        Handover::Whole | Handover::Pending => {
            let why = format!("waiting: {} hands {vm} over to {}", from.host, placement.host);
            return work.wait(vm_ref(vm), why);
        }
    };
    let ended = ended(work, vm, moved, &reason);
    let settled = Placement { moved_from: None, ..(*placement.value).clone() };
    step(work, vm, placement, settled, MoveStep::Settle, ended, reason);
}

/// An attempt that is under way: the owner changes, or it is taken back, or it goes on.
fn go_on(work: &mut Work<'_>, vm: &Name, placement: &Versioned<Placement>, to: &MovingTo) {
    let snapshot = work.snapshot;
    let source = snapshot.migration_told(vm, &placement.host, placement.revision);
    let target = snapshot.migration_told(vm, &to.host, placement.revision);
    if let Some(why) = broken(work, vm, placement, to, source, target) {
        return take_back(work, vm, placement, &why);
    }
    let stopped = source.filter(|told| told.phase == MigrationPhase::Stopped);
    let listens = target.filter(|told| told.phase == MigrationPhase::Listening);
    let session = snapshot.leases.get(&placement.host).map_or(0, |lease| lease.session);
    if let (Some(source), Some(target)) = (stopped, listens)
        && !source.sent_to(target.revision)
    {
        let why = format!("the process on {} that waited for it ended", to.host);
        return take_back(work, vm, placement, &why);
    }
    if let (Some(source), Some(target)) = (stopped, listens) {
        let from = MovedFrom { host: placement.host.clone(), session, attempt: placement.revision };
        let new = Placement {
            host: to.host.clone(),
            epoch: placement.epoch + 1,
            moving_to: None,
            moved_from: Some(from),
            ..(*placement.value).clone()
        };
        let reason = format!("{vm} is handed over from {} to {}", placement.host, to.host);
        let commit =
            MoveStep::Commit { source_told: source.revision, target_told: target.revision };
        return step(work, vm, placement, new, commit, None, reason);
    }
    let at = match (source.map(|told| told.phase), target.map(|told| told.phase)) {
        (Some(MigrationPhase::Copying), _) => format!("its memory is copied to {}", to.host),
        (_, Some(MigrationPhase::Listening)) => format!("{} is ready, the copy begins", to.host),
        _ => format!("{} makes ready", to.host),
    };
    work.wait(
        vm_ref(vm),
        format!("{vm} is being moved from {} to {}: {at}", placement.host, to.host),
    );
}

fn take_back(work: &mut Work<'_>, vm: &Name, placement: &Versioned<Placement>, why: &str) {
    let reason = format!("{vm} stays on {}: {why}", placement.host);
    let ended = ended(work, vm, false, &reason);
    let back = Placement { moving_to: None, ..(*placement.value).clone() };
    step(work, vm, placement, back, MoveStep::TakeBack, ended, reason);
}

/// An attempt that is not live: once the owner has stopped the VM and said so, the owner changes.
fn restart_on(work: &mut Work<'_>, vm: &Name, placement: &Versioned<Placement>, to: &MovingTo) {
    let snapshot = work.snapshot;
    let gone = snapshot.vms.get(vm).is_none_or(|object| object.meta.deleting);
    let why = gone.then(|| "it is being deleted".to_owned());
    if let Some(why) = why.or_else(|| unwanted(work, vm, placement, to)) {
        return take_back(work, vm, placement, &why);
    }
    let told = snapshot.migration_told(vm, &placement.host, placement.revision);
    let Some(told) = told.filter(|told| told.phase == MigrationPhase::Gone) else {
        let why = format!("{vm} moves from {} to {} once it has ended", placement.host, to.host);
        return work.wait(vm_ref(vm), why);
    };
    let new = Placement {
        host: to.host.clone(),
        epoch: placement.epoch + 1,
        moving_to: None,
        ..(*placement.value).clone()
    };
    let runs = snapshot.vms.get(vm).is_some_and(|object| object.spec.running);
    let how = if runs { "restarts" } else { "has its place" };
    let reason = format!("{vm} {how} on {}, moved from {}", to.host, placement.host);
    let ended = ended(work, vm, true, &reason);
    let change = MoveStep::Restart { from: placement.host.clone(), told: told.revision };
    step(work, vm, placement, new, change, ended, reason);
}

/// Why nobody wants an attempt any more, or why its new host cannot take it.
fn unwanted(work: &Work<'_>, vm: &Name, placement: &Placement, to: &MovingTo) -> Option<String> {
    let wanted = work.snapshot.migrations.get(vm).filter(|m| m.id == to.migration);
    let Some(wanted) = wanted else {
        return Some("nobody wants it to move any more".into());
    };
    if let Some(outcome) = &wanted.outcome {
        return Some(outcome.message.clone());
    }
    if let Some(of) = wanted.drain.as_ref().filter(|of| !of.back)
        && drain::stands(work.snapshot, &placement.host).is_none_or(|now| now.id != of.drain)
    {
        return Some(format!("the drain of {} was ended", placement.host));
    }
    let object = work.snapshot.vms.get(vm);
    if let Some(disk) = object.and_then(|vm| storage::replicas::lacks(work.snapshot, vm, &to.host))
    {
        let (host, disk) = (&to.host, &disk.name);
        return Some(format!("{host} does not have all that was written to its disk `{disk}`"));
    }
    match work.states.get(&to.host) {
        Some(HostState::Online | HostState::Cordoned) => None,
        Some(state) => Some(format!("{} is {state}", to.host)),
        None => Some(format!("{} is no host of the cluster any more", to.host)),
    }
}

/// Why an attempt cannot go on.
fn broken(
    work: &Work<'_>,
    vm: &Name,
    placement: &Placement,
    to: &MovingTo,
    source: Option<&Versioned<MigrationStatus>>,
    target: Option<&Versioned<MigrationStatus>>,
) -> Option<String> {
    let failed = |told: Option<&Versioned<MigrationStatus>>| {
        told.filter(|told| told.phase == MigrationPhase::Failed).map(|told| told.message.clone())
    };
    if let Some(why) = unwanted(work, vm, placement, to) {
        return Some(why);
    }
    match work.snapshot.vms.get(vm) {
        Some(object) if object.spec.running && !object.meta.deleting => {
            // One that was taken while this began: it would be lost.
            if let Some(why) = storage::snapshots::lost_by_a_move(work.snapshot, object) {
                return Some(why);
            }
        }
        _ => return Some("it shall not run any more".into()),
    }
    if let Some(why) = failed(source) {
        return Some(why);
    }
    if let Some(why) = failed(target) {
        return Some(format!("{} could not make ready: {why}", to.host));
    }
    // A lost owner is a recovery's to judge.
    let ends = work.snapshot.told_of(vm).is_some_and(|status| status.phase != VmPhase::Running);
    (ends && work.states.get(&placement.host).is_some_and(|s| !matches!(s, HostState::Lost(_))))
        .then(|| "it does not run at the moment".into())
}

/// Begins a migration, or says why it cannot begin.
fn begin(work: &mut Work<'_>, vm: &Name, migration: &Versioned<Migration>) {
    match target(work, vm, migration) {
        Ok((placement, host, why)) => {
            if let Some(why) = work.moves.full([&placement.host, &host]) {
                return work.wait(vm_ref(vm), format!("waiting: {vm} moves later: {why}"));
            }
            let reason = format!(
                "{vm} is to move from {} to {host}, as {} asked: {why}",
                placement.host, migration.by
            );
            let way = SetOut { host, restart: false, record: None };
            set_out(work, vm, placement, migration, way, reason);
        }
        Err(Refusal::Never(why)) => {
            let message = format!("{vm} is not moved: {why}");
            let action = Action::PutMigration {
                vm: vm.clone(),
                migration: Box::new(migration.ended(work.seen.now_ms, false, message.clone())),
                expected_revision: migration.revision,
            };
            work.act(vm_ref(vm), message, action);
        }
        Err(Refusal::NotNow(why)) => work.wait(vm_ref(vm), why),
    }
}

/// How a VM sets out.
pub(crate) struct SetOut {
    /// Where to.
    pub host: Name,
    /// It is not moved live.
    pub restart: bool,
    /// The revision of the record that the migration's own replaces, when that is written with this step.
    pub record: Option<i64>,
}

/// The first step: another host makes ready, or the owner stops it.
pub(crate) fn set_out(
    work: &mut Work<'_>,
    vm: &Name,
    placement: &Versioned<Placement>,
    migration: &Migration,
    way: SetOut,
    reason: String,
) {
    let SetOut { host, restart, record } = way;
    let object = work.snapshot.vms.get(vm);
    if let Some(object) = object {
        work.room.expect(&host, object);
    }
    work.moves.add([&placement.host, &host], object.map(|object| &**object));
    let to = MovingTo {
        host,
        migration: migration.id.clone(),
        options: migration.options.clone(),
        restart,
    };
    let moving = Placement { moving_to: Some(to), ..(*placement.value).clone() };
    let record = record.map(|revision| (Box::new(migration.clone()), revision));
    step(work, vm, placement, moving, MoveStep::Begin, record, reason);
}

/// The record of a migration that Haven begins by itself, now.
pub(crate) fn record(
    work: &Work<'_>,
    placement: &Versioned<Placement>,
    vm: &Name,
    by: String,
) -> Migration {
    Migration {
        // No other write has that revision.
        id: format!("{vm}-{}", placement.revision),
        from: placement.host.clone(),
        to: None,
        options: usual_options(work.snapshot, vm),
        by,
        at_ms: work.seen.now_ms,
        drain: None,
        balances: false,
        outcome: None,
    }
}

/// The first step and the migration's record in one.
pub(crate) fn set_out_with(
    work: &mut Work<'_>,
    vm: &Name,
    placement: &Versioned<Placement>,
    migration: &Migration,
    way: SetOut,
    reason: String,
) {
    let record = Some(work.snapshot.migrations.get(vm).map_or(0, |last| last.revision));
    set_out(work, vm, placement, migration, SetOut { record, ..way }, reason);
}

/// Why a migration does not begin.
pub(crate) enum Refusal {
    /// It can never be as it was asked for.
    Never(String),
    /// It waits; the sentence begins with `waiting:`.
    NotNow(String),
}

/// Where a VM would go now.
fn target<'a>(
    work: &mut Work<'a>,
    vm: &Name,
    migration: &Migration,
) -> Result<(&'a Versioned<Placement>, Name, String), Refusal> {
    let never = |why: String| Err(Refusal::Never(why));
    let snapshot = work.snapshot;
    if migration.drain.is_some() {
        // It began with its record, so that has ended otherwise: its owner was lost.
        return never("it is not under way any more".into());
    }
    let Some(object) = snapshot.vms.get(vm).filter(|v| v.spec.running && !v.meta.deleting) else {
        return never("it shall not run".into());
    };
    let Some(placement) = snapshot.placements.get(vm) else {
        return Err(Refusal::NotNow(format!("waiting: {vm} has no host yet")));
    };
    if let Some(why) = immovable(snapshot, object) {
        return never(why);
    }
    if placement.host != migration.from {
        return never(format!("it runs on {} by now", placement.host));
    }
    if migration.to.as_ref() == Some(&placement.host) {
        return never(format!("it runs on {} already", placement.host));
    }
    if let Some(to) = migration.to.as_ref().filter(|to| !snapshot.hosts.contains_key(*to)) {
        return never(format!("there is no host `{to}`"));
    }
    if matches!(work.states.get(&placement.host), None | Some(HostState::Lost(_))) {
        return never(format!("its host {} is lost, so it starts elsewhere", placement.host));
    }
    let runs = snapshot.told_of(vm).is_some_and(|status| status.phase == VmPhase::Running);
    if !runs || placement.moving_to.is_some() {
        return Err(Refusal::NotNow(format!("waiting: {vm} moves once it runs")));
    }
    if let Some(state) = work.states.get(&placement.host).filter(|state| !state.well()) {
        return Err(Refusal::NotNow(format!(
            "waiting: {vm} moves once {} is well, which is {state}",
            placement.host
        )));
    }
    if let Some(why) = storage::replicas::returns(snapshot, object) {
        return Err(Refusal::NotNow(format!("waiting: {vm} moves later: {why}")));
    }
    let to = migration.to.as_ref();
    if let Some(why) = to.and_then(|to| unfit(snapshot, &placement.host, to)) {
        return never(why);
    }
    let may = |other: &Name| {
        to.is_none_or(|to| to == other) && unfit(snapshot, &placement.host, other).is_none()
    };
    let choice = placement::choose_other(work, object, &placement.host, &may);
    let choice = choice.map_err(Refusal::NotNow)?;
    Ok((placement, choice.host, choice.reason))
}

/// Why what runs on one host cannot go on on another one, if so: QEMU takes a guest of its own or an older version.
pub(crate) fn unfit(snapshot: &Snapshot, from: &Name, to: &Name) -> Option<String> {
    let (from_status, to_status) = (snapshot.host_status.get(from)?, snapshot.host_status.get(to)?);
    if from_status.accel != to_status.accel {
        return Some(format!(
            "{from} runs guests under {}, {to} under {}",
            from_status.accel, to_status.accel
        ));
    }
    let version = |text: &str| -> Vec<u32> {
        let digits = text.split(|c: char| !c.is_ascii_digit());
        digits.filter_map(|part| part.parse().ok()).take(3).collect()
    };
    (version(&to_status.qemu) < version(&from_status.qemu)).then(|| {
        format!("QEMU on {to} ({}) is older than on {from} ({})", to_status.qemu, from_status.qemu)
    })
}

/// How a VM is moved unless it is asked for otherwise: as its spec says, as far as all hosts can.
#[must_use]
pub fn usual_options(snapshot: &Snapshot, vm: &Name) -> MigrationOptions {
    let object = snapshot.vms.get(vm);
    let mut options = object.map(|object| object.spec.migration.clone()).unwrap_or_default();
    // A placement that says so could not be read there.
    options.postcopy &= speaks_less(snapshot, POSTCOPY).is_none();
    options
}

/// A host that does not say that it understands so much, if there is one; each of them reads each placement.
#[must_use]
pub fn speaks_less(snapshot: &Snapshot, what: u32) -> Option<&Name> {
    let less =
        |host: &&Name| snapshot.host_status.get(*host).is_none_or(|status| status.speaks < what);
    snapshot.hosts.keys().find(less)
}

/// Why a VM cannot move live as things are, if so: the other side would make another machine than the one that runs, or a
/// disk that only its host has goes along, and not every host knows of that, or it holds snapshots, which do not.
#[must_use]
pub fn immovable(snapshot: &Snapshot, vm: &Stored<VmSpec>) -> Option<String> {
    let pending = snapshot.pending_machine(&vm.meta.name);
    if snapshot.disks_change(&vm.meta.name) && pending == [DISKS] {
        let told = snapshot.told_of(&vm.meta.name).filter(|told| !told.message.is_empty());
        let why = told.map(|told| format!(" ({})", told.message)).unwrap_or_default();
        return Some(format!("its disks are being changed, and it can move after that{why}"));
    }
    if !pending.is_empty() {
        return Some(format!(
            "it was changed since it was started ({}); `haven vm reset {}` takes that up",
            pending.join(", "),
            vm.meta.name
        ));
    }
    if let Some((disk, _)) = storage::replicas::mirrored(snapshot, &vm.spec).next()
        && let Some(older) = speaks_less(snapshot, MIRRORS_MOVE)
    {
        return Some(format!(
            "its disk `{}` lives in the mirrored pool `{}`, and {older} has not said that it knows of guests that move with such a disk",
            disk.name, disk.pool
        ));
    }
    if let Some(why) = storage::snapshots::stays(snapshot, vm) {
        return Some(why);
    }
    let stays = |disk: &&DiskSpec| {
        let pool = snapshot.pools.get(&disk.pool);
        disk.detached && pool.is_some_and(|pool| pool.spec.driver == PoolDriverKind::Local)
    };
    if let Some(disk) = vm.spec.disks.iter().find(stays) {
        let (name, of) = (&disk.name, &vm.meta.name);
        return Some(format!(
            "its disk `{name}` is detached and lives in the pool `{}`, which is local to its host, so it would stay behind; `haven volume attach {of}.{name}`, or remove it (`haven volume rm {of}.{name}`)",
            disk.pool
        ));
    }
    let (disk, pool) = local_disk(snapshot, &vm.spec)?;
    let older = speaks_less(snapshot, GOES_ALONG)?;
    Some(format!(
        "its disk `{disk}` lives in the pool `{pool}`, which is local to its host, and {older} has not said that it can take such a disk along"
    ))
}

fn told<'a>(snapshot: &'a Snapshot, vm: &Name, host: &Name) -> Option<&'a MigrationStatus> {
    Some(&*snapshot.migration_status.get(vm)?.get(host)?.value)
}

/// The record of a migration that has ended with this step.
fn ended(work: &Work<'_>, vm: &Name, moved: bool, why: &str) -> Option<(Box<Migration>, i64)> {
    let migration = work.snapshot.migrations.get(vm).filter(|m| m.outcome.is_none())?;
    let ended = migration.ended(work.seen.now_ms, moved, why.to_owned());
    Some((Box::new(ended), migration.revision))
}

fn step(
    work: &mut Work<'_>,
    vm: &Name,
    old: &Versioned<Placement>,
    placement: Placement,
    step: MoveStep,
    record: Option<(Box<Migration>, i64)>,
    reason: String,
) {
    let action =
        Action::MoveVm { vm: vm.clone(), placement, expected_revision: old.revision, step, record };
    work.act(vm_ref(vm), reason, action);
}
