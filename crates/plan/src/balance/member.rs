//! One member of a service as the plan sees it, and how it goes: first drained (the balancer sends it nothing new),
//! then deleted.

use crate::{
    tolerance::drain,
    work::{Work, vm_ref},
};
use haven_model::{
    Action, FrontendPlacement, Name, Object, Observations, Snapshot, Versioned, VmPhase, VmSpec,
    object::Stored,
    service::{DRAIN_LABEL, RELEASE_LABEL, TEMPLATE_LABEL},
};

/// How long a drained member may finish what it began, milliseconds.
const DRAIN_MS: u64 = 2000;

pub(super) struct Member<'a> {
    pub name: &'a Name,
    pub object: &'a Versioned<Stored<VmSpec>>,
    /// What it was made from.
    pub template: &'a str,
    /// That is the template of now.
    pub current: bool,
    /// It is well.
    pub ready: bool,
    /// Since when, without a break.
    pub ready_since_ms: Option<i64>,
    /// It runs and was well: clients may be on it, also when it is not well now. It may have more to do than it can.
    pub serves: bool,
    /// Its host is drained, and it cannot move.
    pub leaves: bool,
    /// It gets nothing: the traffic goes to members of other templates.
    pub idle: bool,
    /// When its template was let into the whole service.
    pub released_ms: Option<i64>,
    /// When draining began.
    pub draining: Option<i64>,
}

impl<'a> Member<'a> {
    pub fn of(
        snapshot: &Snapshot,
        seen: &Observations,
        name: &'a Name,
        object: &'a Versioned<Stored<VmSpec>>,
        frontend: Option<&FrontendPlacement>,
        template: &str,
    ) -> Self {
        let checked = object.spec.check.is_some();
        let status = snapshot.told_of(name).filter(|s| s.phase == VmPhase::Running);
        let ready = status.is_some_and(|s| !checked || s.ready == Some(true));
        let serves = ready || status.is_some_and(|s| s.ready_ms.is_some());
        let since = if checked {
            status.and_then(|s| s.ready_since_ms.or(s.ready_ms))
        } else {
            status.map(|s| s.started_ms.unwrap_or(s.since_ms))
        };
        // Every balancer takes it out on mere suspicion.
        let host = snapshot.placements.get(name).map(|placement| &placement.host);
        let ready = ready && !host.is_some_and(|host| seen.suspected.contains(host));
        let leaves = host.is_some_and(|host| drain::is_replaced(snapshot, object, host));
        let labels = &object.meta.labels;
        let own = labels.get(TEMPLATE_LABEL).map_or("", String::as_str);
        let time = |label: &str| labels.get(label).map(|at| at.parse().unwrap_or(0));
        Self {
            name,
            object,
            template: own,
            current: own == template,
            ready,
            ready_since_ms: since.filter(|_| ready),
            serves,
            leaves,
            idle: frontend.is_some_and(|frontend| frontend.gets_nothing(own)),
            released_ms: time(RELEASE_LABEL),
            draining: time(DRAIN_LABEL),
        }
    }

    /// Writes a label.
    pub fn mark(&self, work: &mut Work<'_>, label: &str, at_ms: i64, reason: String) {
        let mut object = (*self.object.value).clone();
        object.meta.labels.insert(label.into(), at_ms.to_string());
        self.put(work, object, reason);
    }

    pub fn delete(&self, work: &mut Work<'_>, reason: String) {
        let mut object = (*self.object.value).clone();
        object.meta.deleting = true;
        self.put(work, object, reason);
    }

    fn put(&self, work: &mut Work<'_>, object: Stored<VmSpec>, reason: String) {
        let action = Action::PutObject {
            object: Box::new(Object::Vm(object)),
            expected_revision: self.object.revision,
        };
        work.act(vm_ref(self.name), reason, action);
    }

    /// Drains it, and deletes it once it has had its time; when it does not serve anybody, at once.
    pub fn retire(&self, work: &mut Work<'_>, why: &str) {
        match self.draining.map(|since| work.passed_ms(since)) {
            None if !self.serves => self.delete(work, format!("{} goes: {why}", self.name)),
            None | Some(None) => {
                let now = work.seen.now_ms;
                self.mark(work, DRAIN_LABEL, now, format!("{} is drained: {why}", self.name));
            }
            Some(Some(passed)) if passed >= DRAIN_MS => {
                self.delete(work, format!("{} is drained and goes: {why}", self.name));
            }
            Some(Some(passed)) => work.wake(DRAIN_MS - passed),
        }
    }

    /// Its number among the members.
    pub fn number(&self) -> u32 {
        self.name.as_str().rsplit_once('-').and_then(|(_, n)| n.parse().ok()).unwrap_or(0)
    }
}
