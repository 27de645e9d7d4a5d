//! Disks in a real Ceph cluster, on a lab of its own: three hosts, and beside them three monitors and three OSDs
//! (`xtask/ceph-lab.sh`) at the lab's own bridge. Where Debian's packages of Ceph cannot be had, it is skipped.

mod guest;
mod snapshots;

use anyhow::{Context, Result, bail, ensure};
use guest::{KEEPS, PATIENCE, VM, boots, has_all, largest, largest_in, said, writes_on};
use haven_lab::drive::Driver;
use haven_model::ProofKind;
use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Instant,
};

/// Where the monitors and OSDs are on the lab's network.
const NET: &str = "10.88.0.20";
fn main() -> Result<()> {
    let wanted: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let name = "disks_in_ceph_outlive_their_host";
    if !wanted.is_empty() && !wanted.iter().any(|w| name.contains(w.as_str())) {
        return Ok(());
    }
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: needs root, to make network namespaces");
        return Ok(());
    }
    let dir = std::env::var("HAVEN_LAB_DIR").unwrap_or_else(|_| "/tmp/haven-test-lab".into());
    let Some(cache) = cache()? else {
        println!("skipped: needs ceph");
        return Ok(());
    };
    let mut lab = Driver::new(env!("CARGO_BIN_EXE_haven").into(), PathBuf::from(&dir), 3)?;
    lab.cache = Some(cache.clone());
    let ceph = Ceph { dir: PathBuf::from(format!("{dir}-ceph")), cache };
    let begin = Instant::now();
    let result = with(&lab, &ceph);
    if result.is_err() {
        println!("{}", lab.report());
    }
    if std::env::var_os("HAVEN_LAB_KEEP").is_none() {
        ceph.down();
        lab.haven(&["lab", "down"])?;
    }
    result?;
    println!("test {name} ... ok ({:.1} s)", begin.elapsed().as_secs_f64());
    println!("test result: 1 passed; 0 failed");
    Ok(())
}

fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../xtask").join(name)
}

/// The directory of the root file system with Ceph's programs; nothing where they cannot be had.
fn cache() -> Result<Option<PathBuf>> {
    let made = Command::new(script("ceph-base.sh")).stdin(Stdio::null()).output()?;
    let said = String::from_utf8_lossy(&made.stdout).trim().to_owned();
    match made.status.code() {
        Some(0) => Ok(Some(PathBuf::from(said))),
        Some(3) => Ok(None),
        _ => bail!("ceph-base.sh: {}", String::from_utf8_lossy(&made.stderr)),
    }
}

/// The Ceph cluster beside the lab.
struct Ceph {
    dir: PathBuf,
    cache: PathBuf,
}

impl Ceph {
    fn command(&self, switch: &str, args: &[&str]) -> Command {
        let mut command = Command::new(script("ceph-lab.sh"));
        command.args(args).stdin(Stdio::null());
        command.env("HAVEN_CEPH_LAB", &self.dir).env("HAVEN_CEPH_NET", NET);
        command.env("HAVEN_CEPH_SWITCH", switch).env("LAB_ROOT", self.cache.join("base/root"));
        command
    }

    fn up(&self, switch: &str) -> Result<()> {
        let made = self.command(switch, &["up"]).output()?;
        let said = String::from_utf8_lossy(&made.stderr);
        ensure!(made.status.success(), "Ceph does not come up: {said}");
        Ok(())
    }

    fn down(&self) {
        // What is left of it is seen by whoever looks for that.
        let _ = self.command("", &["down"]).output();
        let _ = std::fs::remove_dir_all(&self.dir);
    }

    /// What an administrator is told.
    fn ask(&self, args: &[&str]) -> Result<String> {
        let asked = self.command("", &[&["in", "1"], args].concat()).output()?;
        let said = String::from_utf8_lossy(&asked.stderr);
        ensure!(asked.status.success(), "{}: {said}", args.join(" "));
        Ok(String::from_utf8_lossy(&asked.stdout).trim().to_owned())
    }

