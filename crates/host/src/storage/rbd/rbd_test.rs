//! With a real Ceph. `HAVEN_RBD_TEST` names a directory with `pool.json`, a pool as its user writes it, and
//! `poor.key`, the key of `client.poor`, who may only read; `xtask/ceph-lab.sh up` makes both. The pool has a namespace `one`, and beside it there is a pool `other`.

use super::{clients::Client, images::Images, node, pool::RbdPool};
use haven_store::seal::Plain;
use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines},
    process::{Child, ChildStdin, ChildStdout, Command},
};

const MIB: u64 = 1 << 20;

fn lab() -> Option<(PathBuf, RbdPool)> {
    let Some(directory) = std::env::var_os("HAVEN_RBD_TEST").map(PathBuf::from) else {
        println!("skipped: needs ceph");
        return None;
    };
    let text = std::fs::read_to_string(directory.join("pool.json")).unwrap();
    let told: serde_json::Value = serde_json::from_str(&text).unwrap();
    let said = |field: &str| told[field].as_str().unwrap().to_owned();
    let monitors = told["monitors"].as_array().unwrap();
    let pool = RbdPool {
        monitors: monitors.iter().map(|at| at.as_str().unwrap().to_owned()).collect(),
        user: said("user"),
        key: Plain::new(said("key")),
        pool: said("pool"),
        namespace: None,
    };
    Some((directory, pool))
}

/// A file of 3 MiB of which the middle is zero.
fn disk(directory: &Path) -> PathBuf {
    let mut content = vec![0; 3 * MIB as usize];
    content[..MIB as usize].fill(0xa1);
    content[2 * MIB as usize..].fill(0xa3);
    let path = directory.join("disk.raw");
    std::fs::write(&path, content).unwrap();
    path
}

/// A client of QEMU's, which does what it is told until it is dropped.
struct Qemu {
    _child: Child,
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
}

impl Qemu {
    fn open(directory: &Path, pool: &RbdPool, image: &str) -> Self {
        let owner = std::os::unix::fs::MetadataExt::uid(&directory.metadata().unwrap());
        let files = node::write(directory, pool, owner).unwrap();
        let launch = node::RbdLaunch::of(pool, image, files);
        let node = node::node("d0", &launch, "k0");
        let mut child = Command::new("qemu-io")
            .args(["--object", &node::secret("k0", &launch).to_string(), &format!("json:{node}")])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let input = child.stdin.take().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap()).lines();
        Self { _child: child, input, output }
    }

    /// Whether it was done.
    async fn does(&mut self, what: &str) -> bool {
        self.input.write_all(format!("{what}\n").as_bytes()).await.unwrap();
        loop {
            let next = tokio::time::timeout(Duration::from_secs(60), self.output.next_line()).await;
            let line = next.unwrap().unwrap().unwrap();
            if line.contains("failed") || line.contains("error") {
                return false;
            }
            if line.contains("wrote ") || line.contains("read ") && line.contains("bytes at") {
                return true;
            }
        }
    }
}

