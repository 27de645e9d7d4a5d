//! Restarts and upgrades of hosts, one after another: when the next step is taken, and when it all stops
//! (docs/decisions/0020-rolling-work.md).
//!
//! Each step rests on what is seen and on nothing that is remembered elsewhere. A host that is worked on is drained first,
//! by the same record and code as `haven host drain`, so all that may not happen to a VM in a drain may not here.

use crate::{
    HostState,
    tolerance::drain,
    work::{Work, host_ref},
};
use haven_model::{
    Action, Drain, HostStatus, Maintenance, Name, Snapshot, Versioned, VmPhase,
    maintenance::{Phase, Turn, Work as What, WorkState},
};

/// A doubt may last so long before all of it stops, milliseconds: a VM that starts again, say.
const PATIENCE_MS: u64 = 120_000;
/// So long a host may take to become empty, to be worked on, or to get back what it had.
const LONGEST_MS: u64 = 1_800_000;
/// A host must be well at the end of this time after its work.
const SETTLES_MS: u64 = 10_000;
/// It may take so long to be well.
const UNWELL_MS: u64 = 300_000;

/// All hosts that run VMs in the order in which they have their turn: the one that manages comes last. A witness is left out: other
/// clusters may rest on the same machine.
#[must_use]
pub fn in_turn(snapshot: &Snapshot) -> Vec<Name> {
    let manager = snapshot.manager.as_ref().map(|manager| &manager.holder);
    let run_vms = snapshot.hosts.iter().filter(|(_, host)| !host.spec.witness);
    let mut hosts: Vec<Name> = run_vms.map(|(host, _)| host.clone()).collect();
    hosts.sort_by_key(|host| Some(host) == manager);
    hosts
}

/// The record once a person lets it go on after it has stopped, and whether the host begins its work anew: work that failed,
/// or never began. What is done by now is not done twice, and what is under way is waited for again. What is wrong with a
/// host that is back need not get better: whoever says so has looked.
#[must_use]
pub fn resumed(snapshot: &Snapshot, of: &Maintenance, now_ms: i64) -> (Maintenance, bool) {
    let mut next = Maintenance { stopped: None, ..of.clone() };
    let Some(turn) = next.hosts.iter_mut().find(|turn| turn.phase != Phase::Done) else {
        return (next, false);
    };
    turn.since_ms = now_ms;
    let status = snapshot.host_status.get(&turn.host);
    match turn.phase {
        Phase::Working => {
            let told =
                snapshot.work_status.get(&turn.host).filter(|told| told.maintenance == of.id);
            let booted = status.is_some_and(|status| status.boot_id != turn.boot_id);
            let done = match of.work {
                What::Reboot => booted,
                What::Upgrade => told.is_some_and(|told| told.state == WorkState::Done),
            };
            if done {
                turn.phase = Phase::Settling;
            } else if told.is_none_or(|told| told.state != WorkState::Begun) {
                turn.phase = Phase::Draining;
                return (next, true);
            }
        }
        Phase::Settling | Phase::Returning => {
            turn.problems = status.map(|status| status.problems.clone()).unwrap_or_default();
            turn.voted = status.is_some_and(|status| status.etcd_member.is_some());
        }
        _ => {}
    }
    (next, false)
}

/// Takes it one step further.
pub(crate) fn plan(work: &mut Work<'_>) {
    let Some(of) = &work.snapshot.maintenance else { return };
    let Some(turn) = of.turn() else { return };
    let host = &turn.host;
    if let Some(why) = &of.stopped {
        let hint = "`haven host maintenance --resume` goes on, `--end` ends it";
        return work
            .wait(host_ref(host), format!("waiting: the {} stopped: {why}; {hint}", of.work));
    }
    if !work.snapshot.hosts.contains_key(host) {
        let reason = format!("{host} is no host of the cluster any more: the {} goes on", of.work);
        return go(work, of, Phase::Done, reason);
    }
    match turn.phase {
        Phase::Waiting => begin(work, of, turn),
        Phase::Draining => empty(work, of, turn),
        Phase::Working => worked(work, of, turn),
        Phase::Settling => settle(work, of, turn),
        Phase::Returning => give_back(work, of, turn),
        Phase::Done => {}
    }
}

/// How long a turn has been in its phase, milliseconds.
fn since(work: &Work<'_>, turn: &Turn) -> u64 {
    work.passed_ms(turn.since_ms).unwrap_or(0)
}

