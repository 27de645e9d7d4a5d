//! Disks that are attached to a guest that runs, taken from it, and made larger: its guest sees each of it, and what it was told to
//! be written is there afterwards.

use crate::{
    keeper::{begin_anew, largest},
    lab::{HOSTS, Lab},
    witness::Witness,
};
use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use std::time::{Duration, Instant};

const VM: &str = "plugged";
const LOGS: &str = "plugged.logs";
const PATIENCE: Duration = Duration::from_secs(60);

/// Tells which disks it sees, with their sectors, and writes a numbered record after the other to the one called `logs`.
const WRITES: &str = r#"#!/bin/busybox sh
seen=
while :; do
  now=
  for disk in /sys/class/block/vd*; do
    name=$(cat $disk/serial 2> /dev/null)
    now="$now $name=$(cat $disk/size 2> /dev/null)"
    [ "$name" = logs ] && dev=$(cat $disk/dev)
  done
  [ "$now" = "$seen" ] || echo "SEES$now;" > /dev/console
  case "$seen" in *logs=*) ;; *) i= ;; esac
  seen="$now"
  case "$now" in *logs=*)
    # A node of its own: `dd` would make a file where that of a disk that has just gone was.
    [ -n "$i" ] || {
      rm -f /logs
      busybox mknod /logs b ${dev%:*} ${dev#*:}
      i=$(dd if=/logs bs=512 skip=1 count=4000 2> /dev/null | busybox tr -d '\000' | busybox fold -w 8 |
        busybox awk '$1 + 0 != NR { exit } { n = NR } END { print n + 0 }')
      echo "LOGS-HAS $i" > /dev/console
    }
    i=$((i + 1))
    printf '%08d' $i | dd of=/logs bs=512 seek=$i conv=fsync,notrunc 2> /dev/null && echo "LOGS-WROTE $i" > /dev/console
  esac
  sleep 0.05
done
"#;

fn manifest(pool: &str, driver: &str) -> String {
    format!(
        "kind: Pool\nname: {pool}\ndriver: {driver}\npath: /var/lib/haven/{pool}\n---\nkind: VM\nname: {VM}\nimage: tiny\nmemory: 128MiB\ndisks:\n- name: data\n  size: 64MiB\n  pool: {pool}\nnetworks:\n- network: front\nuserData: {WRITES:?}\n"
    )
}

/// What its guest said last of the disks that it sees. One that was moved goes on in the log of its new host.
fn sees(lab: &Lab) -> String {
    let here = lab.host_of(VM).ok().map(|host| {
        let log = lab.dir.join(format!("hosts/{host}/upper/var/log/haven/vms/{VM}.console.log"));
        String::from_utf8_lossy(&std::fs::read(log).unwrap_or_default()).into_owned()
    });
    let said = here.filter(|said| said.contains("SEES")).unwrap_or_else(|| lab.all_said_by(VM));
    let last = said.rsplit_once("SEES").map_or("", |(_, rest)| rest);
    last.split(';').next().unwrap_or_default().to_owned()
}

fn refused(lab: &Lab, args: &[&str], with: &str) -> Result<()> {
    let said = lab.haven(args).err().map(|why| format!("{why:#}")).unwrap_or_default();
    ensure!(said.contains(with), "`haven {}` said: {said}", args.join(" "));
    Ok(())
}

fn writes_on(lab: &Lab) -> Result<()> {
    let then = largest(lab, VM, "LOGS-WROTE");
    lab.wait("it writes on", PATIENCE, |_| largest(lab, VM, "LOGS-WROTE") > then + 5)
}

/// The files of the disk on any host.
fn files(lab: &Lab, pool: &str) -> Vec<String> {
    let all = HOSTS.into_iter().flat_map(|host| {
        let folder = lab.dir.join(format!("hosts/{host}/upper/var/lib/haven/{pool}"));
        let files = std::fs::read_dir(folder).into_iter().flatten().flatten();
        files.map(|file| file.file_name().to_string_lossy().into_owned()).collect::<Vec<_>>()
    });
    all.filter(|name| name.starts_with(LOGS)).collect()
}

/// Which records each host's file of the disk lacks.
fn tell_of_replicas(lab: &Lab, wrote: u64) {
    println!(
        "  what the guest said: {:?}",
        lab.all_said_by(VM)
            .lines()
            .filter(|line| line.contains("LOGS-HAS") || line.contains("SEES"))
            .collect::<Vec<_>>()
    );
    for host in HOSTS {
        let folder = lab.dir.join(format!("hosts/{host}/upper/var/lib/haven/twins"));
        for file in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            if !file.file_name().to_string_lossy().starts_with(LOGS) {
                continue;
            }
            let held = std::fs::read(file.path()).unwrap_or_default();
            let has = |n: &u64| {
                let at = usize::try_from(*n).unwrap_or(0) * 512;
                held.get(at..at + 8).is_some_and(|text| text == format!("{n:08}").as_bytes())
            };
            let lacks: Vec<u64> = (1..=wrote).filter(|n| !has(n)).collect();
            println!("  {host} {:?} ({} bytes) lacks {lacks:?}", file.file_name(), held.len());
        }
    }
}

