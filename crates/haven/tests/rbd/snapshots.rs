//! Snapshots of disks in Ceph: a guest writes each record to its first disk, then to its second. Whatever is put back, or made of it,
//! shows one moment of both, within what was written before and after.

use super::{Ceph, PATIENCE, boots, largest_in, said, writes_on};
use anyhow::{Context, Result, ensure};
use haven_lab::drive::Driver;
use haven_model::{
    Name, ObjectRef,
    backup::Moment,
    object::Kind,
    vm_snapshot::{SnapshotState, VmSnapshot},
};
use nix::sys::signal::Signal;
use std::time::{Duration, Instant};

const VM: &str = "twin";
/// One disk is in Ceph, and one is a file of its host.
const MIXED: &str = "mixed";

/// Writes each record to its first disk, then to its second, and tells it once both have it.
const WRITES: &str = r#"#!/bin/busybox sh
count() {
  dd if=$1 bs=512 skip=1 count=8000 2> /dev/null | busybox tr -d '\000' | busybox fold -w 8 |
    busybox awk '$1 + 0 != NR { exit } { n = NR } END { print n + 0 }'
}
i=$(count /dev/vda)
second=$(count /dev/vdb)
echo "HAS $i AND $second" > /dev/console
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

fn wrote(lab: &Driver, vm: &str) -> u64 {
    // What it has written since it was put back begins anew.
    let said = said(lab, vm, lab.host_of(vm).ok().as_deref());
    let now = said.rsplit_once("HAS ").map_or(said.as_str(), |(_, now)| now);
    largest_in(now, "WROTE ")
}

fn further(lab: &Driver, vm: &str) -> Result<()> {
    let then = wrote(lab, vm);
    lab.wait("it writes on", PATIENCE, |lab| wrote(lab, vm) > then + 15)
}

/// What a guest found on its disks each time that it booted.
fn found(lab: &Driver, vm: &str) -> Vec<(u64, u64)> {
    let said = said(lab, vm, None);
    let lines = said.lines().filter_map(|line| {
        let (first, second) = line.split_once("HAS ")?.1.split_once(" AND ")?;
        Some((first.trim().parse().ok()?, second.trim().parse().ok()?))
    });
    lines.collect()
}

/// What it finds when it boots the next time, on whichever host.
fn finds(lab: &Driver, vm: &str, before: &[(u64, u64)]) -> Result<(u64, u64)> {
    lab.wait("it reads its disks", PATIENCE, |lab| found(lab, vm).len() > before.len())?;
    let mut now = found(lab, vm);
    for old in before {
        let at = now.iter().position(|of| of == old).context("what it had found stands there")?;
        now.remove(at);
    }
    now.pop().context("it told what it found")
}

fn is_one_moment((first, second): (u64, u64), (least, most): (u64, u64)) -> Result<()> {
    println!("  written when it was kept: {least} to {most}; found: {first} and {second}");
    ensure!((least..=most).contains(&first), "it is of another moment");
    ensure!(first == second || first == second + 1, "the disks are of two moments");
    Ok(())
}

fn one(lab: &Driver, vm: &str, name: &str) -> Result<VmSnapshot> {
    let all = lab.ask(|client| async move { client.snapshots(vm).await })?;
    let one = all.into_iter().find(|of| of.name.as_str() == name);
    Ok(one.with_context(|| format!("there is a snapshot {name}"))?.snapshot)
}

fn taken(lab: &Driver, vm: &str, args: &[&str]) -> Result<(u64, u64)> {
    let (least, begin) = (wrote(lab, vm), Instant::now());
    let said = lab.haven(args)?;
    let most = wrote(lab, vm) + 1;
    let (last, took) = (said.trim().lines().last().unwrap_or_default(), begin.elapsed());
    println!("  {last} ({:.2} s)", took.as_secs_f64());
    Ok((least, most))
}

fn stopped(lab: &Driver, vm: &str) -> Result<()> {
    lab.haven(&["vm", "stop", vm])?;
    let named = ObjectRef::new(Kind::Vm, Name::new(vm)?);
    lab.wait("it has stopped", PATIENCE, |lab| {
        let item = lab.ask(|client| {
            let named = named.clone();
            async move { client.object(&named).await }
        });
        item.is_ok_and(|item| item.state == "stopped")
    })
}

