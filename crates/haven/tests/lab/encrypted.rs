//! A guest writes to an encrypted mirrored disk, to an encrypted one that all hosts have, and to one that is not encrypted: what it
//! wrote is found in no file of the first two, and in those of the third. They live through all that disks live through.

use crate::{
    keeper::begin_anew,
    lab::{HOSTS, Lab},
    snapshots::{exec, fails, found, next_found, one, put_back, started, taken, writes_on, wrote},
    witness::Witness,
};
use anyhow::{Context, Result, ensure};
use haven_lab::drive::Driver;
use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

const VM: &str = "vault";
const DISK: &str = "vault.data";
const HOT: &str = "vault.hot";
const CLONE: &str = "vault-two";
const AGAIN: &str = "vault-again";
const PATIENCE: Duration = Duration::from_secs(90);
const POOL: &str = "/srv/shared/vault";
const TARGET: &str = "/srv/shared/vault-backups";
const TWINS: &str = "/var/lib/haven/vaults";
/// What the guest writes to each of its disks, and nobody else shall read.
const WORDS: &str = "written-by-the-guest-of-the-vault";

/// Writes its words to each disk that it sees, and each record to its first disk, then to its second. Where nothing was written yet
/// such a disk reads as noise, so records are whole sectors.
const WRITES: &str = r#"#!/bin/busybox sh
count() {
  dd if=$1 bs=512 skip=1 count=4000 2> /dev/null | busybox tr -d '\000' | busybox fold -w 8 |
    busybox awk '$1 + 0 != NR { exit } { n = NR } END { print n + 0 }'
}
words() { echo WORDS | dd of=$1 bs=512 seek=8000 conv=sync,fsync,notrunc 2> /dev/null; }
i=$(count /dev/vda)
second=$(count /dev/vdb)
echo "HAS $i AND $second IN $(cat /sys/class/block/vda/size)" > /dev/console
[ $second -lt $i ] && i=$second
for disk in /dev/vda /dev/vdb /dev/vdc; do words $disk; done
while :; do
  i=$((i + 1))
  has=yes
  for disk in /dev/vda /dev/vdb; do
    printf '%08d' $i | dd of=$disk bs=512 seek=$i conv=sync,fsync,notrunc 2> /dev/null || has=
  done
  [ -z "$has" ] || echo "WROTE $i" > /dev/console
  for hot in /sys/class/block/vd*; do
    [ "$(cat $hot/serial 2> /dev/null)" = hot ] || continue
    dev=$(cat $hot/dev); rm -f /hot; busybox mknod /hot b ${dev%:*} ${dev#*:}
    words /hot && echo "HOT $(cat $hot/size)" > /dev/console
  done
  sleep 0.05
done
"#;

fn manifest(encrypted: bool) -> String {
    let script = WRITES.replace("WORDS", WORDS);
    format!(
        "kind: Pool\nname: vaults\ndriver: mirrored\npath: {TWINS}\n---\nkind: Pool\nname: filer\ndriver: shared\npath: {POOL}\n---\nkind: VM\nname: {VM}\nimage: tiny\nmemory: 128MiB\ndisks:\n- {{name: data, size: 64MiB, pool: vaults, encrypted: {encrypted}}}\n- {{name: own, size: 64MiB, pool: filer, encrypted: true}}\n- {{name: plain, size: 16MiB, pool: filer}}\nnetworks:\n- network: front\nuserData: {script:?}\n"
    )
}

/// The files of disks on all hosts, whole ones and what is kept beside them.
fn files(lab: &Lab) -> Vec<PathBuf> {
    let pools = HOSTS.into_iter().map(|host| lab.dir.join(format!("hosts/{host}/upper{TWINS}")));
    let all = pools.chain([lab.dir.join("shared/vault")]);
    let entries = all.flat_map(std::fs::read_dir).flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| path.is_file()).collect()
}

fn holds(path: &Path) -> Result<bool> {
    let content = std::fs::read(path).with_context(|| path.display().to_string())?;
    Ok(content.windows(WORDS.len()).any(|part| part == WORDS.as_bytes()))
}

