//! Tests of [`super::rules`].

use super::rules::{Seen, Step, next, outdated};
use haven_model::{Bytes, ClusterSpec, LostSession, ManagerRecord, ProofKind, Snapshot};
use haven_plan::testing::{World, at, lease, name};
use haven_store::server::{Member, peer_url};
use std::collections::BTreeMap;

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
    judged(snapshot, me, members, runs_one, now_ms, &BTreeMap::new())
}

fn judged(
    snapshot: &Snapshot,
    me: &str,
    members: &[Member],
    runs_one: bool,
    now_ms: i64,
    silent_ms: &BTreeMap<u64, i64>,
) -> Step {
    let number: u64 = me.trim_start_matches("host").parse().unwrap();
    let my_url = member(number, false).peer_url;
    let me = name(me);
    next(&Seen { me: &me, my_url: &my_url, runs_one, members, silent_ms, snapshot, now_ms })
}

const THREE: [u64; 3] = [1, 2, 3];

#[test]
fn a_settled_cluster_rests() {
    let (snapshot, members) = (snapshot(), THREE.map(|id| member(id, false)));
    for me in ["host1", "host2", "host4"] {
        assert_eq!(step(&snapshot, me, &members, me != "host4", 1_000_000), Step::Rest);
    }
}

/// A witness is the third of two, and steps back where hosts that run VMs are enough.
#[test]
fn a_witness_votes_only_where_other_hosts_are_too_few() {
    let mut snapshot = snapshot();
    let mut host = (*snapshot.hosts["host1"].value).clone();
    host.spec.witness = true;
    snapshot.hosts.insert(name("host1"), at(9, host));
    let fourth = snapshot.hosts.remove("host4").unwrap();
    let members = [2, 3].map(|id| member(id, false));
    assert_eq!(step(&snapshot, "host1", &members, false, 0), Step::Add);
    snapshot.hosts.insert(name("host4"), fourth);
    assert_eq!(step(&snapshot, "host1", &members, false, 0), Step::Rest);
    assert_eq!(step(&snapshot, "host4", &members, false, 0), Step::Add);
}

#[test]
fn five_voters_come_one_after_another_once_they_are_asked_for() {
    let mut snapshot = World::new(5, Bytes(4 << 30)).snapshot;
    let record = ManagerRecord { term: 1, holder: name("host1"), session: 1 };
    snapshot.manager = Some(at(7, record));
    let mut members = THREE.map(|id| member(id, false)).to_vec();
    assert_eq!(step(&snapshot, "host4", &members, false, 0), Step::Rest, "three are enough");
    snapshot.cluster = Some(at(8, ClusterSpec { voters: 5, ..ClusterSpec::default() }));
    for id in [4, 5] {
        let me = format!("host{id}");
        assert_eq!(step(&snapshot, &me, &members, false, 0), Step::Add);
        members.push(member(id, true));
        assert_eq!(step(&snapshot, &me, &members, true, 0), Step::Promote(id));
        if id == 4 {
            assert_eq!(step(&snapshot, "host5", &members, false, 0), Step::Rest, "4 still learns");
        }
        members.last_mut().unwrap().learner = false;
    }
    for id in 1..=5 {
        assert_eq!(step(&snapshot, &format!("host{id}"), &members, true, 0), Step::Rest);
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
    // Also one that was never seen to vote: a host is written before its member is added.
    let learner = [member(1, false), member(2, false), member(9, true)];
    let removed = step(&snapshot, "host1", &learner, true, 0);
    assert!(matches!(removed, Step::Remove { id: 9, .. }), "{removed:?}");
}

#[test]
fn a_learner_whose_daemon_ended_before_it_ran_is_run() {
    let members = [member(1, false), member(2, false), member(3, true)];
    assert_eq!(step(&snapshot(), "host3", &members, false, 0), Step::Begin);
    assert_eq!(step(&snapshot(), "host3", &members, true, 0), Step::Promote(3));
}

#[test]
fn a_learner_of_a_lost_host_makes_room_at_once() {
    let mut snapshot = snapshot();
    lose(&mut snapshot, "host3", 1_000_000);
    let members = [member(1, false), member(2, false), member(3, true)];
    let removed = step(&snapshot, "host1", &members, true, 1_000_001);
    assert!(matches!(removed, Step::Remove { id: 3, .. }), "{removed:?}");
    assert_eq!(step(&snapshot, "host4", &members[..2], false, 1_000_001), Step::Add);
}

#[test]
fn a_member_that_does_not_answer_for_long_is_replaced_elsewhere_or_begins_anew() {
    let mut snapshot = snapshot();
    let patience = i64::try_from(snapshot.cluster_spec().replace_voter_after.0).unwrap();
    let members = THREE.map(|id| member(id, false));
    let now = |snapshot: &Snapshot, silent| {
        judged(snapshot, "host1", &members, true, 0, &BTreeMap::from([(2, silent)]))
    };
    assert_eq!(now(&snapshot, patience), Step::Rest);
    let removed = now(&snapshot, patience + 1);
    assert!(
        matches!(&removed, Step::Remove { id: 2, why } if why.contains("host4")),
        "{removed:?}"
    );
    let mut status = (*snapshot.host_status["host2"].value).clone();
    status.etcd_silent = true;
    snapshot.host_status.insert(name("host2"), at(8, status));
    let left = [member(1, false), member(3, false)];
    assert_eq!(step(&snapshot, "host2", &left, false, 0), Step::Rest, "a sound host comes first");
    assert_eq!(step(&snapshot, "host4", &left, false, 0), Step::Add);
    snapshot.hosts.remove("host4");
    let removed = now(&snapshot, patience + 1);
    assert!(
        matches!(&removed, Step::Remove { id: 2, why } if why.contains("host2 begins anew")),
        "{removed:?}"
    );
    assert_eq!(step(&snapshot, "host2", &left, false, 0), Step::Add);
}

#[test]
fn only_what_lost_hosts_said_of_members_that_are_gone_is_outdated() {
    let mut snapshot = snapshot();
    for (host, id) in [("host2", 2), ("host3", 3)] {
        let mut status = (*snapshot.host_status[host].value).clone();
        status.etcd_member = Some(id);
        snapshot.host_status.insert(name(host), at(5, status));
    }
    let found = |snapshot: &Snapshot, ids: &[u64]| -> Vec<String> {
        let members: Vec<Member> = ids.iter().map(|id| member(*id, false)).collect();
        outdated(&members, snapshot).map(|(host, _)| host.to_string()).collect()
    };
    assert!(found(&snapshot, &[1, 3]).is_empty(), "a host that is there speaks for itself");
    lose(&mut snapshot, "host2", 1_000_000);
    assert!(found(&snapshot, &THREE).is_empty(), "it may come back, and votes until then");
    assert_eq!(found(&snapshot, &[1, 3, 4]), ["host2"]);
}
