//! Tests of [`super::replicas`].

use super::replicas::{lacks, risks};
use crate::{
    HostState, plan,
    testing::{World, at, name, stored},
};
use haven_model::{
    Action, Bytes, PoolDriverKind, PoolSpec, ProofKind, VmPhase, VmSpec,
    vm::DiskSpec,
    vm_snapshot::VmSnapshot,
    volume::{ReplicaState, Volume, VolumeRef},
};
use serde_json::json;

fn data() -> VolumeRef {
    VolumeRef { vm: name("db"), disk: name("data") }
}

/// A cluster with a VM whose disk is mirrored, and its volume if these hosts have it.
fn world(hosts: usize, on: &[(&str, ReplicaState)]) -> World {
    let mut world = World::new(hosts, Bytes::gib(8));
    world.current();
    let pool = PoolSpec::new(PoolDriverKind::Mirrored, "/pool");
    world.snapshot.pools.insert(name("disks"), at(3, stored("disks", pool)));
    let spec = serde_json::json!({"memory": "1GiB", "disks": [{"name": "data", "size": "10GiB", "pool": "disks"}]});
    world.vm("db", serde_json::from_value::<VmSpec>(spec).unwrap());
    if !on.is_empty() {
        let uid = world.snapshot.vms["db"].meta.uid.clone();
        let mut volume = Volume::new(uid, name("disks"), Bytes::gib(10), []);
        volume.run = 3;
        volume.replicas = on.iter().map(|(host, state)| (name(host), *state)).collect();
        world.snapshot.volumes.insert(data(), at(8, volume));
    }
    world
}

/// The hosts of the volume that a plan chooses, and whether they count.
fn chosen(world: &World) -> Option<Vec<(String, ReplicaState)>> {
    plan(&world.snapshot, &world.seen).actions.into_iter().find_map(|planned| {
        let Action::PutVolume { record, .. } = planned.action else { return None };
        Some(record.replicas.iter().map(|(host, state)| (host.to_string(), *state)).collect())
    })
}

fn placed_on(world: &World) -> Option<String> {
    plan(&world.snapshot, &world.seen).actions.into_iter().find_map(|planned| {
        let Action::PlaceVm { placement, .. } = planned.action else { return None };
        Some(placement.host.to_string())
    })
}

use ReplicaState::{Counted, Returning, Stale};

#[test]
fn the_record_of_a_disk_says_whether_it_is_encrypted() {
    for encrypted in [false, true] {
        let mut world = world(2, &[]);
        let spec = json!({"memory": "1GiB", "disks": [{"name": "data", "size": "10GiB", "pool": "disks", "encrypted": encrypted}]});
        world.vm("db", serde_json::from_value::<VmSpec>(spec).unwrap());
        let record = plan(&world.snapshot, &world.seen).actions.into_iter().find_map(|planned| {
            let Action::PutVolume { record, .. } = planned.action else { return None };
            Some(record)
        });
        let record = record.unwrap();
        assert_eq!(record.encrypted, encrypted);
        let head = if encrypted { haven_model::volume::LUKS_HEAD_BYTES } else { 0 };
        assert_eq!(record.stored_bytes(), (10 << 30) + head);
    }
}

#[test]
fn a_new_disk_is_on_two_hosts_in_different_zones_before_its_vm_has_its_place() {
    let mut world = world(3, &[]);
    for (host, zone) in [("host1", "a"), ("host2", "a"), ("host3", "b")] {
        let mut object = (*world.snapshot.hosts[host].value).clone();
        object.meta.labels.insert("zone".into(), zone.into());
        world.snapshot.hosts.insert(name(host), at(1, object));
    }
    let both = vec![("host1".to_owned(), Counted), ("host3".to_owned(), Counted)];
    assert_eq!(chosen(&world), Some(both));
    let actions = plan(&world.snapshot, &world.seen).actions;
    let put = actions.iter().position(|p| matches!(p.action, Action::PutVolume { .. }));
    let place = actions.iter().position(|p| matches!(p.action, Action::PlaceVm { .. }));
    assert!(put < place, "{actions:?}");
    assert_eq!(placed_on(&world).as_deref(), Some("host1"));
}

