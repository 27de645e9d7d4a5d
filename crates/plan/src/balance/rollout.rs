//! What all strategies share: the members by template, who gets traffic, and how a stage is carried out.
//!
//! ```text
//!   members, labels, traffic of now ──► strategy ──► stage (a value) ──► traffic, if it is to change: alone, first
//!                                                                   └──► members made, marked, drained, deleted
//! ```
//!
//! A strategy (`rolling`, `canary`, `blue_green`) only says which stage the update is in; it remembers nothing. What
//! must be remembered stands in the store: the split of the traffic in the frontend's placement, and on each member
//! when its template was let into the whole service. Such a template may come back without waiting for anybody.
//!
//! Members are made and retired only while the traffic is split as the stage wants it. So no new member can get
//! anything before the balancers know how much, and no old one goes while it has what another should have.

use super::{blue_green, canary, member::Member, rolling, services::template_hash};
use crate::work::{Split, Work, service_ref, vm_ref};
use haven_model::{
    Action, FrontendPlacement, Meta, Name, Object, Observations, ServiceSpec, Snapshot,
    UpdateStrategy, VmSpec,
    object::Stored,
    service::{DRAIN_LABEL, RELEASE_LABEL, SERVICE_LABEL, TEMPLATE_LABEL},
    vm::fnv1a as fnv,
};
use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
};

/// What becomes of the members of other templates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Old {
    /// They go as new ones are ready.
    Replaced,
    /// As many as are wanted serve on; missing ones are made.
    Held,
    /// As many as are wanted stay, without traffic.
    Kept,
}

/// Where an update is, and what that asks for.
pub(super) struct Stage {
    /// So many members of the new template.
    pub new: usize,
    /// Percent of the traffic that they get together; when none, all members share evenly.
    pub share: Option<u32>,
    /// The others.
    pub old: Old,
    /// The new template is let into the whole service.
    pub release: bool,
    /// A person may let it go on.
    pub promotable: bool,
    /// When it goes on by itself, wall clock, milliseconds since 1970.
    pub until_ms: Option<i64>,
    /// In words.
    pub step: String,
}

/// A service and its members, as its update sees them.
pub(super) struct Rollout<'a> {
    pub name: &'a Name,
    pub service: &'a Stored<ServiceSpec>,
    pub template: String,
    pub now_ms: i64,
    /// Who gets how much; none while no host holds an address for it.
    pub frontend: Option<&'a FrontendPlacement>,
    members: Vec<Member<'a>>,
    taken: BTreeSet<&'a Name>,
}

