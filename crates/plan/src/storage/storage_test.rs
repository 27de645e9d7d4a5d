//! Tests of [`super`].

use super::{in_words, risks, rooms};
use crate::testing::{World, at, name, stored};
use haven_model::{
    Bytes, PoolDriverKind, PoolSpec, VmSpec,
    pool::{HostRooms, PoolRoom},
};

fn world(driver: PoolDriverKind, free: [u64; 2]) -> World {
    let mut world = World::new(2, Bytes::gib(8));
    let pool = PoolSpec::new(driver, "/pool");
    world.snapshot.pools.insert(name("fast"), at(3, stored("fast", pool)));
    for (host, free) in ["host1", "host2"].into_iter().zip(free) {
        let session = world.snapshot.leases[host].session;
        let room = PoolRoom { total: Bytes::gib(100), free: Bytes::gib(free), used: Bytes::gib(7) };
        let pools = [(name("fast"), room)].into();
        world.snapshot.rooms.insert(name(host), at(4, HostRooms { session, pools }));
    }
    for (vm, host, size) in
        [("db", "host1", "80GiB"), ("web", "host2", "30GiB"), ("big", "host1", "40GiB")]
    {
        let spec = serde_json::json!({"memory": "1GiB", "disks": [{"name": "root", "size": size, "pool": "fast"}]});
        world.vm(vm, serde_json::from_value::<VmSpec>(spec).unwrap());
        world.run(vm, host);
    }
    world
}

#[test]
fn what_is_free_used_and_promised_is_told_by_host() {
    let world = world(PoolDriverKind::Local, [50, 60]);
    assert_eq!(
        in_words(&world.snapshot, &name("fast")),
        [
            "fast on host1: 50 GiB of 100 GiB are free; its volumes take 7 GiB and may take 120 GiB, more than there is: they take it as they are written",
            "fast on host2: 60 GiB of 100 GiB are free; its volumes take 7 GiB and may take 30 GiB",
        ]
    );
    assert!(risks(&world.snapshot).is_empty());
    assert!(in_words(&world.snapshot, &name("no-such-pool")).is_empty());
}

#[test]
fn a_pool_that_all_share_is_told_once() {
    let world = world(PoolDriverKind::Shared, [50, 50]);
    let told = rooms(&world.snapshot, &name("fast"));
    assert_eq!(told.len(), 1);
    assert_eq!(told[0].promised, Bytes::gib(150));
    assert!(in_words(&world.snapshot, &name("fast"))[0].starts_with("fast: 50 GiB of"));
}

#[test]
fn what_is_about_to_be_full_is_a_risk_and_what_a_lost_host_said_is_not() {
    let mut world = world(PoolDriverKind::Local, [16, 15]);
    assert_eq!(
        risks(&world.snapshot),
        [
            "pool fast on host2 is 85 % full, 15 GiB are free: enlarge it, or remove what is not needed, before its VMs cannot write"
        ]
    );
    world.lost("host2", haven_model::ProofKind::LeaseExpired);
    assert!(risks(&world.snapshot).is_empty());
}
