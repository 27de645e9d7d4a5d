//! A guest writes to two disks, one that only its host has and one that all hosts have; VMs that are made of it while it runs, at
//! rest and from a snapshot find one moment of both, are guests of their own, and it runs on as if nothing had been.

use crate::{keeper::largest, lab::Lab, witness::Witness};
use anyhow::{Context, Result, ensure};
use haven_model::{Name, ObjectRef, object::Kind};
use nix::sys::signal::Signal;
use std::time::{Duration, Instant};

const VM: &str = "first";
const PATIENCE: Duration = Duration::from_secs(90);
const POOL: &str = "/srv/shared/clones";

/// Writes each record to its first disk, then to its second, and tells it once both have it; and what its image holds.
const WRITES: &str = r#"#!/bin/busybox sh
count() {
  dd if=$1 bs=512 skip=1 count=4000 2> /dev/null | busybox tr -d '\000' | busybox fold -w 8 |
    busybox awk '$1 + 0 != NR { exit } { n = NR } END { print n + 0 }'
}
marked() { dd if=$1 bs=512 skip=6000 count=1 2> /dev/null | busybox tr -d '\000'; }
i=$(count /dev/vda)
echo "HAS $i AND $(count /dev/vdb) OF $(marked /dev/vda) $(marked /dev/vdb) AS $(hostname)" > /dev/console
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

fn exec(lab: &Lab, host: &str, script: &str) -> Result<String> {
    lab.haven(&["lab", "exec", host, "--", "sh", "-c", script])
}

fn fails(lab: &Lab, args: &[&str], says: &str) -> Result<()> {
    let said = lab.haven(args).err().with_context(|| format!("{args:?} is refused"))?;
    let said = format!("{said:#}");
    ensure!(said.contains(says), "{args:?} does not say `{says}`, but: {said}");
    Ok(())
}

fn wrote(lab: &Lab, vm: &str) -> u64 {
    largest(lab, vm, "WROTE")
}

fn writes_on(lab: &Lab, vm: &str, by: u64) -> Result<()> {
    let then = wrote(lab, vm);
    lab.wait(&format!("{vm} writes on"), PATIENCE, |_| wrote(lab, vm) > then + by)
}

/// What a guest found when it booted: on its first disk and on its second. It knows its own name, and has all of its image.
fn found(lab: &Lab, vm: &str) -> Result<(u64, u64)> {
    let told = || {
        let said = lab.all_said_by(vm);
        said.lines().find_map(|line| Some(line.split_once("HAS ")?.1.trim().to_owned()))
    };
    lab.wait(&format!("{vm} reads its disks"), PATIENCE, |_| told().is_some())?;
    let told = told().context("it told what it found")?;
    let words: Vec<&str> = told.split_whitespace().collect();
    let [one, "AND", two, "OF", "MARKED", "MARKED", "AS", name] = words.as_slice() else {
        anyhow::bail!("{vm} found: {told}");
    };
    ensure!(*name == vm, "{vm} takes itself for {name}");
    Ok((one.parse()?, two.parse()?))
}

fn prepare(lab: &Lab) -> Result<()> {
    exec(lab, "host1", &format!("mkdir {POOL} && haven pool mark {POOL}"))?;
    let mut image = vec![0; 4 << 20];
    image[6000 * 512..][..6].copy_from_slice(b"MARKED");
    let file = lab.dir.join("clones.img");
    std::fs::write(&file, image)?;
    lab.haven(&["image", "import", "marked", &file.display().to_string()])?;
    let disk = |name: &str, pool: &str| {
        format!("- name: {name}\n  size: 64MiB\n  pool: {pool}\n  image: marked\n")
    };
    let manifest = format!(
        "kind: Pool\nname: scratch\ndriver: local\npath: /var/lib/haven/scratch\n---\nkind: Pool\nname: filer\ndriver: shared\npath: {POOL}\n---\nkind: VM\nname: {VM}\nimage: tiny\nmemory: 128MiB\ndisks:\n{}{}networks:\n- network: front\nuserData: {WRITES:?}\n",
        disk("data", "filer"),
        disk("own", "scratch"),
    );
    lab.apply(&manifest, &["--wait", "--timeout", "120"])?;
    lab.wait("the guest writes", PATIENCE, |_| wrote(lab, VM) > 20)
}

/// The snapshots of the source: what each is called.
fn kept(lab: &Lab) -> Result<Vec<String>> {
    let all = lab.ask(|client| async move { client.snapshots(VM).await })?;
    Ok(all.iter().map(|view| view.name.to_string()).collect())
}

