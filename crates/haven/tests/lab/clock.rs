//! The wall clock of a host jumps. All that decides who runs goes by clocks that cannot be set.

use crate::{
    faults::undisturbed,
    lab::{HOSTS, Lab},
    witness::Witness,
};
use anyhow::{Context, Result, ensure};
use haven_model::Event;
use nix::sys::signal::Signal;
use std::{
    path::Path,
    time::{Duration, SystemTime},
};

/// What lets a process see another time. etcd does not go by it, since Go asks the kernel without a library.
const LIBRARY: &str = "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1";
/// A small guest, made and removed to see that all goes on.
const GUEST: &str =
    "kind: VM\nname: NAME\nimage: tiny\nmemory: 128MiB\nnetworks:\n- network: front\n";

/// How far the manager's clock was ahead of this machine's when it gave a guest its host, seconds.
fn ahead(lab: &Lab, guest: &str) -> Result<i64> {
    // By their times, and one of half an hour ago may have many behind it.
    let events = lab.haven(&["events", "--limit", "5000", "-o", "json"])?;
    let events: Vec<Event> = serde_json::from_str(&events)?;
    let starts = |event: &&Event| {
        event.object.to_string() == format!("vm/{guest}") && event.message.contains("starts on")
    };
    let event = events.iter().find(starts).with_context(|| format!("{guest} was placed"))?;
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?;
    Ok(event.at_ms / 1000 - i64::try_from(now.as_secs())?)
}

/// The managing host's clock goes an hour ahead, then half an hour behind, then right again.
pub fn jumps(lab: &mut Lab, witness: &Witness) -> Result<()> {
    if !Path::new(LIBRARY).exists() {
        println!("skipped: needs libfaketime (xtask/setup.sh installs it)");
        return Ok(());
    }
    let shared = lab.dir.join("shared");
    std::fs::copy(LIBRARY, shared.join("libfaketime.so"))?;
    let set =
        |host: &str, offset: &str| std::fs::write(shared.join(format!("clock-{host}")), offset);
    for host in HOSTS {
        set(host, "+0")?;
        let settings = format!(
            "LD_PRELOAD=/srv/shared/libfaketime.so\\nFAKETIME_TIMESTAMP_FILE=/srv/shared/clock-{host}\\nFAKETIME_CACHE_DURATION=1\\nFAKETIME_DONT_FAKE_MONOTONIC=1\\nDONT_FAKE_MONOTONIC=1\\n"
        );
        let write = format!("mkdir -p /etc/default; printf '{settings}' > /etc/default/haven");
        lab.haven(&["lab", "exec", host, "--", "sh", "-c", &write])?;
    }
    restart(lab, witness)?;
    let result = jump(lab, witness, &set);
    for host in HOSTS {
        lab.haven(&["lab", "exec", host, "--", "rm", "/etc/default/haven"])?;
    }
    restart(lab, witness)?;
    for host in HOSTS {
        std::fs::remove_file(shared.join(format!("clock-{host}")))?;
    }
    std::fs::remove_file(shared.join("libfaketime.so"))?;
    result
}

fn jump(
    lab: &Lab,
    witness: &Witness,
    set: &dyn Fn(&str, &str) -> std::io::Result<()>,
) -> Result<()> {
    let seen = lab.overview()?;
    let manages = |roles: &[String]| roles.iter().any(|role| role == "manager");
    let host = seen.hosts.iter().find(|line| manages(&line.roles)).context("a manager")?;
    for (guest, expected) in [("late", 3600), ("early", -1800), ("on-time", 0)] {
        set(&host.name, &format!("{expected:+}"))?;
        undisturbed(witness, Duration::from_secs(8))?;
        // All goes on under the new time.
        lab.apply(&GUEST.replace("NAME", guest), &["--wait", "--timeout", "60"])?;
        let ahead = ahead(lab, guest)?;
        println!("  the manager's clock was {ahead} s ahead, and nothing was disturbed");
        ensure!((ahead - expected).abs() < 60, "it should be {expected} s: nothing was shown");
        lab.haven(&["delete", &format!("vm/{guest}"), "--wait"])?;
    }
    undisturbed(witness, Duration::from_secs(2))
}

/// Has the daemons started anew, with another environment.
fn restart(lab: &Lab, witness: &Witness) -> Result<()> {
    for host in HOSTS {
        lab.signal(host, "haven daemon", Signal::SIGKILL)?;
        undisturbed(witness, Duration::from_secs(1))?;
        lab.online(host)?;
    }
    lab.voting()?;
    undisturbed(witness, Duration::from_secs(2))
}
