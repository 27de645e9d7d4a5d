//! One host after another: each step when the one before has come true, and none after a doubt.

use super::maintenance::{in_turn, resumed};
use crate::{
    check, plan,
    testing::{World, at, name, vm_spec},
};
use haven_model::{
    Action, Bytes, Drain, HostStatus, Maintenance, VmPhase,
    maintenance::{Phase, Turn, Work, WorkState, WorkStatus},
};

fn asked(world: &mut World, work: Work) {
    let turn = |host: &str| Turn {
        host: name(host),
        phase: Phase::Waiting,
        since_ms: world.seen.now_ms,
        boot_id: String::new(),
        version: String::new(),
        problems: Vec::new(),
        voted: false,
    };
    let maintenance = Maintenance {
        id: "m1".into(),
        work,
        by: "ann".into(),
        at_ms: world.seen.now_ms,
        hosts: vec![turn("host1"), turn("host2")],
        stopped: None,
        ended_ms: None,
    };
    world.snapshot.maintenance = Some(at(50, maintenance));
}

/// Three hosts, each with a member of the store, and a VM on the first.
fn world(work: Work) -> World {
    let mut world = World::new(3, Bytes::gib(16));
    for host in ["host1", "host2", "host3"] {
        status(&mut world, host, |status| {
            status.etcd_member = Some(7);
            status.boot_id = "first".into();
            status.version = "1".into();
        });
    }
    world.vm("db", vm_spec(Bytes::gib(1)));
    world.run("db", "host1");
    asked(&mut world, work);
    world
}

fn status(world: &mut World, host: &str, change: impl FnOnce(&mut HostStatus)) {
    let mut status = (*world.snapshot.host_status[host].value).clone();
    change(&mut status);
    world.snapshot.host_status.insert(name(host), at(2, status));
}

fn of(world: &World) -> &Maintenance {
    &world.snapshot.maintenance.as_ref().unwrap().value
}

fn phases(world: &World) -> Vec<Phase> {
    of(world).hosts.iter().map(|turn| turn.phase).collect()
}

/// Plans, and does what the plan says of drains and of this; the reasons of all that.
fn round(world: &mut World) -> Vec<String> {
    let plan = plan(&world.snapshot, &world.seen);
    check(&world.snapshot, &plan).unwrap();
    let mut said = Vec::new();
    for planned in plan.actions {
        match planned.action {
            Action::PutMaintenance { maintenance, expected_revision } => {
                let now = world.snapshot.maintenance.as_ref().unwrap().revision;
                assert_eq!(expected_revision, now);
                world.snapshot.maintenance = Some(at(now + 1, *maintenance));
            }
            Action::PutDrain { host, drain: Some(drain), .. } => {
                world.snapshot.drains.insert(host, at(60, drain));
            }
            Action::PutDrain { host, drain: None, .. } => {
                world.snapshot.drains.remove(&host);
            }
            _ => continue,
        }
        said.push(planned.reason);
    }
    if said.is_empty() {
        said.extend(plan.waiting.into_iter().map(|waiting| waiting.reason));
    }
    said
}

fn moves(world: &mut World, vm: &str, host: &str) {
    world.snapshot.placements.remove(&name(vm));
    world.run(vm, host);
}

fn passes(world: &mut World, seconds: i64) {
    world.seen.now_ms += seconds * 1000;
}

fn told(world: &mut World, host: &str, state: WorkState, message: &str) {
    let told = WorkStatus { maintenance: "m1".into(), state, message: message.into() };
    world.snapshot.work_status.insert(name(host), at(70, told));
}

/// Until the first host is worked on.
fn emptied(world: &mut World) {
    assert_eq!(round(world), ["host1 is to be emptied for its reboot, as ann asked"]);
    assert_eq!(round(world)[0], "host1 is drained for its reboot");
    assert!(round(world)[0].contains("waits until it is empty: 1 VMs are left"));
    moves(world, "db", "host2");
    let said = round(world);
    assert!(said.contains(&"host1 is empty: its reboot begins".to_owned()), "{said:?}");
    assert_eq!(phases(world), [Phase::Working, Phase::Waiting]);
}

