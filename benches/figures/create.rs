//! `haven vm create` until QEMU runs, beside starting that QEMU by hand.
//!
//! By hand: Haven's own command line without what belongs to the one VM that runs already (its sockets, descriptors,
//! devices and user), in the same host, from the command until its monitor says that it runs. It does less than
//! Haven's, so the difference is rather too large than too small.

use crate::sample::Sample;
use anyhow::{Context, Result};
use haven_lab::drive::Driver;
use std::time::{Duration, Instant};

pub fn run(lab: &Driver, runs: usize) -> Result<()> {
    let (mut ours, mut hand) = (Sample::default(), Sample::default());
    for run in 0..runs {
        let name = format!("made-{run}");
        let begin = Instant::now();
        lab.haven(&["vm", "create", &name, "--memory", "128MiB", "--image", "tiny"])?;
        let pid = loop {
            let found = lab.hosts.iter().find_map(|host| {
                let pids = lab.pids(host, &format!("guest={name}"));
                pids.first().map(|pid| (host.clone(), *pid))
            });
            if let Some(found) = found {
                break found;
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        lab.wait("it runs", Duration::from_secs(30), |lab| {
            lab.haven(&["vm", "ls"])
                .is_ok_and(|text| text.lines().any(|l| l.starts_with(&name) && l.contains("ready")))
        })?;
        ours.push(begin.elapsed().as_secs_f64());
        hand.push(by_hand(lab, &pid.0, pid.1)?);
        lab.haven(&["vm", "rm", &name])?;
        lab.wait("it is gone", Duration::from_secs(30), |lab| {
            lab.haven(&["vm", "ls"]).is_ok_and(|text| !text.contains(&name))
        })?;
    }
    ours.print("haven vm create -> running", f64::INFINITY, f64::INFINITY);
    hand.print("the same QEMU by hand -> running", f64::INFINITY, f64::INFINITY);
    let more = ours.median() - hand.median();
    let met = if more <= 0.3 { "met" } else { "MISSED" };
    println!("haven vm create takes {more:.3} s more than by hand (limit 0.3: {met})");
    Ok(())
}

/// Starts the QEMU of this process once more, by hand.
fn by_hand(lab: &Driver, host: &str, pid: i32) -> Result<f64> {
    let line = std::fs::read(format!("/proc/{pid}/cmdline"))?;
    let mut args: Vec<String> = Vec::new();
    let mut skip = false;
    for arg in line.split(|byte| *byte == 0).map(String::from_utf8_lossy) {
        if std::mem::take(&mut skip) || arg == "-S" || arg.is_empty() {
            continue;
        }
        // What belongs to the one VM that runs already.
        if matches!(
            arg.as_ref(),
            "-qmp"
                | "-chardev"
                | "-add-fd"
                | "-serial"
                | "-mon"
                | "-run-with"
                | "-runas"
                | "-pidfile"
                | "-netdev"
                | "-device"
                | "-drive"
                | "-blockdev"
        ) {
            skip = true;
            continue;
        }
        args.push(arg.into_owned());
    }
    let quoted: Vec<String> = args.iter().map(|arg| format!("'{arg}'")).collect();
    let script = format!(
        "cd /tmp; rm -f hand.in hand.out; mkfifo hand.in; {} -qmp stdio < hand.in > hand.out 2>&1 & \
         pid=$!; exec 3> hand.in; printf '{{\"execute\":\"qmp_capabilities\"}}{{\"execute\":\"query-status\"}}' >&3; \
         until grep -q running hand.out; do kill -0 $pid || {{ cat hand.out; exit 1; }}; sleep 0.002; done; \
         kill -9 $pid; rm -f hand.in hand.out",
        quoted.join(" ")
    );
    let begin = Instant::now();
    lab.haven(&["lab", "exec", host, "--", "bash", "-c", &script]).context("by hand")?;
    Ok(begin.elapsed().as_secs_f64())
}
