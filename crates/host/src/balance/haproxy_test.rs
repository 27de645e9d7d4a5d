//! Tests of [`super::haproxy`] without a HAProxy; the real one is in `tests/balance.rs`.

use super::{
    driver::{Member, MemberState},
    haproxy::assign,
};

fn member(name: &str) -> Member {
    Member {
        name: name.into(),
        ip: [10, 0, 0, 1].into(),
        port: 80,
        state: MemberState::Ready,
        healthy: false,
        weight: 100,
    }
}

#[test]
fn members_keep_their_slots() {
    let first = assign(&[], &[member("a"), member("b"), member("c")]);
    assert_eq!(first.len(), 16);
    let second = assign(&first, &[member("c"), member("d")]);
    assert_eq!(second[2].as_ref().unwrap().name, "c");
    assert_eq!(second[0].as_ref().unwrap().name, "d");
    assert!(second[1].is_none());
}

#[test]
fn slots_grow_in_steps() {
    let many: Vec<Member> = (0..17).map(|i| member(&format!("m{i}"))).collect();
    assert_eq!(assign(&[], &many).len(), 32);
}
