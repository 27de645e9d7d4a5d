//! Disks on real filers, on a lab of its own: three hosts, and beside them an NFS server, or three Gluster servers
//! (`xtask/filer-lab.sh`), at the lab's own bridge. Where Debian's packages of them cannot be had, it is skipped.

#[path = "../rbd/guest.rs"]
mod guest;

use anyhow::{Context, Result, bail, ensure};
use guest::{KEEPS, PATIENCE, VM, boots, has_all, largest, largest_in, said, writes_on};
use haven_lab::drive::Driver;
use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

/// Where the filers are on the lab's network.
const NET: &str = "10.88.0.20";
/// How long the filer is away.
const AWAY: Duration = Duration::from_secs(20);

fn main() -> Result<()> {
    let wanted: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let dir = std::env::var("HAVEN_LAB_DIR").unwrap_or_else(|_| "/tmp/haven-test-lab".into());
    let mut passed = 0;
    let cases: [(&str, Kind); 2] = [
        ("disks_on_an_nfs_server_outlive_their_host", Kind::Nfs),
        ("disks_in_a_gluster_volume_outlive_their_host", Kind::Gluster),
    ];
    for (name, kind) in cases {
        if !wanted.is_empty() && !wanted.iter().any(|w| name.contains(w.as_str())) {
            continue;
        }
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: needs root, to make network namespaces");
            return Ok(());
        }
        let Some(cache) = cache()? else {
            println!("skipped: needs nfs-ganesha and glusterfs-server");
            return Ok(());
        };
        let mut lab = Driver::new(env!("CARGO_BIN_EXE_haven").into(), PathBuf::from(&dir), 3)?;
        lab.cache = Some(cache.clone());
        let filer = Filer { kind, dir: PathBuf::from(format!("{dir}-filer")), cache };
        let begin = Instant::now();
        let result = with(&lab, &filer);
        if result.is_err() {
            println!("{}", lab.report());
        }
        if std::env::var_os("HAVEN_LAB_KEEP").is_none() {
            lab.haven(&["lab", "down"])?;
            filer.down();
        }
        result?;
        println!("test {name} ... ok ({:.1} s)", begin.elapsed().as_secs_f64());
        passed += 1;
    }
    println!("test result: {passed} passed; 0 failed");
    Ok(())
}

fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../xtask").join(name)
}

/// The directory of the root file system with the filers' programs; nothing where they cannot be had.
fn cache() -> Result<Option<PathBuf>> {
    let made = Command::new(script("filer-base.sh")).stdin(Stdio::null()).output()?;
    let said = String::from_utf8_lossy(&made.stdout).trim().to_owned();
    match made.status.code() {
        Some(0) => Ok(Some(PathBuf::from(said))),
        Some(3) => Ok(None),
        _ => bail!("filer-base.sh: {}", String::from_utf8_lossy(&made.stderr)),
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Nfs,
    Gluster,
}

/// The filer beside the lab.
struct Filer {
    kind: Kind,
    dir: PathBuf,
    cache: PathBuf,
}

impl Filer {
    fn run(&self, switch: &str, args: &[&str]) -> Result<String> {
        let mut command = Command::new(script("filer-lab.sh"));
        command.args(args).stdin(Stdio::null());
        command.env("HAVEN_FILER_LAB", &self.dir).env("HAVEN_FILER_NET", NET);
        command.env("HAVEN_FILER_SWITCH", switch).env("LAB_ROOT", self.cache.join("base/root"));
        let output = command.output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "filer-lab.sh {}: {said}", args.join(" "));
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }

    fn up(&self, switch: &str) -> Result<()> {
        let verb = if self.kind == Kind::Nfs { "up-nfs" } else { "up-gluster" };
        self.run(switch, &[verb]).map(drop)
    }

    fn down(&self) {
        // What is left of it is seen by whoever looks for that.
        let _ = self.run("-", &["down"]);
        let _ = std::fs::remove_dir_all(&self.dir);
    }

    /// It is away from one moment to the next.
    fn goes(&self, switch: &str) -> Result<()> {
        match self.kind {
            Kind::Nfs => self.run(switch, &["stop-nfs"]).map(drop),
            Kind::Gluster => self.run(switch, &["away", "1", "2", "3"]).map(drop),
        }
    }

    fn comes_back(&self, switch: &str) -> Result<()> {
        match self.kind {
            Kind::Nfs => self.run(switch, &["start-nfs"]).map(drop),
            Kind::Gluster => self.run(switch, &["back", "1", "2", "3"]).map(drop),
        }
    }

    /// The files of disks there.
    fn files(&self) -> Result<Vec<String>> {
        let at = match self.kind {
            Kind::Nfs => self.dir.join("lab/h1/export/disks"),
            Kind::Gluster => self.dir.join("lab/h1/brick/b/vms"),
        };
        let entries = std::fs::read_dir(at)?;
        let names = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
        let names: Result<Vec<String>> = names.collect();
        Ok(names?.into_iter().filter(|name| !name.starts_with('.')).collect())
    }

    fn create(&self, lab: &Driver, server: &str, directory: &str, volume: &str) -> Result<String> {
        let (name, args): (&str, &[&str]) = match self.kind {
            Kind::Nfs => ("nfs", &["--server", server, "--directory", directory]),
            Kind::Gluster => {
                ("gluster", &["--server", server, "--directory", directory, "--volume", volume])
            }
        };
        lab.haven(&[&["pool", "create", "filer", "--driver", name], args].concat())
    }

    /// The right one.
    fn pool(&self, lab: &Driver) -> Result<String> {
        match self.kind {
            Kind::Nfs => self.create(lab, &format!("{NET}1"), "/tmp/of/lab/h1/export/disks", ""),
            Kind::Gluster => self.create(lab, &format!("{NET}1,{NET}2,{NET}3"), "/vms", "vm"),
        }
    }
}

