//! Encrypted disks with the real QEMU and the tiny guest, inside a host of their own: one in `qcow2`, one that is nothing but LUKS
//! as a replica is, and one that is not encrypted.

#![expect(clippy::unwrap_used, reason = "a helper of tests fails as a test does")]

mod inside;

use async_trait::async_trait;
use haven_host::{
    agent::storage::SeedWanted,
    guard::{Guard, GuardError, GuardStatus, Registration},
    storage::{luks, seed},
    vm::{
        driver::{Accel, DirectBoot, DiskLaunch, GuestState, VmDriver, VmLaunch},
        hot_disks::{HotDisks, LetGo},
        qemu::{QemuConfig, QemuDriver},
        run_dir,
        snapshots::Snapshots,
        views::{DiskView, Keep, Marks, ViewAsked, Views},
    },
};
use haven_model::volume::LUKS_HEAD_BYTES;
use haven_store::seal::{Plain, new_disk_key};
use std::{
    io::Write,
    os::unix::fs::{FileExt, chown},
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

const UID: u32 = 200_001;
const RUN: &str = "/run/haven/vms";
const PATIENCE: Duration = Duration::from_secs(150);
const SIZE: u64 = 16 << 20;
const WORDS: &str = "what-the-guest-wrote-and-nobody-else-reads";

/// Writes each number to its first disk and then to its second, both flushed; its words to all.
const COUNTS: &str = r#"#!/bin/sh
for disk in /dev/vda /dev/vdb /dev/vdc; do
  echo WORDS | dd of=$disk bs=512 seek=20000 conv=sync,fsync,notrunc 2> /dev/null
done
i=0
while :; do
  i=$((i + 1))
  printf '%08d' $i | dd of=/dev/vda bs=512 seek=$i conv=sync,fsync,notrunc 2> /dev/null
  printf '%08d' $i | dd of=/dev/vdb bs=512 seek=$i conv=sync,fsync,notrunc 2> /dev/null
  [ $((i % 20)) = 0 ] && echo "COUNTED $i" > /dev/ttyS0
done
"#;

struct Agrees;

#[async_trait]
impl Guard for Agrees {
    async fn extend(&self, _session: u64, _deadline_ns: u64) -> Result<(), GuardError> {
        Ok(())
    }
    async fn register(&self, _start: &Registration<'_>) -> Result<(), GuardError> {
        Ok(())
    }
    async fn unregister(&self, _vm: &str) -> Result<(), GuardError> {
        Ok(())
    }
    async fn hold(&self, _label: &str) -> Result<(), GuardError> {
        Ok(())
    }
    async fn release(&self, _label: &str) -> Result<(), GuardError> {
        Ok(())
    }
    async fn replace(&self) {}
    async fn status(&self) -> Result<GuardStatus, GuardError> {
        Ok(GuardStatus::default())
    }
}

fn qemu() -> QemuDriver {
    let config = QemuConfig {
        program: "qemu-system-x86_64".into(),
        run_dir: RUN.into(),
        log_dir: "/var/log/haven/vms".into(),
        scopes: false,
    };
    QemuDriver::new(config, Arc::new(Agrees))
}

/// Runs one of QEMU's programs that reads a key at its standard input.
fn run(program: &str, args: &[&str], key: &Plain) -> String {
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(key.expose().as_bytes()).unwrap();
    let done = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&[done.stdout, done.stderr].concat()).into_owned();
    assert!(done.status.success(), "{program} {args:?}: {said}");
    said
}

