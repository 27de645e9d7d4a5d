//! A mirrored disk while replicas break away and return: how long its guest stands, how long a replica takes to have all again,
//! and how much longer a VM with such a disk takes to start elsewhere than one without a disk.
//!
//! The guest writes 4 KiB after 4 KiB, each past its page cache, one at a time. How long it stands is seen from outside: the
//! longest time in which the file of its host's replica does not change. A file's time has the kernel's tick as its
//! resolution (4 ms here).

use crate::{failover::vms, sample::Sample};
use anyhow::{Context, Result, ensure};
use haven_lab::drive::Driver;
use nix::sys::signal::Signal;
use std::{
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

const PATIENCE: Duration = Duration::from_secs(120);

/// One that may be kept when its host is not heard.
pub const KEPT: &str = "kind: Pool\nname: mirrored\ndriver: mirrored\npath: /var/lib/haven/mirrored\n---\nkind: VM\nname: kept\nimage: tiny\nmemory: 128MiB\nisolation: keep\ndisks:\n- name: data\n  size: 64MiB\n  pool: mirrored\n";

fn manifest() -> String {
    let vm = |name: &str, label: &str, disks: &str, script: &str| {
        format!(
            "---\nkind: VM\nname: {name}\nlabels: {{set: {label}}}\nimage: tiny\nmemory: 128MiB\n{disks}userData: {:?}\n",
            format!("#!/bin/sh\n{script}\n")
        )
    };
    let disk = |size: &str| format!("disks:\n- name: data\n  size: {size}\n  pool: mirrored\n");
    let writer = "while :; do dd if=/dev/zero of=/dev/vda bs=4k count=262144 oflag=direct conv=notrunc 2> /dev/null; done";
    let bulk = "i=0; while :; do echo BEGIN $i > /dev/console; dd if=/dev/urandom of=/block bs=1M count=8 2> /dev/null; n=0; while [ $n -lt 128 ]; do dd if=/block of=/dev/vda bs=1M count=8 seek=$((n * 8)) oflag=direct conv=notrunc 2> /dev/null; n=$((n + 1)); done; i=$((i + 1)); echo PASS $i > /dev/console; sleep 25; done";
    [
        "kind: Pool\nname: mirrored\ndriver: mirrored\npath: /var/lib/haven/mirrored\n".to_owned(),
        vm("writer", "writer", &disk("1GiB"), writer),
        vm("bulk", "bulk", &disk("1GiB"), bulk),
    ]
    .concat()
}

/// The host of a VM, and that of the other replica of its disk.
fn hosts(lab: &Driver, vm: &str) -> Result<(String, String)> {
    let owner = lab.host_of(vm)?;
    let name = format!("{vm}.data");
    let view = lab.ask(|client| {
        let name = name.clone();
        async move { client.volume(&name).await }
    })?;
    let other = view.replicas.iter().find(|replica| replica.host.as_str() != owner);
    Ok((owner, other.context("it has another replica")?.host.to_string()))
}

fn counted(lab: &Driver, vm: &str) -> usize {
    let name = format!("{vm}.data");
    let view = lab.ask(|client| {
        let name = name.clone();
        async move { client.volume(&name).await }
    });
    view.map_or(0, |view| view.volume.counted().count())
}

pub fn whole(lab: &Driver, vm: &str) -> Result<()> {
    lab.wait("both replicas count", PATIENCE, |lab| counted(lab, vm) == 2)
}

pub fn replica(lab: &Driver, host: &str, vm: &str) -> Result<PathBuf> {
    let pool = lab.dir.join(format!("hosts/{host}/upper/var/lib/haven/mirrored"));
    let mut all = std::fs::read_dir(&pool)?.flatten().map(|entry| entry.path());
    let of = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        name.starts_with(&format!("{vm}.")) && name.ends_with(".raw")
    };
    all.find(of).with_context(|| format!("{} holds no replica of {vm}", pool.display()))
}

/// The longest time in which a file does not change, seconds.
pub fn stands(file: &Path, for_so_long: Duration) -> Result<f64> {
    let changed = || std::fs::metadata(file).map(|of| (of.mtime(), of.mtime_nsec()));
    let (mut last, mut at, begin) = (changed()?, Instant::now(), Instant::now());
    let mut longest = Duration::ZERO;
    while begin.elapsed() < for_so_long {
        std::thread::sleep(Duration::from_millis(1));
        let now = changed()?;
        if now != last {
            longest = longest.max(at.elapsed());
            (last, at) = (now, Instant::now());
        }
    }
    Ok(longest.max(at.elapsed()).as_secs_f64())
}

