//! Tests of blue-green and canary, walked step by step: who is made, who gets how much, who goes.

use crate::{
    balance::services::{progress, promotable, template_hash},
    check, plan,
    testing::{World, at, name},
};
use haven_model::{
    Action, Bytes, Name, Plan, ProofKind, ServiceSpec, VmPhase, keys,
    service::{DRAIN_LABEL, TEMPLATE_LABEL},
};
use serde_json::{Value, json};

/// A service `web` whose guests answer, and whose members may be told to be ill.
struct Walk {
    world: World,
    /// Members made from templates of this memory never get ready.
    bad: Vec<Bytes>,
    hosts: usize,
}

const V1: Bytes = Bytes::mib(128);
const V2: Bytes = Bytes::mib(256);
const V3: Bytes = Bytes::mib(192);

impl Walk {
    /// `replicas` members of the first version that run, updated as this says.
    fn new(hosts: usize, memory: Bytes, replicas: u32, update: &Value, address: bool) -> Self {
        let mut world = World::new(hosts, memory);
        world.service("web", replicas);
        let mut walk = Self { world, bad: Vec::new(), hosts };
        walk.change(|spec| {
            spec.update = serde_json::from_value(update.clone()).unwrap();
            spec.check = Some(serde_json::from_value(json!({"port": 80})).unwrap());
            spec.frontend = address
                .then(|| serde_json::from_value(json!({"address": "10.88.0.100", "port": 80})))
                .map(Result::unwrap);
        });
        walk.rounds(6);
        assert_eq!(walk.count(V1), replicas as usize, "{:?}", walk.members());
        walk
    }

    fn change(&mut self, change: impl FnOnce(&mut ServiceSpec)) {
        let mut service = (*self.world.snapshot.services["web"].value).clone();
        change(&mut service.spec);
        self.world.snapshot.revision += 1;
        let revision = self.world.snapshot.revision;
        self.world.snapshot.services.insert(name("web"), at(revision, service));
    }

    fn version(&mut self, memory: Bytes) {
        self.change(|spec| spec.template.spec.memory = memory);
    }

    fn hash(&self, memory: Bytes) -> String {
        let mut spec = self.world.snapshot.services["web"].spec.clone();
        spec.template.spec.memory = memory;
        template_hash(&spec)
    }

    fn planned(&self) -> Plan {
        let plan = plan(&self.world.snapshot, &self.world.seen);
        check(&self.world.snapshot, &plan).unwrap();
        plan
    }

    /// One action is committed.
    fn commit(&mut self, action: &Action) {
        let snapshot = &mut self.world.snapshot;
        snapshot.revision += 1;
        let (key, value) = match action {
            Action::PutObject { object, .. } => {
                (keys::object(&object.reference()), Some(object.to_store()))
            }
            Action::PlaceVm { vm, placement, .. } => {
                (keys::placement(vm), Some(serde_json::to_vec(placement).unwrap()))
            }
            Action::PlaceFrontend { service, placement, .. } => {
                (keys::frontend(service), Some(serde_json::to_vec(placement).unwrap()))
            }
            Action::ReleaseVm { vm, .. } => (keys::placement(vm), None),
            Action::RemoveObject { object, .. } => (keys::object(object), None),
            _ => return,
        };
        let revision = snapshot.revision;
        snapshot.apply(&key, value.as_deref().map(|value| (value, revision)));
    }

    /// Commits a plan action by action; no step takes traffic from members below the floor.
    fn step(&mut self) {
        for planned in self.planned().actions {
            let (before, floor) = (self.getting(), self.floor());
            self.commit(&planned.action);
            let after = self.getting();
            assert!(
                after >= before.min(floor),
                "`{}` leaves {after} of {before}, and {floor} must stay",
                planned.reason
            );
        }
    }

    /// Agents do what they are told, after which the manager plans; so many times, a second each.
    fn rounds(&mut self, rounds: usize) {
        for _ in 0..rounds {
            self.step();
            self.agents();
            self.world.seen.now_ms += 1000;
        }
    }

