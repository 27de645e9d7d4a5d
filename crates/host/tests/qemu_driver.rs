//! The driver with the real QEMU and the tiny guest, inside a host of their own.

#![expect(clippy::unwrap_used, reason = "a helper of tests fails as a test does")]

mod inside;

use async_trait::async_trait;
use haven_host::{
    agent::storage::{SeedNic, SeedWanted},
    guard::{Guard, GuardError, GuardStatus, Registration},
    storage::seed,
    vm::{
        console,
        driver::{
            Accel, DirectBoot, DiskLaunch, Exit, GuestState, NicLaunch, VmDriver, VmError, VmEvent,
            VmLaunch,
        },
        qemu::{QemuConfig, QemuDriver},
        run_dir, scan,
        snapshots::Snapshots,
        views::{DiskView, Keep, Marks, ViewAsked, Views},
    },
};
use std::{
    os::unix::fs::{MetadataExt, PermissionsExt, chown},
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::runtime::Runtime;

const UID: u32 = 200_001;
const RUN: &str = "/run/haven/vms";
/// A guest under emulation on a busy machine.
const PATIENCE: Duration = Duration::from_secs(150);

/// A guard that agrees, or that never answers.
struct TestGuard {
    answers: bool,
}

#[async_trait]
impl Guard for TestGuard {
    async fn extend(&self, _session: u64, _deadline_ns: u64) -> Result<(), GuardError> {
        Ok(())
    }
    async fn register(&self, _start: &Registration<'_>) -> Result<(), GuardError> {
        if !self.answers {
            std::future::pending::<()>().await;
        }
        Ok(())
    }
    async fn unregister(&self, _vm: &str) -> Result<(), GuardError> {
        if !self.answers {
            std::future::pending::<()>().await;
        }
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

fn driver(program: &str, answers: bool) -> QemuDriver {
    let config = QemuConfig {
        program: program.into(),
        run_dir: RUN.into(),
        log_dir: "/var/log/haven/vms".into(),
        scopes: false,
    };
    QemuDriver::new(config, Arc::new(TestGuard { answers }))
}

fn qemu() -> QemuDriver {
    driver("qemu-system-x86_64", true)
}

fn runtime() -> Runtime {
    Runtime::new().unwrap()
}

/// A tiny guest that runs `user_data`.
fn launch(vm: &str, user_data: &str) -> VmLaunch {
    let wanted = SeedWanted {
        vm: vm.into(),
        instance_id: "i-1".into(),
        user_data: user_data.into(),
        nics: vec![SeedNic {
            mac: "02:68:0a:4d:00:0a".into(),
            address: "10.77.0.10/24".parse().unwrap(),
            gateway: "10.77.0.1".parse().unwrap(),
            nameservers: Vec::new(),
        }],
        owner_uid: UID,
    };
    let directory = run_dir::prepare(Path::new(RUN), vm).unwrap();
    let path = directory.join(run_dir::SEED);
    run_dir::write(&path, &seed::image(&wanted).unwrap(), Some(UID)).unwrap();
    VmLaunch {
        vm: vm.into(),
        uid: UID,
        epoch: 3,
        session: 1,
        cpus: 1,
        memory_bytes: 128 << 20,
        disks: Vec::new(),
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
        ports: false,
        disks_as: String::new(),
    }
}

fn wait_for(log: &Path, text: &str) {
    let begin = Instant::now();
    loop {
        let said = std::fs::read(log).unwrap_or_default();
        let said = String::from_utf8_lossy(&said);
        if said.contains(text) {
            return;
        }
        assert!(begin.elapsed() < PATIENCE, "`{text}` was not said, but:\n{said}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Root's, and nothing in it that the VM's user could change.
fn is_roots(path: &Path) {
    let found = std::fs::symlink_metadata(path).unwrap();
    assert_eq!(found.uid(), 0, "{}", path.display());
    assert_eq!(found.mode() & 0o022, 0, "{}", path.display());
}

#[test]
fn a_guest_runs_unprivileged_is_adopted_and_powers_itself_off() {
    if !inside::inside("a_guest_runs_unprivileged_is_adopted_and_powers_itself_off") {
        return;
    }
    let begin = runtime();
    let first = qemu();
    let mut launch =
        launch("web-1", "#!/bin/sh\nseq 1 220000 > /dev/ttyS0\necho the-end > /dev/ttyS0\n");
    std::fs::write("/tmp/disk", vec![0u8; 1 << 20]).unwrap();
    chown("/tmp/disk", Some(UID), Some(UID)).unwrap();
    launch.disks.push(DiskLaunch {
        name: "data".into(),
        path: "/tmp/disk".into(),
        format: "raw".into(),
        read_only: false,
        size_bytes: 1 << 20,
        arrives: false,
        mirror: None,
        rbd: None,
        luks: None,
        filer: None,
        slot: None,
        parked: false,
    });
    let running = begin.block_on(first.start(&launch)).unwrap();
    let proc = PathBuf::from(format!("/proc/{}", running.pid));
    assert_eq!(std::fs::metadata(&proc).unwrap().uid(), UID);
    let directory = Path::new(RUN).join("web-1");
    is_roots(&directory);
    for entry in std::fs::read_dir(&directory).unwrap() {
        is_roots(&entry.unwrap().path());
    }
    is_roots(&first.log("web-1"));
    assert_eq!(begin.block_on(first.state("web-1")).unwrap(), GuestState::Running);
    let again = begin.block_on(first.start(&launch)).unwrap_err();
    assert!(again.to_string().contains("runs on this host already"), "{again}");
    wait_for(&first.log("web-1"), "TINY-UP 10.77.0.10/24");
    wait_for(&first.log("web-1"), "the-end");
    let old = console::old(&first.log("web-1"));
    assert!(std::fs::metadata(&old).unwrap().len() <= console::LIMIT_BYTES);
    assert!(std::fs::metadata(first.log("web-1")).unwrap().len() < 2 * console::LIMIT_BYTES);

    // The daemon dies: its tasks and its connections are gone, the guest runs on.
    drop(begin);
    drop(first);
    let (end, second) = (runtime(), qemu());
    let mut events = second.events();
    let found = end.block_on(second.list()).unwrap();
    assert_eq!(found, [running]);
    assert_eq!(end.block_on(second.state("web-1")).unwrap(), GuestState::Running);
    assert_eq!(end.block_on(second.strays()).unwrap(), []);
    let again = end.block_on(second.start(&launch)).unwrap_err();
    assert!(matches!(again, VmError::RunsAlready { .. }), "{again}");
    end.block_on(async {
        use tokio::io::AsyncWriteExt;
        let mut console = tokio::net::UnixStream::connect(second.console("web-1")).await.unwrap();
        let ended = async {
            loop {
                console.write_all(b"\npoweroff -f\n").await.ok();
                tokio::time::sleep(Duration::from_secs(2)).await;
            }
        };
        let event = tokio::select! {
            event = tokio::time::timeout(PATIENCE, events.recv()) => event.unwrap().unwrap(),
            () = ended => unreachable!(),
        };
        let wanted = VmEvent::Exited { vm: "web-1".into(), epoch: 3, how: Exit::PoweredOff };
        assert_eq!(event, wanted);
        assert_eq!(second.list().await.unwrap(), []);
    });
}

#[test]
fn what_a_daemon_left_in_the_middle_of_a_start_is_told_apart() {
    if !inside::inside("what_a_daemon_left_in_the_middle_of_a_start_is_told_apart") {
        return;
    }
    for vm in ["web-1", "web-2"] {
        // Killed while the guard is asked: recorded, but its guest never ran.
        let (killed, first) = (runtime(), driver("qemu-system-x86_64", false));
        let launch = launch(vm, "");
        let started =
            async { tokio::time::timeout(Duration::from_secs(1), first.start(&launch)).await };
        assert!(killed.block_on(started).is_err());
    }
    // The second was killed a little earlier: nothing names its process.
    std::fs::remove_file(Path::new(RUN).join("web-2").join(run_dir::RECORD)).unwrap();
    let runtime = runtime();
    runtime.block_on(async {
        let driver = qemu();
        let strays = driver.strays().await.unwrap();
        assert_eq!(strays.iter().map(|s| s.vm.as_str()).collect::<Vec<_>>(), ["web-2"]);
        let listed = driver.list().await.unwrap();
        assert_eq!(listed.iter().map(|l| l.vm.as_str()).collect::<Vec<_>>(), ["web-1"]);
        assert_eq!(driver.state("web-1").await.unwrap(), GuestState::NotStarted);
        assert!(matches!(driver.state("web-2").await, Err(VmError::NotHere(_))));
        driver.kill("web-1").await.unwrap();
        driver.end_stray(&strays[0]).await.unwrap();
        driver.end_stray(&strays[0]).await.unwrap();
        assert_eq!(driver.strays().await.unwrap(), []);
        assert_eq!(driver.list().await.unwrap(), []);
        assert_eq!(scan::processes(Path::new("/proc"), Path::new(RUN)).unwrap(), []);
        // Both can be started now.
        for vm in ["web-1", "web-2"] {
            driver.start(&launch(vm, "")).await.unwrap();
            driver.kill(vm).await.unwrap();
        }
    });
}

#[test]
fn all_end_at_once_beside_a_guard_that_is_frozen() {
    if !inside::inside("all_end_at_once_beside_a_guard_that_is_frozen") {
        return;
    }
    let (earlier, first) = (runtime(), qemu());
    earlier.block_on(async {
        for vm in ["web-1", "web-2", "web-3"] {
            first.start(&launch(vm, "")).await.unwrap();
        }
    });
    drop((earlier, first));
    runtime().block_on(async {
        let begin = Instant::now();
        // Not asked before what there is: what a daemon finds that has just started counts, too.
        let frozen = driver("qemu-system-x86_64", false);
        assert_eq!(frozen.kill_all().unwrap(), 3);
        while !scan::processes(Path::new("/proc"), Path::new(RUN)).unwrap().is_empty() {
            assert!(begin.elapsed() < Duration::from_secs(2), "one is left");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        println!("three guests ended in {} ms", begin.elapsed().as_millis());
    });
}

#[test]
fn taps_and_kvm_come_as_open_descriptors() {
    if !inside::inside("taps_and_kvm_come_as_open_descriptors") {
        return;
    }
    if !Path::new("/dev/net/tun").exists() {
        println!("skipped: needs /dev/net/tun");
        return;
    }
    // Numbers that the daemon has in use, below and above those that QEMU gets.
    let many: Vec<_> = (0..700).map_while(|_| std::fs::File::open("/dev/null").ok()).collect();
    let mut vm = launch("web-1", "");
    for (i, tap) in ["tap-a", "tap-b"].into_iter().enumerate() {
        let args = ["tuntap", "add", "dev", tap, "mode", "tap", "vnet_hdr", "user"];
        assert!(Command::new("ip").args(args).arg(UID.to_string()).status().unwrap().success());
        vm.nics.push(NicLaunch {
            tap: tap.into(),
            mac: format!("02:68:0a:4d:00:{i:02x}"),
            mtu: 1450,
        });
    }
    let carrier = |tap: &str| {
        let up = Command::new("ip").args(["link", "set", tap, "up"]).status().unwrap();
        assert!(up.success());
        std::fs::read_to_string(format!("/sys/class/net/{tap}/carrier")).unwrap()
    };
    runtime().block_on(async {
        let driver = qemu();
        driver.start(&vm).await.unwrap();
        // A tap has a carrier while somebody has it open.
        assert_eq!((carrier("tap-a"), carrier("tap-b")), ("1\n".into(), "1\n".into()));
        driver.kill("web-1").await.unwrap();
        // What the last QEMU had may be busy for a moment; somebody who keeps it is named.
        driver.start(&vm).await.unwrap();
        driver.kill("web-1").await.unwrap();
        let held = haven_host::vm::launch::open_taps(&vm).await.unwrap();
        let said = driver.start(&vm).await.unwrap_err().to_string();
        assert!(said.contains("the tap tap-a of web-1 cannot be opened; if it is busy"), "{said}");
        let (started, ()) = tokio::join!(driver.start(&vm), async {
            tokio::time::sleep(Duration::from_millis(300)).await;
            drop(held);
        });
        started.unwrap();
        driver.kill("web-1").await.unwrap();
        drop(many);
        if !Path::new("/dev/kvm").exists() {
            println!("skipped: needs /dev/kvm");
            return;
        }
        // Whether or not its guest gets far: QEMU, which may not open /dev/kvm, has it.
        vm.accel = Accel::Kvm;
        driver.start(&vm).await.unwrap();
        assert_eq!(driver.state("web-1").await.unwrap(), GuestState::Running);
        driver.kill("web-1").await.unwrap();
        assert_eq!(driver.strays().await.unwrap(), []);
    });
}

#[test]
fn a_start_that_fails_says_why_and_leaves_nothing() {
    if !inside::inside("a_start_that_fails_says_why_and_leaves_nothing") {
        return;
    }
    runtime().block_on(async {
        let driver = qemu();
        let mut launch = launch("web-1", "");
        launch.direct_boot.as_mut().unwrap().kernel = "/no/such/kernel".into();
        let error = driver.start(&launch).await.unwrap_err();
        assert!(matches!(error, VmError::Died { .. }), "{error}");
        let said = error.to_string();
        assert!(said.contains("/no/such/kernel") && said.contains("haven explain"), "{said}");
        // A disk that is root's alone.
        launch.direct_boot.as_mut().unwrap().kernel = "/tiny/vmlinuz".into();
        std::fs::write("/tmp/secret", [0; 512]).unwrap();
        std::fs::set_permissions("/tmp/secret", std::fs::Permissions::from_mode(0o600)).unwrap();
        launch.disks.push(DiskLaunch {
            name: "data".into(),
            path: "/tmp/secret".into(),
            format: "raw".into(),
            read_only: false,
            size_bytes: 512,
            arrives: false,
            mirror: None,
            rbd: None,
            luks: None,
            filer: None,
            slot: None,
            parked: false,
        });
        let said = driver.start(&launch).await.unwrap_err().to_string();
        assert!(said.contains("Permission denied") && said.contains("unix user"), "{said}");
        assert_eq!(driver.list().await.unwrap(), []);
        assert_eq!(driver.strays().await.unwrap(), []);
        assert!(!Path::new(RUN).join("web-1").join(run_dir::RECORD).exists());
    });
}

#[test]
fn a_host_without_qemu_is_told_what_to_install() {
    if !inside::inside("a_host_without_qemu_is_told_what_to_install") {
        return;
    }
    runtime().block_on(async {
        let driver = driver("qemu-that-nobody-installed", true);
        let error = driver.start(&launch("web-1", "")).await.unwrap_err();
        let said = "QEMU is not installed on this host; install the package qemu-system-x86";
        assert_eq!(error.to_string(), said);
        assert_eq!(driver.list().await.unwrap(), []);
    });
}

/// A guest that writes each number to its first disk and then to its second, both flushed.
const COUNTS: &str = r#"#!/bin/sh
i=0
while :; do
  i=$((i + 1))
  printf '%08d' $i | dd of=/dev/vda bs=512 seek=$i conv=fsync,notrunc 2> /dev/null
  printf '%08d' $i | dd of=/dev/vdb bs=512 seek=$i conv=fsync,notrunc 2> /dev/null
  [ $((i % 20)) = 0 ] && echo "COUNTED $i" > /dev/ttyS0
done
"#;
const DISK: u64 = 16 << 20;

/// All of a disk as it was, and which bytes of it are said to have changed.
async fn all_of(view: &mut Box<dyn DiskView>) -> (Vec<u8>, Vec<(u64, u64)>) {
    let (mut content, mut dirty) = (vec![0; view.size() as usize], Vec::new());
    let mut at = 0;
    while at < view.size() {
        for extent in view.status(at, (view.size() - at) as u32).await.unwrap() {
            if extent.dirty {
                dirty.push((at, at + extent.length));
            }
            let part = &mut content[at as usize..(at + extent.length) as usize];
            view.read(at, part).await.unwrap();
            assert!(!extent.zero || part.iter().all(|byte| *byte == 0), "zeros at {at}");
            at += extent.length;
        }
    }
    (content, dirty)
}

/// The last number that a disk holds; all before it are there, too.
fn last(disk: &[u8]) -> u64 {
    let number = |sector: &[u8]| std::str::from_utf8(&sector[..8]).ok()?.parse::<u64>().ok();
    let found = disk.chunks(512).skip(1).map_while(number);
    found.enumerate().map(|(i, n)| if n == i as u64 + 1 { n } else { 0 }).max().unwrap_or(0)
}

async fn view(driver: &QemuDriver, mark: &str, since: Option<&str>) -> Vec<Box<dyn DiskView>> {
    let marks = Marks { owner: "nas".into(), mark: mark.into(), since: since.map(str::to_owned) };
    let asked = ViewAsked { disks: Vec::new(), marks: Some(marks), keep: None, stored: false };
    let view = driver.open_view("web-1", &asked).await.unwrap();
    let names: Vec<&str> = view.disks.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!((names, view.frozen), (vec!["root", "data"], false));
    view.disks.into_iter().map(|(_, disk)| disk).collect()
}

/// Both disks of one instant: what was written first to one is on the other, too, or under way to it.
fn of_one_instant(disks: &[Vec<u8>]) -> u64 {
    let (first, second) = (last(&disks[0]), last(&disks[1]));
    assert!(first == second || first == second + 1, "{first} on one and {second} on the other");
    second
}

/// Starts a guest that counts on disks of these formats.
async fn counting(driver: &QemuDriver, formats: [&str; 2]) {
    let mut vm = launch("web-1", COUNTS);
    for (name, format) in ["root", "data"].into_iter().zip(formats) {
        let path = format!("/tmp/{name}");
        let args = ["create", "-q", "-f", format, &path, "16M"];
        assert!(Command::new("qemu-img").args(args).status().unwrap().success());
        chown(&path, Some(UID), Some(UID)).unwrap();
        vm.disks.push(DiskLaunch {
            name: name.into(),
            path: path.into(),
            format: format.into(),
            read_only: false,
            size_bytes: DISK,
            arrives: false,
            mirror: None,
            rbd: None,
            luks: None,
            filer: None,
            slot: None,
            parked: false,
        });
    }
    driver.start(&vm).await.unwrap();
    wait_for(&driver.log("web-1"), "COUNTED 40");
}

/// The first view, which stays as it is while the guest writes.
async fn first_view(driver: &QemuDriver) -> Vec<Vec<u8>> {
    let mut disks = view(driver, "a", None).await;
    assert!(disks.iter().all(|disk| !disk.is_marked()));
    let mut all = Vec::new();
    for disk in &mut disks {
        all.push(all_of(disk).await.0);
    }
    let had = of_one_instant(&all);
    assert!(had >= 40, "{had}");
    wait_for(&driver.log("web-1"), &format!("COUNTED {}", (had / 20 + 3) * 20));
    for (disk, before) in disks.iter_mut().zip(&all) {
        assert!(all_of(disk).await.0 == *before, "it changes while its guest writes");
    }
    driver.close_view("web-1").await.unwrap();
    driver.close_view("web-1").await.unwrap();
    all
}

/// The next one says what may have changed since, and nothing else has.
async fn marked_view(driver: &QemuDriver, a: &[Vec<u8>]) {
    let mut disks = view(driver, "b", Some("a")).await;
    assert!(disks.iter().all(|disk| disk.is_marked()));
    let mut b = Vec::new();
    for (disk, before) in disks.iter_mut().zip(a) {
        let (content, dirty) = all_of(disk).await;
        let changed: u64 = dirty.iter().map(|(from, to)| to - from).sum();
        assert!(changed > 0 && changed < DISK / 8, "{changed} bytes are said to have changed");
        for at in (0..DISK).step_by(512) {
            let range = at as usize..at as usize + 512;
            let said = dirty.iter().any(|(from, to)| (*from..*to).contains(&at));
            assert!(said || content[range.clone()] == before[range], "unsaid at {at}");
        }
        b.push(content);
    }
    assert!(of_one_instant(&b) > of_one_instant(a));
}

/// A mark that is not there is no mark; and what is released need not be kept.
async fn released_view(driver: &QemuDriver) {
    let mut disks = view(driver, "c", Some("lost")).await;
    assert!(disks.iter().all(|disk| !disk.is_marked()));
    let mut early = vec![0; 1 << 20];
    disks[0].read(0, &mut early).await.unwrap();
    disks[0].release(0, 1 << 20).await.unwrap();
    let mut rest = vec![0; (DISK - (1 << 20)) as usize];
    disks[0].read(1 << 20, &mut rest).await.unwrap();
    early.append(&mut rest);
    let (data, _) = all_of(&mut disks[1]).await;
    of_one_instant(&[early, data]);
}

/// A daemon that dies while it opens a view leaves a guest that the next one lets run.
fn killed_at_any_moment() {
    let mut stood = 0;
    for after_us in (0..12_000).step_by(300) {
        let killed = runtime();
        let driver = Arc::new(qemu());
        killed.block_on(driver.list()).unwrap();
        let opening = Arc::clone(&driver);
        killed.spawn(async move { view(&opening, &format!("k{after_us}"), None).await.len() });
        std::thread::sleep(Duration::from_micros(after_us));
        killed.shutdown_timeout(Duration::from_secs(5));
        drop(driver);
        let next = qemu();
        runtime().block_on(async {
            next.list().await.unwrap();
            let state = next.state("web-1").await.unwrap();
            stood += u32::from(state != GuestState::Running);
            next.close_view("web-1").await.unwrap();
            assert_eq!(next.state("web-1").await.unwrap(), GuestState::Running, "{after_us} us");
            // Nothing of it is left, or the next one could not be opened.
            assert_eq!(view(&next, &format!("n{after_us}"), None).await.len(), 2);
            next.close_view("web-1").await.unwrap();
        });
    }
    println!("40 daemons were killed; {stood} left a guest that stood");
}

#[test]
fn disks_of_a_guest_that_writes_are_seen_as_they_were_at_one_instant() {
    if !inside::inside("disks_of_a_guest_that_writes_are_seen_as_they_were_at_one_instant") {
        return;
    }
    let first = runtime();
    let driver = qemu();
    first.block_on(async {
        counting(&driver, ["qcow2", "raw"]).await;
        let a = first_view(&driver).await;
        // Nobody closes these.
        marked_view(&driver, &a).await;
        released_view(&driver).await;
    });
    // The daemon dies with the view open; the next one closes it.
    drop(first);
    drop(driver);
    killed_at_any_moment();
    let driver = qemu();
    runtime().block_on(async {
        driver.list().await.unwrap();
        driver.close_view("web-1").await.unwrap();
        assert_eq!(driver.state("web-1").await.unwrap(), GuestState::Running);
        for round in 0..20 {
            let begin = Instant::now();
            let mut disks = view(&driver, &format!("r{round}"), None).await;
            let took = begin.elapsed();
            let mut now = Vec::new();
            for disk in &mut disks {
                now.push(all_of(disk).await.0);
            }
            println!("{} records, opened in {} ms", of_one_instant(&now), took.as_millis());
            driver.close_view("web-1").await.unwrap();
        }
        driver.kill("web-1").await.unwrap();
        let left = std::fs::read_dir("/tmp").unwrap();
        let left: Vec<_> = left.map(|entry| entry.unwrap().file_name()).collect();
        assert!(!left.iter().any(|name| name.to_string_lossy().ends_with(".view")), "{left:?}");
    });
}

/// What a disk held when it took a snapshot; it is at rest.
fn kept(disk: &str, snapshot: &str) -> Vec<u8> {
    let (from, to) = (format!("/tmp/{disk}"), format!("/tmp/{disk}.{snapshot}"));
    let of = format!("snapshot.name={snapshot}");
    let args = ["convert", "-f", "qcow2", "-l", &of, "-O", "raw", &from, &to];
    assert!(Command::new("qemu-img").args(args).status().unwrap().success());
    std::fs::read(to).unwrap()
}

/// How many of its disks keep a snapshot.
async fn keep(driver: &QemuDriver, snapshot: &str) -> usize {
    let keeps = driver.keeps("web-1").await.unwrap();
    keeps.values().filter(|disk| disk.snapshots.contains_key(snapshot)).count()
}

/// Daemons that die while one is taken: both disks keep it, or none.
fn taken_by_daemons_that_die(names: &[String]) -> Vec<String> {
    let (mut whole, mut after_us) = (Vec::new(), 0);
    for snapshot in ["x0", "x1", "x2", "x3", "x4", "x5", "x6", "x7"] {
        let killed = runtime();
        let driver = Arc::new(qemu());
        killed.block_on(driver.list()).unwrap();
        let (taking, disks) = (Arc::clone(&driver), names.to_vec());
        killed.spawn(async move { taking.take_snapshot("web-1", &disks, snapshot).await });
        std::thread::sleep(Duration::from_micros(after_us));
        after_us += 900;
        killed.shutdown_timeout(Duration::from_secs(5));
        drop(driver);
        let next = qemu();
        runtime().block_on(async {
            next.list().await.unwrap();
            assert_eq!(next.state("web-1").await.unwrap(), GuestState::Running);
            let keep = keep(&next, snapshot).await;
            assert!(keep == 0 || keep == 2, "{keep} of its disks keep {snapshot}");
            if keep == 2 {
                whole.push(snapshot.to_owned());
            }
        });
    }
    println!("8 daemons were killed; {} had taken it", whole.len());
    whole
}

/// How much a guest has said.
fn said(log: &std::path::Path) -> u64 {
    log.metadata().unwrap().len()
}

/// What is done beside it is done while the guest stands, whatever it comes to, and whoever waits for it.
async fn held_while_others_keep_it(driver: &Arc<QemuDriver>, names: &[String]) {
    let (asks, log) = (Arc::clone(driver), driver.log("web-1"));
    let beside = async move {
        let before = said(&log);
        tokio::time::sleep(Duration::from_millis(700)).await;
        match asks.state("web-1").await.unwrap() {
            GuestState::Paused if said(&log) == before => Ok(()),
            state => Err(format!("it is {state:?}, and said {} bytes", said(&log) - before)),
        }
    };
    assert!(!driver.take_held("web-1", names, "haven-h", Box::pin(beside)).await.unwrap());
    assert_eq!(driver.state("web-1").await.unwrap(), GuestState::Running);
    assert_eq!(keep(driver, "haven-h").await, 2);
    let fails = async { Err("Ceph is away".to_owned()) };
    let failed = driver.take_held("web-1", names, "haven-f", Box::pin(fails)).await.unwrap_err();
    assert_eq!(failed.to_string(), "Ceph is away");
    assert_eq!(driver.state("web-1").await.unwrap(), GuestState::Running);
    // Nobody waits for it any more, and it is done all the same.
    let slow = async {
        tokio::time::sleep(Duration::from_millis(700)).await;
        Ok(())
    };
    let taking = driver.take_held("web-1", names, "haven-n", Box::pin(slow));
    assert!(tokio::time::timeout(Duration::from_millis(300), taking).await.is_err());
    assert_eq!(driver.state("web-1").await.unwrap(), GuestState::Paused);
    driver.close_view("web-1").await.unwrap();
    assert_eq!(driver.state("web-1").await.unwrap(), GuestState::Running);
    assert_eq!(keep(driver, "haven-n").await, 2);
}

/// The same, and a daemon that dies while its guest stands: the next one lets it go on.
fn held(names: &[String]) {
    let driver = Arc::new(qemu());
    runtime().block_on(async {
        driver.list().await.unwrap();
        held_while_others_keep_it(&driver, names).await;
    });
    drop(driver);
    let (killed, driver) = (runtime(), Arc::new(qemu()));
    killed.block_on(driver.list()).unwrap();
    let (taking, disks) = (Arc::clone(&driver), names.to_vec());
    let never = Box::pin(std::future::pending());
    killed.spawn(async move { taking.take_held("web-1", &disks, "haven-d", never).await });
    std::thread::sleep(Duration::from_millis(800));
    killed.shutdown_timeout(Duration::from_secs(5));
    drop(driver);
    let next = qemu();
    runtime().block_on(async {
        next.list().await.unwrap();
        assert_eq!(next.state("web-1").await.unwrap(), GuestState::Paused);
        next.close_view("web-1").await.unwrap();
        assert_eq!(next.state("web-1").await.unwrap(), GuestState::Running);
    });
}

#[test]
fn snapshots_of_a_guest_that_writes_show_all_its_disks_at_one_instant() {
    if !inside::inside("snapshots_of_a_guest_that_writes_show_all_its_disks_at_one_instant") {
        return;
    }
    let names = ["root".to_owned(), "data".to_owned()];
    let driver = qemu();
    let first = runtime();
    let mut instant = Vec::new();
    let mut taken: Vec<String> = (0..10).map(|i| format!("haven-{i}")).collect();
    first.block_on(async {
        counting(&driver, ["qcow2", "qcow2"]).await;
        for snapshot in &taken {
            let begin = Instant::now();
            assert!(!driver.take_snapshot("web-1", &names, snapshot).await.unwrap());
            println!("{snapshot} took {} ms", begin.elapsed().as_millis());
            assert_eq!(keep(&driver, snapshot).await, 2);
            tokio::time::sleep(Duration::from_millis(150)).await;
        }
        let keeps = driver.keeps("web-1").await.unwrap();
        assert!(keeps.values().all(|disk| disk.size == DISK && disk.snapshots.len() == 10));
        // What one disk refuses no disk keeps.
        let twice = driver.take_snapshot("web-1", &names, "haven-3").await.unwrap_err();
        assert!(format!("{twice:?}").contains("already exists"), "{twice:?}");
        driver.remove_snapshot("web-1", "data", "haven-9").await.unwrap();
        driver.take_snapshot("web-1", &names, "haven-9").await.unwrap_err();
        assert_eq!(keep(&driver, "haven-9").await, 1);
        driver.remove_snapshot("web-1", "root", "haven-9").await.unwrap();
        driver.remove_snapshot("web-1", "root", "haven-9").await.unwrap_err();
        let unknown = ["root".to_owned(), "swap".to_owned()];
        let unknown = driver.take_snapshot("web-1", &unknown, "haven-u").await.unwrap_err();
        assert_eq!(unknown.to_string(), "web-1 runs without its disk `swap`");
        // One disk is read as it was while the other keeps the same instant in itself.
        let keep_root = Keep { snapshot: "haven-k".into(), disks: vec!["root".into()] };
        let one =
            ViewAsked { disks: vec!["data".into()], keep: Some(keep_root), ..ViewAsked::default() };
        let mut seen = driver.open_view("web-1", &one).await.unwrap().disks;
        assert_eq!((seen.len(), seen[0].0.as_str()), (1, "data"));
        let mut data = vec![0; usize::try_from(DISK).unwrap()];
        tokio::time::sleep(Duration::from_millis(300)).await;
        seen[0].1.read(0, &mut data).await.unwrap();
        instant = data;
        drop(seen);
        driver.close_view("web-1").await.unwrap();
        // While a view of its disks is open none is taken, and the guest runs on.
        let views = view(&driver, "a", None).await;
        driver.take_snapshot("web-1", &names, "haven-v").await.unwrap_err();
        assert_eq!(keep(&driver, "haven-v").await, 0);
        drop(views);
        driver.close_view("web-1").await.unwrap();
        driver.take_snapshot("web-1", &names, "haven-v").await.unwrap();
        wait_for(&driver.log("web-1"), "COUNTED 120");
    });
    drop(first);
    drop(driver);
    taken.pop();
    taken.push("haven-v".into());
    held(&names);
    taken.push("haven-h".into());
    taken.extend(taken_by_daemons_that_die(&names));
    let driver = qemu();
    runtime().block_on(async {
        driver.list().await.unwrap();
        driver.kill("web-1").await.unwrap();
    });
    let had = of_one_instant(&[kept("root", "haven-k"), instant]);
    println!("read from one disk, kept in the other: {had} records");
    let mut before = 39;
    for snapshot in &taken {
        let had = of_one_instant(&[kept("root", snapshot), kept("data", snapshot)]);
        println!("{snapshot}: {had} records");
        // Some are taken one right after another: by daemons that died, and the one for which the guest was held.
        let at_once = snapshot.starts_with('x') || snapshot == "haven-h";
        assert!(had >= before + u64::from(!at_once), "{had} after {before}");
        before = had;
    }
}
