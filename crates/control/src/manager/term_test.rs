//! Tests of [`super::term`].

use super::term::{Candidate, Stand, stand};
use haven_model::{Lease, ManagerRecord, Name, Snapshot, Versioned};
use std::sync::Arc;

fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

fn world(session: u64, closed: bool) -> Snapshot {
    let mut snapshot = Snapshot { revision: 9, ..Snapshot::default() };
    let lease = Lease { session, count: 5, closed, ttl_ms: 5000 };
    snapshot.leases.insert(name("host1"), Versioned { revision: 8, value: Arc::new(lease) });
    let record = ManagerRecord { term: 4, holder: name("host1"), session: 2 };
    snapshot.manager = Some(Versioned { revision: 3, value: Arc::new(record) });
    snapshot
}

fn stand_of(snapshot: &Snapshot, me: &str, session: Option<u64>, unchanged_ms: u64) -> Stand {
    let me = name(me);
    let candidate = Candidate {
        me: &me,
        session,
        holder_unchanged: Some((8, unchanged_ms)),
        timeout_ms: 1500,
        stagger_ms: 40,
    };
    stand(snapshot, &candidate)
}

#[test]
fn the_holder_manages_only_in_the_session_in_which_it_took_the_lease() {
    assert_eq!(
        stand_of(&world(2, false), "host1", Some(2), 0),
        Stand::Manage { term: 4, record_revision: 3 }
    );
    assert!(matches!(
        stand_of(&world(3, false), "host1", Some(3), 0),
        Stand::Take { record: ManagerRecord { term: 5, .. }, replaces: 3, .. }
    ));
    assert!(matches!(stand_of(&world(2, false), "host1", None, 0), Stand::Wait { .. }));
}

#[test]
fn a_silent_manager_is_replaced_after_the_timeout_and_not_before() {
    assert_eq!(stand_of(&world(2, false), "host2", Some(1), 1400), Stand::Wait { again_ms: 140 });
    assert!(matches!(
        stand_of(&world(2, false), "host2", Some(1), 1540),
        Stand::Take { record: ManagerRecord { term: 5, .. }, unchanged: Some((_, 8)), .. }
    ));
}

#[test]
fn a_manager_whose_session_ended_is_replaced_at_once() {
    assert!(matches!(stand_of(&world(2, true), "host2", Some(1), 0), Stand::Take { .. }));
    assert!(matches!(stand_of(&world(3, false), "host2", Some(1), 0), Stand::Take { .. }));
}
