//! The members of a service: as many as wanted, all from the current template, replaced a few at a time.
//!
//! Each plan takes the steps that keep the limits now; what is left follows when the store shows their effect.
//! A member that goes is first drained (the balancer sends it nothing new), then deleted.

use crate::work::{Work, service_ref, vm_ref};
use haven_model::{
    Action, Meta, Name, Object, Snapshot, Versioned, VmPhase, VmSpec,
    object::Stored,
    service::{DRAIN_LABEL, SERVICE_LABEL, ServiceSpec, TEMPLATE_LABEL},
    vm::fnv1a as fnv,
};
use std::collections::BTreeSet;

/// How long a drained member may finish what it began, milliseconds.
pub const DRAIN_MS: i64 = 2000;

struct Member<'a> {
    name: &'a Name,
    object: &'a Versioned<Stored<VmSpec>>,
    current: bool,
    /// It is well.
    ready: bool,
    /// It runs and was well: clients may be on it, also when it is not well now. It may have more to do than it can.
    serves: bool,
    /// When draining began.
    draining: Option<i64>,
}

/// Plans the members of every service.
pub(crate) fn plan(work: &mut Work<'_>) {
    let snapshot = work.snapshot;
    for (name, service) in &snapshot.services {
        let template = template_hash(&service.spec);
        let all: Vec<Member<'_>> = snapshot
            .members(name)
            .map(|(vm, object)| member(snapshot, vm, object, &template))
            .collect();
        let names: BTreeSet<&Name> = all.iter().map(|m| m.name).collect();
        let members: Vec<Member<'_>> =
            all.into_iter().filter(|m| !m.object.meta.deleting).collect();
        if service.meta.deleting {
            end(work, name, service.revision, &members, names.is_empty());
        } else {
            let rollout = Rollout { name, service, template: &template, taken: names };
            rollout.plan(work, &members);
        }
    }
}

fn member<'a>(
    snapshot: &Snapshot,
    name: &'a Name,
    object: &'a Versioned<Stored<VmSpec>>,
    template: &str,
) -> Member<'a> {
    let checked = object.spec.check.is_some();
    let status = snapshot.told_of(name).filter(|s| s.phase == VmPhase::Running);
    let ready = status.is_some_and(|s| !checked || s.ready == Some(true));
    let serves = ready || status.is_some_and(|s| s.ready_ms.is_some());
    let labels = &object.meta.labels;
    Member {
        name,
        object,
        current: labels.get(TEMPLATE_LABEL).is_some_and(|t| t == template),
        ready,
        serves,
        draining: labels.get(DRAIN_LABEL).map(|at| at.parse().unwrap_or(0)),
    }
}

/// A short name for a template, the same wherever it is computed (FNV-1a).
#[must_use]
pub fn template_hash(spec: &ServiceSpec) -> String {
    let text =
        serde_json::to_string(&(&spec.template, &spec.check, spec.restarts)).unwrap_or_default();
    format!("{:08x}", fnv(&text) as u32)
}

fn delete(work: &mut Work<'_>, member: &Member<'_>, reason: String) {
    let mut object = (*member.object.value).clone();
    object.meta.deleting = true;
    put(work, member, object, reason);
}

fn put(work: &mut Work<'_>, member: &Member<'_>, object: Stored<VmSpec>, reason: String) {
    let action = Action::PutObject {
        object: Box::new(Object::Vm(object)),
        expected_revision: member.object.revision,
    };
    work.act(vm_ref(member.name), reason, action);
}

/// Drains a member, and deletes it once it has had its time; when it does not serve anybody, at once.
fn retire(work: &mut Work<'_>, member: &Member<'_>, why: &str) {
    match member.draining {
        None if !member.serves => delete(work, member, format!("{} goes: {why}", member.name)),
        None => {
            let mut object = (*member.object.value).clone();
            object.meta.labels.insert(DRAIN_LABEL.into(), work.seen.now_ms.to_string());
            put(work, member, object, format!("{} is drained: {why}", member.name));
        }
        Some(since) => {
            let passed = work.seen.now_ms - since;
            if passed >= DRAIN_MS {
                delete(work, member, format!("{} is drained and goes: {why}", member.name));
            } else {
                work.wake((DRAIN_MS - passed).unsigned_abs());
            }
        }
    }
}

fn end(work: &mut Work<'_>, name: &Name, revision: i64, members: &[Member<'_>], none_left: bool) {
    for member in members {
        delete(work, member, format!("{} goes with its service {name}", member.name));
    }
    if none_left && !work.snapshot.frontends.contains_key(name) {
        let action =
            Action::RemoveObject { object: service_ref(name), expected_revision: revision };
        work.act(service_ref(name), format!("{name} was deleted and has no member left"), action);
    }
}

struct Rollout<'a> {
    name: &'a Name,
    service: &'a Stored<ServiceSpec>,
    template: &'a str,
    taken: BTreeSet<&'a Name>,
}

