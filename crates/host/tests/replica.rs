//! Replicas served by the real `qemu-storage-daemon`, and written by real NBD clients of QEMU: a later run shuts out the
//! earlier ones, whatever was restarted in between.

#![expect(clippy::unwrap_used, reason = "a helper of tests fails as a test does")]

mod inside;

use haven_host::{
    agent::storage::VolumeName,
    storage::mirrored::{
        daemon::{StorageDaemons, USER},
        driver::{Base, ReplicaDriver, ReplicaError, ReplicaWanted, Served, export},
        kept::{KeptCopies, KeptFiles, KeptOf},
        runs,
    },
};
use haven_store::seal::Plain;
use nix::sys::signal::{Signal, kill};
use std::{
    io::{BufRead, BufReader, Write},
    net::{IpAddr, Ipv4Addr},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

const SIZE: u64 = 16 << 20;
const OWNER: u32 = 200_007;
const VOLUME: &str = "db.data.6f2c1c1e-9a55-4a53-9f0e-6a1b2c3d4e5f";
/// A client is told of an end that it was not asked for within this time.
const SOON: Duration = Duration::from_secs(5);

/// A replica on a disk of its own.
struct Replica {
    disk: tempfile::TempDir,
    path: PathBuf,
}

impl Replica {
    fn new() -> Self {
        let up = Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap();
        assert!(up.success());
        let disk = tempfile::tempdir().unwrap();
        // Who runs as another user passes through.
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o711);
        std::fs::set_permissions(disk.path(), open).unwrap();
        let path = disk.path().join(VOLUME);
        let file = std::fs::File::create(&path).unwrap();
        file.set_len(SIZE).unwrap();
        std::os::unix::fs::chown(&path, Some(OWNER), Some(OWNER)).unwrap();
        Self { disk, path }
    }

    fn daemons(&self) -> StorageDaemons {
        StorageDaemons::new("qemu-storage-daemon".into(), self.disk.path().join("run"))
    }

    fn wanted(&self, run: u64) -> ReplicaWanted {
        ReplicaWanted {
            volume: VOLUME.into(),
            path: self.path.clone(),
            owner_uid: OWNER,
            run,
            size_bytes: SIZE,
            key: key(run),
            address: IpAddr::V4(Ipv4Addr::LOCALHOST),
            base: None,
        }
    }

    fn holds(&self, at: u64, byte: u8) -> bool {
        let content = std::fs::read(&self.path).unwrap();
        let at = usize::try_from(at).unwrap();
        content[at..at + 4096].iter().all(|one| *one == byte)
    }
}

/// Another one for each run.
fn key(run: u64) -> Plain {
    Plain::new(format!("{run:02x}").repeat(32))
}

/// QEMU's client, which stays connected.
struct Writer {
    child: Child,
    input: ChildStdin,
    lines: mpsc::Receiver<String>,
}

impl Writer {
    /// Connects with the key and to the name of a run.
    fn connect(keys: &Path, served: &Served, with_key: u64, named: u64) -> Self {
        let directory = keys.join(format!("client{with_key}"));
        std::fs::create_dir_all(&directory).unwrap();
        let line = format!("{USER}:{}\n", key(with_key).expose());
        std::fs::write(directory.join("keys.psk"), line).unwrap();
        let mut child = Command::new("qemu-io")
            .arg("--object")
            .arg(format!(
                "tls-creds-psk,id=key,endpoint=client,username={USER},dir={}",
                directory.display()
            ))
            .args(["-t", "none", "--image-opts"])
            .arg(format!(
                "driver=nbd,host=127.0.0.1,port={},export={},tls-creds=key,reconnect-delay=0,open-timeout=0",
                served.port,
                export(VOLUME, named, &served.instance)
            ))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (said, lines) = mpsc::channel();
        let output = BufReader::new(child.stdout.take().unwrap());
        let errors = BufReader::new(child.stderr.take().unwrap());
        for from in [Box::new(output) as Box<dyn BufRead + Send>, Box::new(errors)] {
            let said = said.clone();
            std::thread::spawn(move || {
                for line in from.lines().map_while(Result::ok) {
                    if said.send(line).is_err() {
                        return;
                    }
                }
            });
        }
        let input = child.stdin.take().unwrap();
        Self { child, input, lines }
    }