#[tokio::test]
async fn an_image_lives() {
    let Some((_, pool)) = lab() else { return };
    for namespace in [None, Some("one".to_owned())] {
        let pool = RbdPool { namespace, ..pool.clone() };
        let dir = tempfile::tempdir().unwrap();
        let images = Images::new(&pool, dir.path()).unwrap();
        let room = images.room().await.unwrap();
        assert!(room.free.0 > 0 && room.total.0 == room.free.0 + room.used.0, "{room:?}");

        assert_eq!(images.size("t.a").await.unwrap(), None);
        images.create("t.a", 8 * MIB + 1).await.unwrap();
        assert_eq!(images.size("t.a").await.unwrap(), Some(8 * MIB + 512));
        let again = images.create("t.a", MIB).await.unwrap_err().what;
        assert!(again.ends_with("t.a: it cannot be made, since there is one already"), "{again}");
        images.grow("t.a", 16 * MIB).await.unwrap();
        images.grow("t.a", MIB).await.unwrap();
        assert_eq!(images.size("t.a").await.unwrap(), Some(16 * MIB));

        images.snapshot("t.a", "before").await.unwrap();
        {
            let mut qemu = Qemu::open(dir.path(), &pool, "t.a");
            assert!(qemu.does("write -P 7 0 4k").await);
            let held = images.revert("t.a", "before").await.unwrap_err().what;
            let who = images.clients("t.a").await.unwrap();
            assert!(held.contains(&who.first().unwrap().to_string()), "{held}");
            let held = images.remove("t.a").await.unwrap_err().what;
            println!("{held}");
            assert!(held.contains("cannot be removed, since it is open to "), "{held}");
            assert!(qemu.does("read -P 7 0 4k").await);
        }
        closed(&images, "t.a").await;
        images.revert("t.a", "before").await.unwrap();
        let mut qemu = Qemu::open(dir.path(), &pool, "t.a");
        assert!(qemu.does("read -P 0 0 4k").await);
        drop(qemu);
        closed(&images, "t.a").await;
        let names = images.snapshots("t.a").await.unwrap();
        assert_eq!((names[0].name.as_str(), names[0].size_bytes), ("before", 16 * MIB));
        images.remove_snapshot("t.a", "before").await.unwrap();
        images.remove_snapshot("t.a", "before").await.unwrap();
        images.snapshot("t.a", "again").await.unwrap();
        images.remove("t.a").await.unwrap();
        images.remove("t.a").await.unwrap();
        assert_eq!(images.size("t.a").await.unwrap(), None);
    }
}

fn ours(name: &str) -> bool {
    name.starts_with("t.")
}

/// What an image holds, or held in a snapshot.
async fn holds(images: &Images, dir: &Path, what: &str) -> Vec<u8> {
    let (of, file) = (images.path("t.x").unwrap().replace("t.x", what), dir.join("exported"));
    let _ = std::fs::remove_file(&file);
    let args = ["export", &of, file.to_str().unwrap(), "--no-progress"];
    images.programs.rbd(&args, Duration::from_secs(60)).await.unwrap();
    std::fs::read(file).unwrap()
}

/// Nothing is flushed, so only what was acknowledged speaks for what the image must hold.
#[tokio::test]
async fn what_qemu_was_told_to_be_written_is_in_a_snapshot_that_another_client_takes() {
    let Some((_, pool)) = lab() else { return };
    let dir = tempfile::tempdir().unwrap();
    let images = Images::new(&pool, dir.path()).unwrap();
    images.create("t.told", 8 * MIB).await.unwrap();
    let (told, asked) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let (ends, begun) = (Arc::new(AtomicBool::new(false)), Instant::now());
    let mut qemu = Qemu::open(dir.path(), &pool, "t.told");
    let writes = tokio::spawn({
        let (told, asked, ends) = (Arc::clone(&told), Arc::clone(&asked), Arc::clone(&ends));
        async move {
            while !ends.load(Ordering::SeqCst) {
                let next = told.load(Ordering::SeqCst) + 1;
                asked.store(next, Ordering::SeqCst);
                assert!(qemu.does(&format!("write -P 1 {} 512", next * 512)).await);
                told.store(next, Ordering::SeqCst);
            }
            qemu
        }
    });
    for turn in 0..6 {
        tokio::time::sleep(Duration::from_millis(200 + 90 * turn)).await;
        let (before, since) = (told.load(Ordering::SeqCst), Instant::now());
        let name = format!("haven-{turn}r1");
        images.snapshot("t.told", &name).await.unwrap();
        let (took, after) = (since.elapsed().as_secs_f64(), asked.load(Ordering::SeqCst));
        let kept = holds(&images, dir.path(), &format!("t.told@{name}")).await;
        let sectors = kept.chunks(512).skip(1).take_while(|sector| sector[0] == 1).count() as u64;
        let all = kept.iter().filter(|byte| **byte == 1).count() as u64 / 512;
        println!(
            "taken in {took:.2} s: {before} writes before, {sectors} kept, {after} begun after"
        );
        assert_eq!(sectors, all, "one is kept and not one before it");
        assert!(before > 0 && before <= sectors && sectors <= after);
    }
    ends.store(true, Ordering::SeqCst);
    let qemu = writes.await.unwrap();
    assert!(told.load(Ordering::SeqCst) > 20, "in {:?}", begun.elapsed());
    // Ceph itself puts nothing back that is open.
    let raw =
        images.programs.rbd(&["snap", "rollback", "vm/t.told@haven-0r1"], Duration::from_secs(60));
    let raw = raw.await.unwrap_err();
    assert!(raw.is(libc::EROFS), "{raw:?}");
    let mut open = qemu;
    assert!(open.does("write -P 7 0 512").await);
    let refused = images.revert("t.told", "haven-0r1").await.unwrap_err().what;
    assert!(refused.contains("since it is open to "), "{refused}");
    let kept = images.snapshots("t.told").await.unwrap();
    let now = i64::try_from(std::time::UNIX_EPOCH.elapsed().unwrap().as_millis()).unwrap();
    assert!(
        kept.len() == 6 && kept.iter().all(|one| (now - one.at_ms()).abs() < 120_000),
        "{kept:?}"
    );
    for one in &kept {
        images.remove_snapshot("t.told", &one.name).await.unwrap();
    }
    drop(open);
    closed(&images, "t.told").await;
    images.remove("t.told").await.unwrap();
}