/// After it was taken from its guest and given back, all is there.
fn goes_and_comes_back(lab: &Lab) -> Result<()> {
    let times = lab.said_by(VM, "LOGS-HAS");
    lab.haven(&["volume", "detach", LOGS])?;
    lab.wait("its guest sees it no more", PATIENCE, |_| !sees(lab).contains("logs"))?;
    let wrote = largest(lab, VM, "LOGS-WROTE");
    lab.haven(&["volume", "attach", LOGS])?;
    lab.wait("its guest sees it again", PATIENCE, |_| lab.said_by(VM, "LOGS-HAS") > times)?;
    let has = largest(lab, VM, "LOGS-HAS");
    println!("  told as written before it was detached: {wrote}, found afterwards: {has}");
    if has < wrote {
        tell_of_replicas(lab, wrote);
    }
    ensure!(has >= wrote, "{} records are lost", wrote - has);
    writes_on(lab)
}

pub fn come_go_and_grow(lab: &mut Lab, witness: &Witness) -> Result<()> {
    witness.moves(true);
    for (pool, driver) in [("spares", "local"), ("twins", "mirrored")] {
        with(lab, pool, driver)?;
    }
    crate::moves::alone(lab, witness)
}

fn with(lab: &mut Lab, pool: &str, driver: &str) -> Result<()> {
    println!("  in a pool of the driver {driver}:");
    begin_anew(lab, VM)?;
    lab.apply(&manifest(pool, driver), &["--wait", "--timeout", "120"])?;
    lab.wait("the guest sees its disk", PATIENCE, |_| sees(lab).contains("data=131072"))?;
    let boots = lab.boots_of(VM);
    lab.haven(&["volume", "create", LOGS, "32MiB"])?;
    refused(lab, &["volume", "create", LOGS, "32MiB"], "has a disk `logs` already")?;
    refused(lab, &["volume", "detach", LOGS], "is detached already")?;
    let begin = Instant::now();
    let said = lab.haven(&["volume", "attach", LOGS])?;
    println!("  {} ({:.2} s)", said.trim(), begin.elapsed().as_secs_f64());
    lab.wait("the guest sees it", PATIENCE, |_| sees(lab).contains("logs=65536"))?;
    refused(lab, &["volume", "attach", LOGS], "is attached already")?;
    refused(lab, &["volume", "rm", LOGS], "is attached to plugged; nothing was removed")?;
    writes_on(lab)?;
    goes_and_comes_back(lab)?;
    // The daemon ends while it is asked for.
    let owner = lab.host_of(VM)?;
    lab.haven(&["volume", "detach", LOGS, "--no-wait"])?;
    lab.signal(&owner, "haven daemon", Signal::SIGKILL)?;
    lab.wait("its guest sees it no more", PATIENCE, |_| !sees(lab).contains("logs"))?;
    lab.wait("the next daemon is there", PATIENCE, |_| {
        !lab.pids(&owner, "haven daemon").is_empty()
    })?;
    lab.online(&owner)?;
    lab.haven(&["volume", "attach", LOGS, "--no-wait"])?;
    lab.signal(&owner, "haven daemon", Signal::SIGKILL)?;
    lab.wait("its guest sees it again", PATIENCE, |_| sees(lab).contains("logs"))?;
    lab.online(&owner)?;
    writes_on(lab)?;
    grows(lab, driver)?;
    lab.wait("it can move", PATIENCE, |lab| {
        lab.ask(|client| async move { client.volume(LOGS).await })
            .is_ok_and(|view| view.state == haven_model::vm::DiskState::Attached)
    })?;
    let from = lab.host_of(VM)?;
    lab.haven(&["vm", "migrate", VM])?;
    ensure!(lab.host_of(VM)? != from, "it is where it was");
    writes_on(lab)?;
    ensure!(lab.boots_of(VM) == boots, "it was started anew");
    goes_and_comes_back(lab)?;
    if driver == "mirrored" {
        outlives_its_host(lab)?;
    }
    lab.haven(&["volume", "detach", LOGS])?;
    ensure!(!files(lab, pool).is_empty(), "its file is nowhere");
    if driver == "local" {
        refused(lab, &["vm", "migrate", VM], "is detached and lives in the pool")?;
    }
    lab.haven(&["volume", "rm", LOGS])?;
    lab.wait("nothing is left of it", PATIENCE, |_| files(lab, pool).is_empty())?;
    refused(lab, &["volume", "create", LOGS, "32MiB"], "had a disk `logs` that was removed")?;
    lab.haven(&["delete", &format!("vm/{VM}"), "--wait"])?;
    lab.haven(&["delete", &format!("pool/{pool}"), "--wait"]).map(drop)
}