/// `1 new member`, `2 new members`.
pub(super) fn counted(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

impl<'a> Rollout<'a> {
    pub fn of(
        snapshot: &'a Snapshot,
        seen: &Observations,
        name: &'a Name,
        service: &'a Stored<ServiceSpec>,
    ) -> Self {
        let template = template_hash(&service.spec);
        let frontend = service.spec.frontend.as_ref().and(snapshot.frontends.get(name));
        let frontend = frontend.map(|placement| &*placement.value);
        let all = || snapshot.members(name);
        let staying = all().filter(|(_, object)| !object.meta.deleting);
        let members = staying
            .map(|(vm, object)| Member::of(snapshot, seen, vm, object, frontend, &template))
            .collect();
        let taken = all().map(|(vm, _)| vm).collect();
        Self { name, service, template, now_ms: seen.now_ms, frontend, members, taken }
    }

    /// Those that are not deleted.
    pub fn members(&self) -> &[Member<'a>] {
        &self.members
    }
    /// Whether nothing is left of it.
    pub fn is_empty(&self) -> bool {
        self.taken.is_empty()
    }
    fn staying(&self) -> impl Iterator<Item = &Member<'a>> {
        self.members.iter().filter(|m| m.draining.is_none())
    }
    /// Those from the new template that stay.
    pub fn current(&self) -> impl Iterator<Item = &Member<'a>> {
        self.staying().filter(|m| m.current)
    }
    /// Those from other templates that do not go yet.
    pub fn old(&self) -> impl Iterator<Item = &Member<'a>> {
        self.staying().filter(|m| !m.current)
    }
    /// Those from the new template that another one takes the place of, because their host is drained.
    fn leaving(&self) -> impl Iterator<Item = &Member<'a>> {
        self.current().filter(|m| m.leaves)
    }
    pub fn wanted(&self) -> usize {
        self.service.spec.replicas as usize
    }
    /// The fewest members that are ready and get traffic, once so many are.
    pub fn floor(&self) -> usize {
        self.wanted().saturating_sub(self.service.spec.update.max_unavailable as usize)
    }
    /// Whether a template was let into the whole service before.
    pub fn is_released(&self, template: &str) -> bool {
        let whole = self.given(template) == Some(100);
        whole || self.members.iter().any(|m| m.template == template && m.released_ms.is_some())
    }
    /// Whether the new template may go into the whole service: it was there before, or a person has promoted it.
    pub fn is_let_in(&self) -> bool {
        self.service.spec.promoted.as_ref() == Some(&self.template)
            || self.is_released(&self.template)
    }
    /// Whether the new template was let in and shares the traffic evenly with others.
    fn is_mixed(&self) -> bool {
        let template = &self.template;
        let unsplit = self.frontend.is_some() && self.given(template).is_none();
        unsplit && !self.is_idle(template) && self.is_released(template)
    }
    /// Percent that the new members get now; none where there is no traffic to split.
    pub fn share(&self) -> Option<u32> {
        Some(self.frontend?.traffic.get(&self.template).copied().unwrap_or(0))
    }

    /// Where it is.
    pub fn stage(&self) -> Stage {
        if self.old().next().is_none() || self.wanted() == 0 {
            return rolling::stage(self);
        }
        match self.service.spec.update.strategy {
            // It began as a rolling update, and ends as one.
            UpdateStrategy::BlueGreen if self.is_mixed() => rolling::stage(self),
            UpdateStrategy::BlueGreen => blue_green::stage(self),
            UpdateStrategy::Canary if !self.is_let_in() => canary::stage(self),
            UpdateStrategy::Canary | UpdateStrategy::Rolling => rolling::stage(self),
        }
    }

    /// Takes the steps of a stage that can be taken now.
    pub fn carry_out(&self, work: &mut Work<'_>, stage: &Stage) {
        // Those that are draining already go on going, whatever changes meanwhile.
        for member in self.members.iter().filter(|m| m.draining.is_some()) {
            member.retire(work, "it is replaced or no longer wanted");
        }
        let traffic = self.traffic(stage);
        let split = self.frontend.is_none_or(|frontend| frontend.traffic == traffic);
        // A record of it that cannot be read may give the traffic to those that would go.
        let record = format!("placement/frontend/{}", self.name);
        let unread = work.snapshot.unreadable.contains_key(&record) && self.old().next().is_some();
        if split && !unread {
            self.make(work, stage);
            self.release(work, stage);
            self.retire_surplus(work, stage);
        }
        let why = format!("{}: {}", self.name, self.split_words(&traffic));
        work.splits.insert(self.name.clone(), Split { traffic, why });
        if self.old().next().is_none() {
            return;
        }
        if let Some(until) = stage.until_ms.filter(|until| *until > self.now_ms) {
            work.wake((until - self.now_ms).unsigned_abs());
        }
        let why = format!("{} is being updated: {}", self.name, stage.step);
        work.wait(service_ref(self.name), why);
    }

    /// The split that a stage wants. Templates that were never let in get nothing, and what has nothing gets none back
    /// by itself, unless nobody else is left. Nothing is taken away while the others are fewer than the floor.
    fn traffic(&self, stage: &Stage) -> BTreeMap<String, u32> {
        let old: BTreeSet<&str> = self.old().map(|m| m.template).collect();
        if old.is_empty() {
            return BTreeMap::new();
        }
        let mut left = self.getting().filter(|m| m.ready).count();
        let mut traffic = BTreeMap::new();
        let share = stage.share.unwrap_or(0);
        let new = (self.template.as_str(), stage.share);
        let serving = old.iter().any(|of| !self.is_idle(of) && self.is_released(of));
        let wake = stage.share == Some(0) && !serving;
        let others = old.iter().filter(|_| share < 100).map(|of| {
            let given_up = self.is_given_up(of);
            let nothing = if self.is_idle(of) { given_up || !wake } else { given_up };
            (*of, nothing.then_some(0))
        });
        for (of, percent) in std::iter::once(new).chain(others) {
            let loses = self.getting().filter(|m| m.ready && m.template == of).count();
            let percent = match percent {
                Some(0) if loses > 0 && left < self.floor() + loses => {
                    // It goes on until the others are enough.
                    self.given(of).map(|was| was.min(99u32.saturating_sub(share)))
                }
                Some(0) => {
                    left -= loses;
                    Some(0)
                }
                other => other,
            };
            traffic.extend(percent.map(|percent| (of.to_owned(), percent)));
        }
        traffic
    }

    /// Members that get traffic.
    fn getting(&self) -> impl Iterator<Item = &Member<'a>> {
        self.staying().filter(|m| !m.idle)
    }
    fn is_idle(&self, template: &str) -> bool {
        self.frontend.is_some_and(|frontend| frontend.gets_nothing(template))
    }
    /// Percent that stands in the split for a template.
    fn given(&self, template: &str) -> Option<u32> {
        self.frontend?.traffic.get(template).copied()
    }

    /// Makes what is missing.
    fn make(&self, work: &mut Work<'_>, stage: &Stage) {
        let old: Vec<&Member<'_>> = self.old().collect();
        let leaving = self.leaving().count();
        let surge = self.service.spec.update.max_surge as usize;
        let surge = if old.is_empty() && leaving == 0 { 0 } else { surge };
        let room = match stage.old {
            Old::Replaced => (self.wanted() + surge).saturating_sub(self.members.len()),
            Old::Held | Old::Kept => usize::MAX,
        };
        let staying = self.current().count() - leaving;
        let new = stage.new.saturating_sub(staying).min(room);
        let like = old.iter().copied().max_by_key(|m| value(self, m));
        let like = like.filter(|_| stage.old == Old::Held);
        let useful = old.iter().filter(|m| !self.is_given_up(m.template)).count();
        let more = like.map_or(0, |_| self.wanted().saturating_sub(useful));
        let names: Vec<Name> = self.free_names(work.snapshot).take(new + more).collect();
        if names.len() < new + more {
            let why = format!(
                "waiting: the name {} leaves no room for the names of {} members; make the service anew under a shorter one",
                self.name,
                new + more - names.len()
            );
            work.wait(service_ref(self.name), why);
        }
        for (i, name) in names.into_iter().enumerate() {
            match like.filter(|_| i >= new) {
                Some(like) => self.create_like(work, name, like),
                None => self.create(work, name, stage.release),
            }
        }
    }

    fn free_names(&self, snapshot: &Snapshot) -> impl Iterator<Item = Name> {
        (1u32..)
            // Names only grow longer: after the first that is too long there is none that fits.
            .map_while(|n| Name::new(format!("{}-{n}", self.name)).ok())
            .filter(|name| !self.taken.contains(name) && !is_used(snapshot, name))
    }

    fn create(&self, work: &mut Work<'_>, name: Name, release: bool) {
        let service = self.service;
        let mut spec = service.spec.template.spec.clone();
        spec.check.clone_from(&service.spec.check);
        let mut labels = service.spec.template.labels.clone();
        labels.insert(SERVICE_LABEL.into(), self.name.to_string());
        labels.insert(TEMPLATE_LABEL.into(), self.template.clone());
        if release {
            labels.insert(RELEASE_LABEL.into(), self.now_ms.to_string());
        }
        self.put_new(work, name, labels, spec);
    }

    /// One more from a template that the service has no longer.
    fn create_like(&self, work: &mut Work<'_>, name: Name, other: &Member<'_>) {
        let mut labels = other.object.meta.labels.clone();
        labels.remove(DRAIN_LABEL);
        self.put_new(work, name, labels, other.object.spec.clone());
    }

    fn put_new(
        &self,
        work: &mut Work<'_>,
        name: Name,
        labels: BTreeMap<String, String>,
        spec: VmSpec,
    ) {
        let mut meta = Meta::new(name.clone(), self.new_uid(&name), self.now_ms);
        meta.labels = labels;
        meta.owner = Some(service_ref(self.name));
        let reason = format!("{} wants {} members", self.name, self.service.spec.replicas);
        let object = Box::new(Object::Vm(Stored { meta, spec }));
        work.act(vm_ref(&name), reason, Action::PutObject { object, expected_revision: 0 });
    }

    fn new_uid(&self, name: &Name) -> String {
        let text = format!("{name} {} {}", self.now_ms, self.service.meta.uid);
        let (a, b) = (fnv(&text), fnv(&format!("{text} ")));
        format!(
            "{:08x}-{:04x}-8{:03x}-a{:03x}-{:012x}",
            (a >> 32) as u32,
            (a >> 16) as u16,
            a & 0xfff,
            (b >> 48) & 0xfff,
            b & 0xffff_ffff_ffff
        )
    }

    /// Notes on the new members that their template was let in.
    fn release(&self, work: &mut Work<'_>, stage: &Stage) {
        for member in self.current().filter(|m| stage.release && m.released_ms.is_none()) {
            let reason =
                format!("the template of {} is let into all of {}", member.name, self.name);
            member.mark(work, RELEASE_LABEL, self.now_ms, reason);
        }
    }

    /// Old members go as new ones are ready; what is more than the stage wants goes. Never so many that fewer than
    /// the floor are ready and get traffic; and as long as the new ones are not, old ones that are not well at the
    /// moment stay in their place too: they may be all that answers.
    fn retire_surplus(&self, work: &mut Work<'_>, stage: &Stage) {
        let ready = self.getting().filter(|m| m.ready).count();
        let floor = self.floor();
        let mut spare = ready.saturating_sub(floor);
        let standing = self
            .getting()
            .filter(|m| if m.current && !m.leaves { m.ready } else { m.serves })
            .count();
        let mut replaced = standing.saturating_sub(floor);
        for (member, why) in self.surplus(stage) {
            let goes = match (member.ready, member.serves && (!member.current || member.leaves)) {
                // It has no traffic to lose; but what was good stays until there is enough without it.
                _ if member.idle => ready >= floor || !self.is_released(member.template),
                (true, _) => spare > 0 && (member.current || replaced > 0),
                (false, true) => replaced > 0,
                (false, false) => true,
            };
            if goes {
                spare -= usize::from(member.ready && !member.idle);
                replaced = replaced.saturating_sub(usize::from(member.serves && !member.idle));
                member.retire(work, why);
            } else if member.leaves {
                let host = work.snapshot.placements.get(member.name).map(|p| &p.host);
                let host = host.map(Name::as_str).unwrap_or_default();
                let why = format!(
                    "waiting: {} leaves {host}, which is drained, once another member takes its place: {ready} of {} are ready, and {floor} must be",
                    member.name, self.name
                );
                work.wait(vm_ref(member.name), why);
            }
        }
    }

    /// What is more than a stage wants, in the order in which it goes.
    fn surplus(&self, stage: &Stage) -> impl Iterator<Item = (&Member<'a>, &'static str)> {
        let (mut current, mut old): (Vec<&Member<'_>>, Vec<&Member<'_>>) =
            self.staying().partition(|m| m.current);
        current.sort_by_key(|m| value(self, m));
        old.sort_by_key(|m| value(self, m));
        let mut more = current.len().saturating_sub(stage.new);
        if self.service.spec.update.max_surge == 0 {
            // None may be made before one goes.
            more = more.max(self.leaving().count());
        }
        let too_many = current.into_iter().take(more).map(|m| {
            let drained = "its host is drained and it cannot move";
            (m, if m.leaves { drained } else { "fewer members are wanted" })
        });
        let (kept, why) = match stage.old {
            Old::Replaced => (0, "it is replaced by one from the new template"),
            Old::Held | Old::Kept => (self.wanted(), "its template was given up"),
        };
        // Those of templates that were never let in are of no use as old ones.
        let (given_up, useful): (Vec<&Member<'_>>, Vec<&Member<'_>>) =
            old.into_iter().partition(|m| self.is_given_up(m.template));
        let more = useful.len().saturating_sub(kept);
        let outdated = given_up.into_iter().chain(useful.into_iter().take(more));
        too_many.chain(outdated.map(move |m| (m, why)))
    }

    /// Whether an old template was never let in, while another one was.
    fn is_given_up(&self, template: &str) -> bool {
        !self.is_released(template) && self.members.iter().any(|m| self.is_released(m.template))
    }

    /// The split of now, in words; none while all share evenly.
    pub fn traffic_words(&self) -> Option<String> {
        let traffic = &self.frontend?.traffic;
        (!traffic.is_empty()).then(|| self.split_words(traffic))
    }

    fn split_words(&self, traffic: &BTreeMap<String, u32>) -> String {
        if traffic.is_empty() {
            return "all members share the traffic evenly".into();
        }
        let left = 100u32.saturating_sub(traffic.values().sum());
        let new = traffic.get(&self.template).copied();
        let others: u32 = traffic.values().sum::<u32>() - new.unwrap_or(0);
        match new {
            Some(new) => {
                format!("new members get {new} % of the traffic, old ones {} %", others + left)
            }
            None if others == 0 => "members of templates that were given up get no traffic".into(),
            None => format!("members of templates that are given up get {others} % of the traffic"),
        }
    }
}

/// What a member is worth, to keep: the least goes first.
fn value(rollout: &Rollout<'_>, member: &Member<'_>) -> (bool, bool, bool, bool, Reverse<u32>) {
    let released = rollout.is_released(member.template);
    (!member.leaves, !member.idle, released, member.ready, Reverse(member.number()))
}

/// Whether there is a VM of this name, a person's own say, or a record of one that cannot be read.
fn is_used(snapshot: &Snapshot, name: &Name) -> bool {
    snapshot.vms.contains_key(name)
        || snapshot.placements.contains_key(name)
        || snapshot.unreadable_of(&vm_ref(name)).is_some()
}
