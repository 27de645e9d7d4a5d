//! The stage of a rehearsal: a copy of the store with a clock of its own, on which the plan's actions are committed, and
//! agents that do what they would do, each after the time that it takes.

use super::{figures::Figures, serves};
use crate::{plan, sound, work::host_ref, work::vm_ref};
use haven_model::{
    Action, Drain, Migration, MigrationPhase, MigrationStatus, Name, Observations, Placement, Plan,
    ProofKind, Snapshot, Versioned, VmPhase, VmStatus,
    api::RehearsedStep,
    keys,
    object::Kind,
    plan::{LeaseAge, MoveStep},
};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};

/// The most rounds of planning, and the longest that is played, milliseconds: what is not settled then never is.
const ROUNDS: usize = 5_000;
const HORIZON_MS: u64 = 30 * 60_000;
/// How long a guest takes to end that is asked to, milliseconds.
const ENDED_MS: u64 = 2_000;
/// What is left of a handover once the owner has changed, milliseconds.
const HANDED_MS: u64 = 50;

/// Something that happens on the stage by itself.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Happens {
    /// A host is suspected.
    Suspected(Name),
    /// The next in line take the addresses of suspected holders.
    Claimed,
    /// A host is proven lost.
    Proven(Name, ProofKind),
    /// A VM runs under an epoch.
    Started(Name, u64),
    /// It passes its check.
    Ready(Name, u64),
    /// Its memory is copied, in this attempt, and its owner has stopped it.
    Copied(Name, i64),
    /// It was handed over and runs under this epoch.
    HandedOver(Name, u64),
    /// Its owner has stopped it, in this attempt.
    Gone(Name, i64),
    /// Its owner has stopped it, under this epoch.
    Ended(Name, u64),
}

pub(super) struct Stage<'a> {
    pub snapshot: Snapshot,
    seen: Observations,
    pub figures: &'a Figures,
    pub steps: Vec<RehearsedStep>,
    /// When each VM served, after it was somewhere else or did not.
    pub served_ms: BTreeMap<Name, u64>,
    now_ms: u64,
    coming: BTreeSet<(u64, Happens)>,
    begun: BTreeSet<Happens>,
    /// The last plan that was made.
    last: Plan,
}

/// A step.
pub(super) fn step(after_ms: u64, host: &Name, message: String) -> RehearsedStep {
    RehearsedStep { after_ms, object: host_ref(host), message }
}

impl<'a> Stage<'a> {
    pub(super) fn new(snapshot: &Snapshot, seen: &Observations, figures: &'a Figures) -> Self {
        let mut seen = seen.clone();
        for (host, age) in &mut seen.leases {
            // Who renews now goes on renewing; who is silent is judged as it is.
            let lost = seen.suspected.contains(host);
            age.unchanged_ms = if lost { age.unchanged_ms } else { 0 };
        }
        Self {
            snapshot: snapshot.clone(),
            seen,
            figures,
            steps: Vec::new(),
            served_ms: BTreeMap::new(),
            now_ms: 0,
            coming: BTreeSet::new(),
            begun: BTreeSet::new(),
            last: Plan::default(),
        }
    }

    /// Something will happen so long after now.
    pub(super) fn later(&mut self, ms: u64, what: Happens) {
        if self.begun.insert(what.clone()) {
            self.coming.insert((self.now_ms + ms, what));
        }
    }

    pub(super) fn drain(&mut self, host: &Name, drain: &Drain) {
        self.write(&keys::drain(host), Some(drain));
    }

    /// When the last thing happened.
    pub(super) fn last_ms(&self) -> u64 {
        self.steps.iter().map(|step| step.after_ms).max().unwrap_or(0)
    }

    /// Why a VM does not serve, or stays.
    pub(super) fn why_not(&self, vm: &Name, stays: bool) -> String {
        let object = vm_ref(vm);
        let waits = self.last.waiting.iter().find(|waiting| waiting.object == object);
        let rests = self.snapshot.vms.get(vm).is_none_or(|vm| !vm.spec.running);
        match waits {
            Some(waits) => waits.reason.clone(),
            None if rests => format!("{vm} does not run"),
            None if stays => format!("{vm} stays where it is"),
            None => format!("{vm} does not serve at the end of the rehearsal"),
        }
    }