/// Makes the file of a disk; with its key encrypted.
fn disk(name: &str, format: &str, key: Option<&Plain>, slot: u8) -> DiskLaunch {
    let path = format!("/tmp/{name}");
    let (size, secret, how) = (SIZE.to_string(), luks::secret(), luks::created());
    let luks = key.map(|key| {
        let file = run_dir::prepare(Path::new(RUN), "web-1").unwrap().join(format!("{name}.luks"));
        run_dir::write(&file, key.expose().as_bytes(), Some(UID)).unwrap();
        file
    });
    match key {
        None => {
            let args = ["create", "-q", "-f", format, &path, &size];
            assert!(Command::new("qemu-img").args(args).status().unwrap().success());
        }
        Some(key) if format == "qcow2" => {
            let args =
                ["create", "-q", "-f", "qcow2", "--object", &secret, "-o", &how, &path, &size];
            run("qemu-img", &args, key);
        }
        Some(key) => {
            let file = std::fs::File::create(&path).unwrap();
            file.set_len(SIZE + LUKS_HEAD_BYTES).unwrap();
            luks::put_head(Path::new(&path), &luks::head(key).unwrap()).unwrap();
        }
    }
    chown(&path, Some(UID), Some(UID)).unwrap();
    DiskLaunch {
        name: name.into(),
        path: path.into(),
        format: format.into(),
        read_only: false,
        size_bytes: SIZE,
        arrives: false,
        mirror: None,
        rbd: None,
        filer: None,
        luks,
        slot: Some(slot),
        parked: false,
    }
}

fn launch(disks: Vec<DiskLaunch>) -> VmLaunch {
    let wanted = SeedWanted {
        vm: "web-1".into(),
        instance_id: "i-1".into(),
        user_data: COUNTS.replace("WORDS", WORDS),
        nics: Vec::new(),
        owner_uid: UID,
    };
    let path = run_dir::prepare(Path::new(RUN), "web-1").unwrap().join(run_dir::SEED);
    run_dir::write(&path, &seed::image(&wanted).unwrap(), Some(UID)).unwrap();
    VmLaunch {
        vm: "web-1".into(),
        uid: UID,
        epoch: 3,
        session: 1,
        cpus: 1,
        memory_bytes: 128 << 20,
        disks,
        direct_boot: Some(DirectBoot {
            kernel: "/tiny/vmlinuz".into(),
            initrd: Some("/tiny/initrd".into()),
            cmdline: "console=ttyS0 quiet".into(),
        }),
        seed: Some(path),
        nics: Vec::new(),
        accel: Accel::Tcg,
        uuid: "6b1f2a3c-0000-4000-8000-000000000001".into(),
        machine: None,
        incoming: false,
        postcopy: false,
        agent: false,
        ports: true,
        disks_as: "as-begun".into(),
    }
}

fn counted(log: &Path) -> u64 {
    let said = String::from_utf8_lossy(&std::fs::read(log).unwrap_or_default()).into_owned();
    let told = said.lines().filter_map(|line| line.split_once("COUNTED ")?.1.trim().parse().ok());
    told.max().unwrap_or(0)
}