    fn agents(&mut self) {
        let vms: Vec<Name> = self.world.snapshot.placements.keys().cloned().collect();
        for vm in vms {
            let object = &self.world.snapshot.vms[&vm];
            let (gone, bad) = (object.meta.deleting, self.bad.contains(&object.spec.memory));
            let closed =
                self.world.snapshot.leases[&self.world.snapshot.placements[&vm].host].closed;
            if closed {
                continue;
            }
            let phase = if gone { VmPhase::Stopped } else { VmPhase::Running };
            self.world.report(vm.as_str(), phase, (!gone).then_some(!bad));
            let mut status = (*self.world.snapshot.vm_status[&vm].value).clone();
            if gone {
                status.message = "deleted".into();
            }
            if bad {
                status.ready_ms = None;
            }
            self.world.snapshot.vm_status.insert(vm, at(8, status));
        }
    }

    /// Ready members that get traffic, seen apart from the code that plans.
    fn getting(&self) -> usize {
        let snapshot = &self.world.snapshot;
        let frontend = snapshot.frontends.get("web");
        let service = name("web");
        let gets = |(vm, object): &(&Name, &haven_model::Versioned<_>)| {
            let object: &haven_model::object::Stored<haven_model::VmSpec> = object;
            let template = &object.meta.labels[TEMPLATE_LABEL];
            let idle = frontend.is_some_and(|frontend| frontend.gets_nothing(template));
            let goes = object.meta.deleting || object.meta.labels.contains_key(DRAIN_LABEL);
            let ready = snapshot.told_of(vm).is_some_and(|s| s.ready == Some(true));
            ready && !idle && !goes
        };
        snapshot.members(&service).filter(gets).count()
    }

    fn floor(&self) -> usize {
        let spec = &self.world.snapshot.services["web"].spec;
        spec.replicas.saturating_sub(spec.update.max_unavailable) as usize
    }

    /// Members of a version that stay.
    fn count(&self, memory: Bytes) -> usize {
        let stays = |vm: &&haven_model::Versioned<haven_model::object::Stored<_>>| {
            !vm.meta.deleting && !vm.meta.labels.contains_key(DRAIN_LABEL)
        };
        let vms = self.world.snapshot.vms.values().filter(stays);
        vms.filter(|vm| vm.spec.memory == memory).count()
    }

    fn members(&self) -> (usize, usize, usize) {
        (self.count(V1), self.count(V2), self.count(V3))
    }

    /// What a version's members get; none when all share evenly.
    fn share(&self, memory: Bytes) -> Option<u32> {
        let traffic = &self.world.snapshot.frontends.get("web")?.traffic;
        let left = 100 - traffic.values().sum::<u32>();
        (!traffic.is_empty()).then(|| traffic.get(&self.hash(memory)).copied().unwrap_or(left))
    }

    fn says(&self) -> String {
        let service = World::reference("service/web");
        crate::explain(&self.world.snapshot, &self.world.seen, &service).join("\n")
    }

    fn promote(&mut self) -> Result<(), String> {
        let template = promotable(&self.world.snapshot, &self.world.seen, &name("web"));
        let template = template.map_err(|(why, _)| why)?;
        self.change(|spec| spec.promoted = Some(template));
        Ok(())
    }

    fn lose(&mut self, host: &str) {
        self.world.lost(host, ProofKind::LeaseExpired);
    }

    /// A host that has a member of this version.
    fn host_of(&self, memory: Bytes) -> String {
        let is = |vm: &&Name| self.world.snapshot.vms[*vm].spec.memory == memory;
        let placements = &self.world.snapshot.placements;
        let vm = placements.keys().find(is).or(placements.keys().next()).unwrap();
        placements[vm].host.to_string()
    }

    /// Only the current version is left, with all traffic, and nothing is done any more.
    fn settled(&self, memory: Bytes) {
        let replicas = self.world.snapshot.services["web"].spec.replicas as usize;
        assert_eq!(self.count(memory), replicas, "{:?} {}", self.members(), self.says());
        assert_eq!(
            self.world.snapshot.vms.values().filter(|vm| !vm.meta.deleting).count(),
            replicas
        );
        assert_eq!(self.share(memory), None);
        let mut actions = self.planned().actions;
        actions.retain(|planned| !matches!(planned.action, Action::PutIncident { .. }));
        assert!(actions.is_empty(), "{actions:?}");
        let of = progress(&self.world.snapshot, &self.world.seen, &name("web")).unwrap();
        assert_eq!((of.step, of.traffic), (None, None));
    }
}

fn canary() -> Value {
    json!({"strategy": "canary", "canary": {"members": 1, "weight": 10, "hold": "60s"}})
}

