//! A guest writes to two disks, one that only its host has and one that all hosts have; what it finds after it was put back is
//! the moment of the snapshot, on both.

use crate::{
    keeper::largest,
    lab::{Lab, other},
    witness::Witness,
};
use anyhow::{Context, Result, ensure};
use haven_lab::drive::Driver;
use haven_model::{backup::Moment, vm_snapshot::VmSnapshot};
use nix::sys::signal::Signal;
use std::{
    path::PathBuf,
    process::Command,
    time::{Duration, Instant},
};

const VM: &str = "put-back";
const PATIENCE: Duration = Duration::from_secs(90);
const POOL: &str = "/srv/shared/snapshots";
const TARGET: &str = "/srv/shared/snapshots-backups";

/// Writes each record to its first disk, then to its second, and tells it once both have it.
pub const WRITES: &str = r#"#!/bin/busybox sh
count() {
  dd if=$1 bs=512 skip=1 count=4000 2> /dev/null | busybox tr -d '\000' | busybox fold -w 8 |
    busybox awk '$1 + 0 != NR { exit } { n = NR } END { print n + 0 }'
}
i=$(count /dev/vda)
second=$(count /dev/vdb)
echo "HAS $i AND $second IN $(cat /sys/class/block/vda/size)" > /dev/console
# The instant that was kept may lie between the two writes of a record.
[ $second -lt $i ] && i=$second
while :; do
  i=$((i + 1))
  has=yes
  for disk in /dev/vda /dev/vdb; do
    printf '%08d' $i | dd of=$disk bs=512 seek=$i conv=fsync,notrunc 2> /dev/null || has=
  done
  [ -z "$has" ] || echo "WROTE $i" > /dev/console
  sleep 0.05
done
"#;

pub fn exec(lab: &Lab, host: &str, script: &str) -> Result<String> {
    lab.haven(&["lab", "exec", host, "--", "sh", "-c", script])
}

pub fn fails(lab: &Lab, args: &[&str], says: &str) -> Result<()> {
    let said = lab.haven(args).err().with_context(|| format!("{args:?} is refused"))?;
    let said = format!("{said:#}");
    ensure!(said.contains(says), "{args:?} does not say `{says}`, but: {said}");
    Ok(())
}

pub fn wrote(lab: &Lab, vm: &str) -> u64 {
    largest(lab, vm, "WROTE")
}

pub fn writes_on(lab: &Lab, vm: &str, by: u64) -> Result<()> {
    let then = wrote(lab, vm);
    lab.wait("it writes on", PATIENCE, |_| wrote(lab, vm) > then + by)
}

/// What a guest found on its disks, each time that it booted: on the first, on the second, and how large the first was.
pub fn found(lab: &Lab, vm: &str) -> Vec<(u64, u64, u64)> {
    let said = lab.all_said_by(vm);
    let lines = said.lines().filter_map(|line| {
        let (_, rest) = line.split_once("HAS ")?;
        let words: Vec<&str> = rest.split_whitespace().collect();
        let [first, "AND", second, "IN", sectors] = words.as_slice() else { return None };
        Some((first.parse().ok()?, second.parse().ok()?, sectors.parse().ok()?))
    });
    let mut all: Vec<_> = lines.collect();
    all.sort_unstable();
    all
}

/// Starts it: what it finds.
pub fn started(lab: &Lab, vm: &str) -> Result<(u64, u64, u64)> {
    let before = found(lab, vm);
    lab.haven(&["vm", "start", vm])?;
    next_found(lab, vm, before)
}

/// What it finds when it boots the next time.
pub fn next_found(lab: &Lab, vm: &str, before: Vec<(u64, u64, u64)>) -> Result<(u64, u64, u64)> {
    lab.wait("it reads its disks", PATIENCE, |_| found(lab, vm).len() > before.len())?;
    let mut now = found(lab, vm);
    for old in before {
        let at = now.iter().position(|of| *of == old).context("what it had found stands there")?;
        now.remove(at);
    }
    now.pop().context("it told what it found")
}

pub fn one(lab: &Driver, vm: &str, name: &str) -> Result<VmSnapshot> {
    let all = lab.ask(|client| async move { client.snapshots(vm).await })?;
    let one = all.into_iter().find(|of| of.name.as_str() == name);
    Ok(one.with_context(|| format!("there is a snapshot {name}"))?.snapshot)
}