    /// Plays until nothing more happens.
    pub(super) fn play(&mut self) {
        for _ in 0..ROUNDS {
            if self.round() {
                self.agents();
                continue;
            }
            let wakes = self.last.wake_after_ms.map(|ms| self.now_ms + ms);
            let next = self.coming.first().map(|(at, _)| *at);
            let at = match (next, wakes) {
                (Some(next), Some(wakes)) => next.min(wakes),
                (Some(next), None) => next,
                (None, Some(wakes)) => wakes,
                (None, None) => return,
            };
            if at > HORIZON_MS {
                return;
            }
            self.seen.now_ms += i64::try_from(at.saturating_sub(self.now_ms)).unwrap_or(0);
            self.now_ms = at;
            while let Some((due, what)) = self.coming.first().cloned().filter(|(due, _)| *due <= at)
            {
                self.coming.remove(&(due, what.clone()));
                self.happen(what);
            }
            self.agents();
        }
    }

    /// Plans, and commits what the plan says, as the manager does; true when that changed something.
    fn round(&mut self) -> bool {
        let (plan, _) = sound(&self.snapshot, plan(&self.snapshot, &self.seen));
        let mut changed = false;
        for planned in &plan.actions {
            let Some(writes) = writes(&self.snapshot, &planned.action) else { continue };
            let (key, expected) = &writes.over;
            if self.revision(key) != *expected {
                // Overtaken by an action before it: the next round plans again.
                break;
            }
            if tells(&planned.action) {
                let placed = matches!(planned.action, Action::PlaceVm { taken_from: Some(_), .. });
                let after_ms = self.now_ms + if placed { self.figures.placed() } else { 0 };
                self.steps.push(RehearsedStep {
                    after_ms,
                    object: planned.object.clone(),
                    message: planned.reason.clone(),
                });
            }
            self.snapshot.revision += 1;
            let revision = self.snapshot.revision;
            for (key, value) in writes.records {
                self.snapshot.apply(&key, value.as_deref().map(|value| (value, revision)));
            }
            changed = true;
        }
        self.last = plan;
        changed
    }

    /// The revision of a record that actions compare; 0 when there is none.
    fn revision(&self, key: &str) -> i64 {
        let snapshot = &self.snapshot;
        let path = key.trim_start_matches(keys::ROOT);
        let (table, name) = path.rsplit_once('/').unwrap_or((path, ""));
        let of = |found: Option<i64>| found.unwrap_or(0);
        match table {
            "placement/vm" => of(snapshot.placements.get(name).map(|r| r.revision)),
            "placement/frontend" => of(snapshot.frontends.get(name).map(|r| r.revision)),
            "leases" => of(snapshot.leases.get(name).map(|r| r.revision)),
            "migrations" => of(snapshot.migrations.get(name).map(|r| r.revision)),
            "maintenance" => of(snapshot.maintenance.as_ref().map(|r| r.revision)),
            "drains" => of(snapshot.drains.get(name).map(|r| r.revision)),
            "incidents" => {
                let number = name.parse().ok();
                of(number
                    .and_then(|number: u64| snapshot.incidents.get(&number))
                    .map(|r| r.revision))
            }
            _ => {
                let kind = table.trim_start_matches("spec/").parse().ok();
                let reference = kind.zip(Name::new(name).ok());
                let reference = reference
                    .map(|(kind, name): (Kind, _)| haven_model::ObjectRef::new(kind, name));
                of(reference.and_then(|of| snapshot.object(&of)).map(|(_, revision)| revision))
            }
        }
    }

    fn write<T: Serialize>(&mut self, key: &str, record: Option<&T>) {
        let value = record.and_then(|record| serde_json::to_vec(record).ok());
        self.snapshot.revision += 1;
        let revision = self.snapshot.revision;
        self.snapshot.apply(key, value.as_deref().map(|value| (value, revision)));
    }

    /// What each agent begins to do about what stands in the store now.
    fn agents(&mut self) {
        let placements: Vec<(Name, Versioned<Placement>)> =
            self.snapshot.placements.iter().map(|(vm, p)| (vm.clone(), p.clone())).collect();
        for (vm, placement) in placements {
            if self.snapshot.session_open(&placement.host) && !self.is_down(&placement.host) {
                self.agent(&vm, &placement);
            }
        }
    }

