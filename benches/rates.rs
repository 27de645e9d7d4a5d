//! How many requests of 4 KiB a disk takes in a second, at random places, one and 16 under way: a local file, a mirrored disk with two
//! and three replicas, and an image of Ceph with three, beside each other on the same disk of one machine.
//! `cargo test -p haven-host --test disk_rate -- [RUNS]`
//!
//! Replicas are served by the product's own storage daemons, with its keys, and opened by the nodes that it gives QEMU; both ends stand
//! on this machine, as do Ceph's three monitors and three OSDs (`xtask/ceph-lab.sh`). No guest is in between: `qemu-img bench` asks.
//! `HAVEN_RATES_DIR` sets where the files stand. Needs root; without Ceph's packages its rows are skipped.

use haven_host::{
    storage::mirrored::{
        daemon::{StorageDaemons, USER},
        driver::{ReplicaDriver, ReplicaWanted},
    },
    vm::{
        driver::DiskLaunch,
        mirrors::{MirrorLaunch, ReplicaAt},
        qemu_mirrors,
    },
};
use haven_model::Name;
use haven_store::seal::Plain;
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr},
    path::{Path, PathBuf},
    process::Command,
};

const SIZE: u64 = 1 << 30;
const BLOCK: u64 = 4096;
/// From one request to the next: as good as random, and past what any cache reads ahead.
const STEP: u64 = BLOCK * 7919;

/// One kind of request: words for people, whether it writes, and how many are under way.
const KINDS: [(&str, bool, u64); 4] = [
    ("write, 1 under way", true, 1),
    ("write, 16 under way", true, 16),
    ("read, 1 under way", false, 1),
    ("read, 16 under way", false, 16),
];

/// A disk that can be asked.
struct Disk {
    name: &'static str,
    /// What comes before `qemu-img`.
    before: Vec<String>,
    /// What it is told of keys.
    object: Option<String>,
    /// As QEMU opens it.
    node: Value,
    /// So many requests of each kind, so that each takes some seconds.
    counts: [u64; 4],
}

impl Disk {
    fn ask(&self, options: &[String]) -> f64 {
        let mut words = self.before.clone();
        words.extend(["qemu-img".into(), "bench".into(), "-t".into(), "none".into()]);
        words.extend(self.object.iter().flat_map(|object| ["--object".to_owned(), object.clone()]));
        words.extend(options.iter().cloned());
        words.push(format!("json:{}", self.node));
        let output = Command::new(&words[0]).args(&words[1..]).output().expect("it can be run");
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{}: {errors}", words.join(" "));
        let seconds =
            said.split("Run completed in ").nth(1).and_then(|rest| rest.split(' ').next());
        seconds.and_then(|seconds| seconds.parse().ok()).expect("it says how long it took")
    }

    /// Each of its blocks is there before anything is measured.
    fn fill(&self) {
        let options = ["-w", "-s", "1M", "-c", &(SIZE >> 20).to_string()].map(str::to_owned);
        self.ask(&options);
    }

    /// Requests a second.
    fn rate(&self, kind: usize) -> f64 {
        let (_, writes, depth) = KINDS[kind];
        let count = self.counts[kind];
        let figures = [("-c", count), ("-d", depth), ("-s", BLOCK), ("-S", STEP)];
        let mut options: Vec<String> =
            figures.iter().flat_map(|(name, of)| [(*name).to_owned(), of.to_string()]).collect();
        options.extend(writes.then(|| "-w".to_owned()));
        // A count of requests is far from 2^53.
        #[allow(clippy::cast_precision_loss)]
        let count = count as f64;
        count / self.ask(&options)
    }
}

fn empty(path: &Path) {
    let file = std::fs::File::create(path).expect("the directory can be written");
    file.set_len(SIZE).expect("the file system takes it");
}

fn launch(path: PathBuf) -> DiskLaunch {
    DiskLaunch {
        name: "data".into(),
        path,
        format: "raw".into(),
        read_only: false,
        size_bytes: SIZE,
        arrives: false,
        mirror: None,
        rbd: None,
        slot: None,
        parked: false,
    }
}

/// A disk on so many hosts, with those that serve its other replicas.
async fn mirrored(dir: &Path, copies: usize) -> (Disk, Vec<(StorageDaemons, String)>) {
    let (volume, key) = (format!("rate.data.{copies}"), "5a".repeat(32));
    let keys = dir.join(format!("keys{copies}"));
    std::fs::create_dir_all(&keys).expect("the directory can be written");
    std::fs::write(keys.join("keys.psk"), format!("{USER}:{key}\n")).expect("it can be written");
    let mut daemons = Vec::new();
    let mut others = Vec::new();
    for number in 1..copies {
        let path = dir.join(format!("{volume}.{number}.raw"));
        empty(&path);
        let run = dir.join(format!("run{copies}.{number}"));
        let serving = StorageDaemons::new("qemu-storage-daemon".into(), run);
        let address = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let wanted = ReplicaWanted {
            volume: volume.clone(),
            path,
            owner_uid: 0,
            run: 1,
            size_bytes: SIZE,
            key: Plain::new(key.clone()),
            address,
            base: None,
        };
        let served = serving.serve(&wanted).await.expect("a replica is served");
        others.push(ReplicaAt {
            host: Name::new(&format!("host{}", number + 1)).expect("a name"),
            address,
            port: served.port,
            instance: served.instance,
            boot: "boot".into(),
        });
        daemons.push((serving, volume.clone()));
    }
    let path = dir.join(format!("{volume}.0.raw"));
    empty(&path);
    let mirror = MirrorLaunch { volume, run: 1, keys, copies, others };
    let nodes = qemu_mirrors::nodes(0, &launch(path), &mirror);
    let disk = Disk {
        name: if copies == 2 { "mirrored, two replicas" } else { "mirrored, three replicas" },
        before: Vec::new(),
        object: Some(qemu_mirrors::key(0, &mirror)),
        node: inline(&nodes),
        counts: [10_000, 20_000, 30_000, 60_000],
    };
    (disk, daemons)
}