/// A clone of a snapshot: the snapshot goes, then the image that it was of; then the clone, and nothing is left of either.
#[tokio::test]
async fn an_image_made_of_a_snapshot_holds_neither_that_nor_its_source() {
    let Some((_, pool)) = lab() else { return };
    for namespace in [None, Some("one".to_owned())] {
        let pool = RbdPool { namespace, ..pool.clone() };
        let dir = tempfile::tempdir().unwrap();
        let images = Images::new(&pool, dir.path()).unwrap();
        images.create("t.source", 8 * MIB).await.unwrap();
        let mut qemu = Qemu::open(dir.path(), &pool, "t.source");
        assert!(qemu.does("write -P 5 0 1M").await);
        images.snapshot("t.source", "haven-1r1").await.unwrap();
        assert!(qemu.does("write -P 6 0 1M").await);
        let of = ("t.source", "haven-1r1");
        let small = images.make_of(of, "t.part", "t.made", MIB).await.unwrap_err().what;
        assert!(small.contains("would be 1 MiB") && small.contains("holds 8 MiB"), "{small}");
        let lacks = images.make_of(("t.source", "haven-2r1"), "t.part", "t.made", 8 * MIB).await;
        assert!(lacks.unwrap_err().what.contains("does not keep `haven-2r1` any more"));
        let since = Instant::now();
        images.make_of(of, "t.part", "t.made", 16 * MIB).await.unwrap();
        println!("made in {:.2} s", since.elapsed().as_secs_f64());
        // One that another attempt has made stays as it is.
        images.make_of(of, "t.part", "t.made", 16 * MIB).await.unwrap();
        assert_eq!(images.size("t.part").await.unwrap(), None);
        images.remove_snapshot("t.source", "haven-1r1").await.unwrap();
        assert_eq!(images.snapshots("t.source").await.unwrap(), []);
        // One of one: it hangs on nothing.
        images.snapshot("t.made", "haven-3r1").await.unwrap();
        images.make_of(("t.made", "haven-3r1"), "t.part", "t.third", 16 * MIB).await.unwrap();
        assert!(images.children("t.made").await.unwrap().is_empty());
        images.snapshot("t.source", "haven-4r1").await.unwrap();
        drop(qemu);
        closed(&images, "t.source").await;
        images.remove("t.source").await.unwrap();
        images.sweep(ours).await.unwrap();
        assert_eq!(images.size("t.source").await.unwrap(), None);
        for name in ["t.made", "t.third"] {
            let held = holds(&images, dir.path(), name).await;
            assert!(held.len() as u64 == 16 * MIB && held[..MIB as usize].iter().all(|b| *b == 5));
            assert!(held[MIB as usize..].iter().all(|byte| *byte == 0), "{name}");
        }
        let path = images.programs.pool.path();
        let hidden = async || -> Vec<serde_json::Value> {
            images.programs.ask_rbd(&["trash", "ls", &path]).await.unwrap()
        };
        assert_eq!(hidden().await.len(), 1);
        images.remove("t.made").await.unwrap();
        images.sweep(|_| false).await.unwrap();
        assert_eq!(hidden().await.len(), 1, "what is another's stays");
        images.sweep(ours).await.unwrap();
        assert!(hidden().await.is_empty(), "{:?}", hidden().await);
        images.remove("t.third").await.unwrap();
    }
}

