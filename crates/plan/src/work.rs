//! What one planning round has at hand: the inputs, tables made once from them, and the plan so far.

use crate::{
    placement::{capacity::Room, names::Taken},
    tolerance::{
        drain::Moves,
        hosts::{HostState, host_states},
        uplink::CutOff,
    },
};
use haven_model::{
    Action, Name, ObjectRef, Observations, Plan, Planned, Snapshot, Timers, Waiting, object::Kind,
    plan::MoveStep,
};
use std::collections::{BTreeMap, BTreeSet};

/// How the traffic of a service is to be split, and why.
pub struct Split {
    pub traffic: BTreeMap<String, u32>,
    pub why: String,
}

pub struct Work<'a> {
    pub snapshot: &'a Snapshot,
    pub seen: &'a Observations,
    pub timers: Timers,
    pub states: BTreeMap<Name, HostState>,
    /// What nobody outside reaches on which hosts.
    pub cut_off: CutOff<'a>,
    /// Room left per usable host, less what this plan has given away already.
    pub room: Room<'a>,
    /// Slots and addresses in use, with what this plan has given away already.
    pub taken: Taken,
    /// Moves that are under way, with what this plan has begun already.
    pub moves: Moves,
    /// By service.
    pub splits: BTreeMap<Name, Split>,
    /// The number of the last incident, with those that this plan opens.
    pub incidents: u64,
    /// VMs that this plan gives another placement. The next plan sees what came of it.
    placed: BTreeSet<Name>,
    plan: Plan,
}

impl<'a> Work<'a> {
    pub fn new(snapshot: &'a Snapshot, seen: &'a Observations) -> Self {
        let states = host_states(snapshot, seen);
        let cut_off = CutOff::of(snapshot, &states);
        let room = Room::of(snapshot, &states);
        let taken = Taken::of(snapshot);
        let moves = Moves::of(snapshot);
        let timers = snapshot.cluster_spec().timers.clone();
        let (splits, plan) = (BTreeMap::new(), Plan::default());
        let incidents = crate::monitor::incidents::last_number(snapshot);
        Self {
            snapshot,
            seen,
            timers,
            states,
            cut_off,
            room,
            taken,
            moves,
            splits,
            incidents,
            placed: BTreeSet::new(),
            plan,
        }
    }

    pub fn act(&mut self, object: ObjectRef, reason: String, action: Action) {
        if let Action::PlaceVm { vm, .. }
        | Action::TryElsewhere { vm, .. }
        | Action::MoveVm { vm, .. } = &action
            && !self.placed.insert(vm.clone())
        {
            // The first stands.
            return;
        }
        if let Some(key) = unreadable(self.snapshot, &object, &action) {
            let why = format!(
                "waiting: {object} is left as it is, because the record {key} cannot be read by this version of Haven; update the managing host"
            );
            return self.wait(object, why);
        }
        self.plan.actions.push(Planned { object, reason, action });
    }

    pub fn wait(&mut self, object: ObjectRef, reason: String) {
        self.plan.waiting.push(Waiting { object, reason });
    }

    /// How long ago this was by the manager's clock, milliseconds. Nothing when it lies ahead: the clock was set back, or
    /// it was another host's that goes before this one's. Whoever waits for a time to pass then waits no longer, or anew.
    pub fn passed_ms(&self, at_ms: i64) -> Option<u64> {
        u64::try_from(self.seen.now_ms - at_ms).ok()
    }

    /// Plan again after `ms` at the latest.
    pub fn wake(&mut self, ms: u64) {
        let ms = ms.max(5);
        self.plan.wake_after_ms = Some(self.plan.wake_after_ms.map_or(ms, |now| now.min(ms)));
    }

    /// Whether this plan does anything yet.
    pub fn acts(&self) -> bool {
        !self.plan.actions.is_empty()
    }

    pub fn finish(self) -> Plan {
        self.plan
    }
}

/// A record that this action rests on, and that is there and cannot be read.
fn unreadable<'a>(snapshot: &'a Snapshot, object: &ObjectRef, action: &Action) -> Option<&'a str> {
    if snapshot.unreadable.is_empty() {
        return None;
    }
    let cluster = snapshot.unreadable_under("cluster").filter(|_| snapshot.cluster.is_none());
    let own = cluster.or_else(|| snapshot.unreadable_of(object));
    own.or_else(|| match action {
        // It may have the number or the address that a newcomer would get.
        // Nor is it known how much memory it takes.
        Action::PlaceVm { expected_revision: 0, .. } => snapshot
            .unreadable_under("placement/vm/")
            .or_else(|| snapshot.unreadable_under("spec/vm/")),
        // Nor need this be done blindly.
        Action::TryElsewhere { .. } => snapshot
            .unreadable_under("placement/vm/")
            .or_else(|| snapshot.unreadable_under("spec/vm/")),
        // Planned work need not be done beside VMs of which it is not known what they must be apart from.
        Action::MoveVm { step: MoveStep::Begin, .. } => snapshot
            .unreadable_under("placement/vm/")
            .or_else(|| snapshot.unreadable_under("spec/vm/")),
        Action::PutVolume { volume, .. } => snapshot
            .unreadable_under(&format!("volumes/{volume}"))
            .or_else(|| snapshot.unreadable_under("spec/pool/")),
        Action::PutClients { vm, .. } => snapshot
            .unreadable_under(&format!("clients/{vm}"))
            .or_else(|| snapshot.unreadable_under("spec/pool/")),
        Action::PutBackup { vm, .. } => snapshot.unreadable_under(&format!("backups/{vm}")),
        Action::PutVmSnapshot { vm, .. } => {
            let uid = snapshot.vms.get(vm).map_or("", |vm| vm.meta.uid.as_str());
            snapshot.unreadable_under(&format!("snapshots/{uid}/"))
        }
        Action::PutIncident { .. } => snapshot.unreadable_under("incidents/"),
        // It may need what would be removed.
        Action::RemoveObject { .. } => snapshot.unreadable_under("spec/"),
        _ => None,
    })
}

pub fn vm_ref(name: &Name) -> ObjectRef {
    ObjectRef::new(Kind::Vm, name.clone())
}
pub fn host_ref(name: &Name) -> ObjectRef {
    ObjectRef::new(Kind::Host, name.clone())
}
pub fn service_ref(name: &Name) -> ObjectRef {
    ObjectRef::new(Kind::Service, name.clone())
}
