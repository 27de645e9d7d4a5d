//! What is mounted, and what names may be; a real volume is tried out in `crates/haven/tests/filers`.

use super::{GlusterMounts, is_mark, is_mounted, last_error};
use crate::storage::pool;
use haven_model::{GlusterSpec, PoolDriverKind, PoolSpec};
use std::path::Path;

const TABLE: &str = "119 86 254:0 /lib /var/lib/glusterd rw - ext4 /dev/vda rw\n150 87 0:82 / /run/haven/gluster/1-2 rw,relatime - fuse.glusterfs 10.86.8.1:vm rw,user_id=0\n";

#[test]
fn only_a_volume_that_is_mounted_there_counts() {
    assert!(is_mounted(Path::new("/run/haven/gluster/1-2"), TABLE));
    assert!(!is_mounted(Path::new("/run/haven/gluster/1"), TABLE));
    assert!(!is_mounted(Path::new("/var/lib/glusterd"), TABLE), "it is of another kind");
}

#[test]
fn no_mark_leads_elsewhere() {
    assert!(is_mark("01890000-0000-7000-8000-000000000000"));
    for wrong in ["", "..", "../x", "a/b", "check-1", "a b"] {
        assert!(!is_mark(wrong), "{wrong}");
    }
}

#[test]
fn the_last_error_of_a_log_is_told() {
    let directory = tempfile::tempdir().unwrap();
    let log = directory.path().join("log");
    std::fs::write(&log, "[x] E [a.c:1:f] 0-old: before\n[x] E [glusterfsd-mgmt.c:2139:cbk] 0-mgmt: failed to fetch volume file (key:none)\n[x] W [b] 0-x: later\n").unwrap();
    assert_eq!(last_error(&log, 0), "failed to fetch volume file (key:none)");
    assert!(last_error(&log, 1000).contains("tells more"));
}

#[tokio::test]
async fn nothing_is_made_in_the_bare_directory_below_a_mount() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().display().to_string();
    let gluster = GlusterSpec {
        servers: vec!["127.0.0.1".into()],
        volume: "vm".into(),
        directory: None,
        mark: Some("1-2".into()),
    };
    let mut of =
        PoolSpec { gluster: Some(gluster), ..PoolSpec::new(PoolDriverKind::Gluster, path) };
    let said = pool::ready(&of).unwrap_err().what;
    assert!(said.contains("holds no .haven-pool"), "{said}");
    assert!(pool::room(&of).unwrap().is_none(), "the room of the disk beneath is told");
    std::fs::write(directory.path().join(pool::MARK), "another\n").unwrap();
    let said = pool::ready(&of).unwrap_err().what;
    assert!(said.contains("is not this pool"), "{said}");
    std::fs::write(directory.path().join(pool::MARK), "1-2\n").unwrap();
    pool::ready(&of).unwrap();
    of.set_mark(Some("../../etc".into()));
    let mounts = GlusterMounts::new(directory.path().join("run"), directory.path().into());
    assert!(mounts.ready(&of).await.unwrap_err().what.contains("does not say which"));
}
