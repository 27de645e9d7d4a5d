//! Balancing: VMs that are moved live because their host has too much to do (docs/decisions/0019-rebalancing.md).
//!
//! A host is relieved when its VMs keep its CPUs busy ([`BUSY`]), when its work stands still for want of a CPU or of
//! memory ([`WAITS_CPU`], [`WAITS_MEMORY`]), or when it is far busier than the least busy one ([`UNEVEN`]). What moves
//! is the VM whose move relieves the busier one of the two hosts most, and it must do so by [`GAIN`]; so a move is never
//! worth taking back. One moves at a time, and what came of it is measured before the next.
//!
//! Moves that only make things even are never worth a risk: there are none while a host is silent, being emptied or being
//! recovered, and none that leaves a VM with worse neighbours or the cluster with less kept for the loss of hosts.

use crate::{
    HostState, placement,
    storage::replicas,
    tolerance::{
        admission,
        migration::{self, SetOut, immovable, unfit},
        recovery::local_disk,
    },
    work::Work,
};
use haven_model::{
    HostLoad, Name, Observations, Placement, Pressure, RebalancePolicy, Snapshot, Versioned,
    VmPhase, VmSpec,
    api::{Balance, BalancingMove, HostBalance},
    object::Stored,
    units::Millis,
};
use std::{cmp::Reverse, collections::BTreeMap, sync::Arc};

/// All in thousandths: the CPUs of a host are busy.
const BUSY: u32 = 800;
/// Work waits for a CPU for so much of the time.
const WAITS_CPU: u32 = 300;
/// Work waits for memory for so much of the time.
const WAITS_MEMORY: u32 = 100;
/// A host that is at least half busy is so much busier than another one.
const UNEVEN: u32 = 300;
/// See above.
const HALF: u32 = 500;
/// A move relieves the busier host by at least so much.
const GAIN: u32 = 100;
/// A VM that was moved for balance stays for so many windows.
const STAYS: u64 = 12;
/// The most moves that are told at once.
const MOST: usize = 10;
/// Of the moves that help most so many are looked at closely: whether all losses of hosts could still be made up for is
/// found out by placing all that they ran.
const CLOSELY: usize = 3;

/// What of a host is short.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Of {
    Cpu,
    Memory,
}

/// What is known of one host's load; all but the pressure is in thousandths of what it has.
#[derive(Clone, Debug)]
struct Load<'a> {
    host: &'a Name,
    cpu: u32,
    memory: u32,
    pressure: Pressure,
    measured: &'a HostLoad,
}

impl Load<'_> {
    fn of(&self, of: Of) -> u32 {
        match of {
            Of::Cpu => self.cpu,
            Of::Memory => self.memory,
        }
    }
}

/// A move with what it would change.
struct Better<'a> {
    vm: &'a Name,
    placement: &'a Versioned<Placement>,
    object: &'a Versioned<Stored<VmSpec>>,
    of: Of,
    to: Name,
    gain: u32,
    /// What is in use here before, and what is left, thousandths.
    before: u32,
    left: u32,
    reason: String,
}

/// Moves what should move now, if the policy is to.
pub(crate) fn plan(work: &mut Work<'_>) {
    let snapshot = work.snapshot;
    let spec = snapshot.cluster_spec();
    if spec.rebalance != RebalancePolicy::Auto || snapshot.loads.is_empty() {
        return;
    }
    let loads = loads(work);
    if loads.iter().all(|load| needs(load, &loads).is_none()) {
        return;
    }
    // What is done now, the proof of a loss say, may change all of it.
    if work.acts() || work.moves.any() || held(work).or_else(|| rests(work)).is_some() {
        return;
    }
    let Some(better) = best(work, &loads) else { return };
    let Better { vm, placement, to, reason, .. } = better;
    let mut record = migration::record(work, placement, vm, "balancing".into());
    record.to = Some(to.clone());
    record.balances = true;
    let way = SetOut { host: to, restart: false, record: None };
    migration::set_out_with(work, vm, placement, &record, way, reason);
}

/// How even the load is, and what would make it more so.
#[must_use]
pub fn balance(snapshot: &Snapshot, seen: &Observations) -> Balance {
    look(snapshot, seen, MOST)
}

/// The move that helps most, where only advice is given.
#[must_use]
pub fn advice(snapshot: &Snapshot, seen: &Observations) -> Option<BalancingMove> {
    let advises = snapshot.cluster_spec().rebalance == RebalancePolicy::Advise;
    look(snapshot, seen, usize::from(advises)).moves.into_iter().next()
}