/// Makes a VM of the source: what it found.
fn clone(lab: &Lab, name: &str, args: &[&str]) -> Result<(u64, u64)> {
    let begin = Instant::now();
    lab.haven(&[&["vm", "clone", VM, name, "--timeout", "120"], args].concat())?;
    let found = found(lab, name)?;
    println!("  {name} runs and found {found:?} after {:.2} s", begin.elapsed().as_secs_f64());
    Ok(found)
}

fn gone(lab: &Lab, vm: &str) -> Result<()> {
    lab.haven(&["vm", "rm", vm, "--wait"]).map(drop)
}

/// Made while the source writes: one moment of both disks, and from then on two guests that know nothing of each other.
fn of_one_that_runs(lab: &Lab) -> Result<()> {
    let (boots, least) = (lab.boots_of(VM), wrote(lab, VM));
    let (one, two) = clone(lab, "second", &[])?;
    let most = wrote(lab, VM) + 1;
    ensure!((least..=most).contains(&one), "it is of another moment: {least} to {most}");
    ensure!(one == two || one == two + 1, "its disks are of two moments");
    fails(lab, &["vm", "clone", VM, "second"], "there is a VM `second` already")?;
    writes_on(lab, VM, 20)?;
    writes_on(lab, "second", 20)?;
    ensure!(lab.boots_of(VM) == boots, "the source was started anew");
    ensure!(lab.host_of(VM)? == lab.host_of("second")?, "it was made on another host");
    lab.wait("nothing is kept any more for it", PATIENCE, |lab| {
        lab.ask(|client| async move { client.snapshots(VM).await }).is_ok_and(|all| all.is_empty())
    })?;
    // By address and in the store, too.
    let of = |vm: &str| lab.haven(&["get", &format!("vm/{vm}"), "-o", "yaml"]);
    ensure!(!of("second")?.contains("copyOf"), "{}", of("second")?);
    gone(lab, "second")
}

/// Of what it was, of one that rests, and by a daemon that was killed meanwhile.
fn of_what_is_kept(lab: &Lab) -> Result<()> {
    let (least, host) = (wrote(lab, VM), lab.host_of(VM)?);
    lab.haven(&["vm", "snapshot", "create", VM, "before"])?;
    let most = wrote(lab, VM) + 1;
    writes_on(lab, VM, 20)?;
    lab.haven(&["vm", "clone", VM, "third", "--snapshot", "before", "--no-wait"])?;
    fails(lab, &["vm", "rm", VM], "third is being made from it")?;
    lab.signal(&host, "haven daemon", Signal::SIGKILL)?;
    let (one, two) = found(lab, "third")?;
    println!("  third, whose host's daemon was killed, found {one} and {two} ({least} to {most})");
    ensure!((least..=most).contains(&one) && (one == two || one == two + 1), "{one} {two}");
    ensure!(kept(lab)? == ["before"], "{:?}", kept(lab)?);
    lab.online(&host)?;
    gone(lab, "third")?;
    lab.haven(&["vm", "stop", VM])?;
    let named = ObjectRef::new(Kind::Vm, Name::new(VM)?);
    lab.wait("it is stopped", PATIENCE, |lab| {
        let item = lab.ask(|client| {
            let named = named.clone();
            async move { client.object(&named).await }
        });
        item.is_ok_and(|item| item.state == "stopped")
    })?;
    let is = wrote(lab, VM);
    let (one, two) = clone(lab, "fourth", &[])?;
    ensure!(one >= is && one <= is + 1 && (one == two || one == two + 1), "{is}: {one} {two}");
    lab.haven(&["vm", "snapshot", "rm", VM, "before"])?;
    // Its source is deleted, and it has all that it needs.
    gone(lab, VM)?;
    writes_on(lab, "fourth", 20)
}

/// All of it.
pub fn are_vms_of_their_own(lab: &mut Lab, witness: &Witness) -> Result<()> {
    witness.moves(true);
    prepare(lab)?;
    of_one_that_runs(lab)?;
    of_what_is_kept(lab)?;
    // One master of the image, on which the disks of that pool stand.
    let masters = exec(lab, "host1", &format!("ls {POOL}/.masters"))?;
    ensure!(masters.trim().lines().count() == 1 && masters.contains(".qcow2"), "{masters}");
    gone(lab, "fourth")?;
    let left = exec(lab, "host1", &format!("ls {POOL}"))?;
    ensure!(left.trim().is_empty(), "its disks are still there: {left}");
    lab.haven(&["delete", "image/marked", "pool/scratch", "pool/filer", "--wait"])?;
    exec(lab, "host1", &format!("rm -r {POOL}")).map(drop)
}