#[test]
fn a_host_that_is_away_gets_its_replica_later_and_one_host_alone_is_waited_for() {
    let mut away = world(2, &[]);
    away.lost("host2", ProofKind::PoweredOff);
    let both = vec![("host1".to_owned(), Counted), ("host2".to_owned(), Stale)];
    assert_eq!(chosen(&away), Some(both));
    let alone = world(1, &[]);
    let plan = plan(&alone.snapshot, &alone.seen);
    let why = &plan.waiting[0].reason;
    assert!(why.contains("is to be on 2 hosts, and the cluster has 1"), "{why}");
}

#[test]
fn a_vm_runs_only_where_all_is_that_was_written() {
    let mut world = world(3, &[("host1", Stale), ("host2", Counted)]);
    assert_eq!(placed_on(&world).as_deref(), Some("host2"));
    let vm = &world.snapshot.vms["db"];
    assert!(lacks(&world.snapshot, vm, &name("host1")).is_some());
    assert!(lacks(&world.snapshot, vm, &name("host3")).is_some());
    // Its host is lost, and another one has all.
    world.run("db", "host2");
    world.lost("host2", ProofKind::PoweredOff);
    let waits = plan(&world.snapshot, &world.seen).waiting;
    assert!(
        waits.iter().any(|w| w.reason.contains("does not have all that was written")),
        "{waits:?}"
    );
    let volume = world.snapshot.volumes[&data()].value.with(&name("host1"), Counted);
    world.snapshot.volumes.insert(data(), at(9, volume));
    assert_eq!(placed_on(&world).as_deref(), Some("host1"));
}

#[test]
fn what_a_host_had_that_is_gone_is_made_anew_elsewhere_after_a_while() {
    let mut world = world(3, &[("host1", Counted), ("host2", Stale)]);
    world.run("db", "host1");
    assert_eq!(chosen(&world), None, "it may come back at any moment");
    world.lost("host2", ProofKind::PoweredOff);
    assert_eq!(chosen(&world), None);
    let wakes = plan(&world.snapshot, &world.seen).wake_after_ms;
    assert!(wakes.is_some_and(|ms| ms <= 500_000), "{wakes:?}");
    world.seen.now_ms += 600_000;
    let now = vec![("host1".to_owned(), Counted), ("host3".to_owned(), Stale)];
    assert_eq!(chosen(&world), Some(now));
    // One that counts is its owner's to leave out first.
    let volume = world.snapshot.volumes[&data()].value.with(&name("host2"), Counted);
    world.snapshot.volumes.insert(data(), at(9, volume));
    assert_eq!(chosen(&world), None);
}

#[test]
fn a_disk_on_fewer_hosts_than_it_should_be_is_a_risk() {
    assert!(risks(&world(3, &[("host1", Counted), ("host2", Counted)]).snapshot).is_empty());
    let said = risks(&world(3, &[("host1", Counted), ("host2", Returning)]).snapshot);
    assert_eq!(
        said,
        [
            "disk data of db (10 GiB): all of it is on host1 alone, and host2 lacks what was written since; that is made up for by itself once the host is there"
        ]
    );
}

/// Where a VM on host1 goes when that is drained; whether by a restart.
fn drained(on: &[(&str, ReplicaState)]) -> Result<(String, bool), String> {
    drained_after(None, on, |_| {})
}

/// The same after so many failures of that drain.
fn drained_after(
    failed: Option<u32>,
    on: &[(&str, ReplicaState)],
    more: impl FnOnce(&mut World),
) -> Result<(String, bool), String> {
    let mut world = world(3, on);
    more(&mut world);
    world.run("db", "host1");
    world.report("db", VmPhase::Running, Some(true));
    let drain = haven_model::Drain {
        id: "d1".into(),
        by: "a person".into(),
        at_ms: 1,
        drained_ms: None,
        bringing_back: false,
    };
    world.snapshot.drains.insert(name("host1"), at(9, drain));
    if let Some(failed) = failed {
        let record = json!({
            "id": "m1", "from": "host1", "options": {}, "by": "the drain of host1", "atMs": 0,
            "drain": {"drain": "d1", "failed": failed},
            "outcome": {"atMs": -10_000_000, "moved": false, "message": "no way"},
        });
        let record = serde_json::from_value(record).unwrap();
        world.snapshot.migrations.insert(name("db"), at(9, record));
    }
    let states = crate::host_states(&world.snapshot, &world.seen);
    assert_eq!(states["host1"], HostState::Draining);
    let planned = plan(&world.snapshot, &world.seen);
    let to = planned.actions.into_iter().find_map(|planned| {
        let Action::MoveVm { placement, .. } = planned.action else { return None };
        placement.moving_to
    });
    to.map(|to| (to.host.to_string(), to.restart)).ok_or_else(|| {
        planned.waiting.into_iter().map(|waiting| waiting.reason).collect::<Vec<_>>().join("; ")
    })
}

