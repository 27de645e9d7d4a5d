//! Tests of [`super::shutting`].

use crate::{
    check, plan,
    testing::{World, at, lease, name, stored},
};
use haven_model::{
    Action, Bytes, ClusterSpec, PoolDriverKind, PoolSpec, ProofKind,
    clients::{DiskClients, OpenDisk, ShutDisks},
    plan::LeaseAge,
    vm::Isolation,
    volume::{ReplicaIs, ReplicaState::Returning, ReplicaStatus, Volume, VolumeRef},
};
use serde_json::json;

fn of(disk: &str) -> VolumeRef {
    VolumeRef { vm: name("db"), disk: name(disk) }
}

/// A VM on host1 whose two disks are on all three hosts, and host1 is not heard.
fn world() -> World {
    let mut world = World::new(3, Bytes::gib(8));
    world.current();
    let fencing = vec![ProofKind::LeaseExpired, ProofKind::StorageFenced];
    world.snapshot.cluster = Some(at(1, ClusterSpec { fencing, ..ClusterSpec::default() }));
    let pool = PoolSpec::new(PoolDriverKind::Mirrored, "/pool");
    world.snapshot.pools.insert(name("disks"), at(3, stored("disks", pool)));
    let disk = |disk: &str| json!({"name": disk, "size": "1GiB", "pool": "disks"});
    let spec = json!({"memory": "1GiB", "isolation": "keep", "disks": [disk("data"), disk("log")]});
    world.vm("db", serde_json::from_value(spec).unwrap());
    world.run("db", "host1");
    let uid = world.snapshot.vms["db"].meta.uid.clone();
    for disk in ["data", "log"] {
        let hosts = ["host1", "host2", "host3"].map(name);
        let volume = Volume::new(uid.clone(), name("disks"), Bytes::gib(1), hosts);
        let volume = Volume { run: 3, clean: false, ..volume };
        world.snapshot.volumes.insert(of(disk), at(8, volume));
    }
    silent(&mut world, 1100);
    world
}

/// Host1 is suspected, and its record is so old.
fn silent(world: &mut World, unchanged_ms: u64) {
    world.seen.suspected.insert(name("host1"));
    let age = LeaseAge { revision: 900, unchanged_ms, confirmed: false };
    world.seen.leases.insert(name("host1"), age);
}

/// The disks that a plan shuts (both are of run 3 before), and where it places the VM under which proof.
fn does(world: &World) -> (Vec<String>, Option<(String, ProofKind)>) {
    let plan = plan(&world.snapshot, &world.seen);
    assert_eq!(check(&world.snapshot, &plan), Ok(()));
    let (mut shut, mut placed) = (Vec::new(), None);
    for planned in plan.actions {
        match planned.action {
            Action::PutVolume { volume, record, .. } => {
                assert!(record.shut && record.run == 4 && record.replicas.len() == 3);
                shut.push(volume.disk.to_string());
            }
            Action::PlaceVm { placement, taken_from, .. } => {
                placed = Some((placement.host.to_string(), taken_from.unwrap().proof));
            }
            _ => {}
        }
    }
    (shut, placed)
}

fn changed(world: &mut World, disk: &str, change: impl FnOnce(&mut Volume)) {
    let mut volume = (*world.snapshot.volumes[&of(disk)].value).clone();
    change(&mut volume);
    world.snapshot.volumes.insert(of(disk), at(9, volume));
}

fn shut(world: &mut World, disk: &str) {
    changed(world, disk, |volume| *volume = volume.shut_out().unwrap());
}

/// A host says that it serves a disk to this run.
fn serves(world: &mut World, disk: &str, host: &str, run: u64) {
    let is = ReplicaIs::Served { run, port: 1, instance: "i".into(), boot: "b".into() };
    let told = at(10, ReplicaStatus { session: 1, is });
    world.snapshot.replica_status.entry(of(disk)).or_default().insert(name(host), told);
}

#[test]
fn all_disks_are_shut_and_then_it_starts_elsewhere() {
    let mut world = world();
    let both = vec!["data".to_owned(), "log".to_owned()];
    assert_eq!(does(&world), (both, None));
    shut(&mut world, "data");
    assert_eq!(does(&world), (vec!["log".to_owned()], None));
    shut(&mut world, "log");
    assert_eq!(does(&world), (vec![], None), "nobody has said that it serves no earlier run");
    for disk in ["data", "log"] {
        serves(&mut world, disk, "host1", 4);
        serves(&mut world, disk, "host2", 3);
    }
    assert_eq!(does(&world), (vec![], None));
    serves(&mut world, "data", "host2", 4);
    assert_eq!(does(&world), (vec![], None), "one disk is not all");
    serves(&mut world, "log", "host3", 4);
    assert_eq!(does(&world).1, Some(("host2".to_owned(), ProofKind::StorageFenced)));
    // The last word of that host is of a session that is closed by now.
    world.snapshot.leases.insert(name("host3"), at(950, lease(true)));
    assert_eq!(does(&world).1, None);
}