/// What the guest wrote lies readable where it is not encrypted, and nowhere else.
fn lies_encrypted(lab: &Lab, least: usize) -> Result<()> {
    exec(lab, "host1", "sync")?;
    let (plain, encrypted): (Vec<_>, Vec<_>) = files(lab).into_iter().partition(|path| {
        path.file_name().is_some_and(|name| name.to_string_lossy().contains(".plain."))
    });
    lab.wait("what is not encrypted is found in its file", PATIENCE, |_| {
        plain.iter().any(|path| holds(path).is_ok_and(|found| found))
    })?;
    for path in &encrypted {
        ensure!(!holds(path)?, "{} holds what the guest wrote", path.display());
    }
    println!(
        "  nothing readable in {} files, and all of it in that which is not encrypted",
        encrypted.len()
    );
    ensure!(encrypted.len() >= least, "{encrypted:?}");
    Ok(())
}

fn counted(lab: &Driver) -> usize {
    let view = lab.ask(|client| async move { client.volume(DISK).await });
    view.map_or(0, |view| view.replicas.iter().filter(|replica| replica.counted).count())
}

fn prepare(lab: &Lab) -> Result<()> {
    for vm in [VM, CLONE, AGAIN] {
        begin_anew(lab, vm)?;
    }
    exec(lab, "host1", &format!("mkdir {POOL} {TARGET}"))?;
    exec(lab, "host1", &format!("haven pool mark {POOL}"))?;
    lab.apply(&manifest(true), &["--wait", "--timeout", "180"])?;
    lab.wait("the guest writes", PATIENCE, |_| wrote(lab, VM) > 20)?;
    let said = lab.haven(&["volume", "show", DISK])?;
    ensure!(said.contains("encrypted") && said.contains("yes"), "{said}");
    let changed = lab.apply(&manifest(false), &[]).err().context("it may become readable")?;
    ensure!(format!("{changed:#}").contains("was made encrypted, and stays so"), "{changed:#}");
    // Two replicas, two files of the shared pool of which one is the other's control.
    lies_encrypted(lab, 3)
}

/// It moves, and gets another disk, which grows, while its guest runs.
fn while_it_runs(lab: &Lab) -> Result<()> {
    let boots = lab.boots_of(VM);
    for _ in 0..2 {
        let from = lab.host_of(VM)?;
        let said = lab.haven(&["vm", "migrate", VM])?;
        println!("  {}", said.lines().last().unwrap_or_default());
        ensure!(lab.host_of(VM)? != from, "it is where it was");
        writes_on(lab, VM, 5)?;
        lab.wait("all replicas count", PATIENCE, |lab| counted(lab) == 2)?;
    }
    let begin = Instant::now();
    lab.haven(&["volume", "create", HOT, "32MiB", "--pool", "vaults", "--encrypted"])?;
    lab.haven(&["volume", "attach", HOT])?;
    lab.wait("its guest writes to it", PATIENCE, |_| lab.said_by(VM, "HOT 65536") > 0)?;
    println!(
        "  another one was attached and written to after {:.2} s",
        begin.elapsed().as_secs_f64()
    );
    lab.haven(&["volume", "resize", HOT, "48MiB"])?;
    lab.wait("its guest sees it larger", PATIENCE, |_| lab.said_by(VM, "HOT 98304") > 0)?;
    ensure!(lab.boots_of(VM) == boots, "it was started anew");
    lies_encrypted(lab, 5)?;
    lab.haven(&["volume", "detach", HOT])?;
    lab.haven(&["volume", "rm", HOT])?;
    writes_on(lab, VM, 5)
}

/// Kept while it runs, cloned, put back: all show one moment, and what is kept is as unreadable as the disk.
fn kept(lab: &Lab) -> Result<u64> {
    let (least, most) = taken(lab, VM, &["vm", "snapshot", "create", VM, "before"])?;
    lab.wait("both hosts have a copy", PATIENCE, |lab| {
        one(lab, VM, "before").is_ok_and(|of| {
            of.disks.iter().any(|disk| disk.name.as_str() == "data" && disk.copies.len() == 2)
        })
    })?;
    lies_encrypted(lab, 5)?;
    let is = |(first, second, sectors): (u64, u64, u64)| {
        println!("  written when it was taken: {least} to {most}; found: {first} and {second}");
        ensure!((least..=most).contains(&first), "the first disk is of another moment");
        ensure!(first == second || first == second + 1, "the disks are of two moments");
        ensure!(sectors == 64 << 11, "its disk has {sectors} sectors");
        Ok(())
    };
    lab.haven(&["vm", "clone", VM, CLONE, "--snapshot", "before"])?;
    lab.wait("the clone reads its disks", PATIENCE, |_| !found(lab, CLONE).is_empty())?;
    is(found(lab, CLONE)[0])?;
    lies_encrypted(lab, 7)?;
    lab.haven(&["vm", "rm", CLONE, "--wait"])?;
    writes_on(lab, VM, 20)?;
    lab.stopped(VM)?;
    put_back(lab, &["vm", "snapshot", "revert", VM, "before"])?;
    is(started(lab, VM)?)?;
    Ok(most)
}