    /// It has lost its power, whatever the store says of it yet.
    fn is_down(&self, host: &Name) -> bool {
        self.seen.suspected.contains(host)
            || self.coming.iter().any(|(_, what)| *what == Happens::Suspected(host.clone()))
    }

    fn agent(&mut self, vm: &Name, placement: &Versioned<Placement>) {
        let Some(object) = self.snapshot.vms.get(vm).cloned() else { return };
        let epoch = placement.epoch;
        let told = self.snapshot.told_of(vm).cloned().filter(|told| told.epoch == epoch);
        let wanted = object.spec.running && !object.meta.deleting;
        if placement.moved_from.is_some() {
            return self.later(HANDED_MS, Happens::HandedOver(vm.clone(), epoch));
        }
        if let Some(to) = &placement.moving_to {
            let attempt = placement.revision;
            if to.restart {
                let runs = told.is_some_and(|told| told.phase == VmPhase::Running);
                let takes = if runs { ENDED_MS } else { HANDED_MS };
                return self.later(takes, Happens::Gone(vm.clone(), attempt));
            }
            let takes = self.figures.moved(&self.snapshot, vm);
            return self.later(takes, Happens::Copied(vm.clone(), attempt));
        }
        match told.map(|told| (told.phase, told.ready)) {
            Some((VmPhase::Running, ready)) if wanted => {
                if object.spec.check.is_some() && ready != Some(true) {
                    let takes = self.figures.ready(&self.snapshot, vm);
                    self.later(takes, Happens::Ready(vm.clone(), epoch));
                }
            }
            Some((VmPhase::Stopped | VmPhase::Failed, _)) if wanted => {}
            _ if wanted => {
                let placed = self.figures.placed();
                let takes = placed + self.figures.started(&self.snapshot, vm);
                self.later(takes, Happens::Started(vm.clone(), epoch));
            }
            Some((VmPhase::Stopped, _)) if !object.meta.deleting => {}
            _ => self.later(ENDED_MS, Happens::Ended(vm.clone(), epoch)),
        }
    }

    fn happen(&mut self, what: Happens) {
        match what {
            Happens::Suspected(host) => {
                self.say_of(&host, format!("{host} is suspected"));
                self.seen.suspected.insert(host);
            }
            Happens::Claimed => self.claim(),
            Happens::Proven(host, kind) => self.prove(host, kind),
            Happens::Started(vm, epoch) => {
                if let Some(host) = self.owner(&vm, epoch) {
                    let message = format!("{vm} runs on {host}");
                    self.tell(&vm, VmPhase::Running, None, "");
                    self.serve(&vm, message);
                }
            }
            Happens::Ready(vm, epoch) => {
                if self.owner(&vm, epoch).is_some() {
                    self.tell(&vm, VmPhase::Running, Some(true), "");
                    self.serve(&vm, format!("{vm} passes its health check"));
                }
            }
            Happens::Copied(vm, attempt) => self.copied(&vm, attempt),
            Happens::HandedOver(vm, epoch) => {
                let Some(placement) = self.snapshot.placements.get(&vm).cloned() else { return };
                let Some(from) = placement.moved_from.clone().filter(|_| placement.epoch == epoch)
                else {
                    return;
                };
                let ready = self.snapshot.told_of(&vm).and_then(|told| told.ready);
                self.word(&vm, &from.host, from.attempt, MigrationPhase::HandedOver);
                self.tell(&vm, VmPhase::Running, ready, "");
                self.served_ms.insert(vm, self.now_ms);
            }
            Happens::Gone(vm, attempt) => {
                let host = self.snapshot.placements.get(&vm).map(|p| (p.host.clone(), p.revision));
                if let Some((host, _)) = host.filter(|(_, revision)| *revision == attempt) {
                    self.tell(&vm, VmPhase::Stopped, None, "");
                    self.word(&vm, &host, attempt, MigrationPhase::Gone);
                }
            }
            Happens::Ended(vm, epoch) => {
                if self.owner(&vm, epoch).is_some() {
                    let deleted = self.snapshot.vms.get(&vm).is_some_and(|vm| vm.meta.deleting);
                    self.tell(&vm, VmPhase::Stopped, None, if deleted { "deleted" } else { "" });
                }
            }
        }
    }

    fn say_of(&mut self, host: &Name, message: String) {
        self.steps.push(step(self.now_ms, host, message));
    }

