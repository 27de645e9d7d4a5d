//! Tests of [`super::setup`].

use super::setup::{HostFile, seal_power};
use crate::paths::Paths;
use haven_model::{Name, ObjectRef, PowerSpec, object::Kind};
use haven_store::{pki::Authority, seal::ClusterKey, server::client_url};
use std::net::Ipv4Addr;

fn ip(last: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 88, 0, last)
}

/// The host that made the cluster, as `haven init` writes it.
fn first(directory: &std::path::Path) -> (Paths, HostFile) {
    let at = |name: &str| directory.join(name);
    let paths = Paths { state: directory.to_owned(), run: at("run"), log: at("log") };
    let host = HostFile {
        name: "host1".parse().unwrap(),
        address: ip(1),
        cluster: Some("test".into()),
        power: None,
        witness: false,
        heartbeat: "00".repeat(32),
        voters: vec![ip(1)],
        initial_cluster: Some("host1=https://10.88.0.1:7380".into()),
    };
    (paths, host)
}

#[test]
fn the_host_that_made_the_cluster_finds_the_other_voters_at_its_next_start() {
    let directory = tempfile::tempdir().unwrap();
    let (paths, mut host) = first(directory.path());
    host.save(&paths).unwrap();
    host.remember(&paths, &[ip(3), ip(1), ip(2)]).unwrap();
    let next = HostFile::load(&paths).unwrap().unwrap();
    assert_eq!(next.endpoints(), [1, 2, 3].map(|last| client_url(ip(last))));
    // Its member was replaced by another while it was away.
    host.remember(&paths, &[ip(4), ip(3), ip(2)]).unwrap();
    let next = HostFile::load(&paths).unwrap().unwrap();
    assert_eq!(next.endpoints(), [1, 2, 3, 4].map(|last| client_url(ip(last))));
}

#[test]
fn a_list_without_voters_is_not_remembered_and_nothing_is_written_without_need() {
    let directory = tempfile::tempdir().unwrap();
    let (paths, mut host) = first(directory.path());
    host.remember(&paths, &[]).unwrap();
    host.remember(&paths, &[ip(1)]).unwrap();
    assert_eq!(host.voters, [ip(1)]);
    assert!(HostFile::load(&paths).unwrap().is_none());
}

#[test]
fn a_member_that_lost_its_data_begins_no_second_cluster() {
    let directory = tempfile::tempdir().unwrap();
    let (paths, mut host) = first(directory.path());
    assert!(host.begins_a_cluster());
    host.remember(&paths, &[ip(1), ip(2), ip(3)]).unwrap();
    assert!(!host.begins_a_cluster());
    let joined = HostFile { cluster: None, voters: vec![ip(1)], ..host };
    assert!(!joined.begins_a_cluster());
}

#[test]
fn the_password_of_a_power_controller_is_sealed_before_it_is_written_and_only_once() {
    let key = ClusterKey::derive(&Authority::create("test").unwrap()).unwrap();
    let name: Name = "host1".parse().unwrap();
    let mut power = PowerSpec::redfish("http://x", "u", "hush");
    seal_power(&key, &name, &mut power).unwrap();
    let of = ObjectRef::new(Kind::Host, name.clone());
    assert_eq!(key.open(&of, &power.password).unwrap().expose(), "hush");
    let sealed = power.clone();
    seal_power(&key, &name, &mut power).unwrap();
    assert_eq!(power, sealed);
    let mut none = PowerSpec::redfish("http://x", "", "");
    seal_power(&key, &name, &mut none).unwrap();
    assert_eq!(none.password, "", "there is nothing to seal");
}
