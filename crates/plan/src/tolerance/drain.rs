//! Planned work: everything leaves a host that is drained, and comes back if asked (docs/decisions/0012-planned-work.md).
//!
//! ```text
//!   VM on a drained host ─► runs, and may move live ────► a live migration, begun with its record in one step (with a
//!                        │                                mirrored disk, a restart elsewhere after three in vain)
//!                        ├► does not run, or runs where nothing newer can take it ─► stopped by its owner, then placed
//!                        │                                                            elsewhere, where it starts if it shall
//!                        ├► a service's member that cannot move ─► its service makes another one, and it goes (balance)
//!                        └► has a disk that is only there ─► stays, and says so
//! ```
//!
//! Nothing is remembered here: the drain is a record, and each VM's last migration says whether it is of that drain, how
//! often it failed, and where it went. So a host that dies, or another manager, changes nothing about it.

use crate::{
    HostState, host_states, placement, plan as plan_all,
    storage::replicas,
    tolerance::{
        migration::{self, SetOut, immovable, set_out_with, unfit},
        recovery::bound_by,
    },
    work::{Work, host_ref, service_ref, vm_ref},
};
use haven_model::{
    Action, Drain, DrainMove, Migration, MoveLimits, Name, Observations, Placement, Snapshot,
    Versioned, VmPhase, VmSpec,
    api::{DrainLeft, DrainView},
    object::Stored,
    vm::RestartPolicy,
};
use std::{cmp::Reverse, collections::BTreeMap};

/// The pause after a move that failed, milliseconds; doubled with each further one.
const AGAIN_MS: u64 = 5_000;
/// The longest such pause, milliseconds.
const AGAIN_AT_MOST_MS: u64 = 300_000;
/// So often a VM with a mirrored disk is moved live in vain before it is restarted elsewhere.
const LIVE_TRIES: u32 = 3;
/// So often it is tried to bring a VM back.
const BACK_TRIES: u32 = 3;

/// The drain of a host, unless it was ended.
#[must_use]
pub fn stands<'a>(snapshot: &'a Snapshot, host: &Name) -> Option<&'a Versioned<Drain>> {
    snapshot.drains.get(host).filter(|drain| !drain.bringing_back)
}

/// The VMs that keep a host from being empty: those that run there, may be started there, or have a copy there.
pub fn left<'a>(snapshot: &'a Snapshot, host: &'a Name) -> impl Iterator<Item = &'a Name> {
    let there = move |(vm, placement): &(&'a Name, &'a Versioned<Placement>)| {
        placement.hosts().any(|of| of == host) && (placement.host != *host || !rests(snapshot, vm))
    };
    snapshot.placements.iter().filter(there).map(|(vm, _)| vm)
}

/// Whether a host was drained and nothing of anybody's is on it: nothing is to be recovered from it.
pub fn emptied(snapshot: &Snapshot, host: &Name) -> bool {
    stands(snapshot, host).is_some()
        && left(snapshot, host).next().is_none()
        && held(snapshot, host).next().is_none()
        && snapshot.unreadable_under("placement/").is_none()
}

/// The services whose addresses a host holds.
pub fn held<'a>(snapshot: &'a Snapshot, host: &'a Name) -> impl Iterator<Item = &'a Name> {
    let held = snapshot.frontends.iter().filter(move |(_, frontend)| frontend.holder == *host);
    held.map(|(service, _)| service)
}

/// Whether a VM has ended and is left so by its restart policy.
pub(crate) fn left_ended(snapshot: &Snapshot, vm: &Name) -> bool {
    rests(snapshot, vm)
}

/// Whether a VM does not run on its host, and shall not be started there by itself.
fn rests(snapshot: &Snapshot, vm: &Name) -> bool {
    let Some(object) = snapshot.vms.get(vm) else { return false };
    let phase = snapshot.told_of(vm).map(|status| status.phase);
    if object.spec.running && !object.meta.deleting {
        phase == Some(VmPhase::Stopped) && object.spec.restart != RestartPolicy::Always
    } else {
        matches!(phase, None | Some(VmPhase::Stopped | VmPhase::Failed))
    }
}