    fn images(&self) -> Result<String> {
        self.ask(&["rbd", "ls", "vm"])
    }
}

fn with(lab: &Driver, ceph: &Ceph) -> Result<()> {
    ceph.down();
    lab.haven(&["lab", "down"])?;
    // The namespaces come first, so that both come up at the same time.
    lab.haven(&["lab", "up", "--bare", "--no-power-control"])?;
    let switch = format!("{}-fab", lab.haven(&["lab", "id"])?);
    std::thread::scope(|scope| {
        let up = scope.spawn(|| ceph.up(&switch));
        lab.haven(&["lab", "up", "--no-power-control"])?;
        up.join().map_err(|_| anyhow::anyhow!("the thread ended"))?
    })?;
    let key = lab.dir.join("haven.key");
    let text = std::fs::read_to_string(ceph.dir.join("lab/pool.json"))?;
    let told: serde_json::Value = serde_json::from_str(&text)?;
    std::fs::write(&key, told["key"].as_str().context("it has a key")?)?;
    let key = key.display().to_string();
    refused(lab, &key)?;
    made(lab, ceph, &key)?;
    moved(lab)?;
    changes(lab, ceph)?;
    snapshots::kept(lab, ceph)?;
    shut_out(lab, ceph)?;
    lost(lab)?;
    gone(lab, ceph)
}

fn pool(lab: &Driver, monitors: &str, key: &str, pool: &str) -> Result<String> {
    let create = ["pool", "create", "ceph", "--driver", "rbd", "--user", "haven"];
    let where_ = ["--monitor", monitors, "--key-file", key, "--ceph-pool", pool];
    lab.haven(&[&create[..], &where_[..]].concat())
}

/// Whatever is wrong is told in one sentence, and nothing is there afterwards.
fn refused(lab: &Driver, key: &str) -> Result<()> {
    let wrong = lab.dir.join("wrong.key");
    std::fs::write(&wrong, "AQBSAAAAAAAAABAAAAAAAAAAAAAAAAAAAAAAAA==")?;
    let wrong = wrong.display().to_string();
    let monitors = format!("{NET}1,{NET}2,{NET}3");
    for (monitors, key, of, says) in [
        ("10.88.0.240", key, "vm", "none of the Ceph monitors 10.88.0.240 answered"),
        (monitors.as_str(), &wrong, "vm", "Ceph does not take the key of client.haven"),
        (monitors.as_str(), key, "nopool", "Ceph has no pool nopool"),
    ] {
        let said = pool(lab, monitors, key, of).err().context("that was taken")?.to_string();
        println!("  {}", said.lines().next().unwrap_or_default());
        ensure!(said.contains(says), "{said}");
        ensure!(!lab.haven(&["pool", "ls"])?.contains("ceph"), "something is there");
    }
    Ok(())
}

fn manifest() -> String {
    format!(
        "kind: Network\nname: front\nsubnet: 10.77.0.0/24\n---\nkind: VM\nname: {VM}\nimage: tiny\nmemory: 128MiB\nisolation: keep\ndisks:\n- name: data\n  size: 64MiB\n  pool: ceph\nnetworks:\n- network: front\nuserData: {KEEPS:?}\n"
    )
}