    fn serve(&mut self, vm: &Name, message: String) {
        self.steps.push(RehearsedStep { after_ms: self.now_ms, object: vm_ref(vm), message });
        if serves(&self.snapshot, vm) {
            self.served_ms.insert(vm.clone(), self.now_ms);
        }
    }

    /// The owner of a VM, if it has this epoch.
    fn owner(&self, vm: &Name, epoch: u64) -> Option<Name> {
        let placement = self.snapshot.placements.get(vm).filter(|p| p.epoch == epoch)?;
        Some(placement.host.clone())
    }

    fn claim(&mut self) {
        let frontends: Vec<_> =
            self.snapshot.frontends.iter().map(|(name, f)| (name.clone(), f.clone())).collect();
        for (service, placement) in frontends {
            let Some(next) = placement.claimant(&self.seen.suspected).cloned() else { continue };
            let claimed = placement.claimed_by(&next);
            self.write(&keys::frontend(&service), Some(&claimed));
            let address = self.snapshot.services.get(&service);
            let address = address.and_then(|s| s.spec.frontend.as_ref()).map(|f| f.address);
            let address = address.map(|ip| ip.to_string()).unwrap_or_default();
            let message = format!(
                "{next} takes {address}: {} is suspected and nobody answers for the address",
                placement.holder
            );
            let object = crate::work::service_ref(&service);
            self.steps.push(RehearsedStep { after_ms: self.now_ms, object, message });
        }
    }

    /// The observer has what it needs to close the session of a host.
    fn prove(&mut self, host: Name, kind: ProofKind) {
        let Some(lease) = self.snapshot.leases.get(&host).filter(|lease| !lease.closed) else {
            return;
        };
        match kind {
            ProofKind::PoweredOff => {
                self.seen.powered_off.insert(host, lease.session);
            }
            ProofKind::LeaseExpired => {
                let unchanged_ms = self.now_ms.max(lease.ttl_ms);
                let revision = lease.revision;
                let age = LeaseAge { revision, unchanged_ms, confirmed: true };
                self.seen.leases.insert(host, age);
            }
            // Of a VM, and not of a host.
            ProofKind::StorageFenced => {}
        }
    }

    fn copied(&mut self, vm: &Name, attempt: i64) {
        let Some(placement) = self.snapshot.placements.get(vm).cloned() else { return };
        let Some(to) = placement.moving_to.clone().filter(|_| placement.revision == attempt) else {
            return;
        };
        if self.is_down(&to.host) || self.is_down(&placement.host) {
            return;
        }
        self.word(vm, &to.host, attempt, MigrationPhase::Listening);
        self.word(vm, &placement.host, attempt, MigrationPhase::Stopped);
    }

    /// A host says how far its side of a move is.
    fn word(&mut self, vm: &Name, host: &Name, attempt: i64, phase: MigrationPhase) {
        let session = self.snapshot.leases.get(host).map_or(0, |lease| lease.session);
        let (progress, machine, message) = (None, None, String::new());
        let status = MigrationStatus {
            attempt,
            session,
            phase,
            progress,
            machine,
            ports: false,
            disks: None,
            heard: None,
            message,
        };
        self.write(&keys::migration_status(vm, host), Some(&status));
    }

    /// The owner of a VM says how it is.
    fn tell(&mut self, vm: &Name, phase: VmPhase, ready: Option<bool>, message: &str) {
        let Some(placement) = self.snapshot.placements.get(vm) else { return };
        let before = self.snapshot.told_of(vm).filter(|told| told.phase == VmPhase::Running);
        let now = self.seen.now_ms;
        let runs = phase == VmPhase::Running;
        let started = before.and_then(|told| told.started_ms).unwrap_or(now);
        let ready_ms = before.and_then(|told| told.ready_ms).or(ready.map(|_| now));
        let since = before.and_then(|told| told.ready_since_ms).or(ready.map(|_| now));
        let status = VmStatus {
            host: placement.host.clone(),
            session: self.snapshot.leases.get(&placement.host).map_or(0, |lease| lease.session),
            epoch: placement.epoch,
            generation: self.snapshot.vms.get(vm).map_or(0, |vm| vm.meta.generation),
            phase,
            since_ms: now,
            started_ms: runs.then_some(started),
            ready: ready.filter(|_| runs),
            ready_ms: ready_ms.filter(|_| runs),
            ready_since_ms: since.filter(|_| runs),
            unproven: false,
            restarts: 0,
            failures: 0,
            hung: 0,
            heard: false,
            idle: phase == VmPhase::Stopped,
            started_with: BTreeMap::new(),
            disks_change: false,
            ports: false,
            resets: self.snapshot.vms.get(vm).map_or(0, |vm| vm.spec.resets),
            message: message.to_owned(),
        };
        self.write(&keys::vm_status(vm), Some(&status));
    }
}