pub fn run(lab: &Driver, runs: usize) -> Result<()> {
    lab.apply(&manifest(), &["--wait", "--timeout", "120"])?;
    std::thread::sleep(Duration::from_secs(8));
    let (mut calm, mut killed, mut cut) = (Sample::default(), Sample::default(), Sample::default());
    let mut moved = Sample::default();
    for _ in 0..runs {
        let (owner, other) = hosts(lab, "writer")?;
        // What the guest writes in its new place reaches this file, too.
        let file = replica(lab, &owner, "writer")?;
        let watch = std::thread::spawn(move || stands(&file, Duration::from_secs(4)));
        std::thread::sleep(Duration::from_millis(200));
        lab.haven(&["vm", "migrate", "writer"])?;
        moved.push(watch.join().map_err(|_| anyhow::anyhow!("the watch panicked"))??);
        ensure!(lab.host_of("writer")? == other, "it did not move");
        whole(lab, "writer")?;
    }
    for _ in 0..runs {
        let (owner, other) = hosts(lab, "writer")?;
        let file = replica(lab, &owner, "writer")?;
        calm.push(stands(&file, Duration::from_secs(2))?);
        let told = file.clone();
        let watch = std::thread::spawn(move || stands(&told, Duration::from_secs(2)));
        std::thread::sleep(Duration::from_millis(200));
        lab.signal(&other, "writer.data", Signal::SIGKILL)?;
        killed.push(watch.join().map_err(|_| anyhow::anyhow!("the watch panicked"))??);
        whole(lab, "writer")?;
        let watch = std::thread::spawn(move || stands(&file, Duration::from_secs(4)));
        std::thread::sleep(Duration::from_millis(200));
        lab.haven(&["lab", "cut", &other, "--from", &owner])?;
        cut.push(watch.join().map_err(|_| anyhow::anyhow!("the watch panicked"))??);
        ensure!(counted(lab, "writer") == 1, "the cut was not noticed");
        lab.haven(&["lab", "heal"])?;
        whole(lab, "writer")?;
    }
    moved.print("guest stands while it moves live with its disk", f64::INFINITY, f64::INFINITY);
    calm.print("longest pause between two changes, nothing happens", f64::INFINITY, f64::INFINITY);
    killed.print("guest stands, what serves the other replica is killed", 0.05, 0.05);
    cut.print("guest stands, the other replica's host is cut off silently", 1.3, 1.3);
    lab.haven(&["delete", "vm/writer", "--wait"])?;
    returned(lab, runs.min(5))?;
    lab.haven(&["delete", "vm/bulk", "--wait"])?;
    takeover(lab, runs)
}

/// A replica that lacks 1 GiB returns.
fn returned(lab: &Driver, runs: usize) -> Result<()> {
    let mut took = Sample::default();
    for _ in 0..runs {
        let (owner, other) = hosts(lab, "bulk")?;
        let says = |words: &str| {
            lab.haven(&["vm", "log", "bulk"]).unwrap_or_default().matches(words).count()
        };
        let before = says("BEGIN");
        lab.wait("a pass begins", PATIENCE, |_| says("BEGIN") > before)?;
        let passes = says("PASS");
        lab.haven(&["lab", "cut", &other, "--from", &owner])?;
        lab.wait("1 GiB is written", PATIENCE, |_| says("PASS") > passes)?;
        let begin = Instant::now();
        lab.haven(&["lab", "heal"])?;
        lab.wait("it counts again", PATIENCE, |lab| counted(lab, "bulk") == 2)?;
        took.push(begin.elapsed().as_secs_f64());
        println!("  1 GiB was written meanwhile: {:.2} s", begin.elapsed().as_secs_f64());
    }
    took.print("link healed -> replica that lacked 1 GiB counts again", 5.0, f64::INFINITY);
    Ok(())
}

/// Two VMs on one host, of which one has a mirrored disk: its power is cut.
fn takeover(lab: &Driver, runs: usize) -> Result<()> {
    let manifest = "kind: VM\nname: with\nlabels: {set: one}\nimage: tiny\nmemory: 128MiB\ndisks:\n- name: data\n  size: 64MiB\n  pool: mirrored\n---\nkind: VM\nname: without\nimage: tiny\nmemory: 128MiB\naffinity: {near: {set: one}}\n";
    lab.apply(manifest, &["--wait", "--timeout", "120"])?;
    let (mut with, mut without, mut more) =
        (Sample::default(), Sample::default(), Sample::default());
    for run in 0..runs {
        whole(lab, "with")?;
        let host = lab.host_of("with")?;
        ensure!(lab.host_of("without")? == host, "they are not on one host");
        let began = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64();
        lab.haven(&["lab", "kill", &host])?;
        lab.wait("both start elsewhere", PATIENCE, |lab| {
            let moved = |(on, _): &(String, i64)| *on != host;
            vms(lab).is_ok_and(|all| all.len() == 2 && all.values().all(moved))
        })?;
        let all = vms(lab)?;
        let after = |vm: &str| all.get(vm).map(|(_, ms)| *ms as f64 / 1000.0 - began);
        let (one, other) = after("with").zip(after("without")).context("both run")?;
        println!("  run {run}, {host}: {one:.3} s with a mirrored disk, {other:.3} s without");
        with.push(one);
        without.push(other);
        more.push(one - other);
        lab.haven(&["lab", "start", &host])?;
        lab.online(&host)?;
        lab.voting()?;
    }
    with.print(
        "power cut -> VM with a mirrored disk started elsewhere",
        f64::INFINITY,
        f64::INFINITY,
    );
    without.print("power cut -> VM without a disk started elsewhere", f64::INFINITY, f64::INFINITY);
    more.print("how much longer it takes with a mirrored disk", 0.5, f64::INFINITY);
    Ok(())
}
