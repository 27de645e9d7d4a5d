//! A guest writes to a mirrored disk and to one that all hosts have; a snapshot is a copy of the first on each host that has a
//! replica of it, and what the second keeps in itself, both at one instant. It is put back, and its host is lost right after that.

use crate::{
    keeper::begin_anew,
    lab::{HOSTS, Lab},
    snapshots::{
        WRITES, exec, fails, found, next_found, one, put_back, started, taken, writes_on, wrote,
    },
    witness::Witness,
};
use anyhow::{Context, Result, ensure};
use haven_lab::drive::Driver;
use haven_model::{backup::Moment, vm_snapshot::SnapshotState};
use nix::sys::signal::Signal;
use std::time::{Duration, Instant};

const VM: &str = "copied";
const DISK: &str = "copied.data";
const CLONE: &str = "double";
const CLONED: &str = "double.data";
const PATIENCE: Duration = Duration::from_secs(90);
const POOL: &str = "/srv/shared/copies";
const TWINS: &str = "/var/lib/haven/twins";

/// The copies on a host: their names.
fn copies(lab: &Lab, host: &str) -> Vec<String> {
    let folder = lab.dir.join(format!("hosts/{host}/upper{TWINS}"));
    let files = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let names = files.map(|file| file.file_name().to_string_lossy().into_owned());
    names.filter(|name| name.contains(".kept")).collect()
}

/// Waits until both hosts with a replica have a copy.
fn on_both(lab: &Lab, snapshot: &str) -> Result<()> {
    let begin = Instant::now();
    lab.wait("both hosts have a copy", PATIENCE, |lab| {
        one(lab, VM, snapshot).is_ok_and(|of| {
            of.disks.iter().any(|disk| disk.name.as_str() == "data" && disk.copies.len() == 2)
        })
    })?;
    println!("  both hosts have a copy after {:.2} s", begin.elapsed().as_secs_f64());
    Ok(())
}

fn counted(lab: &Driver) -> usize {
    let view = lab.ask(|client| async move { client.volume(DISK).await });
    view.map_or(0, |view| view.replicas.iter().filter(|replica| replica.counted).count())
}

fn prepare(lab: &Lab) -> Result<()> {
    begin_anew(lab, VM)?;
    begin_anew(lab, CLONE)?;
    exec(lab, "host1", &format!("mkdir {POOL}"))?;
    exec(lab, "host1", &format!("haven pool mark {POOL}"))?;
    let manifest = format!(
        "kind: Pool\nname: twins\ndriver: mirrored\npath: {TWINS}\n---\nkind: Pool\nname: filer\ndriver: shared\npath: {POOL}\n---\nkind: VM\nname: {VM}\nimage: tiny\nmemory: 128MiB\ndisks:\n- name: data\n  size: 64MiB\n  pool: twins\n- name: own\n  size: 64MiB\n  pool: filer\nnetworks:\n- network: front\nuserData: {WRITES:?}\n"
    );
    lab.apply(&manifest, &["--wait", "--timeout", "120"])?;
    lab.wait("the guest writes", PATIENCE, |_| wrote(lab, VM) > 20)
}

/// What a guest found is of this moment, on both of its disks.
fn of_one_instant((least, most): (u64, u64), (first, second, _): (u64, u64, u64)) -> Result<()> {
    println!("  written when it was taken: {least} to {most}; found: {first} and {second}");
    ensure!((least..=most).contains(&first), "the first disk is of another moment");
    ensure!(first == second || first == second + 1, "the disks are of two moments");
    Ok(())
}

/// Kept while it runs, put back, and its host is lost: the other one has put its own copy in place, and lacks nothing of what was
/// written after that.
fn outlives_its_host(lab: &Lab) -> Result<()> {
    let boots = lab.boots_of(VM);
    let moment = taken(lab, VM, &["vm", "snapshot", "create", VM, "before"])?;
    ensure!(
        one(lab, VM, "before")?.moment == Some(Moment::Running),
        "{:?}",
        one(lab, VM, "before")?
    );
    on_both(lab, "before")?;
    let begin = Instant::now();
    lab.haven(&["vm", "clone", VM, CLONE, "--snapshot", "before"])?;
    lab.wait("the clone reads its disks", PATIENCE, |_| !found(lab, CLONE).is_empty())?;
    println!("  a clone of it runs after {:.2} s", begin.elapsed().as_secs_f64());
    of_one_instant(moment, found(lab, CLONE)[0])?;
    lab.wait("the clone has both replicas", PATIENCE, |lab| {
        let view = lab.ask(|client| async move { client.volume(CLONED).await });
        view.is_ok_and(|view| view.replicas.iter().filter(|of| of.counted).count() == 2)
    })?;
    lab.haven(&["vm", "rm", CLONE, "--wait"])?;
    writes_on(lab, VM, 20)?;
    ensure!(lab.boots_of(VM) == boots && counted(lab) == 2, "it was disturbed");
    lab.stopped(VM)?;
    put_back(lab, &["vm", "snapshot", "revert", VM, "before"])?;
    ensure!(counted(lab) == 2, "the other host has a copy, and does not count");
    of_one_instant(moment, started(lab, VM)?)?;
    // What was undone is written by other records than before.
    writes_on(lab, VM, 0)?;
    ensure!(counted(lab) == 2, "the other host has put its copy in place, and does not count");
    let (owner, before) = (lab.host_of(VM)?, found(lab, VM));
    let told = wrote_since(lab, moment.1)?;
    lab.haven(&["lab", "kill", &owner])?;
    let (first, second, _) = next_found(lab, VM, before)?;
    println!(
        "  told as written before its host was lost: {told}, found afterwards: {first} and {second}"
    );
    ensure!(first >= told && second >= told, "what was written after it was put back is lost");
    lab.haven(&["lab", "start", &owner])?;
    lab.online(&owner)?;
    lab.wait("all replicas count", PATIENCE, |lab| counted(lab) == 2)
}

