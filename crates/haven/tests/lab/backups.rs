//! VMs kept outside the cluster: backed up while their guests write, made again, and whatever is interrupted or damaged
//! leaves the others usable.

use crate::{
    keeper::{KEEPS, largest},
    lab::Lab,
    witness::Witness,
};
use anyhow::{Context, Result, ensure};
use haven_lab::drive::Driver;
use haven_model::{
    Bytes,
    backup::{Backup, BackupRun, Moment},
};
use nix::sys::signal::Signal;
use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

const VM: &str = "kept";
const TARGET: &str = "nas";
const PLACE: &str = "/srv/shared/backups";
const PATIENCE: Duration = Duration::from_secs(90);
/// What the second disk holds that is not the guest's to write, bytes.
const LOAD: u64 = 96 << 20;

fn exec(lab: &Lab, host: &str, script: &str) -> Result<String> {
    lab.haven(&["lab", "exec", host, "--", "sh", "-c", script])
}

fn wrote(lab: &Lab, vm: &str) -> u64 {
    largest(lab, vm, "KEEPER-WROTE")
}

fn writes_on(lab: &Lab, vm: &str) -> Result<()> {
    let then = wrote(lab, vm);
    lab.wait("it writes on", PATIENCE, |_| wrote(lab, vm) > then + 5)
}

fn started(lab: &Lab) -> Result<()> {
    lab.haven(&["vm", "start", VM])?;
    lab.becomes(VM, "ready")
}

/// The backups of the VM, older ones first.
fn held(lab: &Driver) -> Result<Vec<Backup>> {
    let list = lab.ask(|client| async move { client.target_backups(TARGET, Some(VM)).await })?;
    ensure!(list.unreadable.is_empty(), "{:?}", list.unreadable);
    Ok(list.backups)
}

fn run(lab: &Driver) -> Result<BackupRun> {
    let view = lab.ask(|client| async move { client.backup(VM).await })?;
    view.run.context("it was backed up")
}

/// Backs it up, and gives what came of it.
fn backed_up(lab: &Lab) -> Result<Backup> {
    let said = lab.haven(&["backup", "run", VM])?;
    println!("  {}", said.trim());
    held(lab)?.pop().context("there is a backup")
}

fn sum(backup: &Backup, of: fn(&haven_model::backup::BackupDisk) -> Bytes) -> u64 {
    backup.disks.iter().map(|disk| of(disk).0).sum()
}

/// Makes a VM from a backup; it has at least what was told as written before that.
fn made_again(lab: &Lab, id: Option<&str>, name: &str, least: u64) -> Result<()> {
    let begin = Instant::now();
    let mut args = vec!["backup", "restore", VM];
    args.extend(id);
    args.extend(["--as", name, "--timeout", "120"]);
    lab.haven(&args)?;
    lab.wait("it reads its disk", PATIENCE, |_| lab.said_by(name, "KEEPER-HAS") > 0)?;
    let has = largest(lab, name, "KEEPER-HAS");
    println!(
        "  told as written before: {least}, found in {name}: {has}, after {:.1} s",
        begin.elapsed().as_secs_f64()
    );
    ensure!(has >= least, "{} records are lost", least - has);
    writes_on(lab, name)?;
    lab.haven(&["vm", "rm", name, "--wait"]).map(drop)
}

/// A file of a chunk in the target, the largest.
fn chunk(lab: &Lab) -> Result<PathBuf> {
    let mut all = Vec::new();
    for folder in std::fs::read_dir(lab.dir.join("shared/backups/chunks"))? {
        for entry in std::fs::read_dir(folder?.path())? {
            let entry = entry?;
            all.push((entry.metadata()?.len(), entry.path()));
        }
    }
    all.sort();
    all.pop().map(|(_, path)| path).context("there is a chunk")
}

fn fails(lab: &Lab, args: &[&str], says: &str) -> Result<()> {
    let said = lab.haven(args).err().with_context(|| format!("{args:?} is refused"))?;
    let said = format!("{said:#}");
    ensure!(said.contains(says), "{args:?} does not say `{says}`, but: {said}");
    Ok(())
}