/// Takes one while the guest writes: at least so much is in it, and at most.
pub fn taken(lab: &Lab, vm: &str, args: &[&str]) -> Result<(u64, u64)> {
    let (least, begin) = (wrote(lab, vm), Instant::now());
    let said = lab.haven(args)?;
    let most = wrote(lab, vm) + 1;
    println!("  {} ({:.2} s)", said.trim(), begin.elapsed().as_secs_f64());
    Ok((least, most))
}

pub fn put_back(lab: &Lab, args: &[&str]) -> Result<()> {
    let begin = Instant::now();
    let said = lab.haven(args)?;
    println!("  {} ({:.2} s)", said.trim(), begin.elapsed().as_secs_f64());
    Ok(())
}

/// The files of its disks on the lab's machine, with what `qemu-img` tells of the snapshots in each.
fn in_files(lab: &Lab) -> Result<Vec<(PathBuf, usize)>> {
    let host = lab.host_of(VM)?;
    let folders = [
        lab.dir.join(format!("hosts/{host}/upper/var/lib/haven/scratch")),
        lab.dir.join("shared/snapshots"),
    ];
    let mut all = Vec::new();
    for entry in folders.into_iter().flat_map(std::fs::read_dir).flatten() {
        let path = entry?.path();
        if path.extension().is_some_and(|ending| ending == "qcow2") {
            let told =
                Command::new("qemu-img").args(["snapshot", "-l", "-U"]).arg(&path).output()?;
            let told = String::from_utf8_lossy(&told.stdout).into_owned();
            all.push((path, told.matches("haven-").count()));
        }
    }
    Ok(all)
}

fn prepare(lab: &Lab) -> Result<()> {
    exec(lab, "host1", &format!("mkdir {POOL}"))?;
    exec(lab, "host1", &format!("haven pool mark {POOL}"))?;
    let manifest = format!(
        "kind: Pool\nname: scratch\ndriver: local\npath: /var/lib/haven/scratch\n---\nkind: Pool\nname: filer\ndriver: shared\npath: {POOL}\n---\nkind: VM\nname: {VM}\nimage: tiny\nmemory: 128MiB\ndisks:\n- name: data\n  size: 64MiB\n  pool: filer\n- name: own\n  size: 64MiB\n  pool: scratch\nnetworks:\n- network: front\nuserData: {WRITES:?}\n"
    );
    lab.apply(&manifest, &["--wait", "--timeout", "120"])?;
    lab.wait("the guest writes", PATIENCE, |_| wrote(lab, VM) > 20)
}

/// Kept while it runs, written on, put back: it finds that moment on both of its disks, and its larger disk is as large.
fn while_it_runs(lab: &Lab) -> Result<()> {
    let boots = lab.boots_of(VM);
    let (least, most) = taken(lab, VM, &["vm", "snapshot", "create", VM, "before"])?;
    fails(lab, &["vm", "snapshot", "create", VM, "before"], "has a snapshot `before` already")?;
    ensure!(
        one(lab, VM, "before")?.moment == Some(Moment::Running),
        "{:?}",
        one(lab, VM, "before")?
    );
    writes_on(lab, VM, 20)?;
    fails(lab, &["vm", "snapshot", "revert", VM, "before"], "shall run")?;
    ensure!(lab.boots_of(VM) == boots, "it was started anew");
    lab.haven(&["volume", "resize", "put-back.data", "96MiB"])?;
    lab.stopped(VM)?;
    put_back(lab, &["vm", "snapshot", "revert", VM, "before"])?;
    let (first, second, sectors) = started(lab, VM)?;
    println!("  written when it was taken: {least} to {most}; found: {first} and {second}");
    ensure!((least..=most).contains(&first), "the first disk is of another moment");
    ensure!(first == second || first == second + 1, "the disks are of two moments");
    ensure!(sectors == 96 << 11, "its disk has {sectors} sectors");
    writes_on(lab, VM, 20)
}

/// A disk that only its host has, and that holds a snapshot, keeps its guest there; one that all hosts have does not.
fn moved(lab: &Lab) -> Result<()> {
    let host = lab.host_of(VM)?;
    let why = "holds the snapshot `before`, which would not go along";
    fails(lab, &["vm", "migrate", VM], why)?;
    lab.haven(&["host", "drain", &host])?;
    lab.wait("the drain says what keeps it", PATIENCE, |lab| {
        lab.haven(&["explain", &format!("vm/{VM}")]).is_ok_and(|said| said.contains(why))
    })?;
    lab.haven(&["host", "undrain", &host])?;
    lab.haven(&["vm", "snapshot", "rm", VM, "before"])?;
    let left = in_files(lab)?;
    ensure!(left.len() == 2 && left.iter().all(|(_, count)| *count == 0), "{left:?}");
    let (least, most) = taken(lab, VM, &["volume", "snapshot", "put-back.data", "one"])?;
    writes_on(lab, VM, 10)?;
    lab.haven(&["vm", "migrate", VM, "--to", other(&host)])?;
    writes_on(lab, VM, 10)?;
    lab.stopped(VM)?;
    let told = wrote(lab, VM);
    put_back(lab, &["volume", "revert", "put-back.data", "one"])?;
    let (first, second, _) = started(lab, VM)?;
    println!(
        "  one disk, on another host: found {first} ({least} to {most}) and {second} ({told})"
    );
    ensure!((least..=most).contains(&first), "the disk is of another moment");
    ensure!(second >= told, "the other disk was put back as well");
    writes_on(lab, VM, 10)
}