fn with(lab: &Driver, filer: &Filer) -> Result<()> {
    filer.down();
    lab.haven(&["lab", "down"])?;
    // The namespaces come first, so that both come up at the same time.
    lab.haven(&["lab", "up", "--bare", "--no-power-control"])?;
    let switch = format!("{}-fab", lab.haven(&["lab", "id"])?);
    std::thread::scope(|scope| {
        let up = scope.spawn(|| filer.up(&switch));
        lab.haven(&["lab", "up", "--no-power-control"])?;
        up.join().map_err(|_| anyhow::anyhow!("the thread ended"))?
    })?;
    refused(lab, filer)?;
    made(lab, filer)?;
    moved(lab)?;
    changes(lab, filer)?;
    away(lab, filer, &switch)?;
    cut_off(lab)?;
    lost(lab)?;
    gone(lab, filer)
}

/// Whatever is wrong is told in one sentence, and nothing is there afterwards.
fn refused(lab: &Driver, filer: &Filer) -> Result<()> {
    let right = format!("{NET}1");
    let export = "/tmp/of/lab/h1/export";
    let wrong: &[(&str, String, &str, &str)] = match filer.kind {
        Kind::Nfs => &[
            ("10.88.0.240", format!("{export}/disks"), "", "10.88.0.240"),
            (&right, format!("{export}/none"), "", "does not give"),
            (&right, format!("{export}/full"), "", "is not empty (it holds foreign)"),
            (&right, "/tmp/of/lab/h1/squash/disks".into(), "", "no_root_squash"),
        ],
        Kind::Gluster => &[
            ("10.88.0.240", "/vms".into(), "vm", "10.88.0.240"),
            (&right, "/vms".into(), "none", "none"),
            (&right, "/full".into(), "vm", "is not empty (it holds foreign)"),
        ],
    };
    for (server, directory, volume, says) in wrong {
        let begin = Instant::now();
        let said = filer.create(lab, server, directory, volume).err();
        let said = said.context("that was taken")?.to_string();
        let took = begin.elapsed().as_secs_f64();
        println!("  {} ({took:.1} s)", said.lines().next().unwrap_or_default());
        ensure!(said.contains(says), "{says}: {said}");
        ensure!(!lab.haven(&["pool", "ls"])?.contains("filer"), "something is there");
    }
    Ok(())
}

fn manifest(name: &str, more: &str) -> String {
    format!(
        "kind: VM\nname: {name}\nimage: tiny\nmemory: 128MiB\n{more}disks:\n- name: data\n  size: 64MiB\n  pool: filer\nnetworks:\n- network: front\nuserData: {KEEPS:?}\n"
    )
}