/// Writes the turn's next phase; with the last one's end all of it is over.
fn go(work: &mut Work<'_>, of: &Versioned<Maintenance>, phase: Phase, reason: String) {
    let now = work.seen.now_ms;
    let mut next = (*of.value).clone();
    let Some(turn) = next.hosts.iter_mut().find(|turn| turn.phase != Phase::Done) else { return };
    turn.phase = phase;
    turn.since_ms = now;
    if phase == Phase::Working {
        let status = work.snapshot.host_status.get(&turn.host);
        let status = status.map(|status| (*status.value).clone()).unwrap_or_default();
        turn.boot_id = status.boot_id;
        turn.version = status.version;
        turn.problems = status.problems;
        turn.voted = status.etcd_member.is_some();
    }
    if next.hosts.iter().all(|turn| turn.phase == Phase::Done) {
        next.ended_ms = Some(now);
    } else if phase == Phase::Done
        && let Some(turn) = next.hosts.iter_mut().find(|turn| turn.phase != Phase::Done)
    {
        turn.since_ms = now;
    }
    put(work, of, next, reason);
}

fn put(work: &mut Work<'_>, of: &Versioned<Maintenance>, next: Maintenance, reason: String) {
    let host = of.turn().map(|turn| host_ref(&turn.host));
    let Some(host) = host else { return };
    let (maintenance, expected_revision) = (Box::new(next), of.revision);
    work.act(host, reason, Action::PutMaintenance { maintenance, expected_revision });
}

fn stop(work: &mut Work<'_>, of: &Versioned<Maintenance>, why: String) {
    let next = Maintenance { stopped: Some(why.clone()), ..(*of.value).clone() };
    put(work, of, next, format!("the {} of hosts stops: {why}", of.work));
}

/// Waits, or stops when that has lasted for too long.
fn wait_or_stop(
    work: &mut Work<'_>,
    of: &Versioned<Maintenance>,
    turn: &Turn,
    why: String,
    most: u64,
) {
    let passed = since(work, turn);
    if passed >= most {
        let after = passed / 1000;
        return stop(work, of, format!("{why} ({after} s after {} was at that step)", turn.host));
    }
    work.wake(most - passed);
    work.wait(host_ref(&turn.host), format!("waiting: {why}"));
}

/// Why no host should be taken away now.
fn doubt(work: &Work<'_>, host: &Name) -> Option<String> {
    let snapshot = work.snapshot;
    let unwell = work.states.iter().find(|(other, state)| *other != host && !state.well());
    if let Some((other, state)) = unwell {
        return Some(format!("{other} is {state}"));
    }
    if let Some(state) = work.states.get(host).filter(|state| !state.well()) {
        return Some(format!("{host} is {state}"));
    }
    if let Some(incident) = snapshot.incidents.values().find(|of| of.closed_ms.is_none()) {
        return Some(format!("incident {} is not over: {}", incident.number, incident.title));
    }
    let ends =
        |(vm, object): &(&Name, &Versioned<haven_model::object::Stored<haven_model::VmSpec>>)| {
            let runs = snapshot.told_of(vm).is_some_and(|told| told.phase == VmPhase::Running);
            object.spec.running
                && !object.meta.deleting
                && !runs
                && !drain::left_ended(snapshot, vm)
        };
    if let Some((vm, _)) = snapshot.vms.iter().find(ends) {
        return Some(format!("{vm} does not run"));
    }
    drain::costs_quorum(snapshot, &work.states, host)
}

fn begin(work: &mut Work<'_>, of: &Versioned<Maintenance>, turn: &Turn) {
    let host = &turn.host;
    if let Some(why) = doubt(work, host) {
        return wait_or_stop(
            work,
            of,
            turn,
            format!("the {} of {host} waits: {why}", of.work),
            PATIENCE_MS,
        );
    }
    let reason = format!("{host} is to be emptied for its {}, as {} asked", of.work, of.by);
    go(work, of, Phase::Draining, reason);
}

fn empty(work: &mut Work<'_>, of: &Versioned<Maintenance>, turn: &Turn) {
    let (snapshot, host) = (work.snapshot, &turn.host);
    let drain = snapshot.drains.get(host);
    match drain {
        None => {
            let drain = Drain {
                id: of.drain_id(host),
                by: format!("the {} of {host}", of.work),
                at_ms: work.seen.now_ms,
                drained_ms: None,
                bringing_back: false,
            };
            let action =
                Action::PutDrain { host: host.clone(), drain: Some(drain), expected_revision: 0 };
            return work.act(
                host_ref(host),
                format!("{host} is drained for its {}", of.work),
                action,
            );
        }
        Some(drain) if drain.bringing_back => {
            let why =
                format!("the {} of {host} waits: its last drain still brings back VMs", of.work);
            return wait_or_stop(work, of, turn, why, LONGEST_MS);
        }
        Some(_) => {}
    }
    if work.states.get(host) != Some(&HostState::Drained) {
        let left = drain::left(snapshot, host).count();
        let why = format!(
            "the {} of {host} waits until it is empty: {left} VMs are left; `haven host show {host}` tells what blocks",
            of.work
        );
        return wait_or_stop(work, of, turn, why, LONGEST_MS);
    }
    // Emptying it may have taken long, and a doubt since then may last as long as one before.
    if let Some(why) = doubt(work, host) {
        let drained_ms = drain.and_then(|drain| drain.drained_ms).unwrap_or(work.seen.now_ms);
        let passed = work.passed_ms(drained_ms).unwrap_or(0);
        let why = format!("the {} of {host}, which is empty, waits: {why}", of.work);
        let most = since(work, turn) + PATIENCE_MS.saturating_sub(passed);
        return wait_or_stop(work, of, turn, why, most);
    }
    go(work, of, Phase::Working, format!("{host} is empty: its {} begins", of.work));
}

