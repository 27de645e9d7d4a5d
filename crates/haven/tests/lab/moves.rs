//! Guests that move while they run: nothing is lost on a quiet day, and exactly one copy runs afterwards whatever dies.

use crate::{
    lab::{Lab, other},
    witness::Witness,
};
use anyhow::{Result, bail};
use haven_lab::asking::{Asking, STEADILY, failures};
use nix::sys::signal::Signal;
use std::time::{Duration, Instant};

/// One member behind an address: what it does not answer, nobody does.
const SINGLE: &str = "kind: Service\nname: single\nreplicas: 1\ntemplate:\n  spec:\n    image: tiny\n    memory: 128MiB\n    networks:\n    - network: front\ncheck:\n  mode: http\n  port: 80\nfrontend:\n  address: 10.88.0.102\n  port: 80\n  mode: http\n";

/// A guest goes round: it counts on, no count is lost or told twice, and its service answers every question.
pub fn live(lab: &mut Lab, witness: &Witness) -> Result<()> {
    lab.apply(SINGLE, &["--wait", "--timeout", "120"])?;
    witness.moves(true);
    let before = witness.newest()["tick-1"].clone();
    let asking = Asking::start(lab, "10.88.0.102:80", STEADILY)?;
    for _ in 0..3 {
        for vm in ["tick-1", "single-1"] {
            let from = lab.host_of(vm)?;
            let to = other(&from);
            let said = lab.haven(&["vm", "migrate", vm, "--to", to])?;
            println!("  {}", said.lines().last().unwrap_or_default());
            if lab.host_of(vm)? != to {
                bail!("{vm} did not move to {to}: {said}");
            }
        }
    }
    std::thread::sleep(Duration::from_secs(2));
    let asked = asking.end()?;
    let bad = asked.iter().filter(|a| !a.good).count();
    println!("  {} questions while it moved three times, {bad} failed", asked.len());
    if bad > 0 {
        bail!("a move under load lost questions: {}", failures(&asked));
    }
    let after = witness.newest()["tick-1"].clone();
    if after.boot != before.boot {
        bail!("tick-1 was started anew instead of moved");
    }
    if witness.places("tick-1") != 4 {
        bail!(
            "tick-1 should have counted on four places one after another, and it did on {}",
            witness.places("tick-1")
        );
    }
    lab.haven(&["delete", "service/single", "--wait"])?;
    alone(lab, witness)
}

/// After a while there is one process for each VM.
pub fn alone(lab: &Lab, witness: &Witness) -> Result<()> {
    lab.wait("each VM has one process", Duration::from_secs(20), |_| witness.running() == 2)?;
    witness.moves(false);
    Ok(())
}

/// What is done to a move that is under way, and how it is mended.
struct Fault {
    what: &'static str,
    does: fn(&Lab, &str, &str) -> Result<()>,
    mends: fn(&Lab, &str, &str) -> Result<()>,
}

fn nothing(_: &Lab, _: &str, _: &str) -> Result<()> {
    Ok(())
}

const FAULTS: [Fault; 6] = [
    Fault {
        what: "the daemon of the old host is killed",
        does: |lab, from, _| lab.signal(from, "haven daemon", Signal::SIGKILL).map(|_| ()),
        mends: nothing,
    },
    Fault {
        what: "the daemon of the new host is killed",
        does: |lab, _, to| lab.signal(to, "haven daemon", Signal::SIGKILL).map(|_| ()),
        mends: nothing,
    },
    Fault {
        what: "the process that takes the guest is killed",
        does: |lab, _, to| {
            lab.signal(to, "guest=tick-1", Signal::SIGKILL).map(|_| ()).or_else(|_| Ok(()))
        },
        mends: nothing,
    },
    Fault {
        what: "the wire between the two is cut",
        does: |lab, from, to| lab.haven(&["lab", "cut", from, "--from", to]).map(|_| ()),
        mends: |lab, _, _| lab.haven(&["lab", "heal"]).map(|_| ()),
    },
    Fault {
        what: "the new host loses its power",
        does: |lab, _, to| lab.haven(&["lab", "kill", to]).map(|_| ()),
        mends: |lab, _, to| lab.haven(&["lab", "start", to]).map(|_| ()),
    },
    Fault {
        what: "the old host loses its power",
        does: |lab, from, _| lab.haven(&["lab", "kill", from]).map(|_| ()),
        mends: |lab, from, _| lab.haven(&["lab", "start", from]).map(|_| ()),
    },
];

/// The six nastiest, each in the middle of a move.
pub fn broken(lab: &mut Lab, witness: &Witness) -> Result<()> {
    for fault in &FAULTS {
        witness.moves(true);
        let from = lab.host_of("tick-1")?;
        let to = other(&from);
        lab.haven(&["vm", "migrate", "tick-1", "--to", to, "--no-wait"])?;
        let begin = Instant::now();
        // The new host's process is there: the copy is about to begin, or under way.
        lab.wait("the other host makes ready", Duration::from_secs(20), |lab| {
            !lab.pids(to, "guest=tick-1").is_empty()
        })?;
        (fault.does)(lab, &from, to)?;
        println!(
            "  {} {:.2} s after the move was asked for",
            fault.what,
            begin.elapsed().as_secs_f64()
        );
        std::thread::sleep(Duration::from_secs(7));
        (fault.mends)(lab, &from, to)?;
        lab.all_well(witness)?;
        lab.wait("the move has ended", Duration::from_secs(60), |lab| {
            let shown = lab.haven(&["get", "vm/tick-1", "-o", "json"]).unwrap_or_default();
            !shown.is_empty() && lab.haven(&["vm", "migrate", "tick-1", "--cancel"]).is_err()
        })?;
        alone(lab, witness)?;
        witness.verdict()?;
        println!("  afterwards it runs on {}", lab.host_of("tick-1")?);
    }
    Ok(())
}
