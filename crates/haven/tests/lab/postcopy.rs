//! A guest that writes its memory faster than it can be copied moves all the same: it goes over, and its memory follows.
//! Whatever breaks meanwhile, one copy of it runs afterwards.

use crate::{
    lab::{HOSTS, Lab, other},
    witness::Witness,
};
use anyhow::{Result, bail, ensure};
use haven_model::{MigrationPhase, api::MigrationView};
use nix::sys::signal::Signal;
use std::{
    path::Path,
    time::{Duration, Instant},
};

const VM: &str = "writer";
/// Fills a file from another one, over and over: about 100 MiB of memory in each round.
const WRITES: &str = "#!/bin/busybox sh\ni=0; while [ $i -lt 60 ]; do cat /bin/busybox; i=$((i+1)); done > /all\necho WRITER-READY > /dev/console\nwhile :; do dd if=/all of=/copy bs=1M conv=notrunc 2> /dev/null; done\n";
/// Until it has filled the first file, on two cores that emulate it.
const FILLED: Duration = Duration::from_secs(90);

fn view(lab: &Lab) -> Result<MigrationView> {
    lab.ask(|client| async move { client.migration(VM).await })
}

fn processes(lab: &Lab) -> usize {
    HOSTS.into_iter().map(|host| lab.pids(host, &format!("guest={VM}")).len()).sum()
}

/// How often it has told that it writes, anywhere.
fn ready(lab: &Lab) -> usize {
    lab.said_by(VM, "WRITER-READY")
}

struct Fault {
    what: &'static str,
    does: fn(&Lab, &str, &str) -> Result<()>,
    /// The guest is lost with it, and starts anew.
    costs_a_restart: bool,
}

const FAULTS: [Fault; 4] = [
    Fault {
        what: "the wire between the two is cut for 3 s",
        does: |lab, from, to| {
            lab.haven(&["lab", "cut", from, "--from", to])?;
            std::thread::sleep(Duration::from_secs(3));
            lab.haven(&["lab", "heal"]).map(|_| ())
        },
        costs_a_restart: false,
    },
    Fault {
        what: "the process that sends the memory is killed",
        does: |lab, from, _| lab.signal(from, "guest=writer", Signal::SIGKILL).map(|_| ()),
        costs_a_restart: true,
    },
    Fault {
        what: "the daemon of the new host is killed",
        does: |lab, _, to| lab.signal(to, "haven daemon", Signal::SIGKILL).map(|_| ()),
        costs_a_restart: true,
    },
    Fault {
        what: "the old host loses its power",
        does: |lab, from, _| {
            lab.haven(&["lab", "kill", from])?;
            std::thread::sleep(Duration::from_secs(7));
            lab.haven(&["lab", "start", from]).map(|_| ())
        },
        costs_a_restart: true,
    },
];

/// Moves it, and breaks that once its memory follows.
pub fn follows(lab: &mut Lab, witness: &Witness) -> Result<()> {
    if !Path::new("/dev/userfaultfd").exists() {
        println!("skipped: needs /dev/userfaultfd (Linux 6.1 or newer, built with userfaultfd)");
        return Ok(());
    }
    witness.moves(true);
    let manifest = format!(
        "kind: VM\nname: {VM}\nimage: tiny\nmemory: 1GiB\nnetworks:\n- network: front\nmigration:\n  downtime: 1ms\nuserData: {WRITES:?}\n"
    );
    lab.apply(&manifest, &["--wait", "--timeout", "120"])?;
    lab.wait("the guest writes", FILLED, |_| ready(lab) == 1)?;
    let from = lab.host_of(VM)?;
    let said = lab.haven(&["vm", "migrate", VM, "--to", other(&from), "--postcopy"])?;
    println!("  {}", said.lines().last().unwrap_or_default());
    ensure!(said.contains("its memory followed it"), "nothing followed: {said}");
    ensure!(lab.host_of(VM)? == other(&from) && lab.boots_of(VM) == 1, "it was started anew");
    for fault in &FAULTS {
        broken(lab, witness, fault)?;
    }
    lab.haven(&["delete", &format!("vm/{VM}"), "--wait"])?;
    crate::moves::alone(lab, witness)
}

fn broken(lab: &Lab, witness: &Witness, fault: &Fault) -> Result<()> {
    let (from, boots, told) = (lab.host_of(VM)?, lab.boots_of(VM), ready(lab));
    let to = other(&from);
    lab.haven(&["vm", "migrate", VM, "--to", to, "--postcopy", "--no-wait"])?;
    let begin = Instant::now();
    loop {
        let view = view(lab)?;
        if view.source.is_some_and(|told| told.phase == MigrationPhase::Following) {
            break;
        }
        if let Some(outcome) = view.migration.and_then(|migration| migration.outcome) {
            bail!("it was over before its memory was seen to follow: {}", outcome.message);
        }
        ensure!(begin.elapsed() < Duration::from_secs(60), "it does not go over within 60 s");
    }
    (fault.does)(lab, &from, to)?;
    println!(
        "  {}, {:.2} s after the move was asked for",
        fault.what,
        begin.elapsed().as_secs_f64()
    );
    lab.all_well(witness)?;
    lab.wait("the move has ended", Duration::from_secs(60), |_| {
        view(lab).is_ok_and(|view| view.migration.is_some_and(|m| m.outcome.is_some()))
    })?;
    let outcome = view(lab)?.migration.and_then(|migration| migration.outcome);
    println!("  {}", outcome.map(|outcome| outcome.message).unwrap_or_default());
    lab.wait("one process is left", Duration::from_secs(20), |_| processes(lab) == 1)?;
    if fault.costs_a_restart {
        lab.wait("it has started anew", FILLED, |_| ready(lab) > told)?;
    } else {
        ensure!(lab.boots_of(VM) == boots, "it was started anew");
    }
    ensure!(lab.host_of(VM)? == to, "it is not where it went");
    witness.verdict()
}
