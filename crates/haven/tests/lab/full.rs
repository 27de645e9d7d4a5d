//! A mirrored pool that is full on one host: its writers stand, lose nothing, and go on when there is room, here or elsewhere.

use crate::{
    keeper::{KEEPS, largest},
    lab::{HOSTS, Lab},
    witness::Witness,
};
use anyhow::{Context, Result, ensure};
use std::time::Duration;

const VM: &str = "pressed";
const POOL: &str = "/var/lib/haven/tight";
const PATIENCE: Duration = Duration::from_secs(60);

fn exec(lab: &Lab, host: &str, script: &str) -> Result<String> {
    lab.haven(&["lab", "exec", host, "--", "sh", "-c", script])
}

fn wrote(lab: &Lab) -> u64 {
    largest(lab, VM, "KEEPER-WROTE")
}

fn writes_on(lab: &Lab) -> Result<()> {
    let then = wrote(lab);
    lab.wait("it writes on", PATIENCE, |_| wrote(lab) > then + 5)
}

fn counted(lab: &Lab) -> usize {
    let view = lab.ask(|client| async move { client.volume("pressed.data").await });
    view.ok().and_then(|view| view.volume).map_or(0, |volume| volume.counted().count())
}

/// Takes all room of the pool on a host.
fn fill(lab: &Lab, host: &str) -> Result<()> {
    exec(lab, host, &format!("dd if=/dev/zero of={POOL}/filler bs=4k 2> /dev/null; sync; true"))
        .map(drop)
}

fn empty(lab: &Lab, host: &str) -> Result<()> {
    exec(lab, host, &format!("rm {POOL}/filler")).map(drop)
}

/// It is said why it stands, and nothing is told as written.
fn stands(lab: &Lab, why: &str) -> Result<()> {
    let before = wrote(lab);
    let told = lab.wait("it is said why it stands", PATIENCE, |lab| {
        let said = lab.haven(&["explain", &format!("vm/{VM}")]);
        said.is_ok_and(|said| said.contains(why))
    });
    told.with_context(|| {
        let room = exec(
            lab,
            &lab.host_of(VM).unwrap_or_default(),
            &format!("df -B1 {POOL}; ls -ls {POOL}"),
        );
        format!("{before} records were told before that, {} after it; {room:?}", wrote(lab))
    })?;
    let then = wrote(lab);
    std::thread::sleep(Duration::from_secs(2));
    ensure!(wrote(lab) == then, "it is told that something is written, and there is no room");
    Ok(())
}

/// It was started anew for the `boots`th time and has all that it was told to be written before.
fn has_all(lab: &Lab, told: u64, boots: usize) -> Result<()> {
    lab.wait("it reads its disk anew", PATIENCE, |_| lab.said_by(VM, "KEEPER-HAS") == boots)?;
    let has = largest(lab, VM, "KEEPER-HAS");
    println!("  told as written: {told}, found on the disk afterwards: {has}");
    ensure!(has >= told, "{} records are lost", told - has);
    writes_on(lab)
}

/// It moves as it stands, to where there is no room either, and goes on once there is.
fn moves(lab: &Lab, from: &str) -> Result<()> {
    let view = lab.ask(|client| async move { client.volume("pressed.data").await })?;
    let volume = view.volume.context("it is mirrored")?;
    let to =
        volume.replicas.keys().find(|host| host.as_str() != from).context("another replica")?;
    fill(lab, from)?;
    stands(lab, "does not take what is written")?;
    fill(lab, to.as_str())?;
    lab.haven(&["host", "drain", from, "--wait", "--timeout", "90"])?;
    ensure!(lab.host_of(VM)? == to.as_str(), "it did not move");
    stands(lab, "does not take what is written")?;
    empty(lab, to.as_str())?;
    writes_on(lab)?;
    lab.wait("the full replica counts no more", PATIENCE, |_| counted(lab) == 1)?;
    ensure!(lab.boots_of(VM) == 2, "it was started anew");
    println!("  it was moved as it stood, and went on once there was room");
    empty(lab, from)?;
    lab.wait("all replicas count", PATIENCE * 2, |_| counted(lab) == 2)?;
    writes_on(lab)
}

fn has_all_after_reset(lab: &Lab, boots: usize) -> Result<()> {
    let told = wrote(lab);
    lab.haven(&["vm", "reset", VM])?;
    has_all(lab, told, boots)
}

/// It stands when its host's pool is full and goes on with room there; or moves to where there is room, as it stands.
pub fn presses(lab: &mut Lab, witness: &Witness) -> Result<()> {
    witness.moves(true);
    for host in HOSTS {
        // Small, and a file system of its own; QEMU writes past the page cache, which older kernels do not do here.
        let make = format!(
            "mkdir -p {POOL} && mount -t tmpfs -o size=24M tmpfs {POOL} && dd if=/dev/zero of={POOL}/try bs=4k count=1 oflag=direct && rm {POOL}/try"
        );
        if let Err(error) = exec(lab, host, &make) {
            println!(
                "skipped: needs a kernel whose tmpfs takes direct writes, 6.6 or newer ({error:#})"
            );
            return Ok(());
        }
    }
    let manifest = format!(
        "kind: Pool\nname: tight\ndriver: mirrored\npath: {POOL}\n---\nkind: VM\nname: {VM}\nimage: tiny\nmemory: 128MiB\ndisks:\n- name: data\n  size: 16MiB\n  pool: tight\nnetworks:\n- network: front\nuserData: {KEEPS:?}\n"
    );
    lab.apply(&manifest, &["--wait", "--timeout", "120"])?;
    lab.wait("the guest writes", PATIENCE, |_| wrote(lab) > 5)?;
    let from = lab.host_of(VM)?;
    fill(lab, &from)?;
    stands(lab, "does not take what is written")?;
    empty(lab, &from)?;
    writes_on(lab)?;
    ensure!(counted(lab) == 2 && lab.boots_of(VM) == 1, "it cost a replica, or its guest");
    println!("  it stood while its pool was full on {from}, and went on by itself");
    // Only the write that it waits for makes the replicas the same.
    fill(lab, &from)?;
    stands(lab, "does not take what is written")?;
    let told = wrote(lab);
    lab.haven(&["vm", "reset", VM])?;
    stands(lab, "it is reset once its disk takes what it waits to write")?;
    empty(lab, &from)?;
    has_all(lab, told, 2)?;
    ensure!(counted(lab) == 2, "a replica was left out");
    println!("  its reset waited for its disk");
    moves(lab, &from)?;
    has_all_after_reset(lab, 3)?;
    lab.haven(&["host", "undrain", &from])?;
    lab.haven(&["delete", &format!("vm/{VM}"), "--wait"])?;
    lab.haven(&["delete", "pool/tight", "--wait"])?;
    for host in HOSTS {
        lab.wait("nothing holds the pool", PATIENCE, |_| {
            exec(lab, host, &format!("umount {POOL}")).is_ok()
        })?;
    }
    crate::moves::alone(lab, witness)
}