#[test]
fn a_host_is_emptied_restarted_looked_at_and_gets_back_what_it_had() {
    let mut world = world(Work::Reboot);
    emptied(&mut world);
    assert!(of(&world).works_on(&name("host1")) && !of(&world).works_on(&name("host2")));
    // It is silent while it restarts, and nobody switches it off for that.
    world.silent("host1", 4000, false);
    world.seen.suspected.insert(name("host1"));
    let mut with_power = (*world.snapshot.hosts["host1"].value).clone();
    with_power.spec.power = serde_json::from_value(serde_json::json!({"url": "sim:"})).unwrap();
    world.snapshot.hosts.insert(name("host1"), at(1, with_power));
    let silent = plan(&world.snapshot, &world.seen);
    let power =
        |action: &Action| matches!(action, Action::PowerOff { .. } | Action::ReadPower { .. });
    assert!(!silent.actions.iter().any(|planned| power(&planned.action)), "{silent:?}");
    assert!(round(&mut world)[0].contains("the reboot of host1 is under way"));
    world.seen.suspected.clear();
    world.silent("host1", 100, false);
    assert!(round(&mut world)[0].contains("under way"), "it is the boot of before");
    status(&mut world, "host1", |status| status.boot_id = "second".into());
    assert_eq!(round(&mut world), ["host1 was restarted and is back"]);
    assert!(round(&mut world)[0].contains("must stay well for 10 s"));
    passes(&mut world, 10);
    status(&mut world, "host1", |status| status.etcd_silent = true);
    assert!(round(&mut world)[0].contains("the store's member on host1 does not answer"));
    status(&mut world, "host1", |status| status.etcd_silent = false);
    assert_eq!(round(&mut world), ["host1 is well after its reboot: it takes VMs again"]);
    assert!(round(&mut world).contains(&"host1 gets back what had left it for its reboot".into()));
    // Nothing of it is away, so the drain's record goes, and with it this host is done.
    round(&mut world);
    let said = round(&mut world);
    assert!(said.contains(&"the reboot of host1 is over".to_owned()), "{said:?}");
    assert_eq!(phases(&world), [Phase::Done, Phase::Waiting]);
    assert_eq!(round(&mut world), ["host2 is to be emptied for its reboot, as ann asked"]);
}

#[test]
fn the_first_doubt_stops_it_and_no_other_host_is_touched() {
    // A host that is missing for long.
    let mut other = world(Work::Reboot);
    other.silent("host3", 3000, false);
    assert!(round(&mut other)[0].contains("the reboot of host1 waits: host3 is silent"));
    passes(&mut other, 121);
    assert!(
        round(&mut other)[0].starts_with("the reboot of hosts stops: the reboot of host1 waits")
    );
    assert!(of(&other).stopped.is_some() && phases(&other) == [Phase::Waiting, Phase::Waiting]);
    assert!(round(&mut other)[0].contains("`haven host maintenance --resume` goes on"));
    // A voter too many.
    let mut store = world(Work::Reboot);
    status(&mut store, "host3", |status| status.etcd_silent = true);
    assert!(round(&mut store)[0].starts_with("waiting: the reboot of host1 waits: "));
    // A VM that does not run.
    let mut ended = world(Work::Reboot);
    ended.vm("mail", vm_spec(Bytes::gib(1)));
    ended.run("mail", "host3");
    ended.report("mail", VmPhase::Failed, None);
    assert!(round(&mut ended).iter().any(|said| said.contains("waits: mail does not run")));
    // Work that fails.
    let mut failed = world(Work::Reboot);
    emptied(&mut failed);
    told(&mut failed, "host1", WorkState::Failed, "no space left");
    let why = "the reboot of host1 failed: no space left";
    assert_eq!(round(&mut failed), [format!("the reboot of hosts stops: {why}")]);
    // A host that does not come back.
    let mut gone = world(Work::Reboot);
    emptied(&mut gone);
    gone.silent("host1", 1_000_000, false);
    passes(&mut gone, 1801);
    assert!(
        round(&mut gone)
            .iter()
            .any(|said| said.contains("stops: the reboot of host1 is under way"))
    );
    // One that is worse than before.
    let mut worse = world(Work::Reboot);
    emptied(&mut worse);
    status(&mut worse, "host1", |status| {
        status.boot_id = "second".into();
        status.problems = vec!["no KVM".into()];
    });
    round(&mut worse);
    passes(&mut worse, 301);
    assert!(round(&mut worse)[0].contains("stops: host1 says: no KVM"));
    assert_eq!(phases(&worse), [Phase::Settling, Phase::Waiting]);
}