fn blue_green() -> Value {
    json!({"strategy": "blue-green", "keepOld": "30s"})
}

fn three(update: &Value) -> Walk {
    Walk::new(3, Bytes::gib(8), 3, update, true)
}

#[test]
fn a_canary_gets_its_share_holds_and_then_the_rest_follows() {
    let mut walk = three(&canary());
    walk.version(V2);
    walk.step();
    assert_eq!((walk.members(), walk.share(V2)), ((3, 0, 0), Some(0)), "the balancers know first");
    walk.step();
    assert_eq!(walk.members(), (3, 1, 0));
    assert!(walk.says().contains("canary: 0 of 1 new member ready; the old ones get all traffic"));
    walk.rounds(4);
    assert_eq!((walk.members(), walk.share(V2), walk.share(V1)), ((3, 1, 0), Some(10), Some(90)));
    let said = walk.says();
    assert!(said.contains("1 new member with 10 % of the traffic, 1 of them ready"), "{said}");
    assert!(said.contains("the rest follows when they have been ready for 1m"), "{said}");
    let wakes = walk.planned().wake_after_ms.unwrap();
    assert!((50_000..=60_000).contains(&wakes), "{wakes}");
    walk.rounds(50);
    assert_eq!((walk.members(), walk.share(V2)), ((3, 1, 0), Some(10)), "it holds");
    walk.rounds(40);
    walk.settled(V2);
}

#[test]
fn a_canary_that_is_ill_for_a_moment_begins_its_hold_anew() {
    let mut walk = three(&canary());
    walk.version(V2);
    walk.rounds(40);
    walk.bad.push(V2);
    walk.rounds(2);
    walk.bad.clear();
    walk.rounds(40);
    assert_eq!(walk.members(), (3, 1, 0), "40 s have passed since, of 60 s");
    walk.rounds(60);
    walk.settled(V2);
}

#[test]
fn a_canary_without_a_hold_waits_for_a_person() {
    let mut walk = three(&json!({"strategy": "canary", "canary": {"members": 2, "weight": 25}}));
    assert!(walk.promote().unwrap_err().contains("are made from its template already"));
    walk.version(V2);
    walk.rounds(2);
    assert!(walk.promote().unwrap_err().contains("not all ready yet"));
    walk.rounds(500);
    assert_eq!((walk.members(), walk.share(V2)), ((3, 2, 0), Some(25)));
    assert!(
        walk.says().contains("`haven service promote web` replaces the rest"),
        "{}",
        walk.says()
    );
    walk.promote().unwrap();
    assert!(walk.promote().unwrap_err().contains("is let in already"));
    walk.rounds(30);
    walk.settled(V2);
    // Who promoted that version has not promoted the next.
    walk.version(V3);
    walk.rounds(50);
    assert_eq!(walk.members(), (0, 3, 2));
}

#[test]
fn blue_green_waits_for_all_switches_at_once_keeps_the_old_ones_and_ends() {
    let mut walk = three(&blue_green());
    walk.version(V2);
    walk.bad.push(V2);
    walk.rounds(20);
    assert_eq!((walk.members(), walk.share(V2), walk.share(V1)), ((3, 3, 0), Some(0), Some(100)));
    assert!(walk.says().contains("0 of 3 new members ready; the old ones get all traffic"));
    walk.bad.clear();
    walk.agents();
    walk.world.report(&walk.last_of(V2), VmPhase::Running, Some(false));
    walk.step();
    assert_eq!(walk.share(V2), Some(0), "two of three are not all");
    walk.rounds(3);
    assert_eq!((walk.members(), walk.share(V2), walk.share(V1)), ((3, 3, 0), Some(100), Some(0)));
    assert!(walk.says().contains("3 old members kept for 30s to go back to"), "{}", walk.says());
    assert!(walk.promote().is_err());
    walk.rounds(25);
    assert_eq!(walk.members(), (3, 3, 0), "30 s are not over");
    walk.rounds(20);
    walk.settled(V2);
}

impl Walk {
    fn last_of(&self, memory: Bytes) -> String {
        let mut vms = self.world.snapshot.vms.iter().filter(|(_, vm)| vm.spec.memory == memory);
        vms.next_back().unwrap().0.to_string()
    }
}