/// The target, the pools and the VM, with a disk on two hosts and one on its own.
fn prepare(lab: &Lab) -> Result<()> {
    fails(lab, &["backup", "target", "create", TARGET, "--directory", PLACE], "backups")?;
    exec(lab, "host1", &format!("mkdir {PLACE} && touch {PLACE}/somebody"))?;
    fails(lab, &["backup", "target", "mark", TARGET], "holds something else already")?;
    exec(lab, "host1", &format!("rm {PLACE}/somebody"))?;
    lab.haven(&["backup", "target", "mark", TARGET])?;
    let bulk = lab.dir.join("bulk.raw");
    let noise = std::process::Command::new("head")
        .args(["-c", &LOAD.to_string(), "/dev/urandom"])
        .output()?;
    std::fs::write(&bulk, noise.stdout)?;
    let path = bulk.display().to_string();
    lab.haven(&["image", "import", "bulk", &path])?;
    std::fs::remove_file(&bulk)?;
    let manifest = format!(
        "kind: Pool\nname: mirrored\ndriver: mirrored\npath: /var/lib/haven/mirrored\n---\nkind: VM\nname: {VM}\nimage: tiny\nmemory: 128MiB\ndisks:\n- name: data\n  size: 64MiB\n  pool: mirrored\n- name: bulk\n  size: 128MiB\n  pool: mirrored\n  image: bulk\nnetworks:\n- network: front\nuserData: {KEEPS:?}\n"
    );
    lab.apply(&manifest, &["--wait", "--timeout", "120"])?;
    lab.wait("the guest writes", PATIENCE, |_| wrote(lab, VM) > 20)
}

/// Whole, then what changed since; what it had said to be written is in what is made of it.
fn while_it_runs(lab: &Lab) -> Result<()> {
    let told = wrote(lab, VM);
    let whole = backed_up(lab)?;
    ensure!(whole.moment == Moment::Running && whole.by != "schedule", "{whole:?}");
    ensure!(sum(&whole, |disk| disk.read) >= LOAD, "{whole:?}");
    writes_on(lab, VM)?;
    let more = wrote(lab, VM);
    let next = backed_up(lab)?;
    let read = sum(&next, |disk| disk.read);
    ensure!(read > 0 && read <= 16 << 20, "{read} bytes were read, and little has changed");
    ensure!(lab.boots_of(VM) == 1, "it was started anew");
    made_again(lab, Some(&whole.id), "once", told)?;
    made_again(lab, None, "again", more)
}

/// It is killed in the middle, moved, ended, and its host loses its power; what was there before is there.
fn interrupted(lab: &Lab) -> Result<()> {
    let before = held(lab)?.len();
    // So much is to be read anew that there is time for all this: a guest that starts anew has no marks.
    lab.stopped(VM)?;
    started(lab)?;
    writes_on(lab, VM)?;
    lab.haven(&["backup", "run", VM, "--no-wait"])?;
    fails(lab, &["backup", "run", VM], "is being backed up to nas already")?;
    lab.haven(&["backup", "run", VM, "--cancel"])?;
    ensure!(run(lab)?.outcome.is_some_and(|end| !end.well), "it goes on");
    writes_on(lab, VM)?;
    ensure!(held(lab)?.len() == before, "what was ended is listed");

    lab.haven(&["backup", "run", VM, "--no-wait"])?;
    lab.haven(&["vm", "migrate", VM])?;
    ended_well(lab, "it begins anew where its guest is")?;
    ensure!(held(lab)?.len() == before + 1, "it is not listed");
    let host = lab.host_of(VM)?;
    lab.haven(&["backup", "run", VM, "--no-wait"])?;
    lab.signal(&host, "haven daemon", Signal::SIGKILL)?;
    ended_well(lab, "its host's next daemon makes it")?;
    writes_on(lab, VM)?;

    let told = wrote(lab, VM);
    lab.haven(&["backup", "run", VM, "--no-wait"])?;
    lab.haven(&["lab", "kill", &host])?;
    ended_well(lab, "the next host makes it")?;
    ensure!(lab.host_of(VM)? != host, "it is where it was");
    lab.haven(&["lab", "start", &host])?;
    made_again(lab, None, "after", told)
}