#[test]
fn nothing_is_shut_to_a_host_that_renews_or_where_it_would_prove_nothing() {
    let nothing = (vec![], None);
    let mut renews = world();
    silent(&mut renews, 900);
    assert_eq!(does(&renews), nothing);
    assert_eq!(plan(&renews.snapshot, &renews.seen).wake_after_ms, Some(100));
    let mut heard = world();
    heard.seen.suspected.clear();
    assert_eq!(does(&heard), nothing);
    let mut newer = world();
    newer.snapshot.leases.insert(name("host1"), at(901, lease(false)));
    assert_eq!(does(&newer), nothing, "it has renewed since");
    let mut policy = world();
    policy.snapshot.cluster = None;
    assert_eq!(does(&policy), nothing);
    let mut stop = world();
    let mut vm = (*stop.snapshot.vms["db"].value).clone();
    vm.spec.isolation = Isolation::Stop;
    stop.snapshot.vms.insert(name("db"), at(4, vm.clone()));
    assert_eq!(does(&stop), nothing);
    let mut local = world();
    let pool = PoolSpec::new(PoolDriverKind::Local, "/local");
    local.snapshot.pools.insert(name("scratch"), at(3, stored("scratch", pool)));
    vm.spec.isolation = Isolation::Keep;
    vm.spec.disks[1].pool = name("scratch");
    local.snapshot.vms.insert(name("db"), at(4, vm));
    assert_eq!(does(&local), nothing, "what it writes to its other disk nobody can shut");
    let mut alone = world();
    for disk in ["data", "log"] {
        changed(&mut alone, disk, |volume| {
            *volume = volume.without([&name("host2"), &name("host3")])
        });
    }
    assert_eq!(does(&alone), nothing, "no other host has all that was written");
    let mut older = world();
    let mut told = (*older.snapshot.host_status["host1"].value).clone();
    told.speaks = haven_model::host::SHUTS - 1;
    older.snapshot.host_status.insert(name("host1"), at(2, told));
    assert_eq!(does(&older), nothing, "it would write the record anew");
}

#[test]
fn what_no_process_has_open_is_not_shut() {
    for state in [(0, true), (3, true)] {
        let mut world = world();
        changed(&mut world, "data", |volume| (volume.run, volume.clean) = state);
        assert_eq!(does(&world), (vec!["log".to_owned()], None));
        shut(&mut world, "log");
        serves(&mut world, "log", "host2", 4);
        serves(&mut world, "data", "host2", state.0);
        assert_eq!(does(&world), (vec![], None), "its next owner is told by its host's proof");
    }
}

#[test]
fn one_that_is_heard_again_keeps_its_vm() {
    let mut world = ready();
    assert!(does(&world).1.is_some());
    world.seen.suspected.clear();
    assert_eq!(does(&world), (vec![], None), "it begins a run of its own there");
    silent(&mut world, 900);
    assert_eq!(does(&world), (vec![], None), "it has just renewed");
}

/// A process may for a moment do without one that counts while another is taken in (known fault 58).
#[test]
fn one_that_returns_is_shut_as_well() {
    let mut world = ready();
    changed(&mut world, "log", |volume| *volume = volume.with(&name("host3"), Returning));
    assert_eq!(does(&world), (vec![], None));
    serves(&mut world, "log", "host3", 3);
    assert_eq!(does(&world), (vec![], None));
    serves(&mut world, "log", "host3", 4);
    assert_eq!(does(&world).1, Some(("host2".to_owned(), ProofKind::StorageFenced)));
}

#[test]
fn nothing_is_shut_if_no_host_could_take_the_vm() {
    let mut apart = world();
    changed(&mut apart, "data", |volume| *volume = volume.without([&name("host3")]));
    assert_eq!(does(&apart).0.len(), 2, "host2 has all of both");
    changed(&mut apart, "log", |volume| *volume = volume.without([&name("host2")]));
    assert_eq!(does(&apart), (vec![], None), "no host has all of both");
    let mut cordoned = world();
    for host in ["host2", "host3"] {
        let mut object = (*cordoned.snapshot.hosts[host].value).clone();
        object.spec.cordoned = true;
        cordoned.snapshot.hosts.insert(name(host), at(1, object));
    }
    assert_eq!(does(&cordoned), (vec![], None));
}

#[test]
fn a_host_that_is_worked_on_may_be_silent() {
    let mut world = world();
    let turn = json!({"host": "host1", "phase": "working", "sinceMs": 1});
    let work = json!({"id": "m1", "work": "reboot", "by": "ann", "atMs": 1, "hosts": [turn]});
    world.snapshot.maintenance = Some(at(7, serde_json::from_value(work).unwrap()));
    assert_eq!(does(&world).0, [""; 0]);
}

/// All disks are shut to host1, and host2 says so.
fn ready() -> World {
    let mut world = world();
    for disk in ["data", "log"] {
        shut(&mut world, disk);
        serves(&mut world, disk, "host2", 4);
    }
    world
}