/// A pool, a VM with an empty disk in it, and one whose disk is made from an image.
fn made(lab: &Driver, ceph: &Ceph, key: &str) -> Result<()> {
    pool(lab, &format!("{NET}1,{NET}2,{NET}3"), key, "vm")?;
    let shown = lab.haven(&["get", "pool/ceph", "-o", "yaml"])?;
    ensure!(shown.contains("key: sealed") && !shown.contains("AQ"), "{shown}");
    lab.change_cluster(|spec| {
        spec.admission = haven_model::AdmissionPolicy::Warn;
        spec.fencing =
            vec![ProofKind::PoweredOff, ProofKind::LeaseExpired, ProofKind::StorageFenced];
    })?;
    let mut image = vec![0; 4 << 20];
    image[..12].copy_from_slice(b"marked-image");
    let file = lab.dir.join("marked.img");
    std::fs::write(&file, image)?;
    lab.haven(&["image", "import", "marked", &file.display().to_string()])?;
    let reads = "#!/bin/busybox sh\necho \"IMAGE-SAYS $(dd if=/dev/vda bs=12 count=1 2> /dev/null) $(cat /sys/class/block/vda/size)\" > /dev/console\n";
    let reader = format!(
        "---\nkind: VM\nname: reader\nimage: tiny\nmemory: 128MiB\ndisks:\n- name: root\n  size: 16MiB\n  pool: ceph\n  image: marked\nuserData: {reads:?}\n"
    );
    lab.apply(&(manifest() + &reader), &["--wait", "--timeout", "120"])?;
    lab.wait("the guest writes", PATIENCE, |lab| largest(lab, "KEEPER-WROTE") > 20)?;
    let room = lab.haven(&["pool", "show", "ceph"])?;
    println!("  {}", room.lines().last().unwrap_or_default());
    ensure!(room.contains(" are free; its volumes take"), "{room}");
    lab.wait("the other guest reads its image", PATIENCE, |lab| {
        said(lab, "reader", None).contains("IMAGE-SAYS marked-image 32768")
    })?;
    lab.haven(&["delete", "vm/reader", "--wait"])?;
    let images = ceph.images()?;
    ensure!(images.lines().count() == 1 && images.contains("scribe.data."), "{images}");
    Ok(())
}

/// It moves live, and is not started anew. Ceph takes a client that was killed for one that has the disk open for 30 s, and holds the
/// next one's first write up so long; one that closes it holds up nobody.
fn moved(lab: &Driver) -> Result<()> {
    let before = boots(lab);
    for _ in 0..2 {
        let begin = Instant::now();
        let said = lab.haven(&["vm", "migrate", VM])?;
        writes_on(lab)?;
        let took = begin.elapsed().as_secs_f64();
        println!("  {}; it writes on after {took:.1} s", said.lines().last().unwrap_or_default());
        ensure!(took < 20.0, "its writes are held up");
    }
    ensure!(boots(lab) == before, "it was started anew");
    Ok(())
}

/// A disk comes, grows and goes while the guest writes to its other one.
fn changes(lab: &Driver, ceph: &Ceph) -> Result<()> {
    let before = boots(lab);
    let sees = |what: &str, disks: &str| {
        let last = |lab: &Driver| {
            let said = said(lab, VM, lab.host_of(VM).ok().as_deref());
            said.lines()
                .rev()
                .find_map(|line| Some(line.split_once("KEEPER-DISKS ")?.1.trim().to_owned()))
        };
        lab.wait(what, PATIENCE, |lab| last(lab).is_some_and(|now| now.contains(disks)))
    };
    lab.haven(&["volume", "create", "scribe.more", "8MiB", "--pool", "ceph"])?;
    lab.haven(&["volume", "attach", "scribe.more"])?;
    sees("it sees the new disk", " 16384")?;
    lab.haven(&["volume", "resize", "scribe.more", "16MiB"])?;
    sees("it sees that it is larger", " 32768")?;
    ensure!(ceph.images()?.contains("scribe.more."), "{}", ceph.images()?);
    lab.haven(&["volume", "detach", "scribe.more"])?;
    lab.haven(&["volume", "rm", "scribe.more"])?;
    lab.wait("its image is gone", PATIENCE, |_| {
        ceph.images().is_ok_and(|images| !images.contains("scribe.more."))
    })?;
    ensure!(boots(lab) == before, "it was started anew");
    writes_on(lab)
}