/// How a VM leaves a host.
enum Way {
    /// Moved while it runs.
    Live,
    /// Its owner stops it, if it runs, and it has its place elsewhere.
    Restart,
    /// Its service makes another one.
    Replaced,
    /// It ended by itself and is left so, or is about to end.
    Left,
    /// It cannot; why, in words.
    Stays(String),
}

fn way(snapshot: &Snapshot, vm: &Name, object: &Stored<VmSpec>, host: &Name) -> Way {
    if object.meta.deleting {
        return Way::Left;
    }
    if is_replaced(snapshot, object, host) {
        return Way::Replaced;
    }
    let phase = snapshot.told_of(vm).map(|status| status.phase);
    let bound = bound_by(snapshot, object);
    let live = phase == Some(VmPhase::Running)
        && object.spec.running
        && immovable(snapshot, object).is_none()
        && fits_nowhere(snapshot, host).is_none();
    match phase {
        // It takes its disk along while it runs, and only then.
        _ if live => Way::Live,
        // What it has open by now may live on this host alone, whatever it is to have at its next start.
        Some(VmPhase::Running)
            if (bound.is_some() || disks_changed(snapshot, vm))
                && let Some(why) = immovable(snapshot, object) =>
        {
            Way::Stays(why)
        }
        _ if let Some((disk, pool)) = bound => Way::Stays(format!(
            "its disk `{disk}` lives in the local pool `{pool}` and goes along only while it runs"
        )),
        Some(VmPhase::Stopping) => Way::Left,
        Some(VmPhase::Running) if !object.spec.running => Way::Left,
        _ if object.spec.running && rests(snapshot, vm) => Way::Left,
        _ => Way::Restart,
    }
}

/// Whether a VM that runs has other disks than it is to have at its next start.
fn disks_changed(snapshot: &Snapshot, vm: &Name) -> bool {
    snapshot.pending_machine(vm).iter().any(|part| part == "disks")
}

/// Whether a VM on a host that is drained is a member of a service and cannot move: another one takes its place.
#[must_use]
pub fn is_replaced(snapshot: &Snapshot, vm: &Stored<VmSpec>, host: &Name) -> bool {
    let member = service_of(vm).is_some();
    let drained = stands(snapshot, host).is_some();
    member
        && drained
        && (immovable(snapshot, vm).is_some() || fits_nowhere(snapshot, host).is_some())
}

/// Why nothing that runs on a host can go on anywhere else, if so: there are other hosts, and each runs guests another
/// way or by an older QEMU.
#[must_use]
pub fn fits_nowhere(snapshot: &Snapshot, host: &Name) -> Option<String> {
    let others = snapshot.hosts.iter().filter(|(other, object)| {
        *other != host
            && !object.spec.cordoned
            && !object.spec.witness
            && snapshot.session_open(other)
            && snapshot.host_status.contains_key(*other)
            && stands(snapshot, other).is_none()
    });
    let mut why = None;
    for (other, _) in others {
        why = Some(unfit(snapshot, host, other)?);
    }
    why
}

/// Moves that are under way, against the limits of the cluster.
pub struct Moves {
    limits: MoveLimits,
    all: u32,
    hosts: BTreeMap<Name, u32>,
    /// Members of each service, also those that have moved and did not answer since.
    members: BTreeMap<Name, u32>,
}

impl Moves {
    /// Those that the store has.
    #[must_use]
    pub fn of(snapshot: &Snapshot) -> Self {
        let limits = snapshot.cluster_spec().moves.clone();
        let mut moves = Self { limits, all: 0, hosts: BTreeMap::new(), members: BTreeMap::new() };
        for (vm, placement) in &snapshot.placements {
            let to = placement.moving_to.iter().map(|to| &to.host);
            let other = to.chain(placement.moved_from.iter().map(|from| &from.host)).next();
            if let Some(other) = other {
                moves.add([&placement.host, other], snapshot.vms.get(vm).map(|vm| &**vm));
            } else if snapshot.told_of(vm).is_some_and(|told| told.unproven) {
                moves.count_member(snapshot.vms.get(vm).map(|vm| &**vm));
            }
        }
        moves
    }

    /// Whether any is under way, or begins with this plan.
    #[must_use]
    pub fn any(&self) -> bool {
        self.all > 0
    }