/// A pool, a VM with an empty disk in it, and one whose disk is made from an image.
fn made(lab: &Driver, filer: &Filer) -> Result<()> {
    filer.pool(lab)?;
    lab.change_cluster(|spec| spec.admission = haven_model::AdmissionPolicy::Warn)?;
    let mut image = vec![0; 4 << 20];
    image[..12].copy_from_slice(b"marked-image");
    let file = lab.dir.join("marked.img");
    std::fs::write(&file, image)?;
    lab.haven(&["image", "import", "marked", &file.display().to_string()])?;
    let reads = "#!/bin/busybox sh\necho \"IMAGE-SAYS $(dd if=/dev/vda bs=12 count=1 2> /dev/null) $(cat /sys/class/block/vda/size)\" > /dev/console\n";
    let reader = format!(
        "---\nkind: VM\nname: reader\nimage: tiny\nmemory: 128MiB\ndisks:\n- name: root\n  size: 16MiB\n  pool: filer\n  image: marked\nuserData: {reads:?}\n"
    );
    let network = "kind: Network\nname: front\nsubnet: 10.77.0.0/24\n---\n";
    let kept = network.to_owned() + &manifest(VM, "isolation: keep\n");
    let kept = lab.apply(&kept, &[]).err().context("it would be kept")?.to_string();
    ensure!(kept.contains("cannot be shut to a host that is not heard"), "{kept}");
    let all = network.to_owned() + &manifest(VM, "") + &reader;
    lab.apply(&all, &["--wait", "--timeout", "120"])?;
    lab.wait("the guest writes", PATIENCE, |lab| largest(lab, "KEEPER-WROTE") > 20)?;
    lab.wait("the other guest reads its image", PATIENCE, |lab| {
        said(lab, "reader", None).contains("IMAGE-SAYS marked-image 32768")
    })?;
    lab.wait("the room is told", PATIENCE, |lab| {
        lab.haven(&["pool", "show", "filer"])
            .is_ok_and(|room| room.contains(" are free; its volumes take"))
    })?;
    let room = lab.haven(&["pool", "show", "filer"])?;
    println!("  {}", room.lines().last().unwrap_or_default());
    lab.haven(&["delete", "vm/reader", "--wait"])?;
    let files = filer.files()?;
    ensure!(
        files.iter().all(|name| name.starts_with("scribe.data.") || name == "masters"),
        "{files:?}"
    );
    let snapshot = lab.haven(&["vm", "snapshot", "create", VM]);
    match filer.kind {
        Kind::Nfs => {
            let said = snapshot.err().context("a snapshot was taken")?.to_string();
            ensure!(said.contains("keep no snapshots"), "{said}");
        }
        Kind::Gluster => drop(snapshot?),
    }
    Ok(())
}

/// It moves live, and is not started anew.
fn moved(lab: &Driver) -> Result<()> {
    let before = boots(lab);
    for _ in 0..2 {
        let begin = Instant::now();
        let said = lab.haven(&["vm", "migrate", VM])?;
        writes_on(lab)?;
        let took = begin.elapsed().as_secs_f64();
        println!("  {}; it writes on after {took:.1} s", said.lines().last().unwrap_or_default());
    }
    ensure!(boots(lab) == before, "it was started anew");
    Ok(())
}

/// A disk comes, grows and goes while the guest writes to its other one.
fn changes(lab: &Driver, filer: &Filer) -> Result<()> {
    let before = boots(lab);
    let sees = |what: &str, disks: &str| {
        let last = |lab: &Driver| {
            let said = said(lab, VM, lab.host_of(VM).ok().as_deref());
            let mut lines = said.lines().rev();
            lines.find_map(|line| Some(line.split_once("KEEPER-DISKS ")?.1.trim().to_owned()))
        };
        lab.wait(what, PATIENCE, |lab| last(lab).is_some_and(|now| now.contains(disks)))
    };
    let has =
        || Ok::<bool, anyhow::Error>(filer.files()?.iter().any(|n| n.starts_with("scribe.more.")));
    lab.haven(&["volume", "create", "scribe.more", "8MiB", "--pool", "filer"])?;
    lab.haven(&["volume", "attach", "scribe.more"])?;
    sees("it sees the new disk", " 16384")?;
    lab.haven(&["volume", "resize", "scribe.more", "16MiB"])?;
    sees("it sees that it is larger", " 32768")?;
    ensure!(has()?, "{:?}", filer.files()?);
    lab.haven(&["volume", "detach", "scribe.more"])?;
    lab.haven(&["volume", "rm", "scribe.more"])?;
    lab.wait("its file is gone", PATIENCE, |_| has().is_ok_and(|has| !has))?;
    ensure!(boots(lab) == before, "it was started anew");
    writes_on(lab)
}