#[test]
fn blue_green_by_hand_waits_for_a_person() {
    let mut walk = three(&json!({"strategy": "blue-green", "promote": "manual"}));
    walk.version(V2);
    walk.rounds(100);
    assert_eq!((walk.members(), walk.share(V2)), ((3, 3, 0), Some(0)));
    assert!(walk.says().contains("`haven service promote web` gives it to the new ones"));
    walk.promote().unwrap();
    walk.step();
    assert_eq!(walk.share(V2), Some(100), "one step");
    walk.rounds(60);
    walk.settled(V2);
}

#[test]
fn blue_green_by_itself_cannot_be_promoted() {
    let mut walk = three(&blue_green());
    walk.version(V2);
    walk.rounds(2);
    assert!(walk.promote().unwrap_err().contains("switches by itself"));
    walk.change(|spec| *spec.update = Default::default());
    assert!(walk.promote().unwrap_err().contains("by `rolling`, which waits for nobody"));
}

#[test]
fn going_back_to_kept_members_is_one_step() {
    let mut walk = three(&json!({"strategy": "blue-green", "promote": "manual", "keepOld": "5m"}));
    walk.version(V2);
    walk.rounds(6);
    walk.promote().unwrap();
    walk.rounds(6);
    assert_eq!((walk.members(), walk.share(V2)), ((3, 3, 0), Some(100)));
    walk.version(V1);
    walk.step();
    assert_eq!((walk.share(V1), walk.share(V2)), (Some(100), Some(0)), "nobody promotes it");
    walk.rounds(330);
    walk.settled(V1);
}

#[test]
fn going_back_before_the_switch_only_ends_the_new_members() {
    for update in [blue_green(), canary()] {
        let mut walk = three(&update);
        walk.version(V2);
        walk.rounds(3);
        assert!(walk.count(V2) > 0);
        walk.version(V1);
        walk.step();
        assert_eq!(walk.share(V2), Some(0), "{update}");
        walk.rounds(10);
        walk.settled(V1);
    }
}

#[test]
fn going_back_while_the_rest_is_replaced_waits_for_no_hold() {
    let mut walk = three(&canary());
    walk.version(V2);
    while walk.count(V2) < 2 {
        walk.rounds(1);
    }
    assert!(walk.count(V1) > 0);
    walk.version(V1);
    walk.rounds(20);
    walk.settled(V1);
}

#[test]
fn a_version_that_never_gets_ready_harms_nobody() {
    for update in [blue_green(), canary()] {
        for address in [true, false] {
            let mut walk = Walk::new(3, Bytes::gib(8), 3, &update, address);
            walk.bad.push(V2);
            walk.version(V2);
            walk.rounds(1000);
            assert_eq!(walk.count(V1), 3);
            assert_eq!(walk.share(V2), address.then_some(0), "{update}");
            assert!(walk.says().contains("0 of"), "{}", walk.says());
            // Another that is good takes its place.
            walk.version(V3);
            walk.rounds(120);
            walk.settled(V3);
        }
    }
}

#[test]
fn a_host_lost_in_the_middle_delays_and_breaks_nothing() {
    for update in [blue_green(), canary()] {
        for of in [V1, V2] {
            for when in [2, 4, 8, 64] {
                let mut walk = Walk::new(4, Bytes::gib(8), 3, &update, true);
                assert_eq!(walk.hosts, 4);
                walk.version(V2);
                walk.rounds(when);
                let version = if walk.count(of) > 0 { of } else { V2 };
                let host = walk.host_of(version);
                walk.lose(&host);
                walk.rounds(140);
                walk.settled(V2);
            }
        }
    }
}

#[test]
fn old_members_serve_again_when_no_new_one_is_left() {
    let mut walk = three(&json!({"strategy": "blue-green", "keepOld": "10m"}));
    walk.version(V2);
    walk.rounds(8);
    assert_eq!(walk.share(V2), Some(100));
    for (vm, object) in walk.world.snapshot.vms.clone() {
        if object.spec.memory == V2 {
            walk.world.snapshot.vm_status.remove(&vm);
        }
    }
    walk.step();
    assert_eq!((walk.share(V1), walk.share(V2)), (Some(100), Some(0)));
    walk.rounds(3);
    assert_eq!(walk.share(V2), Some(100), "they are back");
}