impl Rollout<'_> {
    fn plan(&self, work: &mut Work<'_>, members: &[Member<'_>]) {
        let spec = &self.service.spec;
        let wanted = spec.replicas as usize;
        // Those that are draining already go on going, whatever changes meanwhile.
        for member in members.iter().filter(|m| m.draining.is_some()) {
            retire(work, member, "it is replaced or no longer wanted");
        }
        let staying: Vec<&Member<'_>> = members.iter().filter(|m| m.draining.is_none()).collect();
        let (current, old): (Vec<&Member<'_>>, Vec<&Member<'_>>) =
            staying.iter().copied().partition(|m| m.current);
        let most = wanted + if old.is_empty() { 0 } else { spec.update.max_surge as usize };
        let missing = wanted.saturating_sub(current.len()).min(most.saturating_sub(members.len()));
        let names: Vec<Name> = self.free_names(work.snapshot).take(missing).collect();
        if names.len() < missing {
            let why = format!(
                "waiting: the name {} leaves no room for the names of {} members; make the service anew under a shorter one",
                self.name,
                missing - names.len()
            );
            work.wait(service_ref(self.name), why);
        }
        for name in names {
            self.create(work, name);
        }
        self.retire_surplus(work, &current, &old, wanted);
        if !old.is_empty() {
            let ready = current.iter().filter(|m| m.ready).count();
            let why = format!(
                "{} is being updated: {ready} of {wanted} members are new and ready, {} old ones are left",
                self.name,
                old.len()
            );
            work.wait(service_ref(self.name), why);
        }
    }

    /// Old members go as new ones are ready; of the current ones the surplus goes. Never so many that fewer than
    /// wanted less `max_unavailable` are ready; and as long as the new ones are not, old ones that are not well at the
    /// moment stay in their place too: they may be all that answers.
    fn retire_surplus(
        &self,
        work: &mut Work<'_>,
        current: &[&Member<'_>],
        old: &[&Member<'_>],
        wanted: usize,
    ) {
        let ready = current.iter().chain(old).filter(|m| m.ready).count();
        let floor = wanted.saturating_sub(self.service.spec.update.max_unavailable as usize);
        let mut spare = ready.saturating_sub(floor);
        let standing =
            current.iter().filter(|m| m.ready).count() + old.iter().filter(|m| m.serves).count();
        let mut replaced = standing.saturating_sub(floor);
        // Those that serve nobody go first, then the newest by name.
        let order = |members: &[&Member<'_>]| {
            let mut order: Vec<usize> = (0..members.len()).collect();
            order.sort_by_key(|i| {
                (members[*i].ready, std::cmp::Reverse(number_of(members[*i].name)))
            });
            order
        };
        let surplus = current.len().saturating_sub(wanted);
        let too_many = order(current).into_iter().map(|i| current[i]).take(surplus);
        let outdated: Vec<&Member<'_>> = order(old).into_iter().map(|i| old[i]).collect();
        for (member, why) in too_many
            .map(|m| (m, "fewer members are wanted"))
            .chain(outdated.into_iter().map(|m| (m, "it is replaced by one from the new template")))
        {
            let goes = match (member.ready, member.serves && !member.current) {
                (true, _) => spare > 0 && (member.current || replaced > 0),
                (false, true) => replaced > 0,
                (false, false) => true,
            };
            if goes {
                spare -= usize::from(member.ready);
                replaced = replaced.saturating_sub(usize::from(member.serves));
                retire(work, member, why);
            }
        }
    }

    fn free_names(&self, snapshot: &Snapshot) -> impl Iterator<Item = Name> {
        (1u32..)
            // Names only grow longer: after the first that is too long there is none that fits.
            .map_while(|n| Name::new(format!("{}-{n}", self.name)).ok())
            .filter(|name| !self.taken.contains(name) && !is_used(snapshot, name))
    }

    fn create(&self, work: &mut Work<'_>, name: Name) {
        let service = self.service;
        let mut spec = service.spec.template.spec.clone();
        spec.check.clone_from(&service.spec.check);
        let text = format!("{name} {} {}", work.seen.now_ms, service.meta.uid);
        let (a, b) = (fnv(&text), fnv(&format!("{text} ")));
        let uid = format!(
            "{:08x}-{:04x}-8{:03x}-a{:03x}-{:012x}",
            (a >> 32) as u32,
            (a >> 16) as u16,
            a & 0xfff,
            (b >> 48) & 0xfff,
            b & 0xffff_ffff_ffff
        );
        let mut meta = Meta::new(name.clone(), uid, work.seen.now_ms);
        meta.labels.clone_from(&service.spec.template.labels);
        meta.labels.insert(SERVICE_LABEL.into(), self.name.to_string());
        meta.labels.insert(TEMPLATE_LABEL.into(), self.template.to_owned());
        meta.owner = Some(service_ref(self.name));
        let reason = format!("{} wants {} members", self.name, service.spec.replicas);
        let object = Box::new(Object::Vm(Stored { meta, spec }));
        work.act(vm_ref(&name), reason, Action::PutObject { object, expected_revision: 0 });
    }
}

/// Whether there is a VM of this name, a person's own say, or a record of one that cannot be read.
fn is_used(snapshot: &Snapshot, name: &Name) -> bool {
    snapshot.vms.contains_key(name)
        || snapshot.placements.contains_key(name)
        || snapshot.unreadable_of(&vm_ref(name)).is_some()
}

fn number_of(name: &Name) -> u32 {
    name.as_str().rsplit_once('-').and_then(|(_, n)| n.parse().ok()).unwrap_or(0)
}
