//! Tests of [`super::rules`].

use super::rules::{Seen, Step, next};
use haven_model::{Bytes, LostSession, ManagerRecord, ProofKind, Snapshot};
use haven_plan::testing::{World, at, lease, name};
use haven_store::server::{Member, peer_url};

fn member(id: u64, learner: bool) -> Member {
    let address = std::net::Ipv4Addr::from(0x0a58_0000 + u32::try_from(id).unwrap());
    Member { id, name: format!("host{id}"), peer_url: peer_url(address), learner }
}

/// Four hosts, three of them with members; host1 manages.
fn snapshot() -> Snapshot {
    let mut world = World::new(4, Bytes(4 << 30));
    let record = ManagerRecord { term: 1, holder: name("host1"), session: 1 };
    world.snapshot.manager = Some(at(7, record));
    world.snapshot
}

fn lose(snapshot: &mut Snapshot, host: &str, at_ms: i64) {
    snapshot.leases.insert(name(host), at(901, lease(true)));
    let proof = ProofKind::LeaseExpired;
    let lost = LostSession { session: 1, proof, at_ms, last_heard_ms: at_ms, incident: 1 };
    snapshot.lost.insert(name(host), at(901, lost));
}

fn step(snapshot: &Snapshot, me: &str, members: &[Member], runs_one: bool, now_ms: i64) -> Step {
    let number: u64 = me.trim_start_matches("host").parse().unwrap();
    let my_url = member(number, false).peer_url;
    let me = name(me);
    next(&Seen { me: &me, my_url: &my_url, runs_one, members, snapshot, now_ms })
}

const THREE: [u64; 3] = [1, 2, 3];

#[test]
fn a_settled_cluster_rests() {
    let (snapshot, members) = (snapshot(), THREE.map(|id| member(id, false)));
    for me in ["host1", "host2", "host4"] {
        assert_eq!(step(&snapshot, me, &members, me != "host4", 1_000_000), Step::Rest);
    }
}

#[test]
fn a_voter_lost_for_long_is_replaced_by_the_first_host_without_a_member() {
    let mut snapshot = snapshot();
    lose(&mut snapshot, "host2", 1_000_000);
    let members = THREE.map(|id| member(id, false));
    let patience = i64::try_from(snapshot.cluster_spec().replace_voter_after.0).unwrap();
    assert_eq!(step(&snapshot, "host1", &members, true, 1_000_000 + patience), Step::Rest);
    let later = 1_000_001 + patience;
    let removed = step(&snapshot, "host1", &members, true, later);
    assert!(matches!(removed, Step::Remove { id: 2, .. }), "{removed:?}");
    assert_eq!(step(&snapshot, "host3", &members, true, later), Step::Rest, "only the manager");
    let left = [member(1, false), member(3, false)];
    assert_eq!(step(&snapshot, "host4", &left, false, later), Step::Add);
    assert_eq!(step(&snapshot, "host1", &left, true, later), Step::Rest);
    let learning = [member(1, false), member(3, false), member(4, true)];
    assert_eq!(step(&snapshot, "host4", &learning, true, later), Step::Promote(4));
    // The old one comes back: its member is not in the list.
    assert_eq!(step(&snapshot, "host2", &learning, true, later), Step::Forget);
}

#[test]
fn a_voter_is_kept_while_nobody_can_take_its_place() {
    let mut snapshot = snapshot();
    snapshot.hosts.remove("host4");
    lose(&mut snapshot, "host2", 0);
    let members = THREE.map(|id| member(id, false));
    assert_eq!(step(&snapshot, "host1", &members, true, 10_000_000), Step::Rest);
}

#[test]
fn the_member_of_a_removed_host_is_taken_out() {
    let mut snapshot = snapshot();
    snapshot.hosts.remove("host3");
    let removed = step(&snapshot, "host1", &THREE.map(|id| member(id, false)), true, 0);
    assert!(matches!(removed, Step::Remove { id: 3, .. }), "{removed:?}");
    // A learner of a host that is just joining is left alone.
    let joining = [member(1, false), member(2, false), member(9, true)];
    assert_eq!(step(&snapshot, "host1", &joining, true, 0), Step::Rest);
}