fn worked(work: &mut Work<'_>, of: &Versioned<Maintenance>, turn: &Turn) {
    let (snapshot, host) = (work.snapshot, &turn.host);
    let told = snapshot.work_status.get(host).filter(|told| told.maintenance == of.id);
    if let Some(told) = told.filter(|told| told.state == WorkState::Failed) {
        return stop(work, of, format!("the {} of {host} failed: {}", of.work, told.message));
    }
    let well = work.states.get(host).is_some_and(|state| state.well());
    let status = snapshot.host_status.get(host);
    // It has not begun, and somebody has ended the drain: it may run VMs by now.
    if told.is_none() && drain::stands(snapshot, host).is_none() {
        return stop(
            work,
            of,
            format!("somebody ended the drain of {host} before its {}", of.work),
        );
    }
    let done = match of.work {
        What::Reboot => status.is_some_and(|status| status.boot_id != turn.boot_id),
        What::Upgrade => told.is_some_and(|told| told.state == WorkState::Done),
    };
    if done && well {
        let version = status.map(|status| status.version.clone()).unwrap_or_default();
        let how = match of.work {
            What::Reboot => format!("{host} was restarted and is back"),
            What::Upgrade if version == turn.version => {
                format!("the upgrade of {host} is done; it is at version {version} as before")
            }
            What::Upgrade => format!("{host} is at version {version}, before at {}", turn.version),
        };
        return go(work, of, Phase::Settling, how);
    }
    let state = work.states.get(host).map(ToString::to_string).unwrap_or_default();
    let why = format!("the {} of {host} is under way: it is {state}", of.work);
    wait_or_stop(work, of, turn, why, LONGEST_MS);
}

/// What is wrong with a host that was not wrong before its work.
fn unwell(work: &Work<'_>, turn: &Turn) -> Option<String> {
    let host = &turn.host;
    let state = work.states.get(host).copied().unwrap_or(HostState::Joining);
    if !state.well() {
        return Some(format!("{host} is {state}"));
    }
    let none = HostStatus::default();
    let status = work.snapshot.host_status.get(host).map_or(&none, |status| &status.value);
    let votes = |status: &HostStatus| status.etcd_member.is_some();
    let voters = work.snapshot.host_status.values().filter(|status| votes(status)).count();
    // Another host may have got its place while it was away for long.
    let replaced = voters >= work.snapshot.cluster_spec().voters as usize;
    if turn.voted && (status.etcd_silent || !votes(status) && !replaced) {
        return Some(format!("the store's member on {host} does not answer"));
    }
    let new = status.problems.iter().find(|problem| !turn.problems.contains(problem));
    new.map(|problem| format!("{host} says: {problem}"))
}

fn settle(work: &mut Work<'_>, of: &Versioned<Maintenance>, turn: &Turn) {
    let passed = since(work, turn);
    if passed < SETTLES_MS {
        work.wake(SETTLES_MS - passed);
        let why = format!("waiting: {} must stay well for 10 s after its {}", turn.host, of.work);
        return work.wait(host_ref(&turn.host), why);
    }
    if let Some(why) = unwell(work, turn) {
        return wait_or_stop(work, of, turn, why, UNWELL_MS);
    }
    let reason = format!("{} is well after its {}: it takes VMs again", turn.host, of.work);
    go(work, of, Phase::Returning, reason);
}

fn give_back(work: &mut Work<'_>, of: &Versioned<Maintenance>, turn: &Turn) {
    let host = &turn.host;
    let drain = work.snapshot.drains.get(host);
    let ours = drain.filter(|drain| drain.id == of.drain_id(host));
    let Some(drain) = ours else {
        if let Some(why) = unwell(work, turn) {
            return wait_or_stop(work, of, turn, why, UNWELL_MS);
        }
        let mut reason = format!("the {} of {host} is over", of.work);
        if let Some(stands) = drain.filter(|drain| !drain.bringing_back) {
            let by = &stands.by;
            reason += &format!(
                "; it stays drained, as {by} asked: `haven host undrain {host}` ends that"
            );
        }
        return go(work, of, Phase::Done, reason);
    };
    if !drain.bringing_back {
        let back = Drain { bringing_back: true, ..(*drain.value).clone() };
        let action = Action::PutDrain {
            host: host.clone(),
            drain: Some(back),
            expected_revision: drain.revision,
        };
        let reason = format!("{host} gets back what had left it for its {}", of.work);
        return work.act(host_ref(host), reason, action);
    }
    let why = format!("the {} of {host} is done, and what had left comes back", of.work);
    wait_or_stop(work, of, turn, why, LONGEST_MS);
}
