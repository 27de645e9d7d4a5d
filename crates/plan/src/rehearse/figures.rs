//! How long things take: as they did in past incidents and moves, or as the timers say.

use crate::monitor::incidents::proof_of;
use haven_model::{Incident, IncidentStep, Name, ProofKind, Snapshot};
use std::collections::BTreeMap;

/// From a power-off command to the power read as off, where it was never measured, milliseconds.
pub(super) const POWER_MS: u64 = 300;
/// From a suspicion to an address that another host has probed for and taken, milliseconds.
pub(super) const CLAIM_MS: u64 = 300;
/// From a proof to the placements that rest on it, where it was never measured, milliseconds.
const PLACED_MS: u64 = 50;
/// From a placement to a process that runs, where it was never measured, milliseconds.
const STARTED_MS: u64 = 1_000;
/// From that to a check that passes, where it was never measured, milliseconds.
const READY_MS: u64 = 3_000;
/// A live migration, where none was measured, milliseconds; and beside that what copying the memory takes.
const MOVED_MS: u64 = 1_000;
/// What is copied in a millisecond, where it was never measured, bytes: a wire of 1 Gbit/s.
const BYTES_PER_MS: u64 = 110_000;

/// What was measured.
#[derive(Debug, Default)]
pub(super) struct Figures {
    proofs: BTreeMap<ProofKind, Vec<u64>>,
    placed: Vec<u64>,
    started: ByVm,
    ready: ByVm,
    moved: ByVm,
    incidents: usize,
}

/// Figures by VM; members of a service are alike.
#[derive(Debug, Default)]
struct ByVm {
    vms: BTreeMap<Name, Vec<u64>>,
    services: BTreeMap<Name, Vec<u64>>,
    all: Vec<u64>,
}

impl ByVm {
    fn add(&mut self, snapshot: &Snapshot, vm: &Name, ms: u64) {
        self.vms.entry(vm.clone()).or_default().push(ms);
        if let Some(service) = service_of(snapshot, vm) {
            self.services.entry(service).or_default().push(ms);
        }
        self.all.push(ms);
    }

    /// What it took this VM, or its like, or any.
    fn of(&self, snapshot: &Snapshot, vm: &Name) -> Option<u64> {
        let service = service_of(snapshot, vm);
        let own = self.vms.get(vm).and_then(|own| median(own));
        let like = || median(self.services.get(&service?)?);
        own.or_else(like).or_else(|| median(&self.all))
    }
}

fn service_of(snapshot: &Snapshot, vm: &Name) -> Option<Name> {
    Some(snapshot.vms.get(vm)?.meta.member_of()?.name.clone())
}

fn median(of: &[u64]) -> Option<u64> {
    let mut sorted = of.to_vec();
    sorted.sort_unstable();
    sorted.get(sorted.len() / 2).copied()
}

impl Figures {
    /// Those of all incidents and moves that the store knows.
    pub(super) fn of(snapshot: &Snapshot) -> Self {
        let mut figures = Self::default();
        for incident in snapshot.incidents.values() {
            figures.learn(snapshot, incident);
        }
        for (vm, migration) in &snapshot.migrations {
            let outcome = migration.outcome.as_ref().filter(|outcome| outcome.moved);
            let took = outcome.and_then(|outcome| between(migration.at_ms, outcome.at_ms));
            if let Some(ms) = took {
                figures.moved.add(snapshot, vm, ms);
            }
        }
        figures
    }

    fn learn(&mut self, snapshot: &Snapshot, incident: &Incident) {
        let first = |phase: &str| incident.steps.iter().find(|step| step.phase == phase);
        let (Some(failed), Some(proof)) = (first("failed"), first("proof")) else { return };
        self.incidents += 1;
        if let Some(ms) = between(failed.at_ms, proof.at_ms) {
            self.proofs.entry(proof_of(proof)).or_default().push(ms);
        }
        let of = |phase: &str, vm: &IncidentStep| {
            let same = |step: &&IncidentStep| step.phase == phase && step.object == vm.object;
            incident.steps.iter().find(same).map(|step| step.at_ms)
        };
        for placed in incident.steps.iter().filter(|step| step.phase == "placed") {
            let vm = &placed.object.name;
            self.placed.extend(between(proof.at_ms, placed.at_ms));
            let started = of("started", placed);
            if let Some(ms) = started.and_then(|at| between(placed.at_ms, at)) {
                self.started.add(snapshot, vm, ms);
            }
            let ready = of("ready", placed);
            if let Some(ms) = started.zip(ready).and_then(|(from, to)| between(from, to)) {
                self.ready.add(snapshot, vm, ms);
            }
        }
    }

    /// From the last renewal to a proof.
    pub(super) fn proof(&self, kind: ProofKind, default: u64) -> u64 {
        self.proofs.get(&kind).and_then(|of| median(of)).unwrap_or(default)
    }
    /// From a proof to the placements that rest on it.
    pub(super) fn placed(&self) -> u64 {
        median(&self.placed).unwrap_or(PLACED_MS)
    }
    /// From a placement to a process that runs.
    pub(super) fn started(&self, snapshot: &Snapshot, vm: &Name) -> u64 {
        self.started.of(snapshot, vm).unwrap_or(STARTED_MS)
    }
    /// From that to a check that passes.
    pub(super) fn ready(&self, snapshot: &Snapshot, vm: &Name) -> u64 {
        self.ready.of(snapshot, vm).unwrap_or(READY_MS)
    }
    /// A live migration.
    pub(super) fn moved(&self, snapshot: &Snapshot, vm: &Name) -> u64 {
        let memory = snapshot.vms.get(vm).map_or(0, |vm| vm.spec.memory.0);
        self.moved.of(snapshot, vm).unwrap_or(MOVED_MS + memory / BYTES_PER_MS)
    }

    /// What the times rest on.
    pub(super) fn words(&self) -> String {
        let moves = self.moved.all.len();
        match (self.incidents, moves) {
            (0, 0) => "nothing was measured here yet: the times are those of the timers, and guesses for starts and moves".into(),
            (incidents, moves) => format!(
                "the times are medians of {incidents} past incidents and {moves} past moves; what never happened is timed by the timers, and guessed for starts and moves"
            ),
        }
    }
}

fn between(from_ms: i64, to_ms: i64) -> Option<u64> {
    u64::try_from(to_ms - from_ms).ok()
}