/// A client that was killed is forgotten in time; here it is shut out.
async fn closed(images: &Images, image: &str) {
    images.shut_out(image, &BTreeSet::new(), &BTreeSet::new()).await.unwrap();
}

#[tokio::test]
async fn files_are_imported_and_cloned() {
    let Some((_, pool)) = lab() else { return };
    let dir = tempfile::tempdir().unwrap();
    let images = Images::new(&pool, dir.path()).unwrap();
    let raw = disk(dir.path());
    let qcow2 = dir.path().join("disk.qcow2");
    let made = std::process::Command::new("qemu-img")
        .args(["convert", "-f", "raw", "-O", "qcow2"])
        .args([&raw, &qcow2])
        .status();
    assert!(made.unwrap().success());
    for (file, format) in [(&raw, "raw"), (&qcow2, "qcow2")] {
        // A try that was cut off.
        images.create("t.image.part", MIB).await.unwrap();
        images.import(file, format, "t.image").await.unwrap();
        assert_eq!(images.size("t.image.part").await.unwrap(), None);
        images.clone("t.image", "t.clone", 20 * MIB).await.unwrap();
        let small = images.clone("t.image", "t.small", MIB).await.unwrap_err().what;
        assert!(small.contains("would be 1 MiB") && small.contains("holds 3 MiB"), "{small}");
        let mut qemu = Qemu::open(dir.path(), &pool, "t.clone");
        for read in ["-P 0xa1 0 1M", "-P 0 1M 1M", "-P 0xa3 2M 1M", "-P 0 3M 17M"] {
            assert!(qemu.does(&format!("read {read}")).await, "{read}");
        }
        assert!(qemu.does("write -P 9 0 4k").await);
        let use_ = images.list().await.unwrap();
        let of = |name: &str| use_.iter().find(|image| image.name == name).unwrap();
        assert_eq!(of("t.clone").size_bytes, 20 * MIB);
        assert!(of("t.clone").used_bytes > 0 && of("t.image").used_bytes >= 2 * MIB);
        assert_eq!(images.children("t.image").await.unwrap(), ["t.clone"]);
        // An image may go before its clones.
        images.remove("t.image").await.unwrap();
        images.sweep(ours).await.unwrap();
        assert_eq!(images.size("t.image").await.unwrap(), None);
        assert!(qemu.does("read -P 0xa3 2M 1M").await);
        drop(qemu);
        closed(&images, "t.clone").await;
        images.remove("t.clone").await.unwrap();
        images.sweep(ours).await.unwrap();
    }
    let wrong = images.import(&raw, "qcow2", "t.wrong").await.unwrap_err().what;
    assert!(wrong.contains("is not a disk of the format qcow2"), "{wrong}");
}