    /// One more.
    pub fn add(&mut self, hosts: [&Name; 2], vm: Option<&Stored<VmSpec>>) {
        self.all += 1;
        self.count_member(vm);
        for host in hosts {
            *self.hosts.entry(host.clone()).or_default() += 1;
        }
    }

    fn count_member(&mut self, vm: Option<&Stored<VmSpec>>) {
        if let Some(service) = vm.and_then(service_of) {
            *self.members.entry(service.clone()).or_default() += 1;
        }
    }

    /// Why no other one may begin now between these hosts, if so.
    #[must_use]
    pub fn full<'n>(&self, hosts: impl IntoIterator<Item = &'n Name>) -> Option<String> {
        let MoveLimits { per_host, cluster } = self.limits;
        if self.all >= cluster {
            return Some(format!("{} VMs are being moved (moves.cluster is {cluster})", self.all));
        }
        let busy = |host: &&Name| self.hosts.get(*host).copied().unwrap_or(0) >= per_host;
        let host = hosts.into_iter().find(busy)?;
        Some(format!("{host} has a part in enough moves now (moves.perHost is {per_host})"))
    }

    /// Why this VM may not move now, if so: a replica of its disk is being copied to, or as many members of its service move as
    /// may be missing, and at least one may. One that moves stands still for a moment, and its balancer gives it nothing
    /// meanwhile.
    #[must_use]
    pub fn enough(&self, snapshot: &Snapshot, vm: &Stored<VmSpec>) -> Option<String> {
        if let Some(why) = replicas::returns(snapshot, vm) {
            return Some(why);
        }
        let service = service_of(vm)?;
        let update = snapshot.services.get(service).map(|service| &service.spec.update);
        let most = update.map_or(1, |update| update.max_unavailable.max(1));
        let moving = self.members.get(service).copied().unwrap_or(0);
        let moving_now = if moving == 1 { "member of" } else { "members of" };
        let verb = if moving == 1 { "moves" } else { "move" };
        (moving >= most)
            .then(|| format!("{moving} {moving_now} service/{service} {verb} now, and no more may"))
    }
}

fn service_of(vm: &Stored<VmSpec>) -> Option<&Name> {
    vm.meta.member_of().map(|service| &service.name)
}

/// Takes every drain one step further.
pub(crate) fn plan(work: &mut Work<'_>) {
    let snapshot = work.snapshot;
    for (host, drain) in &snapshot.drains {
        if drain.bringing_back {
            bring_back(work, host, drain);
        } else {
            empty(work, host, drain);
        }
    }
}

fn empty(work: &mut Work<'_>, host: &Name, drain: &Versioned<Drain>) {
    let state = work.states.get(host).copied();
    if !matches!(state, Some(HostState::Draining | HostState::Drained)) {
        // What is lost is a recovery's, and who is silent can send nothing.
        return;
    }
    let snapshot = work.snapshot;
    let mut vms: Vec<_> = snapshot
        .placements
        .iter()
        .filter(|(_, p)| p.host == *host && p.moving_to.is_none() && p.moved_from.is_none())
        .filter_map(|(vm, placement)| Some((vm, placement, snapshot.vms.get(vm)?)))
        .collect();
    // The largest first, as long as there is one large room. What does not run comes last.
    vms.sort_by_key(|(vm, _, object)| (rests(snapshot, vm), Reverse(object.spec.memory), *vm));
    for (vm, placement, object) in vms {
        leave(work, drain, vm, placement, object);
    }
    if state == Some(HostState::Drained) && drain.drained_ms.is_none() {
        let now = Drain { drained_ms: Some(work.seen.now_ms), ..(*drain.value).clone() };
        let action = Action::PutDrain {
            host: host.clone(),
            drain: Some(now),
            expected_revision: drain.revision,
        };
        work.act(host_ref(host), format!("{host} is drained: no VM runs there any more"), action);
    }
}

