//! A guest whose disk only its host has moves live, and takes it along: all that it was told to be written is there.

use crate::{
    keeper::{KEEPS, largest},
    lab::{Lab, other},
    witness::Witness,
};
use anyhow::{Context, Result, ensure};
use haven_model::MigrationPhase;
use nix::sys::signal::Signal;
use std::time::{Duration, Instant};

const VM: &str = "keeper";
const PATIENCE: Duration = Duration::from_secs(90);

fn files(lab: &Lab, host: &str) -> usize {
    let pool = lab.dir.join(format!("hosts/{host}/upper/var/lib/haven/keeps"));
    let all = std::fs::read_dir(pool).into_iter().flatten().flatten();
    all.filter(|file| file.file_name().to_string_lossy().ends_with(".qcow2")).count()
}

/// It moves round, is then started anew, and has all that it had written; a move that breaks costs it nothing.
pub fn go_along(lab: &mut Lab, witness: &Witness) -> Result<()> {
    witness.moves(true);
    let manifest = format!(
        "kind: Pool\nname: keeps\ndriver: local\npath: /var/lib/haven/keeps\n---\nkind: VM\nname: {VM}\nimage: tiny\nmemory: 128MiB\ndisks:\n- name: data\n  size: 64MiB\n  pool: keeps\nnetworks:\n- network: front\nuserData: {KEEPS:?}\n"
    );
    lab.apply(&manifest, &["--wait", "--timeout", "120"])?;
    lab.wait("the guest writes", PATIENCE, |_| largest(lab, VM, "KEEPER-WROTE") > 20)?;
    for _ in 0..2 {
        let from = lab.host_of(VM)?;
        let to = other(&from);
        let begin = Instant::now();
        let said = lab.haven(&["vm", "migrate", VM, "--to", to])?;
        println!(
            "  {} ({:.1} s)",
            said.lines().last().unwrap_or_default(),
            begin.elapsed().as_secs_f64()
        );
        ensure!(lab.host_of(VM)? == to && lab.boots_of(VM) == 1, "it was started anew");
        lab.wait("its old host has nothing of it", Duration::from_secs(20), |_| {
            files(lab, &from) == 0
        })?;
        let then = largest(lab, VM, "KEEPER-WROTE");
        lab.wait("it writes on", PATIENCE, |_| largest(lab, VM, "KEEPER-WROTE") > then + 5)?;
    }
    broken(lab)?;
    // What its new disk has, and not what its memory remembers.
    let wrote = largest(lab, VM, "KEEPER-WROTE");
    lab.haven(&["vm", "reset", VM])?;
    lab.wait("it starts anew", PATIENCE, |_| lab.said_by(VM, "KEEPER-HAS") == 2)?;
    let has = largest(lab, VM, "KEEPER-HAS");
    println!("  told as written before: {wrote}, found on the disk afterwards: {has}");
    ensure!(has >= wrote, "{} records are lost", wrote - has);
    drained(lab)?;
    lab.haven(&["delete", &format!("vm/{VM}"), "--wait"])?;
    lab.haven(&["delete", "pool/keeps", "--wait"])?;
    crate::moves::alone(lab, witness)
}

/// The process that takes it is killed while its disk is on its way.
fn broken(lab: &Lab) -> Result<()> {
    let (from, boots) = (lab.host_of(VM)?, lab.boots_of(VM));
    let to = other(&from);
    lab.haven(&["vm", "migrate", VM, "--to", to, "--no-wait"])?;
    let view = |lab: &Lab| lab.ask(|client| async move { client.migration(VM).await });
    lab.wait("the copy begins", Duration::from_secs(20), |_| {
        let copies = |phase| phase >= MigrationPhase::Copying;
        view(lab).is_ok_and(|view| view.source.is_some_and(|told| copies(told.phase)))
    })?;
    lab.signal(to, "guest=keeper", Signal::SIGKILL)?;
    lab.wait("the move has ended", Duration::from_secs(60), |_| {
        view(lab).is_ok_and(|view| view.migration.is_some_and(|m| m.outcome.is_some()))
    })?;
    let outcome = view(lab)?.migration.and_then(|m| m.outcome).context("it has an outcome")?;
    println!("  {}", outcome.message);
    if !outcome.moved {
        ensure!(lab.host_of(VM)? == from && lab.boots_of(VM) == boots, "it was started anew");
    }
    let then = largest(lab, VM, "KEEPER-WROTE");
    lab.wait("it writes on", PATIENCE, |_| largest(lab, VM, "KEEPER-WROTE") > then + 5)?;
    let other = if lab.host_of(VM)? == from { to } else { &from };
    lab.wait("one host has its disk", Duration::from_secs(20), |_| files(lab, other) == 0)
}

/// A drain takes it along, too.
fn drained(lab: &Lab) -> Result<()> {
    let (from, boots) = (lab.host_of(VM)?, lab.boots_of(VM));
    lab.haven(&["host", "drain", &from, "--wait", "--timeout", "120"])?;
    ensure!(lab.host_of(VM)? != from && lab.boots_of(VM) == boots, "it was started anew");
    lab.haven(&["host", "undrain", &from]).map(|_| ())
}