fn put_back(lab: &Driver, vm: &str, to: &str) -> Result<(u64, u64)> {
    let before = found(lab, vm);
    let begin = Instant::now();
    lab.haven(&["vm", "snapshot", "revert", vm, to])?;
    println!("  put back to {to} in {:.2} s", begin.elapsed().as_secs_f64());
    lab.haven(&["vm", "start", vm])?;
    finds(lab, vm, &before)
}

/// The snapshots of the images of a VM, one line each.
fn in_images(ceph: &Ceph, vm: &str) -> Result<Vec<String>> {
    let images = ceph.images()?;
    let mut all = Vec::new();
    for image in images.lines().filter(|image| image.starts_with(&format!("{vm}."))) {
        let listed = ceph.ask(&["rbd", "snap", "ls", &format!("vm/{image}")])?;
        all.extend(listed.lines().filter(|line| line.contains("haven-")).map(str::to_owned));
    }
    Ok(all)
}

fn prepare(lab: &Driver) -> Result<()> {
    let vm = |name: &str, second: &str| {
        format!(
            "---\nkind: VM\nname: {name}\nimage: tiny\nmemory: 128MiB\ndisks:\n- name: one\n  size: 64MiB\n  pool: ceph\n- name: two\n  size: 64MiB\n  pool: {second}\nnetworks:\n- network: front\nuserData: {WRITES:?}\n"
        )
    };
    let pool = "kind: Pool\nname: scratch\ndriver: local\npath: /var/lib/haven/scratch\n";
    let manifest = pool.to_owned() + &vm(VM, "ceph") + &vm(MIXED, "scratch");
    lab.apply(&manifest, &["--wait", "--timeout", "120"])?;
    lab.wait("both guests write", PATIENCE, |lab| wrote(lab, VM) > 20 && wrote(lab, MIXED) > 20)
}

/// Kept while it runs, moved, put back at rest.
fn while_it_runs(lab: &Driver, ceph: &Ceph, vm: &str) -> Result<()> {
    let boots = found(lab, vm).len();
    let moment = taken(lab, vm, &["vm", "snapshot", "create", vm, "before"])?;
    let of = one(lab, vm, "before")?;
    ensure!(of.moment == Some(Moment::Running) && of.of_ms.is_some(), "{of:?}");
    further(lab, vm)?;
    let refused = lab.haven(&["vm", "snapshot", "revert", vm, "before"]).err();
    let refused = refused.context("it was reverted while it ran")?.to_string();
    ensure!(refused.contains("shall run"), "{refused}");
    ensure!(found(lab, vm).len() == boots, "it was started anew");
    if vm == VM {
        lab.haven(&["vm", "migrate", vm])?;
        further(lab, vm)?;
        ensure!(found(lab, vm).len() == boots, "it was started anew");
    }
    stopped(lab, vm)?;
    is_one_moment(put_back(lab, vm, "before")?, moment)?;
    further(lab, vm)?;
    lab.haven(&["vm", "snapshot", "rm", vm, "before"])?;
    let left = in_images(ceph, vm)?;
    ensure!(left.is_empty(), "{left:?}");
    Ok(())
}

/// Its host's daemon is killed after it was asked for: the next one has it whole, of one moment, and the guest writes on.
fn interrupted(lab: &Driver, ceph: &Ceph) -> Result<()> {
    let host = lab.host_of(VM)?;
    let boots = found(lab, VM).len();
    let mut moments = Vec::new();
    for turn in 0..4 {
        let name = format!("turn-{turn}");
        lab.wait("its host's daemon is there", PATIENCE, |lab| {
            !lab.pids(&host, "haven daemon").is_empty()
        })?;
        lab.online(&host)?;
        let least = wrote(lab, VM);
        lab.haven(&["vm", "snapshot", "create", VM, &name, "--no-wait"])?;
        // While it is named, while the guest stands and Ceph is asked, and about when it is written down.
        std::thread::sleep(Duration::from_millis(50 + 350 * turn));
        lab.signal(&host, "haven daemon", Signal::SIGKILL)?;
        lab.wait("the next daemon has it whole", PATIENCE, |lab| {
            one(lab, VM, &name).is_ok_and(|of| !of.is_due())
        })?;
        let of = one(lab, VM, &name)?;
        ensure!(of.state == SnapshotState::There, "{of:?}");
        moments.push((name, (least, wrote(lab, VM) + 1)));
        println!("  killed after {} ms: {:?}", 50 + 350 * turn, of.copy);
        further(lab, VM)?;
    }
    ensure!(found(lab, VM).len() == boots, "it was started anew");
    let kept = in_images(ceph, VM)?;
    ensure!(kept.len() >= 8, "{kept:?}");
    for (name, moment) in moments {
        stopped(lab, VM)?;
        is_one_moment(put_back(lab, VM, &name)?, moment)?;
        further(lab, VM)?;
        lab.haven(&["vm", "snapshot", "rm", VM, &name])?;
    }
    let left = in_images(ceph, VM)?;
    ensure!(left.is_empty(), "{left:?}");
    Ok(())
}