/// The last record that its guest told since it went back to this one.
fn wrote_since(lab: &Lab, back_to: u64) -> Result<u64> {
    let host = lab.host_of(VM)?;
    let log = lab.dir.join(format!("hosts/{host}/upper/var/log/haven/vms/{VM}.console.log"));
    let last = || {
        let said = String::from_utf8_lossy(&std::fs::read(&log).ok()?).into_owned();
        let since = said.rsplit_once("HAS ").map(|(_, since)| since.to_owned())?;
        let told =
            since.lines().filter_map(|line| line.split_once("WROTE ")?.1.trim().parse().ok());
        told.max()
    };
    lab.wait("it writes again", PATIENCE, |_| last().is_some_and(|n: u64| n > back_to + 5))?;
    last().context("it told what it wrote")
}

/// Its host loses its power: it goes on elsewhere with all that it was told to be written.
fn outlives_its_host(lab: &Lab, back_to: u64) -> Result<()> {
    let before = found(lab, VM);
    let told = wrote_since(lab, back_to)?;
    let owner = lab.host_of(VM)?;
    lab.haven(&["lab", "kill", &owner])?;
    let (first, second, _) = next_found(lab, VM, before)?;
    println!(
        "  told as written before its host was lost: {told}, found afterwards: {first} and {second}"
    );
    ensure!(first >= told && second >= told, "records are lost");
    lab.haven(&["lab", "start", &owner])?;
    lab.online(&owner)?;
    lab.wait("all replicas count", PATIENCE, |lab| counted(lab) == 2)?;
    let said = lab.haven(&["volume", "check", DISK])?;
    ensure!(said.contains("all of it is the same on"), "{said}");
    lies_encrypted(lab, 3)
}

/// A backup holds what the guest sees; a VM that is made from it has it under keys of its own.
fn backed_up(lab: &Lab, back_to: u64) -> Result<()> {
    // It is not marked yet.
    let _ = lab.haven(&["backup", "target", "create", "safe", "--directory", TARGET]);
    lab.haven(&["backup", "target", "mark", "safe"])?;
    let least = wrote_since(lab, back_to)?;
    lab.haven(&["backup", "run", VM])?;
    lab.haven(&["backup", "restore", VM, "--as", AGAIN, "--timeout", "180"])?;
    lab.wait("it reads its disks", PATIENCE, |_| !found(lab, AGAIN).is_empty())?;
    let (first, second, _) = found(lab, AGAIN)[0];
    println!("  in a VM from a backup: {first} and {second}, of at least {least}");
    ensure!(first >= least && (first == second || first == second + 1), "it is of another moment");
    let said = lab.haven(&["volume", "show", &format!("{AGAIN}.data")])?;
    ensure!(said.contains("yes"), "{said}");
    lies_encrypted(lab, 6)?;
    lab.haven(&["vm", "rm", AGAIN, "--wait"])?;
    lab.haven(&["backup", "target", "rm", "safe", "--wait"]).map(drop)
}

/// Encrypted, through all of it.
pub fn lie_unreadable(lab: &mut Lab, witness: &Witness) -> Result<()> {
    witness.moves(true);
    prepare(lab)?;
    while_it_runs(lab)?;
    let back_to = kept(lab)?;
    outlives_its_host(lab, back_to)?;
    backed_up(lab, back_to)?;
    fails(lab, &["volume", "rm", DISK], "is attached to vault; nothing was removed")?;
    lab.haven(&["vm", "rm", VM, "--wait"])?;
    lab.haven(&["delete", "pool/vaults", "pool/filer", "--wait"])?;
    exec(lab, "host1", &format!("rm -r {POOL} {TARGET}"))?;
    crate::moves::alone(lab, witness)
}