/// The last of these nodes, with those that it names within it.
fn inline(nodes: &[Value]) -> Value {
    let named: BTreeMap<&str, &Value> =
        nodes.iter().filter_map(|node| Some((node["node-name"].as_str()?, node))).collect();
    fn whole(node: &Value, named: &BTreeMap<&str, &Value>) -> Value {
        let mut node = node.clone();
        if let Some(children) = node["children"].as_array() {
            let of = |child: &Value| whole(named[child.as_str().unwrap_or_default()], named);
            node["children"] = children.iter().map(of).collect();
        }
        if let Some(object) = node.as_object_mut() {
            object.remove("node-name");
        }
        node
    }
    whole(nodes.last().expect("there are some"), &named)
}

fn local(dir: &Path) -> Disk {
    let path = dir.join("local.raw");
    empty(&path);
    let cache = json!({ "direct": true });
    Disk {
        name: "local file",
        before: Vec::new(),
        object: None,
        node: json!({
            "driver": "raw", "cache": cache,
            "file": { "driver": "file", "filename": path, "aio": "threads", "cache": cache },
        }),
        counts: [30_000, 90_000, 30_000, 90_000],
    }
}

/// A Ceph of this machine, which ends with it.
struct Ceph {
    script: PathBuf,
    root: String,
    dir: PathBuf,
}

impl Ceph {
    fn up(dir: &Path) -> Option<Self> {
        let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../xtask");
        let made = Command::new(scripts.join("ceph-base.sh")).output().ok()?;
        if !made.status.success() {
            return None;
        }
        let root = format!("{}/base/root", String::from_utf8_lossy(&made.stdout).trim());
        let ceph = Self { script: scripts.join("ceph-lab.sh"), root, dir: dir.join("ceph") };
        let up = ceph.command(&["up"]).output().ok()?;
        assert!(up.status.success(), "{}", String::from_utf8_lossy(&up.stderr));
        Some(ceph)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.script);
        command.args(args).env("LAB_ROOT", &self.root).env("HAVEN_CEPH_LAB", &self.dir);
        command
    }

    fn disk(&self) -> Disk {
        let size = format!("{}M", SIZE >> 20);
        let made = self
            .command(&["in", "1", "rbd", "create", "--size", &size, "vm/rate"])
            .output()
            .expect("rbd can be run");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let conf = self.dir.join("lab/ceph.conf");
        let env = |name: &str, of: &str| format!("{name}={of}");
        Disk {
            name: "Ceph RBD, three replicas",
            before: vec![
                "env".into(),
                env("LAB_ROOT", &self.root),
                env("HAVEN_CEPH_LAB", &self.dir.display().to_string()),
                self.script.display().to_string(),
                "in".into(),
                "1".into(),
            ],
            object: None,
            node: json!({
                "driver": "raw", "cache": { "direct": true },
                "file": { "driver": "rbd", "pool": "vm", "image": "rate", "conf": conf, "cache": { "direct": true } },
            }),
            counts: [2_000, 5_000, 10_000, 30_000],
        }
    }
}

impl Drop for Ceph {
    fn drop(&mut self) {
        let _ = self.command(&["down"]).output();
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let runs = std::env::args().skip(1).find_map(|arg| arg.parse::<usize>().ok()).unwrap_or(3);
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: needs root, for storage daemons of another user");
        return;
    }
    let base = std::env::var("HAVEN_RATES_DIR").unwrap_or_else(|_| "/var/tmp".into());
    let dir = tempfile::Builder::new().prefix("haven-rates").tempdir_in(base).expect("a directory");
    let (two, first) = mirrored(dir.path(), 2).await;
    let (three, second) = mirrored(dir.path(), 3).await;
    let ceph = Ceph::up(dir.path());
    let mut disks = vec![local(dir.path()), two, three];
    match &ceph {
        Some(ceph) => disks.push(ceph.disk()),
        None => println!("skipped: needs ceph, to be compared with"),
    }
    disks.iter().for_each(Disk::fill);
    let mut rates = vec![vec![Vec::new(); KINDS.len()]; disks.len()];
    // All of them in each round, so that what else happens on the machine happens to all.
    for _ in 0..runs {
        for (disk, rates) in disks.iter().zip(&mut rates) {
            for (kind, rates) in rates.iter_mut().enumerate() {
                rates.push(disk.rate(kind));
            }
        }
    }
    println!("requests of 4 KiB a second: median (min, max) of {runs}; beside the local file");
    for (kind, (what, ..)) in KINDS.iter().enumerate() {
        let median = |rates: &mut Vec<f64>| {
            rates.sort_by(f64::total_cmp);
            rates[rates.len() / 2]
        };
        let of = median(&mut rates[0][kind]);
        for (disk, rates) in disks.iter().zip(&mut rates) {
            let middle = median(&mut rates[kind]);
            let (least, most) = (rates[kind][0], rates[kind][runs - 1]);
            println!(
                "{what:<20} {:<26} {middle:>8.0} ({least:.0}, {most:.0})  {:.2}",
                disk.name,
                middle / of
            );
        }
    }
    for (serving, volume) in first.into_iter().chain(second) {
        serving.end(&volume).await.expect("a storage daemon ends");
    }
    drop(ceph);
}