/// Its host's daemon is killed as soon as it is asked for: it becomes whole by the next one.
fn interrupted(lab: &Lab) -> Result<()> {
    let host = lab.host_of(VM)?;
    for turn in 0..3 {
        let name = format!("turn-{turn}");
        lab.wait("its host's daemon is there", PATIENCE, |lab| {
            !lab.pids(&host, "haven daemon").is_empty()
        })?;
        lab.online(&host)?;
        lab.haven(&["vm", "snapshot", "create", VM, &name, "--no-wait"])?;
        std::thread::sleep(Duration::from_millis(20 * turn));
        lab.signal(&host, "haven daemon", Signal::SIGKILL)?;
        lab.wait("the next daemon has it whole", PATIENCE, |lab| {
            one(lab, VM, &name).is_ok_and(|of| !of.is_due())
        })?;
        let of = one(lab, VM, &name)?;
        ensure!(of.state == haven_model::vm_snapshot::SnapshotState::There, "{of:?}");
    }
    writes_on(lab, VM, 10)?;
    ensure!(in_files(lab)?.iter().all(|(_, count)| *count >= 3), "{:?}", in_files(lab)?);
    for turn in 0..3 {
        lab.haven(&["vm", "snapshot", "rm", VM, &format!("turn-{turn}")])?;
    }
    Ok(())
}

/// One of a VM at rest is exact; a backup after it was put back holds what it was put back to.
fn at_rest(lab: &Lab) -> Result<()> {
    // Its directory is not there yet.
    let _ = lab.haven(&["backup", "target", "create", "nas", "--directory", TARGET]);
    exec(lab, "host1", &format!("mkdir -p {TARGET}"))?;
    lab.haven(&["backup", "target", "mark", "nas"])?;
    lab.stopped(VM)?;
    lab.haven(&["vm", "snapshot", "create", VM, "rest"])?;
    ensure!(one(lab, VM, "rest")?.moment == Some(Moment::Stopped), "{:?}", one(lab, VM, "rest")?);
    let (is, _, _) = started(lab, VM)?;
    writes_on(lab, VM, 20)?;
    lab.haven(&["backup", "run", VM])?;
    writes_on(lab, VM, 20)?;
    lab.stopped(VM)?;
    put_back(lab, &["vm", "snapshot", "revert", VM, "rest"])?;
    let (first, _, _) = started(lab, VM)?;
    println!("  at rest: it had {is}, and found {first}");
    ensure!(first == is, "it is of another moment");
    lab.stopped(VM)?;
    put_back(lab, &["vm", "snapshot", "revert", VM, "rest"])?;
    lab.haven(&["backup", "run", VM])?;
    lab.haven(&["backup", "restore", VM, "--as", "again", "--timeout", "120"])?;
    lab.wait("it reads its disks", PATIENCE, |_| !found(lab, "again").is_empty())?;
    let again = found(lab, "again");
    println!("  in a VM from the backup after that: {again:?}");
    ensure!(again.first().is_some_and(|of| of.0 == is), "the backup is of another moment");
    lab.haven(&["vm", "rm", "again", "--wait"]).map(drop)
}

/// Kept, put back, removed.
pub fn put_back_to(lab: &mut Lab, witness: &Witness) -> Result<()> {
    witness.moves(true);
    prepare(lab)?;
    while_it_runs(lab)?;
    moved(lab)?;
    interrupted(lab)?;
    at_rest(lab)?;
    lab.haven(&["vm", "rm", VM, "--wait"])?;
    ensure!(in_files(lab).is_err() || in_files(lab)?.is_empty(), "its disks are still there");
    lab.haven(&["backup", "target", "rm", "nas", "--wait"])?;
    lab.haven(&["delete", "pool/scratch", "pool/filer", "--wait"])?;
    exec(lab, "host1", &format!("rm -r {POOL} {TARGET}")).map(drop)
}