    /// Writes 4 KiB; what the client says of it.
    fn write(&mut self, at: u64, byte: u8) -> String {
        let _ = writeln!(self.input, "write -P {byte} {at} 4096");
        let until = Instant::now() + SOON;
        let mut all = String::new();
        while let Ok(line) =
            self.lines.recv_timeout(until.saturating_duration_since(Instant::now()))
        {
            all.push_str(&line);
            all.push('\n');
            if ["wrote", "failed", "can't open", "No such"].iter().any(|word| line.contains(word)) {
                break;
            }
        }
        all
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What QEMU says when it makes a VM, which is never let run, with this file as its disk; nothing when all is well.
fn boot(disk: &Path) -> String {
    let node = format!("driver=raw,node-name=d,file.driver=file,file.filename={}", disk.display());
    let output = Command::new("timeout")
        .args([
            "2",
            "qemu-system-x86_64",
            "-S",
            "-nodefaults",
            "-display",
            "none",
            "-machine",
            "q35",
        ])
        .args(["-blockdev", &node, "-device", "virtio-blk-pci,drive=d"])
        .output()
        .unwrap();
    String::from_utf8_lossy(&output.stderr)
        .lines()
        .filter(|line| !line.contains("terminating on signal"))
        .collect()
}

fn run<T>(future: impl Future<Output = T>) -> T {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder.worker_threads(2).enable_all().build().unwrap().block_on(future)
}

/// The process that has the replica open.
fn pid() -> i32 {
    let found =
        Command::new("pgrep").args(["-f", "^qemu-storage-daemon|/qemu-storage-daemon "]).output();
    let text = String::from_utf8(found.unwrap().stdout).unwrap();
    let pids: Vec<i32> = text.lines().map(|line| line.parse().unwrap()).collect();
    assert_eq!(pids.len(), 1, "{pids:?}");
    pids[0]
}

/// Waits until the process has ended: the kernel closes its connections, which its clients notice, a moment before that.
fn until_ended(pid: i32) {
    let since = Instant::now();
    let ended = || {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.rsplit(") ").next().is_none_or(|rest| rest.is_empty() || rest.starts_with(['Z', 'X']))
    };
    while !ended() {
        assert!(since.elapsed() < SOON, "{pid} runs after {SOON:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_replica_grows_with_its_run() {
    if !inside::inside("a_replica_grows_with_its_run") {
        return;
    }
    let replica = Replica::new();
    let keys = tempfile::tempdir().unwrap();
    let length = || std::fs::metadata(&replica.path).unwrap().len();
    run(async {
        let daemons = replica.daemons();
        let first = daemons.serve(&replica.wanted(3)).await.unwrap();
        let mut small = Writer::connect(keys.path(), &first, 3, 3);
        assert!(small.write(0, 0x11).contains("wrote"));
        assert!(!small.write(SIZE, 0x12).contains("wrote"), "that is beyond its end");
        let larger = ReplicaWanted { size_bytes: 2 * SIZE, ..replica.wanted(4) };
        let second = daemons.serve(&larger).await.unwrap();
        assert_eq!((length(), second.instance.as_str()), (2 * SIZE, first.instance.as_str()));
        let mut large = Writer::connect(keys.path(), &second, 4, 4);
        assert!(large.write(SIZE, 0x13).contains("wrote"));
        assert!(replica.holds(0, 0x11) && replica.holds(SIZE, 0x13));
        // Made longer by somebody else while its daemon has it open.
        std::fs::OpenOptions::new()
            .write(true)
            .open(&replica.path)
            .unwrap()
            .set_len(3 * SIZE)
            .unwrap();
        let longest = ReplicaWanted { size_bytes: 3 * SIZE, ..replica.wanted(5) };
        let third = daemons.serve(&longest).await.unwrap();
        let mut longest = Writer::connect(keys.path(), &third, 5, 5);
        assert!(longest.write(2 * SIZE, 0x14).contains("wrote"));
        // Never shorter.
        daemons.serve(&replica.wanted(6)).await.unwrap();
        assert_eq!(length(), 3 * SIZE);
        daemons.end(VOLUME).await.unwrap();
    });
}

#[test]
fn a_replica_is_made_what_it_was_once_whoever_had_it_open() {
    if !inside::inside("a_replica_is_made_what_it_was_once_whoever_had_it_open") {
        return;
    }
    let replica = Replica::new();
    let keys = tempfile::tempdir().unwrap();
    let kept = KeptOf {
        replica: replica.path.clone(),
        volume: VolumeName::parse(VOLUME).unwrap(),
        copy: "a1".into(),
    };
    let back = Base { run: 4, kept: kept.clone() };
    let wanted = |run| ReplicaWanted { base: Some(back.clone()), ..replica.wanted(run) };
    run(async {
        let daemons = replica.daemons();
        let first = daemons.serve(&replica.wanted(3)).await.unwrap();
        let mut before = Writer::connect(keys.path(), &first, 3, 3);
        assert!(before.write(0, 0x11).contains("wrote"));
        KeptFiles.keep(&kept, 1).await.unwrap();
        assert!(before.write(0, 0x12).contains("wrote") && replica.holds(0, 0x12));
        // A run before that one leaves it as it is.
        assert_eq!(daemons.serve(&wanted(3)).await.unwrap(), first);
        assert!(replica.holds(0, 0x12));
        let second = daemons.serve(&wanted(5)).await.unwrap();
        assert!(replica.holds(0, 0x11));
        assert_ne!((&second.file, &second.instance), (&first.file, &first.instance));
        assert!(!before.write(0, 0x13).contains("wrote"), "it is another run's");
        let owner = std::os::unix::fs::MetadataExt::uid(&std::fs::metadata(&replica.path).unwrap());
        assert_eq!(owner, OWNER);
        // Once, whoever asks for it again: another daemon, another run, its own host.
        let mut after = Writer::connect(keys.path(), &second, 5, 5);
        assert!(after.write(0, 0x14).contains("wrote"));
        assert_eq!(daemons.serve(&wanted(5)).await.unwrap(), second);
        drop(daemons);
        let daemons = replica.daemons();
        daemons.serve(&wanted(6)).await.unwrap();
        daemons.own(VOLUME, &replica.path, 7, Some(&back)).await.unwrap();
        assert!(replica.holds(0, 0x14));
        // Another snapshot is another one; without its copy nobody opens it.
        let gone = KeptOf { copy: "b2".into(), ..kept.clone() };
        let gone = Base { run: 8, kept: gone };
        let why = daemons.own(VOLUME, &replica.path, 8, Some(&gone)).await.unwrap_err();
        assert!(matches!(why, ReplicaError::NotBack { .. }), "{why:?}");
        assert_eq!(runs::lowest(&replica.path).unwrap(), 7);
        assert!(replica.holds(0, 0x14));
    });
}

#[test]
fn a_later_run_shuts_out_the_earlier_ones_for_good() {
    if !inside::inside("a_later_run_shuts_out_the_earlier_ones_for_good") {
        return;
    }
    let replica = Replica::new();
    let keys = tempfile::tempdir().unwrap();
    run(async {
        let daemons = replica.daemons();
        let first = daemons.serve(&replica.wanted(3)).await.unwrap();
        let mut old = Writer::connect(keys.path(), &first, 3, 3);
        assert!(old.write(0, 0x11).contains("wrote"), "the owner writes");
        assert!(replica.holds(0, 0x11));
        // Asked again it is served as it is, and nobody is disturbed.
        assert_eq!(daemons.serve(&replica.wanted(3)).await.unwrap(), first);
        assert!(old.write(4096, 0x12).contains("wrote"));

        let begun = Instant::now();
        let second = daemons.serve(&replica.wanted(4)).await.unwrap();
        let took = begun.elapsed();
        println!("note: the run changed within {:.1} ms", took.as_secs_f64() * 1000.0);
        assert_eq!(second.instance, first.instance, "the process stays");
        let said = old.write(8192, 0x13);
        assert!(said.contains("failed"), "who came before is shut out: {said}");
        assert!(replica.holds(8192, 0));
        // The key of a run that is over opens nothing, whatever it is asked for by.
        for named in [3, 4] {
            let said = Writer::connect(keys.path(), &second, 3, named).write(8192, 0x14);
            assert!(!said.contains("wrote"), "{said}");
        }
        let said = Writer::connect(keys.path(), &second, 4, 3).write(8192, 0x15);
        assert!(!said.contains("wrote"), "an export of the earlier run is there: {said}");
        let mut new = Writer::connect(keys.path(), &second, 4, 4);
        assert!(new.write(8192, 0x16).contains("wrote"));
        assert!(
            replica.holds(8192, 0x16) && replica.holds(0, 0x11),
            "what was acknowledged is there"
        );

        // Not by another daemon of Haven, and not by another storage daemon either.
        let over =
            |error: ReplicaError| matches!(error, ReplicaError::Over { run: 3, lowest: 4, .. });
        assert!(over(daemons.serve(&replica.wanted(3)).await.unwrap_err()));
        drop(daemons);
        let later = replica.daemons();
        assert_eq!(later.serve(&replica.wanted(4)).await.unwrap(), second, "it is taken over");
        assert!(new.write(12288, 0x17).contains("wrote"), "and its owner is not disturbed");
        later.end(VOLUME).await.unwrap();
        assert!(new.write(12288, 0x18).contains("failed"));
        assert!(over(later.serve(&replica.wanted(3)).await.unwrap_err()));
        assert_eq!(runs::lowest(&replica.path).unwrap(), 4);
        later.end(VOLUME).await.unwrap();
    });
}

#[test]
fn a_storage_daemon_that_ends_is_noticed_and_another_one_is_another_instance() {
    if !inside::inside("a_storage_daemon_that_ends_is_noticed_and_another_one_is_another_instance")
    {
        return;
    }
    let replica = Replica::new();
    let keys = tempfile::tempdir().unwrap();
    run(async {
        let daemons = replica.daemons();
        let first = daemons.serve(&replica.wanted(1)).await.unwrap();
        let mut writer = Writer::connect(keys.path(), &first, 1, 1);
        assert!(writer.write(0, 0x21).contains("wrote"));
        let before = pid();
        let begun = Instant::now();
        kill(nix::unistd::Pid::from_raw(before), Signal::SIGKILL).unwrap();
        let said = writer.write(4096, 0x22);
        assert!(said.contains("failed") && begun.elapsed() < Duration::from_secs(1), "{said}");
        until_ended(before);
        assert_eq!(daemons.served(VOLUME).await, None);
        let second = daemons.serve(&replica.wanted(1)).await.unwrap();
        assert_ne!(second.instance, first.instance);
        assert_ne!(pid(), before);
        assert!(Writer::connect(keys.path(), &second, 1, 1).write(4096, 0x23).contains("wrote"));
        // One that was started and of which nothing was noted holds the file; it goes first.
        let record = |run: &Path| {
            let mut all = std::fs::read_dir(run).unwrap().map(|entry| entry.unwrap().path());
            all.next().unwrap().join("replica.json")
        };
        std::fs::remove_file(record(&replica.disk.path().join("run"))).unwrap();
        let later = replica.daemons();
        let third = later.serve(&replica.wanted(2)).await.unwrap();
        assert_ne!(third.instance, second.instance);
        pid();
        // While it is served no VM opens the file beside it.
        assert!(boot(&replica.path).contains("lock"));
        assert!(replica.holds(0, 0x21));
        later.end(VOLUME).await.unwrap();
        assert_eq!(later.served(VOLUME).await, None);
        assert_eq!(boot(&replica.path), "", "and now one does");
    });
}

#[test]
fn what_cannot_be_served_is_said_in_words() {
    if !inside::inside("what_cannot_be_served_is_said_in_words") {
        return;
    }
    let replica = Replica::new();
    run(async {
        let daemons =
            StorageDaemons::new("no-such-program".into(), replica.disk.path().join("run"));
        let said = daemons.serve(&replica.wanted(1)).await.unwrap_err().to_string();
        assert!(said.contains("install the package qemu-utils"), "{said}");
        let daemons = replica.daemons();
        std::fs::remove_file(&replica.path).unwrap();
        let said = daemons.serve(&replica.wanted(1)).await.unwrap_err().to_string();
        assert!(said.contains("cannot be looked at"), "{said}");
        // Who does not know the lowest run serves none.
        std::fs::write(runs::beside(&replica.path), "?").unwrap();
        let said = daemons.serve(&replica.wanted(9)).await.unwrap_err().to_string();
        assert!(said.contains("the lowest run of") && said.contains(".run"), "{said}");
        daemons.end(VOLUME).await.unwrap();
    });
}