/// Lets one VM set out, or says why it does not.
fn leave<'a>(
    work: &mut Work<'a>,
    drain: &Drain,
    vm: &'a Name,
    placement: &Versioned<Placement>,
    object: &'a Versioned<Stored<VmSpec>>,
) {
    let snapshot = work.snapshot;
    let host = &placement.host;
    let restart = match way(snapshot, vm, object, host) {
        Way::Live => false,
        Way::Restart => true,
        // Its service says how that stands.
        Way::Replaced | Way::Left => return,
        Way::Stays(_) if rests(snapshot, vm) => return,
        Way::Stays(why) => {
            let why =
                format!("waiting: {vm} keeps {host} from being drained: {why}; stop or delete it");
            return work.wait(vm_ref(vm), why);
        }
    };
    let failed = match tried(work, vm, drain, false) {
        Ok(failed) => failed,
        Err(why) => return work.wait(vm_ref(vm), why),
    };
    // One that does not come over although its host tries: its disk there may be dead, and another replica has all.
    // With one that only its host has it would begin anew elsewhere, empty.
    let bound = bound_by(snapshot, object).is_some();
    let mirrored = replicas::is_mirrored(snapshot, &object.spec) && !bound;
    let tired = !restart && failed >= LIVE_TRIES && mirrored;
    let restart = restart || tired;
    let fits = |other: &Name| restart || unfit(snapshot, host, other).is_none();
    let (to, why) = match room(work, object, host, &fits) {
        Ok(choice) => choice,
        Err(why) => return work.wait(vm_ref(vm), why),
    };
    let runs = snapshot.told_of(vm).is_some_and(|told| told.phase == VmPhase::Running);
    let live = || immovable(snapshot, object).filter(|_| runs);
    let how = match (restart, live().or_else(|| fits_nowhere(snapshot, host))) {
        _ if tired => "restarts, because it could not be moved while it runs, and moves".to_owned(),
        (true, Some(unfit)) if object.spec.running => {
            format!("restarts, because {unfit}, and moves")
        }
        _ => "is to move".into(),
    };
    let reason = format!("{vm} {how} from {host} to {to}, because {host} is drained: {why}");
    let migration = Migration {
        to: Some(to.clone()),
        drain: Some(DrainMove { drain: drain.id.clone(), failed, back: false }),
        ..migration::record(work, placement, vm, format!("the drain of {host}"))
    };
    let way = SetOut { host: to, restart, record: None };
    set_out_with(work, vm, placement, &migration, way, reason);
}

/// How often this drain has tried to move a VM in vain.
///
/// # Errors
/// Why it is not tried now: a person's move comes first, and after one that failed there is a pause.
fn tried(work: &mut Work<'_>, vm: &Name, drain: &Drain, back: bool) -> Result<u32, String> {
    if work.snapshot.unreadable.contains_key(&format!("migrations/{vm}")) {
        return Err(format!(
            "waiting: {vm} stays where it is, because the record migrations/{vm} cannot be read by this version of Haven; update the managing host"
        ));
    }
    let Some(last) = work.snapshot.migrations.get(vm) else { return Ok(0) };
    let Some(outcome) = &last.outcome else {
        let by = &last.by;
        return Err(format!(
            "waiting: {vm} first moves as {by} asked; `haven vm migrate {vm} --cancel` takes that back"
        ));
    };
    let ours = last.drain.as_ref().filter(|of| of.drain == drain.id && of.back == back);
    let Some(of) = ours.filter(|_| !outcome.moved) else { return Ok(0) };
    let pause = (AGAIN_MS << of.failed.min(10)).min(AGAIN_AT_MOST_MS);
    if let Some(passed) = work.passed_ms(outcome.at_ms).filter(|passed| *passed < pause) {
        work.wake(pause - passed);
        let seconds = (pause - passed).div_ceil(1000);
        return Err(format!("waiting: {vm} is moved again in {seconds} s: {}", outcome.message));
    }
    Ok(of.failed.saturating_add(1))
}

/// Where a VM goes now, among the hosts that fit.
///
/// # Errors
/// A sentence: it has no room anywhere, or waits for its turn.
fn room<'a>(
    work: &mut Work<'a>,
    object: &'a Stored<VmSpec>,
    host: &Name,
    fits: &dyn Fn(&Name) -> bool,
) -> Result<(Name, String), String> {
    let vm = &object.meta.name;
    let turn = |why: String| format!("waiting: {vm} leaves {host} later: {why}");
    if let Some(why) = work.moves.full([host]).or(work.moves.enough(work.snapshot, object)) {
        return Err(turn(why));
    }
    let busy: Vec<Name> =
        work.states.keys().filter(|h| work.moves.full([*h]).is_some()).cloned().collect();
    let may = |other: &Name| fits(other) && !busy.contains(other);
    let now = placement::choose_other(work, object, host, &may);
    let choice = now.map_err(|_| {
        // There may be room on a host that has a part in enough moves.
        match placement::choose_other(work, object, host, fits) {
            Ok(_) => turn(format!(
                "every host with room for it has a part in enough moves now (moves.perHost is {})",
                work.snapshot.cluster_spec().moves.per_host
            )),
            Err(all) => format!("{all}; it stays on {host}, which is drained"),
        }
    })?;
    Ok((choice.host, choice.reason))
}