fn ended_well(lab: &Lab, what: &str) -> Result<()> {
    lab.wait(what, PATIENCE, |lab| run(lab).is_ok_and(|run| run.outcome.is_some()))?;
    let outcome = run(lab)?.outcome.context("it has ended")?;
    println!("  {what}: {}", outcome.message);
    ensure!(outcome.well, "it failed: {}", outcome.message);
    Ok(())
}

/// One of a VM that does not run; a flipped bit is found, refused, and made good by the next backup.
fn damaged(lab: &Lab) -> Result<()> {
    lab.stopped(VM)?;
    let told = wrote(lab, VM);
    let stopped = backed_up(lab)?;
    ensure!(stopped.moment == Moment::Stopped, "{stopped:?}");
    let said = lab.haven(&["backup", "verify"])?;
    ensure!(said.contains("are whole"), "{said}");
    let path = chunk(lab)?;
    let mut stored = std::fs::read(&path)?;
    stored[1000] ^= 1;
    std::fs::write(&path, stored)?;
    let name = path.file_name().context("it has a name")?.to_string_lossy().into_owned();
    fails(lab, &["backup", "verify"], "are damaged")?;
    lab.haven(&["backup", "restore", VM, "--as", "spoilt", "--no-wait"])?;
    lab.wait("it is said why it cannot be made", PATIENCE, |lab| {
        let said = lab.haven(&["explain", "vm/spoilt"]);
        said.is_ok_and(|said| said.contains(&name))
    })?;
    lab.haven(&["vm", "rm", "spoilt", "--wait"])?;
    // What is on the disk yet makes all of them whole again.
    backed_up(lab)?;
    let said = lab.haven(&["backup", "verify"])?;
    ensure!(said.contains("are whole"), "{said}");
    started(lab)?;
    made_again(lab, Some(&stopped.id), "well", told)
}

/// By itself, to where it is kept, and removed once it is too old.
fn by_itself(lab: &Lab) -> Result<()> {
    let object = lab.haven(&["get", &format!("vm/{VM}"), "-o", "yaml"])?;
    let manifest = format!("{object}\nbackup:\n  to: {TARGET}\n  every: 1m\n  keep: 1s\n");
    lab.apply(&manifest, &[])?;
    lab.wait("it is backed up by itself", PATIENCE, |lab| {
        let run = run(lab);
        run.is_ok_and(|run| run.by == "schedule" && run.outcome.is_some())
    })?;
    let end = run(lab)?.outcome.context("it has ended")?;
    println!("  by itself: {}", end.message);
    ensure!(end.well, "{end:?}");
    lab.wait("those that are too old are removed", PATIENCE, |lab| {
        held(lab).is_ok_and(|held| held.len() == 1)
    })?;
    lab.haven(&["vm", "rm", VM, "--wait"])?;
    lab.haven(&["backup", "restore", VM, "--timeout", "120"])?;
    lab.wait("it is itself again", PATIENCE, |_| lab.said_by(VM, "KEEPER-HAS") > 0)?;
    println!("  a VM that was deleted is made again under its own name");
    Ok(())
}

/// Backed up whatever happens, and made again.
pub fn kept(lab: &mut Lab, witness: &Witness) -> Result<()> {
    witness.moves(true);
    prepare(lab)?;
    while_it_runs(lab)?;
    interrupted(lab)?;
    damaged(lab)?;
    by_itself(lab)?;
    lab.haven(&["vm", "rm", VM, "--wait"])?;
    lab.haven(&["backup", "target", "rm", TARGET, "--wait"])?;
    exec(lab, "host1", &format!("rm -r {PLACE}")).map(drop)
}
