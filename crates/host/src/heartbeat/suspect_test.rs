//! Tests of [`super::suspect`] and of the datagrams.

use super::{Beat, pack, suspect::Watchers, unpack};
use haven_model::Name;
use haven_store::clock::Mono;
use std::{collections::BTreeSet, time::Duration};

fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}
fn at(ms: u64) -> Mono {
    Mono(ms * 1_000_000)
}
fn beat(from: &str, number: u64, unheard: &[&str]) -> Beat {
    Beat {
        from: name(from),
        number,
        unheard: unheard.iter().map(|n| name(n)).collect(),
        silence_ms: 0,
    }
}
fn three() -> Watchers {
    let mut watchers = Watchers::new(name("host1"), Duration::from_secs(1));
    watchers.members([name("host1"), name("host2"), name("host3")].iter(), at(0));
    watchers
}

#[test]
fn a_host_unheard_by_both_others_is_suspected() {
    let mut watchers = three();
    watchers.heard(&beat("host2", 1, &[]), at(1000));
    watchers.heard(&beat("host3", 1, &[]), at(900));
    assert!(watchers.suspected(at(1800)).is_empty());
    watchers.heard(&beat("host2", 2, &["host3"]), at(2000));
    assert_eq!(watchers.suspected(at(2000)), BTreeSet::from([name("host3")]));
}

#[test]
fn one_deaf_ear_suspects_nobody() {
    let mut watchers = three();
    watchers.heard(&beat("host2", 1, &["host3"]), at(1000));
    watchers.heard(&beat("host3", 1, &[]), at(1000));
    assert!(watchers.suspected(at(1500)).is_empty());
}

#[test]
fn a_host_that_hears_nobody_suspects_nobody() {
    let watchers = three();
    assert_eq!(watchers.unheard(at(5000)).len(), 2);
    assert!(watchers.suspected(at(5000)).is_empty());
}

#[test]
fn an_old_datagram_is_not_heard() {
    let mut watchers = three();
    watchers.heard(&beat("host2", 5, &[]), at(100));
    watchers.heard(&beat("host2", 5, &[]), at(3000));
    watchers.heard(&beat("host2", 4, &[]), at(3000));
    assert!(watchers.unheard(at(3000)).contains(&name("host2")));
}

#[test]
fn a_datagram_with_a_wrong_seal_is_nothing() {
    let key = [7; 32];
    let beat = beat("host2", 5, &["host3"]);
    let packet = pack(&key, &beat);
    assert_eq!(unpack(&key, &packet), Some(beat));
    assert_eq!(unpack(&[8; 32], &packet), None);
    for i in 0..packet.len() {
        let mut bad = packet.clone();
        bad[i] ^= 1;
        assert_eq!(unpack(&key, &bad), None);
    }
}

#[test]
fn the_moment_of_the_next_silence_is_known() {
    let mut watchers = three();
    watchers.heard(&beat("host2", 1, &[]), at(500));
    // host3 counts as heard at 0.
    let next = watchers.next_unheard(at(600)).unwrap();
    assert!(!watchers.unheard(at(1000)).contains(&name("host3")));
    assert_eq!(watchers.unheard(next), BTreeSet::from([name("host3")]));
    assert_eq!(watchers.next_unheard(next), Some(at(1501)));
    assert_eq!(watchers.next_unheard(at(2000)), None);
}

#[test]
fn hosts_that_hear_each_other_again_are_counted() {
    let mut watchers = three();
    watchers.heard(&beat("host2", 1, &[]), at(500));
    assert_eq!(watchers.reunions(), 0);
    // host2 did not hear this host, then does.
    watchers.heard(&beat("host2", 2, &["host1"]), at(1000));
    assert_eq!(watchers.reunions(), 0);
    watchers.heard(&beat("host2", 3, &[]), at(1200));
    assert_eq!(watchers.reunions(), 1);
    // This host did not hear host2, as after a pause.
    watchers.heard(&beat("host2", 4, &[]), at(9000));
    assert_eq!(watchers.reunions(), 2);
}

#[test]
fn only_a_datagram_that_says_something_new_is_news() {
    let mut watchers = three();
    assert!(!watchers.heard(&beat("host2", 1, &[]), at(200)));
    assert!(watchers.heard(&beat("host2", 2, &["host3"]), at(400)));
    assert!(!watchers.heard(&beat("host2", 3, &["host3"]), at(600)));
    assert!(watchers.heard(&beat("host2", 4, &["host3"]), at(5000)), "it was silent");
}