/// The last record that was told after the guest went back to this one: it tells numbers that it had told before.
fn wrote_since(lab: &Lab, back_to: u64) -> Result<u64> {
    let host = lab.host_of(VM)?;
    let log = lab.dir.join(format!("hosts/{host}/upper/var/log/haven/vms/{VM}.console.log"));
    let last = || {
        let said = String::from_utf8_lossy(&std::fs::read(&log).ok()?).into_owned();
        let since = said.rsplit_once("HAS ").map(|(_, since)| since.to_owned())?;
        let numbers = since
            .lines()
            .filter_map(|line| line.split_once("WROTE ")?.1.trim().parse::<u64>().ok());
        numbers.max()
    };
    lab.wait("it writes again", PATIENCE, |_| last().is_some_and(|n| n > back_to + 5))?;
    last().context("it told what it wrote")
}

/// Its host's daemon is killed while it copies: the next one takes it anew.
fn interrupted(lab: &Lab) -> Result<()> {
    for turn in 0..3 {
        let (host, name) = (lab.host_of(VM)?, format!("turn-{turn}"));
        lab.wait("its host's daemon is there", PATIENCE, |lab| {
            !lab.pids(&host, "haven daemon").is_empty()
        })?;
        lab.online(&host)?;
        lab.haven(&["vm", "snapshot", "create", VM, &name, "--no-wait"])?;
        std::thread::sleep(Duration::from_millis(60 * turn));
        lab.signal(&host, "haven daemon", Signal::SIGKILL)?;
        lab.wait("the next daemon has it whole", PATIENCE, |lab| {
            one(lab, VM, &name).is_ok_and(|of| !of.is_due())
        })?;
        let of = one(lab, VM, &name)?;
        ensure!(of.state == SnapshotState::There, "{of:?}");
        writes_on(lab, VM, 5)?;
    }
    for turn in 0..3 {
        lab.haven(&["vm", "snapshot", "rm", VM, &format!("turn-{turn}")])?;
    }
    lab.wait("their copies are gone everywhere", PATIENCE, |_| {
        HOSTS.iter().all(|host| copies(lab, host).len() <= 1)
    })
}

/// One of a VM at rest is exact. Where the other host has no copy its replica counts no more, and gets all of it when it is back.
fn at_rest(lab: &Lab) -> Result<()> {
    lab.haven(&["vm", "snapshot", "rm", VM, "before"])?;
    lab.stopped(VM)?;
    let away = lab
        .ask(|client| async move { client.volume(DISK).await })?
        .replicas
        .into_iter()
        .map(|replica| replica.host.to_string())
        .find(|host| lab.host_of(VM).is_ok_and(|owner| owner != *host))
        .context("another host has a replica")?;
    lab.haven(&["lab", "kill", &away])?;
    lab.wait("it is known to be lost", PATIENCE, |lab| {
        // Until then the store may be choosing another leader.
        let lost = |line: &haven_model::api::HostLine| {
            line.name == away.as_str() && line.state.starts_with("lost")
        };
        lab.overview().is_ok_and(|overview| overview.hosts.iter().any(lost))
    })?;
    lab.haven(&["vm", "snapshot", "create", VM, "rest"])?;
    ensure!(one(lab, VM, "rest")?.moment == Some(Moment::Stopped), "{:?}", one(lab, VM, "rest")?);
    let (is, _, _) = started(lab, VM)?;
    wrote_since(lab, is)?;
    lab.stopped(VM)?;
    put_back(lab, &["vm", "snapshot", "revert", VM, "rest"])?;
    ensure!(counted(lab) == 1, "a host without a copy counts");
    lab.haven(&["lab", "start", &away])?;
    lab.online(&away)?;
    let (first, second, _) = started(lab, VM)?;
    println!("  at rest: it had {is}, and found {first} and {second}");
    ensure!(first == is && second == is, "it is of another moment");
    lab.wait("all replicas count", PATIENCE, |lab| counted(lab) == 2)?;
    on_both(lab, "rest")?;
    ensure!(copies(lab, &away).len() == 1, "{:?}", copies(lab, &away));
    fails(lab, &["vm", "snapshot", "revert", VM, "rest"], "shall run")
}

/// Kept, put back, removed.
pub fn kept_and_put_back(lab: &mut Lab, witness: &Witness) -> Result<()> {
    witness.moves(true);
    prepare(lab)?;
    outlives_its_host(lab)?;
    interrupted(lab)?;
    at_rest(lab)?;
    lab.haven(&["vm", "rm", VM, "--wait"])?;
    lab.wait("no copy is left", PATIENCE, |_| {
        HOSTS.iter().all(|host| copies(lab, host).is_empty())
    })?;
    lab.haven(&["delete", "pool/twins", "pool/filer", "--wait"])?;
    exec(lab, "host1", &format!("rm -r {POOL}"))?;
    crate::moves::alone(lab, witness)
}