#[test]
fn an_upgrade_is_done_once_its_agent_says_so() {
    let mut world = world(Work::Upgrade);
    moves(&mut world, "db", "host3");
    for _ in 0..3 {
        round(&mut world);
    }
    assert_eq!(phases(&world), [Phase::Working, Phase::Waiting]);
    told(&mut world, "host1", WorkState::Begun, "");
    assert!(round(&mut world)[0].contains("the upgrade of host1 is under way"));
    told(&mut world, "host1", WorkState::Done, "");
    status(&mut world, "host1", |status| status.version = "2".into());
    assert_eq!(round(&mut world), ["host1 is at version 2, before at 1"]);
    // What an earlier one said is nothing of this one.
    let mut world = self::world(Work::Upgrade);
    moves(&mut world, "db", "host3");
    told(&mut world, "host1", WorkState::Done, "");
    let mut old = (*world.snapshot.work_status["host1"].value).clone();
    old.maintenance = "m0".into();
    world.snapshot.work_status.insert(name("host1"), at(70, old));
    for _ in 0..3 {
        round(&mut world);
    }
    assert!(round(&mut world)[0].contains("under way"));
}

#[test]
fn a_drain_that_a_person_began_stands_afterwards() {
    let mut world = world(Work::Reboot);
    moves(&mut world, "db", "host3");
    let drain = Drain {
        id: "d9".into(),
        by: "bob".into(),
        at_ms: 1,
        drained_ms: Some(1),
        bringing_back: false,
    };
    world.snapshot.drains.insert(name("host1"), at(9, drain));
    round(&mut world);
    assert_eq!(round(&mut world), ["host1 is empty: its reboot begins"]);
    status(&mut world, "host1", |status| status.boot_id = "second".into());
    round(&mut world);
    passes(&mut world, 10);
    round(&mut world);
    let over = "the reboot of host1 is over; it stays drained, as bob asked: `haven host undrain host1` ends that";
    assert_eq!(round(&mut world), [over]);
    assert_eq!(world.snapshot.drains["host1"].id, "d9");
}

#[test]
fn a_host_that_is_no_more_is_passed_over_and_the_last_one_ends_it() {
    let mut world = world(Work::Reboot);
    for host in ["host1", "host2"] {
        world.snapshot.hosts.remove(&name(host));
        let why = format!("{host} is no host of the cluster any more: the reboot goes on");
        assert!(round(&mut world).contains(&why));
    }
    assert_eq!(of(&world).ended_ms, Some(world.seen.now_ms));
    assert!(of(&world).turn().is_none());
}

#[test]
fn a_drain_that_somebody_ended_before_the_work_stops_it() {
    let mut world = world(Work::Reboot);
    emptied(&mut world);
    let drain = world.snapshot.drains.remove(&name("host1")).unwrap();
    assert_eq!(drain.id, "m1/host1", "each host has a drain of its own");
    let why = "the reboot of hosts stops: somebody ended the drain of host1 before its reboot";
    assert_eq!(round(&mut world), [why]);
    // Once its agent has begun there is no way back.
    let mut world = self::world(Work::Reboot);
    emptied(&mut world);
    told(&mut world, "host1", WorkState::Begun, "");
    world.snapshot.drains.remove(&name("host1"));
    assert!(round(&mut world)[0].contains("under way"));
}