#[test]
fn a_vm_with_a_mirrored_disk_moves_live_to_where_all_of_its_disk_is_and_nowhere_else() {
    assert_eq!(drained(&[("host1", Counted), ("host3", Counted)]), Ok(("host3".into(), false)));
    let why = drained(&[("host1", Counted), ("host2", Stale)]).unwrap_err();
    assert!(
        why.contains("does not have all that was written to the disk `data`; it stays on host1"),
        "{why}"
    );
    // One whose host cannot send it, because its disk there is dead, is started anew where all of it is.
    let both = [("host1", Counted), ("host3", Counted)];
    assert_eq!(drained_after(Some(1), &both, |_| {}), Ok(("host3".into(), false)));
    assert_eq!(drained_after(Some(2), &both, |_| {}), Ok(("host3".into(), true)));
    // Not one that has a disk which only its host has, too: that would begin anew there, empty.
    let with_a_local_one = |world: &mut World| {
        let pool = PoolSpec::new(PoolDriverKind::Local, "/p");
        world.snapshot.pools.insert(name("fast"), at(1, stored("fast", pool)));
        let mut spec = world.snapshot.vms["db"].spec.clone();
        spec.disks.push(DiskSpec::new(name("tmp"), Bytes::gib(1), name("fast")));
        let mut db = (*world.snapshot.vms["db"].value).clone();
        db.spec = spec;
        world.snapshot.vms.insert(name("db"), at(4, db));
    };
    assert_eq!(drained_after(Some(2), &both, with_a_local_one), Ok(("host3".into(), false)));
    // What was copied so far would be lost.
    let why = drained(&[("host1", Counted), ("host2", Counted), ("host3", Returning)]).unwrap_err();
    assert!(
        why.contains("the replica of its disk `data` on host3 is brought up to date first"),
        "{why}"
    );
}

#[test]
fn a_clone_has_its_disk_where_there_is_a_copy_of_what_it_is_made_from() {
    let mut world = world(3, &[]);
    let of = json!({"vm": "src", "vmUid": "u-src", "disk": "data", "snapshot": "s1"});
    let disk = json!({"name": "data", "size": "10GiB", "pool": "disks", "copyOf": of});
    let spec = json!({"memory": "1GiB", "disks": [disk]});
    world.vm("db", serde_json::from_value::<VmSpec>(spec).unwrap());
    let kept = |world: &mut World, state: &str, copies: &[&str]| {
        let disk = json!({"name": "data", "pool": "disks", "size": "10GiB", "copies": copies});
        let record = json!({"id": "s1", "vm": "src", "by": "root", "atMs": 1, "state": state,
            "copy": "c1", "message": "it broke", "disks": [disk]});
        let record: VmSnapshot = serde_json::from_value(record).unwrap();
        world.snapshot.vm_snapshots =
            [("u-src".into(), [(name("before"), at(5, record))].into())].into();
    };
    let says = |world: &World| serde_json::to_string(&plan(&world.snapshot, &world.seen)).unwrap();
    kept(&mut world, "wanted", &[]);
    assert_eq!(chosen(&world), None);
    assert!(says(&world).contains("from which the disk `data` is made, is wanted"));
    kept(&mut world, "there", &["host2"]);
    assert_eq!(chosen(&world), None);
    assert!(says(&world).contains("host1 has no copy yet of the disk `data` of src"));
    kept(&mut world, "failed", &[]);
    assert_eq!(chosen(&world), None);
    assert!(says(&world).contains("could not be taken, or was removed (it broke)"));
    // One that has a copy comes before all others, and only such a one counts.
    kept(&mut world, "there", &["host3", "host1"]);
    let both = vec![("host1".to_owned(), Counted), ("host3".to_owned(), Counted)];
    assert_eq!(chosen(&world), Some(both));
    kept(&mut world, "there", &["host1"]);
    let one = chosen(&world).unwrap();
    assert_eq!((one.len(), one.iter().filter(|(_, state)| *state == Counted).count()), (2, 1));
    assert!(says(&world).contains("\"copy\":\"c1\""));
}