/// Its host is cut off from the others and not from Ceph, so its guest writes on until it is shut out.
fn shut_out(lab: &Driver, ceph: &Ceph) -> Result<()> {
    // Not where a new manager and a new leader of the store must be found first.
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
    let before = boots(lab);
    let (begin, wrote) = (Instant::now(), largest(lab, "KEEPER-WROTE"));
    for other in &others {
        lab.haven(&["lab", "cut", &owner, "--from", other])?;
    }
    let runs = |host: &str| !lab.pids(host, "guest=scribe").is_empty();
    lab.wait("it starts on another host", PATIENCE, |_| others.iter().any(|host| runs(host)))?;
    let (took, old) = (begin.elapsed().as_secs_f64(), runs(&owner));
    let wrote_alone =
        largest_in(&said(lab, VM, Some(&owner)), "KEEPER-WROTE").saturating_sub(wrote);
    println!(
        "  {owner} cut off: it starts elsewhere after {took:.2} s; the old copy is there: {old}, and wrote {wrote_alone} records meanwhile"
    );
    ensure!(wrote_alone > 0, "the old copy was not to be cut off from its disk");
    // At 4.4 s its guard ends it in any case.
    ensure!(old || took > 4.4, "its old copy");
    has_all(lab, before)?;
    lab.haven(&["lab", "heal"])?;
    lab.online(&owner)?;
    lab.wait("its old copy has ended", PATIENCE, |_| !runs(&owner))?;
    let (late, has) =
        (largest_in(&said(lab, VM, Some(&owner)), "KEEPER-WROTE"), largest(lab, "KEEPER-HAS"));
    ensure!(
        late <= has,
        "the old copy was told that {late} is written, and the new one found {has}"
    );
    let events = lab.haven(&["events", "--limit", "200"])?;
    ensure!(events.contains("shuts the disks of scribe in Ceph"), "{events}");
    ensure!(events.contains("(storage-fenced)"), "{events}");
    // An entry that ends would let a client in again that slept through it.
    let year = |text: &str| text.split('-').next().and_then(|year| year.parse::<u32>().ok());
    let list = ceph.ask(&["ceph", "osd", "blocklist", "ls"])?;
    let ends: Vec<u32> = list
        .lines()
        .filter(|line| {
            ["10.88.0.1:", "10.88.0.2:", "10.88.0.3:"].iter().any(|of| line.starts_with(of))
        })
        .filter_map(|line| year(line.split_whitespace().nth(1)?))
        .collect();
    println!("  {} clients are shut out, until {:?}", ends.len(), ends.iter().min());
    ensure!(!ends.is_empty() && ends.iter().all(|year| *year >= 2030), "{list}");
    writes_on(lab)
}

/// Its host loses its power.
fn lost(lab: &Driver) -> Result<()> {
    // Its process crashes, on the same host.
    let (owner, before) = (lab.host_of(VM)?, boots(lab));
    lab.signal(&owner, "guest=scribe", nix::sys::signal::Signal::SIGKILL)?;
    has_all(lab, before)?;
    let (owner, before) = (lab.host_of(VM)?, boots(lab));
    let begin = Instant::now();
    lab.haven(&["lab", "kill", &owner])?;
    lab.wait("it starts on another host", PATIENCE, |lab| boots(lab) > before)?;
    println!(
        "  {owner} lost: its guest is up elsewhere after {:.2} s",
        begin.elapsed().as_secs_f64()
    );
    has_all(lab, before)?;
    lab.haven(&["lab", "start", &owner])?;
    lab.online(&owner)
}

/// Nothing of it is left.
fn gone(lab: &Driver, ceph: &Ceph) -> Result<()> {
    let begin = Instant::now();
    lab.haven(&["delete", &format!("vm/{VM}"), "--wait"])?;
    println!("  its VM was deleted in {:.1} s", begin.elapsed().as_secs_f64());
    let images = ceph.images()?;
    ensure!(images.is_empty(), "{images}");
    lab.haven(&["delete", "pool/ceph", "--wait"]).map(drop)
}