#[test]
fn the_last_host_must_be_well_when_all_is_said_to_be_over() {
    let mut world = world(Work::Reboot);
    let mut of = of(&world).clone();
    of.hosts.truncate(1);
    of.hosts[0].phase = Phase::Returning;
    world.snapshot.maintenance = Some(at(50, of));
    world.silent("host1", 3000, false);
    assert!(round(&mut world)[0].contains("waiting: host1 is silent"));
    passes(&mut world, 301);
    assert!(round(&mut world)[0].contains("the reboot of hosts stops: host1 is silent"));
    world.silent("host1", 100, false);
    let mut of = self::of(&world).clone();
    of.stopped = None;
    world.snapshot.maintenance = Some(at(60, of));
    assert_eq!(round(&mut world), ["the reboot of host1 is over"]);
    assert!(self::of(&world).ended_ms.is_some());
}

#[test]
fn a_host_whose_vote_went_elsewhere_meanwhile_is_well_without_it() {
    let mut world = world(Work::Reboot);
    emptied(&mut world);
    status(&mut world, "host1", |status| {
        status.boot_id = "second".into();
        status.etcd_member = None;
    });
    round(&mut world);
    passes(&mut world, 10);
    assert!(round(&mut world)[0].contains("the store's member on host1 does not answer"));
    world.host("host4", Bytes::gib(16));
    status(&mut world, "host4", |status| status.etcd_member = Some(9));
    assert_eq!(round(&mut world), ["host1 is well after its reboot: it takes VMs again"]);
}

#[test]
fn an_emptied_host_that_only_its_power_proves_lost_is_asked_for_it() {
    let mut world = world(Work::Reboot);
    let spec = haven_model::ClusterSpec {
        fencing: vec![haven_model::ProofKind::PoweredOff],
        ..haven_model::ClusterSpec::default()
    };
    world.snapshot.cluster = Some(at(1, spec));
    emptied(&mut world);
    let mut with_power = (*world.snapshot.hosts["host1"].value).clone();
    with_power.spec.power = serde_json::from_value(serde_json::json!({"url": "sim:"})).unwrap();
    world.snapshot.hosts.insert(name("host1"), at(1, with_power));
    world.silent("host1", 4000, false);
    world.seen.suspected.insert(name("host1"));
    let cuts = |world: &World| {
        let plan = plan(&world.snapshot, &world.seen);
        plan.actions.iter().any(|of| matches!(of.action, Action::PowerOff { .. }))
    };
    assert!(!cuts(&world), "it is worked on");
    world.snapshot.maintenance = None;
    assert!(cuts(&world));
}

#[test]
fn what_is_done_or_under_way_is_not_done_twice_when_a_person_lets_it_go_on() {
    let again = |work: Work, state: Option<WorkState>, boot: &str| {
        let mut world = world(work);
        let mut of = of(&world).clone();
        of.stopped = Some("it took too long".into());
        of.hosts[0].phase = Phase::Working;
        of.hosts[0].boot_id = "first".into();
        if let Some(state) = state {
            told(&mut world, "host1", state, "");
        }
        status(&mut world, "host1", |status| status.boot_id = boot.into());
        let (next, anew) = resumed(&world.snapshot, &of, 9);
        assert!(next.stopped.is_none() && next.hosts[0].since_ms == 9);
        (next.hosts[0].phase, anew)
    };
    use WorkState::{Begun, Done, Failed};
    assert_eq!(again(Work::Reboot, Some(Begun), "first"), (Phase::Working, false));
    assert_eq!(again(Work::Reboot, Some(Begun), "second"), (Phase::Settling, false));
    assert_eq!(again(Work::Reboot, Some(Failed), "first"), (Phase::Draining, true));
    assert_eq!(again(Work::Reboot, None, "first"), (Phase::Draining, true));
    assert_eq!(again(Work::Upgrade, Some(Begun), "first"), (Phase::Working, false));
    assert_eq!(again(Work::Upgrade, Some(Done), "first"), (Phase::Settling, false));
    assert_eq!(again(Work::Upgrade, Some(Failed), "first"), (Phase::Draining, true));
}

#[test]
fn the_managing_host_has_its_turn_last() {
    let mut world = world(Work::Reboot);
    let manager = serde_json::json!({"term": 1, "holder": "host1", "session": 1});
    world.snapshot.manager = Some(at(1, serde_json::from_value(manager).unwrap()));
    let order: Vec<String> = in_turn(&world.snapshot).iter().map(ToString::to_string).collect();
    assert_eq!(order, ["host2", "host3", "host1"]);
}