#[tokio::test]
async fn each_wrong_thing_is_one_sentence() {
    let Some((directory, pool)) = lab() else { return };
    let poor = std::fs::read_to_string(directory.join("poor.key")).unwrap();
    let says = async |change: &dyn Fn(&mut RbdPool)| {
        let mut pool = pool.clone();
        change(&mut pool);
        let dir = tempfile::tempdir().unwrap();
        let since = Instant::now();
        let said = Images::new(&pool, dir.path()).unwrap().check().await;
        let took = since.elapsed();
        println!("{:.1} s: {said:?}", took.as_secs_f64());
        assert!(took < Duration::from_secs(11), "{took:?}");
        said.map_err(|failure| failure.what).err().unwrap_or_default()
    };
    assert_eq!(says(&|_| {}).await, "");
    assert_eq!(says(&|pool| pool.namespace = Some("one".into())).await, "");
    assert!(
        says(&|pool| pool.monitors = vec!["10.86.7.77".into(), "10.86.7.78:3300".into()])
            .await
            .contains("none of the Ceph monitors")
    );
    assert!(
        says(&|pool| pool.monitors = vec!["127.0.0.1".into()])
            .await
            .contains("none of the Ceph monitors")
    );
    assert!(
        says(&|pool| pool.monitors = vec!["no.such.host".into()]).await.contains("no.such.host")
    );
    let key = || Plain::new("AQBSAAAAAAAAABAAAAAAAAAAAAAAAAAAAAAAAA==".into());
    assert!(says(&|pool| pool.key = key()).await.contains("does not take the key of client.haven"));
    assert!(says(&|pool| pool.user = "nobody".into()).await.contains("has no such user"));
    assert!(says(&|pool| pool.pool = "nopool".into()).await.contains("Ceph has no pool nopool"));
    assert!(says(&|pool| pool.pool = "other".into()).await.contains("ceph auth caps client.haven"));
    assert!(says(&|pool| pool.namespace = Some("none".into())).await.contains("no such namespace"));
    let poor =
        says(&|pool| (pool.user, pool.key) = ("poor".into(), Plain::new(poor.clone()))).await;
    assert!(poor.contains("ceph auth caps client.poor mon 'profile rbd'"), "{poor}");
}

#[tokio::test]
async fn whoever_is_shut_out_writes_no_more_and_gets_errors() {
    let Some((_, pool)) = lab() else { return };
    let dir = tempfile::tempdir().unwrap();
    let images = Images::new(&pool, dir.path()).unwrap();
    images.create("t.fence", 8 * MIB).await.unwrap();
    let mut old = Qemu::open(dir.path(), &pool, "t.fence");
    assert!(old.does("write -P 1 0 4k").await);
    let noted = images.clients("t.fence").await.unwrap();
    assert_eq!(noted.len(), 1);
    let mut other = Qemu::open(dir.path(), &pool, "t.fence");
    assert!(other.does("read -P 1 0 4k").await);
    // The lock alone keeps nobody out: it goes to and fro.
    for turn in 0..3 {
        assert!(other.does(&format!("write -P 2 {turn}M 4k")).await);
        assert!(old.does(&format!("write -P 1 {turn}M 4k")).await);
    }
    // One that was noted, and one that nobody knew of.
    let since = Instant::now();
    let out = images.shut_out("t.fence", &noted, &BTreeSet::new()).await.unwrap();
    println!("two clients were shut out in {:.2} s", since.elapsed().as_secs_f64());
    assert_eq!(out.len(), 2);
    assert!(out.is_superset(&noted));
    let since = Instant::now();
    let mut new = Qemu::open(dir.path(), &pool, "t.fence");
    assert!(new.does("read -P 1 0 4k").await && new.does("write -P 3 0 4k").await);
    println!("the new owner wrote {:.2} s later", since.elapsed().as_secs_f64());
    for turn in 0..3 {
        assert!(!old.does("write -P 1 0 4k").await && !other.does("write -P 2 0 4k").await);
        assert!(!old.does("read -P 1 0 4k").await);
        assert!(new.does(&format!("write -P 3 {turn}M 4k")).await);
    }
    assert!(new.does("read -P 3 0 4k").await);
    let denied = images.let_in(noted.first().unwrap()).await.unwrap_err().what;
    assert!(denied.contains("an administrator may: `ceph osd blocklist rm "), "{denied}");
    // Again, and for one of whom nobody knows.
    images.shut_out("t.fence", &out, &BTreeSet::new()).await.unwrap();
    assert!(!new.does("write -P 3 0 4k").await);
    images.shut_out_client(&"192.0.2.2:0/5".parse::<Client>().unwrap()).await.unwrap();
    images.remove("t.fence").await.unwrap();
}