/// Whether an action is worth a line.
fn tells(action: &Action) -> bool {
    !matches!(action, Action::PutIncident { .. } | Action::PutMigration { .. })
        && !matches!(action, Action::MoveVm { step: MoveStep::Commit { .. }, .. })
}

/// What an action writes, and over which revision of which record.
struct Writes {
    over: (String, i64),
    records: Vec<(String, Option<Vec<u8>>)>,
}

fn json<T: Serialize>(record: &T) -> Option<Vec<u8>> {
    serde_json::to_vec(record).ok()
}

/// What an action writes; none when it writes nothing.
fn writes(snapshot: &Snapshot, action: &Action) -> Option<Writes> {
    let one = |key: String, expected: i64, value: Option<Vec<u8>>| Writes {
        over: (key.clone(), expected),
        records: vec![(key, value)],
    };
    Some(match action {
        // What is backed up or kept meanwhile changes nothing of what is rehearsed, nor does what no host of it would carry out.
        Action::ConfirmLease { .. }
        | Action::ReadPower { .. }
        | Action::PowerOff { .. }
        | Action::PutBackup { .. }
        | Action::PutVmSnapshot { .. }
        | Action::PutClients { .. } => return None,
        Action::CloseSession { host, lease_revision, lost } => {
            let lease = snapshot.leases.get(host)?;
            let closed = haven_model::Lease { closed: true, ..(*lease.value).clone() };
            let mut writes = one(keys::lease(host), *lease_revision, json(&closed));
            writes.records.push((keys::lost(host), json(lost)));
            writes
        }
        Action::PlaceVm { vm, placement, expected_revision, .. }
        | Action::TryElsewhere { vm, placement, expected_revision, .. } => {
            one(keys::placement(vm), *expected_revision, json(placement))
        }
        Action::MoveVm { vm, placement, expected_revision, record, .. } => {
            let mut writes = one(keys::placement(vm), *expected_revision, json(placement));
            let record: Option<&(Box<Migration>, i64)> = record.as_ref();
            writes.records.extend(record.map(|(of, _)| (keys::migration(vm), json(of))));
            writes
        }
        Action::PutMigration { vm, migration, expected_revision } => {
            one(keys::migration(vm), *expected_revision, json(migration))
        }
        Action::PutWait { vm, wait, expected_revision } => {
            one(keys::wait(vm), *expected_revision, wait.as_ref().and_then(json))
        }
        Action::PutDrain { host, drain, expected_revision } => {
            one(keys::drain(host), *expected_revision, drain.as_ref().and_then(json))
        }
        Action::PutMaintenance { maintenance, expected_revision } => {
            one(keys::MAINTENANCE.into(), *expected_revision, json(maintenance))
        }
        Action::ReleaseVm { vm, expected_revision } => {
            let mut writes = one(keys::placement(vm), *expected_revision, None);
            writes.records.push((keys::vm_status(vm), None));
            writes
        }
        Action::PutObject { object, expected_revision } => {
            one(keys::object(&object.reference()), *expected_revision, Some(object.to_store()))
        }
        Action::RemoveObject { object, expected_revision } => {
            let mut writes = one(keys::object(object), *expected_revision, None);
            let more = [keys::vm_status(&object.name), keys::migration(&object.name)];
            let of_vm = more.into_iter().filter(|_| object.kind == Kind::Vm);
            writes.records.extend(of_vm.map(|key| (key, None)));
            writes
        }
        Action::PlaceFrontend { service, placement, expected_revision } => {
            one(keys::frontend(service), *expected_revision, json(placement))
        }
        Action::ReleaseFrontend { service, expected_revision } => {
            one(keys::frontend(service), *expected_revision, None)
        }
        Action::PutVolume { volume, record, expected_revision } => {
            one(keys::volume(volume), *expected_revision, json(record))
        }
        Action::PutIncident { incident, expected_revision } => {
            one(keys::incident(incident.number), *expected_revision, json(incident))
        }
    })
}