fn look(snapshot: &Snapshot, seen: &Observations, most: usize) -> Balance {
    let work = Work::new(snapshot, seen);
    let before = loads(&work);
    let mut told = Balance {
        policy: snapshot.cluster_spec().rebalance,
        held: held(&work),
        rests: rests(&work),
        ..Balance::default()
    };
    let mut after: BTreeMap<Name, (u32, u32)> = BTreeMap::new();
    // Each further move is looked for in a world in which those before are done.
    let mut world = snapshot.clone();
    while told.moves.len() < most {
        let copy = world.clone();
        let mut work = Work::new(&copy, seen);
        let loads = loads(&work);
        for load in &loads {
            after.insert(load.host.clone(), (load.cpu, load.memory));
        }
        if loads.iter().all(|load| needs(load, &loads).is_none()) {
            break;
        }
        let Some(better) = best(&mut work, &loads) else { break };
        told.moves.push(BalancingMove {
            vm: better.vm.clone(),
            from: better.placement.host.clone(),
            to: better.to.clone(),
            reason: better.reason.clone(),
            gain: better.gain,
        });
        done(&mut world, &better);
    }
    for (host, state) in &work.states {
        if !state.well() || *state == HostState::Witness {
            continue;
        }
        let load = before.iter().find(|load| load.host == host);
        let after = after.get(host);
        told.hosts.push(HostBalance {
            host: host.clone(),
            cpu: load.map(|load| load.cpu),
            cpu_after: after.map(|after| after.0),
            memory: load.map(|load| load.memory),
            memory_after: after.map(|after| after.1),
            pressure: load.and_then(|load| load.measured.pressure),
        });
    }
    told
}

/// The world once a VM was moved: its work goes with it, and what waits at home waits less by its part.
fn done(world: &mut Snapshot, better: &Better<'_>) {
    let from = &better.placement.host;
    placed(world, better);
    let Some(of) = world.loads.get_mut(from) else { return };
    let mut load = (*of.value).clone();
    let Some(taken) = load.vms.remove(better.vm) else { return };
    if let Some(pressure) = &mut load.pressure {
        let (left, all) = (u64::from(better.left), u64::from(better.before.max(1)));
        let waits = match better.of {
            Of::Cpu => &mut pressure.cpu,
            Of::Memory => &mut pressure.memory,
        };
        *waits = u32::try_from(u64::from(*waits) * left / all).unwrap_or(*waits);
    }
    of.value = Arc::new(load);
    if let Some(of) = world.loads.get_mut(&better.to) {
        let mut load = (*of.value).clone();
        // It stays where it is once it was moved.
        load.vms.insert(better.vm.clone(), haven_model::VmLoad { over: Millis(0), ..taken });
        of.value = Arc::new(load);
    }
}

/// The loads of all hosts that take VMs and have measured them.
fn loads<'a>(work: &Work<'a>) -> Vec<Load<'a>> {
    let snapshot = work.snapshot;
    let window = snapshot.cluster_spec().rebalance_window.0;
    let mut all = Vec::new();
    if snapshot.cluster_spec().rebalance == RebalancePolicy::Off {
        return all;
    }
    for (host, measured) in &snapshot.loads {
        let open = snapshot
            .leases
            .get(host)
            .is_some_and(|lease| !lease.closed && lease.session == measured.session);
        let usable = work.states.get(host).is_some_and(|state| state.usable());
        // What changes little is told again after four windows at the latest.
        let old = work.passed_ms(measured.at_ms).is_some_and(|passed| passed > 6 * window);
        if !open || !usable || old || measured.over.0 < window / 5 * 4 {
            continue;
        }
        let Some(room) = work.room.of_host(host) else { continue };
        let (cpu, memory) = measured.vms.values().fold((0_u64, 0_u64), |(cpu, memory), vm| {
            (cpu + u64::from(vm.cpu), memory + vm.memory.0)
        });
        all.push(Load {
            host,
            cpu: thousandths(cpu, room.cpus * 1000),
            memory: thousandths(memory, room.memory),
            pressure: measured.pressure.unwrap_or_default(),
            measured,
        });
    }
    all
}

fn thousandths(part: u64, whole: u64) -> u32 {
    let of = u128::from(part) * 1000 / u128::from(whole.max(1));
    u32::try_from(of).unwrap_or(u32::MAX)
}

/// Thousandths as people read them.
fn percent(thousandths: u32) -> String {
    format!("{} %", thousandths.saturating_add(5) / 10)
}

/// Why a host should have less to do.
struct Need {
    of: Of,
    /// Its work stands still, whatever its VMs take of it.
    waits: bool,
    why: String,
}