/// One of a VM at rest is exact; a daemon that is killed while it is put back is followed by one that goes on.
fn at_rest(lab: &Driver) -> Result<()> {
    stopped(lab, VM)?;
    lab.haven(&["vm", "snapshot", "create", VM, "rest"])?;
    let of = one(lab, VM, "rest")?;
    ensure!(of.moment == Some(Moment::Stopped), "{of:?}");
    let before = found(lab, VM);
    lab.haven(&["vm", "start", VM])?;
    let is = finds(lab, VM, &before)?;
    further(lab, VM)?;
    stopped(lab, VM)?;
    let (host, before) = (lab.host_of(VM)?, found(lab, VM));
    lab.haven(&["vm", "snapshot", "revert", VM, "rest", "--no-wait"])?;
    std::thread::sleep(Duration::from_millis(700));
    lab.signal(&host, "haven daemon", Signal::SIGKILL)?;
    lab.wait("its host's daemon is there", PATIENCE, |lab| {
        !lab.pids(&host, "haven daemon").is_empty()
    })?;
    lab.online(&host)?;
    lab.haven(&["vm", "start", VM])?;
    let found = finds(lab, VM, &before)?;
    println!("  at rest: it had {is:?}, and found {found:?}");
    ensure!(found == is, "it is of another moment");
    lab.haven(&["vm", "snapshot", "rm", VM, "rest"])?;
    further(lab, VM)
}

/// A VM made of it while it runs; the source goes, and nothing is left of either in the end.
fn cloned(lab: &Driver, ceph: &Ceph) -> Result<()> {
    let (least, begin) = (wrote(lab, VM), Instant::now());
    lab.haven(&["vm", "clone", VM, "copy", "--timeout", "120"])?;
    let is = finds(lab, "copy", &[])?;
    let took = begin.elapsed().as_secs_f64();
    println!("  cloned, and its guest is up, in {took:.2} s");
    is_one_moment(is, (least, wrote(lab, VM) + 1))?;
    lab.wait("nothing is kept of the source any more", PATIENCE, |lab| {
        let all = lab.ask(|client| async move { client.snapshots(VM).await });
        all.is_ok_and(|all| all.is_empty())
    })?;
    further(lab, VM)?;
    further(lab, "copy")?;
    lab.haven(&["vm", "rm", VM, "--wait"])?;
    let images = ceph.images()?;
    ensure!(!images.contains("twin."), "{images}");
    stopped(lab, "copy")?;
    let (told, before) = (wrote(lab, "copy"), found(lab, "copy"));
    lab.haven(&["vm", "start", "copy"])?;
    let (first, second) = finds(lab, "copy", &before)?;
    ensure!(first >= told && second >= told, "{told} were written, {first} and {second} are there");
    lab.haven(&["vm", "rm", "copy", "--wait"])?;
    let hidden = ceph.ask(&["rbd", "trash", "ls", "vm"])?;
    ensure!(hidden.is_empty(), "{hidden}");
    Ok(())
}

/// All of it, beside the guest of the other cases, which writes on.
pub fn kept(lab: &Driver, ceph: &Ceph) -> Result<()> {
    let before = boots(lab);
    prepare(lab)?;
    while_it_runs(lab, ceph, VM)?;
    while_it_runs(lab, ceph, MIXED)?;
    lab.haven(&["vm", "rm", MIXED, "--wait"])?;
    interrupted(lab, ceph)?;
    at_rest(lab)?;
    cloned(lab, ceph)?;
    lab.haven(&["delete", "pool/scratch", "--wait"])?;
    ensure!(boots(lab) == before, "the other guest was started anew");
    writes_on(lab)
}