/// Brings back what a drain had moved and what is still where that put it; then the drain is forgotten.
fn bring_back(work: &mut Work<'_>, host: &Name, drain: &Versioned<Drain>) {
    let snapshot = work.snapshot;
    let (mut going, mut stay) = (false, Vec::new());
    for (vm, last) in &snapshot.migrations {
        let Some(of) = last.drain.as_ref().filter(|of| of.drain == drain.id) else { continue };
        let Some(placement) = snapshot.placements.get(vm) else { continue };
        let Some(outcome) = &last.outcome else {
            going = true;
            continue;
        };
        let away = match (of.back, outcome.moved) {
            (false, true) => last.to.as_ref() == Some(&placement.host),
            (true, false) => last.from == placement.host && of.failed + 1 < BACK_TRIES,
            _ => false,
        };
        let object = snapshot.vms.get(vm).filter(|vm| vm.spec.running && !vm.meta.deleting);
        let Some(object) = object.filter(|_| away && placement.host != *host) else { continue };
        if let Some(why) = unfit(snapshot, &placement.host, host) {
            work.wait(vm_ref(vm), format!("{vm} stays on {}: {why}", placement.host));
            continue;
        }
        match come_back(work, (host, drain), vm, placement, object) {
            Ok(()) => going = true,
            Err(Stays::ForNow(why)) => {
                going = true;
                work.wait(vm_ref(vm), why);
            }
            Err(Stays::AsItIs(why)) => {
                stay.push(format!("{vm} ({why})"));
                work.wait(vm_ref(vm), why);
            }
        }
    }
    // What has no place there once nothing else is on its way back stays: nobody waits for ever for room.
    if !going {
        let mut reason =
            format!("all that the drain of {host} had moved and that could come back is back");
        if !stay.is_empty() {
            reason += &format!("; what has no place there now stays: {}", stay.join(", "));
        }
        let action =
            Action::PutDrain { host: host.clone(), drain: None, expected_revision: drain.revision };
        work.act(host_ref(host), reason, action);
    }
}

/// Why a VM does not come back now.
enum Stays {
    /// It may a little later.
    ForNow(String),
    /// It has no place there as things are.
    AsItIs(String),
}

fn come_back<'a>(
    work: &mut Work<'a>,
    (host, drain): (&Name, &Drain),
    vm: &'a Name,
    placement: &Versioned<Placement>,
    object: &'a Versioned<Stored<VmSpec>>,
) -> Result<(), Stays> {
    let from = &placement.host;
    let running = work.snapshot.told_of(vm).is_some_and(|told| told.phase == VmPhase::Running);
    let well = work.states.get(from).is_some_and(|state| state.well());
    if !running || !well || placement.moving_to.is_some() || placement.moved_from.is_some() {
        let why = format!("waiting: {vm} comes back to {host} once it runs on {from} undisturbed");
        return Err(Stays::ForNow(why));
    }
    if let Some(why) = immovable(work.snapshot, object) {
        return Err(Stays::AsItIs(why));
    }
    let failed = tried(work, vm, drain, true).map_err(Stays::ForNow)?;
    if let Some(why) = work.moves.full([from, host]).or(work.moves.enough(work.snapshot, object)) {
        let why = format!("waiting: {vm} comes back to {host} later: {why}");
        return Err(Stays::ForNow(why));
    }
    let choice = placement::choose_other(work, object, from, &|other| other == host)
        .map_err(Stays::AsItIs)?;
    let reason =
        format!("{vm} comes back from {from} to {host}, whose drain was ended: {}", choice.reason);
    let migration = Migration {
        to: Some(host.clone()),
        drain: Some(DrainMove { drain: drain.id.clone(), failed, back: true }),
        ..migration::record(work, placement, vm, format!("the end of the drain of {host}"))
    };
    let way = SetOut { host: host.clone(), restart: false, record: None };
    set_out_with(work, vm, placement, &migration, way, reason);
    Ok(())
}