/// Why a host should have less to do, if so.
fn needs(load: &Load<'_>, all: &[Load<'_>]) -> Option<Need> {
    let host = load.host;
    if load.pressure.memory >= WAITS_MEMORY {
        let waits = percent(load.pressure.memory);
        let why = format!("work on {host} waits for memory {waits} of the time");
        return Some(Need { of: Of::Memory, waits: true, why });
    }
    if load.cpu >= BUSY {
        let why = format!("the CPUs of {host} are {} busy", percent(load.cpu));
        return Some(Need { of: Of::Cpu, waits: false, why });
    }
    let least = all.iter().min_by_key(|other| other.cpu)?;
    if load.cpu >= HALF && load.cpu - least.cpu >= UNEVEN {
        let (busy, other) = (percent(load.cpu), percent(least.cpu));
        let why = format!("the CPUs of {host} are {busy} busy, those of {} {other}", least.host);
        return Some(Need { of: Of::Cpu, waits: false, why });
    }
    (load.pressure.cpu >= WAITS_CPU).then(|| {
        let waits = percent(load.pressure.cpu);
        let why = format!("work on {host} waits for a CPU {waits} of the time");
        Need { of: Of::Cpu, waits: true, why }
    })
}

/// Whether work would stand still on another host as well, or more than it does here.
fn as_tight(need: &Need, from: &Load<'_>, to: &Load<'_>) -> bool {
    let (here, there) = match need.of {
        Of::Cpu => (from.pressure.cpu, to.pressure.cpu),
        Of::Memory => (from.pressure.memory, to.pressure.memory),
    };
    if need.waits { there * 2 > here } else { there > here + GAIN }
}

/// Why nothing may move for balance alone.
fn held(work: &Work<'_>) -> Option<String> {
    let snapshot = work.snapshot;
    for (host, state) in &work.states {
        let busy = match state {
            HostState::Suspected | HostState::Silent(_) => true,
            HostState::Draining => true,
            HostState::Lost(_) => snapshot.placements.values().any(|p| p.host == *host),
            _ => false,
        };
        if busy {
            return Some(format!("nothing is moved for balance while {host} is {state}"));
        }
    }
    if let Some(incident) = snapshot.incidents.values().find(|of| of.closed_ms.is_none()) {
        let (number, title) = (incident.number, &incident.title);
        return Some(format!(
            "nothing is moved for balance before incident {number} is over: {title}"
        ));
    }
    if let Some((of, turn)) = snapshot.maintenance.as_ref().and_then(|of| Some((of, of.turn()?))) {
        let (work, host) = (of.work, &turn.host);
        return Some(format!(
            "nothing is moved for balance before the {work} of hosts is over; it is at {host}"
        ));
    }
    if let Some((host, _)) = snapshot.drains.iter().find(|(_, drain)| drain.bringing_back) {
        return Some(format!("nothing is moved for balance before all is back on {host}"));
    }
    if let Some(key) = snapshot.unreadable.keys().next() {
        return Some(format!(
            "nothing is moved for balance while the record {key} cannot be read by this version of Haven; update the managing host"
        ));
    }
    let moving =
        |(_, p): &(&Name, &Versioned<Placement>)| p.moving_to.is_some() || p.moved_from.is_some();
    let (vm, _) = snapshot.placements.iter().find(moving)?;
    Some(format!("nothing more is moved for balance before {vm} has arrived"))
}

/// What came of the last move, whoever made it, is measured before the next.
fn rests(work: &Work<'_>) -> Option<String> {
    let window = work.snapshot.cluster_spec().rebalance_window.0;
    let ended = |migration: &haven_model::Migration| {
        let outcome = migration.outcome.as_ref().filter(|of| migration.balances || of.moved)?;
        work.passed_ms(outcome.at_ms)
    };
    let last = work.snapshot.migrations.values().filter_map(|m| ended(m)).min()?;
    (last < window).then(|| {
        let rest = (window - last).div_ceil(1000);
        format!("what came of the last move is measured first: {rest} s more")
    })
}