fn counts_to(log: &Path, least: u64) {
    let begin = Instant::now();
    while counted(log) < least {
        let said = std::fs::read(log).unwrap_or_default();
        let said = String::from_utf8_lossy(&said);
        assert!(begin.elapsed() < PATIENCE, "it is not at {least}, but:\n{said}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn holds(path: &str, what: &[u8]) -> bool {
    std::fs::read(path).unwrap().windows(what.len()).any(|part| part == what)
}

/// All that is said to hold something; and how much of it that is, bytes.
async fn all_of(view: &mut Box<dyn DiskView>) -> (Vec<u8>, u64) {
    let (mut content, mut data) = (vec![0; view.size() as usize], 0);
    let mut at = 0;
    while at < view.size() {
        for extent in view.status(at, (view.size() - at) as u32).await.unwrap() {
            if !extent.zero {
                let part = &mut content[at as usize..(at + extent.length) as usize];
                view.read(at, part).await.unwrap();
                data += extent.length;
            }
            at += extent.length;
        }
    }
    (content, data)
}

/// The last number that a disk holds; all before it are there, too.
fn last(disk: &[u8]) -> u64 {
    let number = |sector: &[u8]| std::str::from_utf8(&sector[..8]).ok()?.parse::<u64>().ok();
    let found = disk.chunks(512).skip(1).map_while(number);
    found.enumerate().map(|(i, n)| if n == i as u64 + 1 { n } else { 0 }).max().unwrap_or(0)
}

fn asked(disks: &[&str], stored: bool, mark: Option<(&str, Option<&str>)>) -> ViewAsked {
    let marks = mark.map(|(mark, since)| Marks {
        owner: "nas".into(),
        mark: mark.into(),
        since: since.map(str::to_owned),
    });
    let disks = disks.iter().map(|disk| (*disk).to_owned()).collect();
    ViewAsked { disks, marks, keep: None, stored }
}

/// What a copy of a replica holds, with the key.
fn decrypted(content: &[u8], key: &Plain) -> Vec<u8> {
    std::fs::File::create("/tmp/copy").unwrap().write_all_at(content, 0).unwrap();
    let of = luks::opened(Path::new("/tmp/copy"), "raw").unwrap();
    let secret = luks::secret();
    run(
        "qemu-img",
        &["convert", "--object", &secret, "--image-opts", &of, "-O", "raw", "/tmp/clear"],
        key,
    );
    std::fs::read("/tmp/clear").unwrap()
}

/// Seen as its guest does for a backup, and as it lies there for a copy; by two daemons, the first of which dies with a view open.
async fn seen(driver: &QemuDriver, key: &Plain) {
    let log = driver.log("web-1");
    let view = driver.open_view("web-1", &asked(&["root", "data"], false, Some(("a", None)))).await;
    let mut disks = view.unwrap().disks;
    let (first, _) = all_of(&mut disks[0].1).await;
    let (second, data) = all_of(&mut disks[1].1).await;
    let (one, two) = (last(&first), last(&second));
    assert!(one >= 20 && (one == two || one == two + 1), "{one} and {two}");
    assert!(data < SIZE / 4, "what was never written is read: {data} bytes");
    assert!(second.windows(WORDS.len()).any(|part| part == WORDS.as_bytes()));
    drop(disks);
    driver.close_view("web-1").await.unwrap();
    let then = counted(&log);
    counts_to(&log, then + 20);
    // What changed since is known, above what decrypts it.
    let since = asked(&["root", "data"], false, Some(("b", Some("a"))));
    let view = driver.open_view("web-1", &since).await.unwrap();
    assert!(view.disks.iter().all(|(_, disk)| disk.is_marked()));
    drop(view);
    driver.close_view("web-1").await.unwrap();
    // As it lies in its file, of the same instant as what the other keeps in itself.
    let keep = Keep { snapshot: "haven-k".into(), disks: vec!["root".into()] };
    let stored = ViewAsked { keep: Some(keep), ..asked(&["data"], true, None) };
    let mut disks = driver.open_view("web-1", &stored).await.unwrap().disks;
    assert_eq!(disks[0].1.size(), SIZE + LUKS_HEAD_BYTES);
    counts_to(&log, counted(&log) + 20);
    let (content, data) = all_of(&mut disks[0].1).await;
    assert!(content[..LUKS_HEAD_BYTES as usize] == luks::head(key).unwrap()[..]);
    assert!(!content.windows(WORDS.len()).any(|part| part == WORDS.as_bytes()));
    assert!(data < LUKS_HEAD_BYTES + SIZE / 4, "{data} bytes");
    let clear = decrypted(&content, key);
    // The guest was told of these before the view was opened.
    assert!(clear.len() as u64 == SIZE && last(&clear) >= then + 20, "{}", last(&clear));
    println!("as it lies there it has {} records, before that {one}", last(&clear));
    // It is left open: this daemon dies.
}

/// Another disk comes, and one grows, while the guest runs.
async fn changed(driver: &QemuDriver, key: &Plain) {
    for (format, slot) in [("raw", 5), ("qcow2", 6)] {
        let hot = disk(&format!("hot-{format}"), format, Some(key), slot);
        driver.plug("web-1", &hot, "with").await.unwrap();
        let has = driver.has("web-1").await.unwrap();
        let place = has.disks.iter().find(|one| one.name == hot.name).unwrap().place;
        assert!(has.disks.iter().all(|one| one.plugged));
        tokio::time::sleep(Duration::from_secs(1)).await;
        let gone = driver.unplug("web-1", place, "without", Duration::from_secs(60)).await;
        assert_eq!(gone.unwrap(), LetGo::Yes { whole: true });
        // Nothing is left of it, so it can come again, with another key.
        let again = disk(&hot.name, format, Some(&new_disk_key().unwrap()), slot);
        driver.plug("web-1", &again, "with").await.unwrap();
        let gone = driver.unplug("web-1", place, "without", Duration::from_secs(60)).await;
        assert_eq!(gone.unwrap(), LetGo::Yes { whole: true });
    }
    let has = driver.has("web-1").await.unwrap();
    let root = has.disks.iter().find(|one| one.name == "root").unwrap().place;
    driver.grow("web-1", root, SIZE * 2, "larger").await.unwrap();
    assert_eq!(driver.keeps("web-1").await.unwrap()["root"].size, SIZE * 2);
}

#[test]
fn what_a_guest_writes_lies_encrypted_and_is_seen_kept_and_changed_while_it_runs() {
    if !inside::inside(
        "what_a_guest_writes_lies_encrypted_and_is_seen_kept_and_changed_while_it_runs",
    ) {
        return;
    }
    let (one, two) = (new_disk_key().unwrap(), new_disk_key().unwrap());
    let disks = vec![
        disk("root", "qcow2", Some(&one), 0),
        disk("data", "raw", Some(&two), 1),
        disk("plain", "qcow2", None, 2),
    ];
    let (first, driver) = (tokio::runtime::Runtime::new().unwrap(), qemu());
    first.block_on(async {
        let running = driver.start(&launch(disks)).await.unwrap();
        counts_to(&driver.log("web-1"), 20);
        for what in [WORDS, "00000012"] {
            for path in ["/tmp/root", "/tmp/data"] {
                assert!(!holds(path, what.as_bytes()), "{what} in {path}");
            }
        }
        assert!(holds("/tmp/plain", WORDS.as_bytes()), "the test cannot fail");
        for file in ["cmdline", "environ"] {
            let told = std::fs::read(format!("/proc/{}/{file}", running.pid)).unwrap();
            let told = String::from_utf8_lossy(&told).into_owned();
            assert!(!told.contains(one.expose()) && !told.contains(two.expose()), "{told}");
        }
        seen(&driver, &two).await;
    });
    drop(first);
    drop(driver);
    let driver = qemu();
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        assert_eq!(driver.list().await.unwrap().len(), 1);
        driver.close_view("web-1").await.unwrap();
        assert_eq!(driver.state("web-1").await.unwrap(), GuestState::Running);
        let then = counted(&driver.log("web-1"));
        counts_to(&driver.log("web-1"), then + 20);
        changed(&driver, &one).await;
        counts_to(&driver.log("web-1"), then + 60);
        driver.kill("web-1").await.unwrap();
    });
    let told = counted(&driver.log("web-1"));
    let clear = decrypted(&std::fs::read("/tmp/data").unwrap(), &two);
    assert!(last(&clear) >= told, "{} of {told}", last(&clear));
}

#[test]
fn another_key_starts_nothing_and_changes_nothing() {
    if !inside::inside("another_key_starts_nothing_and_changes_nothing") {
        return;
    }
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        let driver = qemu();
        for format in ["qcow2", "raw"] {
            let (mine, other) = (new_disk_key().unwrap(), new_disk_key().unwrap());
            let one = disk("root", format, Some(&mine), 0);
            run_dir::write(one.luks.as_ref().unwrap(), other.expose().as_bytes(), Some(UID))
                .unwrap();
            let before = std::fs::read(&one.path).unwrap();
            let path = one.path.clone();
            let said = driver.start(&launch(vec![one])).await.unwrap_err().to_string();
            assert!(said.contains("does not open it; nothing was changed in it"), "{said}");
            assert!(before == std::fs::read(&path).unwrap(), "{format}");
            assert_eq!(driver.list().await.unwrap(), []);
        }
    });
}
