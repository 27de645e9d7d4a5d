//! All hosts are restarted, one after another, and an upgrade that fails touches no second host.

use crate::{
    lab::{HOSTS, Lab},
    witness::Witness,
};
use anyhow::{Context, Result, bail, ensure};
use std::{collections::BTreeMap, time::Instant};

fn boots(lab: &Lab) -> Result<BTreeMap<String, String>> {
    let of = |host: &str| -> Result<(String, String)> {
        // When its PID 1 began.
        let boot = exec(lab, host, "cut -d' ' -f22 /proc/1/stat")?;
        Ok((host.to_owned(), boot))
    };
    HOSTS.into_iter().map(of).collect()
}

fn exec(lab: &Lab, host: &str, script: &str) -> Result<String> {
    lab.haven(&["lab", "exec", host, "--", "sh", "-c", script])
}

/// Restarts all of them; then an upgrade whose command fails on the first, is mended, and goes on.
pub fn all(lab: &mut Lab, witness: &Witness) -> Result<()> {
    witness.moves(true);
    let (before, guests) = (boots(lab)?, witness.newest());
    let begin = Instant::now();
    let said = lab.haven(&["host", "reboot", "--rolling", "--timeout", "600"])?;
    println!("{said}  three hosts were restarted in {:.1} s", begin.elapsed().as_secs_f64());
    let after = boots(lab)?;
    for host in HOSTS {
        ensure!(before[host] != after[host], "{host} was not restarted: {before:?} {after:?}");
        ensure!(lab.voting().is_ok(), "a voter is missing afterwards");
    }
    undisturbed(lab, witness, &guests)?;
    upgraded(lab)?;
    undisturbed(lab, witness, &guests)?;
    witness.moves(false);
    Ok(())
}

fn undisturbed(
    lab: &Lab,
    witness: &Witness,
    before: &BTreeMap<String, crate::witness::Copy>,
) -> Result<()> {
    for (vm, copy) in witness.newest() {
        if before.get(&vm).is_none_or(|before| before.boot != copy.boot) {
            bail!("{vm} was started anew");
        }
    }
    ensure!(!lab.haven(&["host", "ls"])?.contains("drain"), "a host is still drained");
    Ok(())
}

fn upgraded(lab: &Lab) -> Result<()> {
    let write = |host: &str, script: &str| {
        let text = format!(
            "printf '#!/bin/sh\\n{script}\\n' > /etc/haven/upgrade; chmod 755 /etc/haven/upgrade"
        );
        exec(lab, host, &text)
    };
    for host in HOSTS {
        // As a package does it: the programs are there, then both are restarted.
        write(
            host,
            "touch /var/lib/haven/upgraded; sleep 1; kill $(pidof haven-guard) $(pidof haven)",
        )?;
    }
    write("host1", "echo no space left; exit 7")?;
    let refused = lab.command(&["host", "upgrade", "host1", "host2"]).output()?;
    let why = String::from_utf8_lossy(&refused.stderr).into_owned();
    println!("  {}", why.trim());
    let told = why.contains(
        "the upgrade of host1 failed: its command ended with code 7; it said last: no space left",
    );
    ensure!(!refused.status.success() && told, "what failed is told: {why}");
    ensure!(exec(lab, "host2", "ls /var/lib/haven/upgraded").is_err(), "host2 was touched");
    write("host1", "touch /var/lib/haven/upgraded")?;
    let shown = lab.haven(&["host", "maintenance", "--resume"])?;
    ensure!(shown.contains("host1"), "{shown}");
    lab.wait("both are upgraded", std::time::Duration::from_secs(120), |lab| {
        lab.haven(&["host", "maintenance"]).is_ok_and(|shown| shown.contains("it is over"))
    })?;
    for host in ["host1", "host2"] {
        exec(lab, host, "rm /var/lib/haven/upgraded")
            .with_context(|| format!("{host} was upgraded"))?;
    }
    for host in HOSTS {
        exec(lab, host, "rm /etc/haven/upgrade")?;
    }
    Ok(())
}