/// The move that helps most.
fn best<'a>(work: &mut Work<'a>, loads: &[Load<'_>]) -> Option<Better<'a>> {
    let snapshot = work.snapshot;
    let mut found = Vec::new();
    for from in loads {
        let Some(need) = needs(from, loads) else { continue };
        let (of, why) = (need.of, &need.why);
        for (vm, takes) in &from.measured.vms {
            let Some((name, placement, object)) = movable(work, vm, from.host) else { continue };
            for to in loads.iter().filter(|to| to.host != from.host) {
                let Some((share, here)) = shares(work, of, takes, to.host, from.host) else {
                    continue;
                };
                let (before, left) = (from.of(of), from.of(of).saturating_sub(here));
                let there = to.of(of) + share;
                let gain = before.max(to.of(of)).saturating_sub(left.max(there));
                // What relieves it of one thing must not make the other host short of another.
                let (cpu, _) = shares(work, Of::Cpu, takes, to.host, from.host).unwrap_or_default();
                if as_tight(&need, from, to)
                    || of == Of::Memory && to.cpu + cpu >= BUSY
                    || gain < GAIN
                    || unfit(snapshot, from.host, to.host).is_some()
                {
                    continue;
                }
                let what = match of {
                    Of::Cpu => "CPUs",
                    Of::Memory => "memory",
                };
                let (here, other) = (from.host, to.host);
                let reason = format!(
                    "{vm} is to move from {here} to {other} for balance: {why}; then {} of the {what} of {here} and {} of those of {other} are in use, where it is {} and {} now",
                    percent(left),
                    percent(there),
                    percent(before),
                    percent(to.of(of)),
                );
                let to = other.clone();
                let better =
                    Better { vm: name, placement, object, of, to, gain, before, left, reason };
                // Of two moves that help alike the one to the emptier host, then that of the smaller VM.
                found.push(((gain, Reverse(there), Reverse(object.spec.memory)), better));
            }
        }
    }
    if found.is_empty() {
        return None;
    }
    // The stable order leaves the first by name where all else is equal.
    found.sort_by_key(|(score, _)| Reverse(*score));
    let kept = admission::losses(snapshot, work.seen).vms;
    let mut closely = 0;
    for (_, better) in found {
        let from = &better.placement.host;
        if placement::no_worse(work, better.object, from, &better.to).is_err() {
            continue;
        }
        if keeps_reserve(work, &better, kept) {
            return Some(better);
        }
        closely += 1;
        if closely == CLOSELY {
            break;
        }
    }
    None
}

/// What a VM's work is of two hosts, thousandths.
fn shares(
    work: &Work<'_>,
    of: Of,
    takes: &haven_model::VmLoad,
    there: &Name,
    here: &Name,
) -> Option<(u32, u32)> {
    let share = |host: &Name| {
        let room = work.room.of_host(host)?;
        Some(match of {
            Of::Cpu => thousandths(u64::from(takes.cpu), room.cpus * 1000),
            Of::Memory => thousandths(takes.memory.0, room.memory),
        })
    };
    Some((share(there)?, share(here)?))
}

/// A VM with its records.
type Found<'a> = (&'a Name, &'a Versioned<Placement>, &'a Versioned<Stored<VmSpec>>);

/// A VM that may be moved away from a host for balance.
fn movable<'a>(work: &Work<'a>, vm: &Name, host: &Name) -> Option<Found<'a>> {
    let snapshot = work.snapshot;
    let (name, placement) = snapshot.placements.get_key_value(vm)?;
    let object = snapshot.vms.get(vm)?;
    let runs = snapshot.told_of(vm).is_some_and(|told| told.phase == VmPhase::Running);
    let wanted = object.spec.running
        && !object.meta.deleting
        && immovable(snapshot, object).is_none()
        && replicas::returns(snapshot, object).is_none();
    let well = object.spec.check.is_none()
        || snapshot.told_of(vm).is_some_and(|told| told.ready == Some(true));
    let window = snapshot.cluster_spec().rebalance_window.0;
    let known = snapshot.loads.get(host)?.vms.get(vm)?.over.0 >= window / 5 * 4;
    let last = snapshot.migrations.get(vm);
    let moves = last.is_some_and(|last| last.outcome.is_none());
    let stays = last.filter(|last| last.balances).and_then(|last| last.outcome.as_ref());
    let stays = stays.is_some_and(|outcome| {
        work.passed_ms(outcome.at_ms).is_some_and(|passed| passed < STAYS * window)
    });
    let may = placement.host == *host
        && placement.moving_to.is_none()
        && placement.moved_from.is_none()
        && (runs && wanted && well && known)
        && !(moves || stays)
        // A disk that goes along costs more than balance is worth.
        && local_disk(snapshot, &object.spec).is_none();
    may.then_some((name, placement, object))
}

/// The VM is on its new host.
fn placed(world: &mut Snapshot, better: &Better<'_>) {
    let placement = Placement { host: better.to.clone(), ..(*better.placement.value).clone() };
    let moved = Versioned { revision: better.placement.revision, value: Arc::new(placement) };
    world.placements.insert(better.vm.clone(), moved);
}

/// Whether as many losses of hosts can be made up for once a VM is moved.
fn keeps_reserve(work: &Work<'_>, better: &Better<'_>, kept: usize) -> bool {
    let mut world = work.snapshot.clone();
    placed(&mut world, better);
    admission::losses(&world, work.seen).vms >= kept
}