#[test]
fn a_guest_that_goes_over_is_left_to_its_move() {
    let world = ready();
    let placed = (*world.snapshot.placements["db"].value).clone();
    let moving = serde_json::from_value(json!({"host": "host3", "migration": "m1"}));
    let Ok(moving) = moving else { panic!("{moving:?}") };
    let moving = haven_model::Placement { moving_to: Some(moving), ..placed };
    for mut world in [world, self::world()] {
        world.snapshot.placements.insert(name("db"), at(5, moving.clone()));
        assert_eq!(does(&world), (vec![], None));
    }
}

#[test]
fn a_replica_that_counts_no_more_proves_nothing() {
    let mut world = ready();
    assert!(does(&world).1.is_some());
    changed(&mut world, "log", |volume| *volume = volume.without([&name("host2")]));
    assert_eq!(does(&world).1, None);
}

/// The disk `log` is in Ceph, and host1 has it open.
fn in_ceph() -> World {
    let mut world = world();
    let pool = PoolSpec::new(PoolDriverKind::Rbd, "");
    world.snapshot.pools.insert(name("ceph"), at(3, stored("ceph", pool)));
    let mut vm = (*world.snapshot.vms["db"].value).clone();
    vm.spec.disks[1].pool = name("ceph");
    world.snapshot.volumes.remove(&of("log"));
    world.snapshot.vms.insert(name("db"), at(4, vm.clone()));
    let open = |host: &str| OpenDisk {
        disk: name("log"),
        pool: name("ceph"),
        host: name(host),
        client: "10.0.0.1:0/7".into(),
    };
    let record =
        DiskClients { vm_uid: vm.meta.uid, open: vec![open("host1")], ..Default::default() };
    world.snapshot.clients.insert(name("db"), at(12, record));
    world
}

fn clients(world: &mut World, change: impl FnOnce(&mut DiskClients)) {
    let mut record = (*world.snapshot.clients["db"].value).clone();
    change(&mut record);
    world.snapshot.clients.insert(name("db"), at(13, record));
}

/// Who is to shut the disks in Ceph, and where a plan places the VM.
fn asks(world: &World) -> (Option<ShutDisks>, Option<String>) {
    let plan = plan(&world.snapshot, &world.seen);
    assert_eq!(check(&world.snapshot, &plan), Ok(()));
    let mut asked = (None, None);
    for planned in plan.actions {
        match planned.action {
            Action::PutClients { record, expected_revision, .. } => {
                assert_eq!(expected_revision, world.snapshot.clients["db"].revision);
                assert_eq!(record.open, world.snapshot.clients["db"].open);
                assert!(planned.reason.contains("shuts the disks of db in Ceph"));
                asked.0 = record.shut;
            }
            Action::PlaceVm { placement, taken_from, .. } => {
                assert_eq!(taken_from.unwrap().proof, ProofKind::StorageFenced);
                asked.1 = Some(placement.host.to_string());
            }
            _ => {}
        }
    }
    asked
}

#[test]
fn disks_in_ceph_are_shut_by_the_host_where_it_is_to_start() {
    let mut world = in_ceph();
    let by = |host: &str, done| Some(ShutDisks { by: name(host), done });
    assert_eq!(asks(&world), (by("host2", false), None));
    shut(&mut world, "data");
    serves(&mut world, "data", "host2", 4);
    clients(&mut world, |of| of.shut = by("host2", false));
    assert_eq!(asks(&world), (None, None), "host2 has not done it");
    // Host2 is not heard any more either.
    world.seen.suspected.insert(name("host2"));
    assert_eq!(asks(&world).0, by("host3", false));
    world.seen.suspected.remove("host2");
    clients(&mut world, |of| of.shut = by("host2", true));
    assert_eq!(asks(&world), (None, Some("host2".into())));
    // The other disk is open to it yet.
    changed(&mut world, "data", |volume| volume.shut = false);
    assert_eq!(asks(&world).1, None);
}

#[test]
fn what_may_be_open_to_unknown_clients_of_ceph_is_not_shut() {
    let nothing = (None, None);
    let not_shut = |change: &dyn Fn(&mut World)| {
        let mut world = in_ceph();
        shut(&mut world, "data");
        serves(&mut world, "data", "host2", 4);
        clients(&mut world, |of| {
            of.shut = Some(ShutDisks { by: name("host2"), done: true });
        });
        assert!(asks(&world).1.is_some());
        change(&mut world);
        asks(&world)
    };
    let of_another = |world: &mut World| clients(world, |of| of.vm_uid = "another".into());
    assert_eq!(not_shut(&of_another), nothing);
    assert_eq!(not_shut(&|w| clients(w, |of| _ = of.begins.insert(name("host1")))), nothing);
    assert_eq!(not_shut(&|w| clients(w, |of| of.open[0].host = name("host3"))), nothing);
    assert_eq!(not_shut(&|w| clients(w, |of| of.open[0].disk = name("data"))), nothing);
    assert_eq!(not_shut(&|w| _ = w.snapshot.clients.remove("db")), nothing);
    let older = |world: &mut World| {
        clients(world, |of| of.shut = None);
        let mut told = (*world.snapshot.host_status["host1"].value).clone();
        told.speaks = haven_model::host::RBD - 1;
        world.snapshot.host_status.insert(name("host1"), at(2, told));
    };
    assert_eq!(not_shut(&older), nothing);
}
