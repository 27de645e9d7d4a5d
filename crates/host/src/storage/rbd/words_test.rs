//! Without a cluster: what is read, and what is refused.

use super::{clients, images, node, pool::RbdPool};
use haven_store::seal::Plain;
use std::{os::unix::fs::PermissionsExt, path::Path};

const KEY: &str = "AQBSAAAAAAAAABAAAAAAAAAAAAAAAAAAAAAAAA==";

fn pool() -> RbdPool {
    RbdPool {
        monitors: vec![
            "10.0.0.1".into(),
            "10.0.0.2:6789".into(),
            "[fd00::3]:3300".into(),
            "fd00::4".into(),
        ],
        user: "haven".into(),
        key: Plain::new(KEY.into()),
        pool: "vm".into(),
        namespace: None,
    }
}

#[test]
fn a_key_is_not_printed() {
    assert!(!format!("{:?}", pool()).contains(KEY));
}

#[test]
fn what_makes_no_sense_is_refused_in_words() {
    let refused = |change: &dyn Fn(&mut RbdPool)| {
        let mut pool = pool();
        change(&mut pool);
        pool.makes_sense().unwrap_err().what
    };
    pool().makes_sense().unwrap();
    assert!(refused(&|pool| pool.monitors.clear()).contains("names none"));
    assert!(refused(&|pool| pool.monitors.push("10.0.0.1,evil".into())).contains("no address"));
    assert!(refused(&|pool| pool.monitors.push("a:b:c]".into())).contains("no address"));
    assert!(refused(&|pool| pool.monitors.push("10.0.0.1:99999".into())).contains("no address"));
    assert!(refused(&|pool| pool.user = "client.haven".into()).contains("without `client.`"));
    assert!(refused(&|pool| pool.pool = "--conf".into()).contains("`pool`"));
    assert!(refused(&|pool| pool.namespace = Some("a/b".into())).contains("`namespace`"));
    assert!(refused(&|pool| pool.key = Plain::new("abc".into())).contains("get-key client.haven"));
}

#[test]
fn monitors_have_ports_for_qemu() {
    let servers = super::pool::servers(&pool().monitors);
    let at = |i: usize| (servers[i].0.as_str(), servers[i].1);
    assert_eq!(at(0), ("10.0.0.1", 3300));
    assert_eq!(at(1), ("10.0.0.2", 6789));
    assert_eq!(at(2), ("fd00::3", 3300));
    assert_eq!(at(3), ("fd00::4", 3300));
}

#[test]
fn a_client_is_one_client() {
    for good in ["10.86.7.4:0/131471054", "[fd00::4]:0/7"] {
        let client: clients::Client = good.parse().unwrap();
        assert_eq!(client.to_string(), good);
        assert!(client.host().is_some());
    }
    // These would mean everybody on a host, or nobody.
    for bad in [
        "10.86.7.4",
        "10.86.7.4:0/0",
        "10.86.7.4:0",
        "-h:0/1",
        "10.86.7.4:x/1",
        ":/",
        "10.86.7.4:0/1 2",
    ] {
        assert!(bad.parse::<clients::Client>().is_err(), "{bad}");
    }
}

#[test]
fn watchers_and_owners_of_locks_are_read() {
    let status = r#"[{"address":"10.86.7.3:0/1842150178","client":4810,"cookie":1},{"address":"10.86.7.2:0/39","client":1,"cookie":2}]"#;
    let named: Vec<clients::At> = serde_json::from_str(status).unwrap();
    assert_eq!(clients::clients(&named).unwrap().len(), 2);
    let lock = r#"[{"id":"auto 140437243417232","locker":"client.4375","address":"10.86.7.4:0/131471054"}]"#;
    let named: Vec<clients::At> = serde_json::from_str(lock).unwrap();
    assert_eq!(
        clients::clients(&named).unwrap().first().unwrap().to_string(),
        "10.86.7.4:0/131471054"
    );
}

#[test]
fn usage_counts_snapshots_with_their_image() {
    let text = r#"{"images":[{"name":"a","snapshot":"s","snapshot_id":4,"provisioned_size":10,"used_size":3},
        {"name":"a","provisioned_size":20,"used_size":4},{"name":"b","provisioned_size":5,"used_size":0}],
        "total_provisioned_size":25,"total_used_size":7}"#;
    let images = images::usage(serde_json::from_str(text).unwrap());
    assert_eq!(images.len(), 2);
    assert_eq!((images[0].size_bytes, images[0].used_bytes), (20, 7));
}

#[test]
fn room_ends_at_the_quota() {
    let text = |quota: u64| {
        format!(
            r#"{{"pools":[{{"name":"vm","id":1,"stats":{{"stored":100,"max_avail":900,"quota_bytes":{quota}}}}}]}}"#
        )
    };
    let room = |quota| images::room(&serde_json::from_str(&text(quota)).unwrap(), "vm").unwrap();
    assert_eq!((room(0).total.0, room(0).free.0, room(0).used.0), (1000, 900, 100));
    assert_eq!((room(150).total.0, room(150).free.0), (150, 50));
    assert_eq!(room(50).free.0, 0);
}

#[test]
fn qemu_gets_the_key_by_a_file_that_only_its_user_reads() {
    let dir = tempfile::tempdir().unwrap();
    let owner = std::os::unix::fs::MetadataExt::uid(&dir.path().metadata().unwrap());
    let files = node::write(dir.path(), &pool(), owner).unwrap();
    for file in [&files.conf, &files.key] {
        assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    }
    let mut pool = pool();
    pool.namespace = Some("one".into());
    let launch = node::RbdLaunch::of(&pool, "web.root.1", files);
    let node = node::node("d0", &launch, "k0");
    assert_eq!(node["file"]["namespace"], "one");
    assert_eq!(node["file"]["server"][1]["port"], "6789");
    assert!(!node.to_string().contains(KEY));
    assert_eq!(node::secret("k0", &launch)["format"], "base64");
    assert!(Path::new(node["file"]["conf"].as_str().unwrap()).exists());
}