/// The filer is away for a while: the guest's writers stand, a start says why it waits, and all go on.
fn away(lab: &Driver, filer: &Filer, switch: &str) -> Result<()> {
    let before = boots(lab);
    filer.goes(switch)?;
    let begin = Instant::now();
    std::thread::sleep(Duration::from_secs(1));
    let stands = largest(lab, "KEEPER-WROTE");
    lab.apply(&manifest("late", ""), &[])?;
    lab.wait("a start says why it waits", AWAY, |lab| {
        let said = lab.haven(&["explain", "vm/late"]).unwrap_or_default();
        let says = said.lines().find(|line| line.contains("filer") || line.contains(NET));
        says.is_some_and(|_| said.contains("answer"))
    })?;
    let said = lab.haven(&["explain", "vm/late"])?;
    println!("  {}", said.lines().find(|line| line.contains("answer")).unwrap_or_default().trim());
    std::thread::sleep(AWAY.saturating_sub(begin.elapsed()));
    let then = largest(lab, "KEEPER-WROTE");
    ensure!(then <= stands + 1, "it was told that {then} is written, while nobody took it");
    filer.comes_back(switch)?;
    let back = Instant::now();
    lab.wait("it writes on", PATIENCE, |lab| largest(lab, "KEEPER-WROTE") > then + 5)?;
    println!(
        "  the filer was away for {} s; it writes on {:.1} s after",
        AWAY.as_secs(),
        back.elapsed().as_secs_f64()
    );
    lab.wait("the late one starts", PATIENCE, |lab| {
        guest::said(lab, "late", None).contains("KEEPER-WROTE")
    })?;
    println!("  the late one runs {:.1} s after", back.elapsed().as_secs_f64());
    lab.haven(&["delete", "vm/late", "--wait"])?;
    match filer.kind {
        Kind::Nfs => ensure!(boots(lab) == before, "it was started anew"),
        // What was open in Gluster while no server answered may stay shut; then its process is ended, and has all of it.
        Kind::Gluster if boots(lab) > before => {
            println!("  its process was ended, and it was started anew");
            let has = largest(lab, "KEEPER-HAS");
            ensure!(has >= then, "it was told that {then} is written, and found {has}");
        }
        Kind::Gluster => {}
    }
    Ok(())
}

/// Its host is cut off from the others and not from the filer. It starts elsewhere only once the host is proven lost, and whatever the
/// old copy was told to be written is there.
fn cut_off(lab: &Driver) -> Result<()> {
    let overview = lab.overview()?;
    let leads = |line: &haven_model::api::HostLine| {
        line.roles.iter().any(|role| role == "manager" || role.contains("leader"))
    };
    let quiet = overview.hosts.iter().find(|line| !leads(line)).context("a host leads nothing")?;
    let owner = quiet.name.clone();
    if lab.host_of(VM)? != owner {
        lab.haven(&["vm", "migrate", VM, "--to", &owner])?;
        writes_on(lab)?;
    }
    let others: Vec<&String> = lab.hosts.iter().filter(|host| **host != owner).collect();
    let runs = |host: &str| !lab.pids(host, "guest=scribe").is_empty();
    let before = boots(lab);
    let begin = Instant::now();
    for other in &others {
        lab.haven(&["lab", "cut", &owner, "--from", other])?;
    }
    lab.wait("it starts on another host", PATIENCE, |_| others.iter().any(|host| runs(host)))?;
    ensure!(!runs(&owner), "two copies run");
    println!("  {owner} cut off: it starts elsewhere after {:.2} s", begin.elapsed().as_secs_f64());
    has_all(lab, before)?;
    lab.haven(&["lab", "heal"])?;
    lab.online(&owner)?;
    let late = largest_in(&said(lab, VM, Some(&owner)), "KEEPER-WROTE");
    let has = largest(lab, "KEEPER-HAS");
    ensure!(late <= has, "the old copy was told that {late} is written, and the new found {has}");
    writes_on(lab)
}

/// Its process crashes; then its host loses its power.
fn lost(lab: &Driver) -> Result<()> {
    let (owner, before) = (lab.host_of(VM)?, boots(lab));
    lab.signal(&owner, "guest=scribe", nix::sys::signal::Signal::SIGKILL)?;
    has_all(lab, before)?;
    let (owner, before) = (lab.host_of(VM)?, boots(lab));
    let begin = Instant::now();
    lab.haven(&["lab", "kill", &owner])?;
    lab.wait("it starts on another host", PATIENCE, |lab| boots(lab) > before)?;
    let took = begin.elapsed().as_secs_f64();
    println!("  {owner} lost: its guest is up elsewhere after {took:.2} s");
    has_all(lab, before)?;
    lab.haven(&["lab", "start", &owner])?;
    lab.online(&owner)
}

/// Nothing of it is left.
fn gone(lab: &Driver, filer: &Filer) -> Result<()> {
    lab.haven(&["delete", &format!("vm/{VM}"), "--wait"])?;
    let mut files = filer.files()?;
    files.retain(|name| name != "masters");
    ensure!(files.is_empty(), "{files:?}");
    lab.haven(&["delete", "pool/filer", "--wait"]).map(drop)
}