#[test]
fn a_template_changed_again_gives_the_one_between_up() {
    for update in [blue_green(), canary()] {
        for when in [2, 6] {
            let mut walk = three(&update);
            walk.version(V2);
            walk.rounds(when);
            walk.version(V3);
            walk.rounds(6);
            let (old, between, _) = walk.members();
            assert!(between == 0 || old == 0, "{update} after {when}: {:?}", walk.members());
            walk.rounds(160);
            walk.settled(V3);
        }
    }
}

#[test]
fn a_version_that_was_given_up_counts_for_no_old_member() {
    let mut walk = three(&canary());
    walk.version(V2);
    walk.rounds(6);
    assert_eq!(walk.share(V2), Some(10));
    walk.bad.push(V3);
    walk.version(V3);
    walk.change(|spec| spec.replicas = 4);
    walk.rounds(12);
    assert_eq!((walk.members(), walk.getting()), ((4, 0, 1), 4), "{}", walk.says());
}

#[test]
fn strategies_changed_in_the_middle_end_as_the_last_one() {
    let all = [blue_green(), canary(), json!({"strategy": "rolling"})];
    for (first, then) in all.iter().flat_map(|a| all.iter().map(move |b| (a, b))) {
        for when in [1, 2, 3, 4, 6, 10] {
            let mut walk = three(first);
            walk.version(V2);
            walk.rounds(when);
            walk.change(|spec| spec.update = serde_json::from_value(then.clone()).unwrap());
            walk.rounds(140);
            walk.settled(V2);
        }
    }
}

#[test]
fn scaling_in_the_middle_counts_the_old_members() {
    for update in [blue_green(), canary()] {
        let mut walk = three(&update);
        walk.bad.push(V2);
        walk.version(V2);
        walk.rounds(5);
        walk.change(|spec| spec.replicas = 5);
        walk.rounds(5);
        assert_eq!((walk.count(V1), walk.getting()), (5, 5), "{update}");
        walk.change(|spec| spec.replicas = 2);
        walk.rounds(6);
        assert_eq!((walk.count(V1), walk.getting()), (2, 2), "{update}");
        walk.bad.clear();
        walk.rounds(120);
        walk.settled(V2);
    }
}

#[test]
fn what_does_not_fit_waits_and_says_so_while_the_old_ones_serve() {
    for update in [blue_green(), canary()] {
        // Room for two members each.
        let mut walk = Walk::new(2, Bytes::mib(450), 4, &update, true);
        walk.version(V2);
        walk.rounds(20);
        assert_eq!((walk.count(V1), walk.getting(), walk.share(V2)), (4, 4, Some(0)));
        let said = walk.says();
        assert!(said.contains("new member") && said.contains("largest free is"), "{said}");
    }
    // Members that must stand apart find no host beside the old ones.
    let mut walk = three(&blue_green());
    walk.change(|spec| spec.spread.required = true);
    walk.version(V2);
    walk.rounds(20);
    assert_eq!((walk.count(V1), walk.share(V2)), (3, Some(0)));
    assert!(walk.says().contains("shares its host with another member"), "{}", walk.says());
}

#[test]
fn without_an_address_members_are_replaced_in_the_same_order() {
    for update in [blue_green(), canary()] {
        let mut walk = Walk::new(3, Bytes::gib(8), 3, &update, false);
        walk.version(V2);
        walk.rounds(6);
        assert_eq!(walk.count(V1), 3, "{update}");
        walk.rounds(120);
        walk.settled(V2);
    }
}

#[test]
fn a_split_that_cannot_be_read_stops_the_update() {
    let mut walk = three(&blue_green());
    walk.version(V2);
    walk.rounds(2);
    walk.world.snapshot.frontends.remove("web");
    walk.world.snapshot.unreadable.insert("placement/frontend/web".into(), 9);
    walk.rounds(60);
    assert_eq!(walk.count(V1), 3, "nobody knows whether they have the traffic");
}

#[test]
fn an_address_that_moves_keeps_the_split() {
    let mut walk = three(&canary());
    walk.version(V2);
    walk.rounds(6);
    let before = walk.world.snapshot.frontends["web"].clone();
    assert_eq!(before.claimed_by(&name("host2")).traffic, before.traffic);
    walk.lose(before.holder.as_str());
    walk.step();
    let after = &walk.world.snapshot.frontends["web"];
    assert!(after.holder != before.holder && after.epoch == before.epoch + 1);
    assert!(after.traffic.values().sum::<u32>() <= 10 && !after.traffic.is_empty());
}