/// While its guest writes, also when the daemon that has just begun is killed.
fn grows(lab: &Lab, driver: &str) -> Result<()> {
    let begin = Instant::now();
    let said = lab.haven(&["volume", "resize", LOGS, "48MiB"])?;
    println!("  {} ({:.2} s)", said.trim().replace('\n', "; "), begin.elapsed().as_secs_f64());
    lab.wait("its guest sees it larger", PATIENCE, |_| sees(lab).contains("logs=98304"))?;
    let view = lab.ask(|client| async move { client.volume(LOGS).await })?;
    ensure!(view.replicas.iter().all(|replica| replica.counted), "a replica was left behind");
    writes_on(lab)?;
    let owner = lab.host_of(VM)?;
    for (i, size) in [64, 80, 96].into_iter().enumerate() {
        lab.haven(&["volume", "resize", LOGS, &format!("{size}MiB"), "--no-wait"])?;
        std::thread::sleep(Duration::from_millis(60) * u32::try_from(i)?);
        lab.signal(&owner, "haven daemon", Signal::SIGKILL)?;
        let seen = format!("logs={}", size * 2048);
        lab.wait("its guest sees it larger", PATIENCE, |_| sees(lab).contains(&seen))?;
        writes_on(lab)?;
        lab.wait("the next daemon is there", PATIENCE, |lab| {
            !lab.pids(&owner, "haven daemon").is_empty()
        })?;
        lab.online(&owner)?;
    }
    if driver == "mirrored" {
        lab.wait("its replicas can be compared", PATIENCE, |lab| {
            let said = lab.haven(&["volume", "check", LOGS]);
            said.is_ok_and(|said| said.contains("all of it is the same on"))
        })?;
    }
    Ok(())
}

/// Both disks are there on the other host.
fn outlives_its_host(lab: &Lab) -> Result<()> {
    let (owner, times) = (lab.host_of(VM)?, lab.said_by(VM, "LOGS-HAS"));
    let wrote = largest(lab, VM, "LOGS-WROTE");
    lab.haven(&["lab", "kill", &owner])?;
    lab.wait("it starts elsewhere", PATIENCE, |_| lab.said_by(VM, "LOGS-HAS") > times)?;
    let has = largest(lab, VM, "LOGS-HAS");
    println!("  told as written before its host was lost: {wrote}, found afterwards: {has}");
    ensure!(has >= wrote, "{} records are lost", wrote - has);
    lab.haven(&["lab", "start", &owner])?;
    lab.online(&owner)?;
    lab.wait("all replicas count", PATIENCE, |lab| {
        let view = lab.ask(|client| async move { client.volume(LOGS).await });
        view.is_ok_and(|view| view.replicas.iter().all(|replica| replica.counted))
    })
}