/// How the drain of a host stands, from the same code that decides.
#[must_use]
pub fn view(snapshot: &Snapshot, seen: &Observations, host: &Name) -> DrainView {
    let states = host_states(snapshot, seen);
    let plan = plan_all(snapshot, seen);
    let why = |vm: &Name| {
        let object = vm_ref(vm);
        let waits = plan.waiting.iter().find(|w| w.object == object).map(|w| w.reason.clone());
        let next = || plan.actions.iter().find(|a| a.object == object).map(|a| a.reason.clone());
        waits.or_else(next).unwrap_or_else(|| format!("{vm} is about to leave"))
    };
    let line = |vm: &Name| {
        let placement = snapshot.placements.get(vm);
        let to = placement.and_then(|p| {
            let gone = p.moved_from.as_ref().map(|_| &p.host);
            p.moving_to.as_ref().map(|to| &to.host).or(gone).cloned()
        });
        DrainLeft { vm: vm.clone(), to, why: why(vm) }
    };
    let address = |service: &Name| {
        let object = service_ref(service);
        let waits =
            plan.waiting.iter().find(|w| w.object == object && w.reason.contains("drained"));
        waits.map_or_else(
            || format!("the address of {service} is about to leave"),
            |waits| waits.reason.clone(),
        )
    };
    let drain = snapshot.drains.get(host);
    let of = |migration: &Migration| {
        let of = migration.drain.as_ref()?;
        drain.is_some_and(|drain| drain.id == of.drain).then_some(of.back)
    };
    let moved = snapshot.migrations.iter().filter(|(_, m)| {
        of(m) == Some(false) && m.outcome.as_ref().is_some_and(|outcome| outcome.moved)
    });
    let elsewhere = |vm: &&Name| snapshot.placements.get(*vm).is_some_and(|p| p.host != *host);
    let moved: Vec<Name> = moved.map(|(vm, _)| vm).filter(elsewhere).cloned().collect();
    let returns = drain.is_some_and(|drain| drain.bringing_back);
    let coming = snapshot.migrations.iter().filter(|(_, m)| of(m) == Some(true)).map(|(vm, _)| vm);
    let away = moved.iter().chain(coming.filter(elsewhere)).filter(|_| returns);
    let resting =
        snapshot.placements.iter().filter(|(vm, p)| p.host == *host && rests(snapshot, vm));
    DrainView {
        state: states.get(host).map(ToString::to_string).unwrap_or_default(),
        drain: drain.map(|drain| (*drain.value).clone()),
        left: left(snapshot, host).map(line).collect(),
        addresses: held(snapshot, host).map(address).collect(),
        away: away.map(line).collect(),
        moved,
        resting: resting.map(|(vm, _)| vm.clone()).collect(),
        quorum: costs_quorum(snapshot, &states, host),
    }
}

/// Whether a host that runs a member of the store could not be spared now: the others that answer would be no majority.
#[must_use]
pub fn costs_quorum(
    snapshot: &Snapshot,
    states: &BTreeMap<Name, HostState>,
    host: &Name,
) -> Option<String> {
    let votes = |name: &&Name| {
        snapshot.host_status.get(*name).is_some_and(|status| status.etcd_member.is_some())
    };
    let answers = |name: &&Name| {
        let silent = snapshot.host_status.get(*name).is_none_or(|status| status.etcd_silent);
        !silent && states.get(*name).is_some_and(|state| state.well())
    };
    snapshot.hosts.keys().find(|name| *name == host).filter(votes)?;
    let all = snapshot.hosts.keys().filter(votes).count();
    let others = snapshot.hosts.keys().filter(votes).filter(|name| *name != host);
    let left = others.filter(answers).count();
    (left < all / 2 + 1).then(|| {
        format!(
            "{host} runs one of {all} members of the store, and without it {left} would answer, fewer than the {} it needs: a reboot of {host} would stop the cluster's management",
            all / 2 + 1
        )
    })
}
