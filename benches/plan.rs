//! How long one plan takes for a cluster that has just lost a host, and how that grows; and how long it takes to find out
//! how many hosts can be lost.
//! `cargo test -p haven-plan --test plan_time`

use haven_model::{Bytes, LostSession, Object, ObjectRef, ProofKind, object::Kind};
use haven_plan::testing::{World, at, lease, name, stored, vm_spec};
use std::time::{Duration, Instant};

/// So many hosts with twenty VMs each; the first is lost.
fn world(hosts: usize) -> World {
    let mut world = World::new(hosts, Bytes(64 << 30));
    for i in 0..hosts * 20 {
        let vm = format!("vm-{i}");
        world.vm(&vm, vm_spec(Bytes(1 << 30)));
        world.run(&vm, &format!("host{}", i % hosts + 1));
    }
    let lost = name("host1");
    let proof = ProofKind::LeaseExpired;
    let record = LostSession { session: 1, proof, at_ms: 0, last_heard_ms: 0, incident: 1 };
    world.snapshot.leases.insert(lost.clone(), at(901, lease(true)));
    world.snapshot.lost.insert(lost, at(901, record));
    world
}

fn main() {
    println!("one plan with one host lost, twenty VMs per host; 20 runs each");
    println!(
        "{:>6} {:>7} {:>8} {:>9} {:>9} {:>9}",
        "hosts", "VMs", "moves", "median", "min", "max"
    );
    let mut largest = Duration::ZERO;
    for hosts in [10, 30, 100, 300, 1000] {
        let world = world(hosts);
        let mut times = Vec::new();
        let mut moves = 0;
        for _ in 0..20 {
            let begin = Instant::now();
            let plan = haven_plan::plan(&world.snapshot, &world.seen);
            times.push(begin.elapsed());
            moves = plan.actions.len();
        }
        times.sort();
        let ms = |time: Duration| format!("{:.2} ms", time.as_secs_f64() * 1000.0);
        println!(
            "{hosts:>6} {:>7} {moves:>8} {:>9} {:>9} {:>9}",
            hosts * 20,
            ms(times[10]),
            ms(times[0]),
            ms(times[19])
        );
        largest = times[10];
    }
    println!("target: 1,000 hosts and 20,000 VMs in 100 ms or less (median): {}", met(largest));
    println!();
    println!(
        "how many hosts can be lost, as `haven status` tells it, and one VM more let in or not"
    );
    println!("{:>6} {:>7} {:>8} {:>9} {:>9}", "hosts", "VMs", "losses", "status", "admit");
    for hosts in [10, 30, 100] {
        let world = full(hosts);
        let one = Object::Vm(stored("one-more", vm_spec(Bytes(1 << 30))));
        let (mut status, mut admit, mut losses) = (Vec::new(), Vec::new(), 0);
        for _ in 0..20 {
            let begin = Instant::now();
            losses = haven_plan::losses(&world.snapshot, &world.seen).vms;
            status.push(begin.elapsed());
            let begin = Instant::now();
            let refused = haven_plan::admit(&world.snapshot, &world.seen, &[one.clone()]);
            admit.push(begin.elapsed());
            assert!(refused.is_none(), "{refused:?}");
        }
        status.sort();
        admit.sort();
        let ms = |time: Duration| format!("{:.2} ms", time.as_secs_f64() * 1000.0);
        let vms = hosts * 20;
        println!("{hosts:>6} {vms:>7} {losses:>8} {:>9} {:>9}", ms(status[10]), ms(admit[10]));
        largest = status[10].max(admit[10]);
    }
    println!("target: 100 hosts and 2,000 VMs in 100 ms or less (median): {}", met(largest));
}

/// So many hosts with twenty VMs each, half of them members of services of ten; room for the loss of three.
fn full(hosts: usize) -> World {
    let mut world = World::new(hosts, Bytes(30 << 30));
    for i in 0..hosts {
        world.service(&format!("service-{i}"), 10);
    }
    for i in 0..hosts * 20 {
        let vm = format!("vm-{i}");
        let mut object = stored(&vm, vm_spec(Bytes(1 << 30)));
        if i % 2 == 0 {
            object.meta.owner =
                Some(ObjectRef::new(Kind::Service, name(&format!("service-{}", i / 20))));
        }
        world.snapshot.vms.insert(name(&vm), at(4, object));
        world.run(&vm, &format!("host{}", i % hosts + 1));
    }
    world
}

fn met(median: Duration) -> &'static str {
    if median <= Duration::from_millis(100) { "met" } else { "MISSED" }
}
