//! Two hosts and a witness, on a lab of their own.

use anyhow::{Context, Result, ensure};
use haven_lab::drive::Driver;
use std::time::{Duration, Instant};

const GUEST: &str = "kind: Network\nname: front\nsubnet: 10.77.0.0/24\n---\n\
    kind: VM\nname: kept\nimage: tiny\nmemory: 128MiB\nnetworks:\n- network: front\n";
const WITNESS: &str = "host3";
const PATIENCE: Duration = Duration::from_secs(60);

fn state_of(lab: &Driver, host: &str) -> Result<String> {
    let seen = lab.overview()?;
    let line = seen.hosts.into_iter().find(|line| line.name == host);
    Ok(line.with_context(|| format!("there is no {host}"))?.state)
}

fn runs(lab: &Driver, on: &str) -> bool {
    lab.host_of("kept").is_ok_and(|host| host == on) && !lab.pids(on, "guest=kept").is_empty()
}

/// What a witness may take, MiB.
const SMALL: f64 = 64.0;

/// The memory of the witness that is its own, of daemon and etcd, MiB: what of it are pages of programs can be dropped.
fn memory(lab: &Driver) -> f64 {
    let all = ["haven daemon", "etcd --"].map(|words| lab.pids(WITNESS, words));
    let kib = all.concat().into_iter().filter_map(|pid| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"))?;
        line.split_whitespace().next()?.parse::<f64>().ok()
    });
    kib.sum::<f64>() / 1024.0
}

/// The witness runs nothing; each of the three may be lost, one at a time.
pub fn witnessed(lab: &Driver) -> Result<()> {
    lab.haven(&["lab", "down"])?;
    lab.haven(&["lab", "up", "--hosts", "3", "--witness", "--no-power-control"])?;
    ensure!(state_of(lab, WITNESS)? == "witness", "{}", lab.haven(&["status"])?);
    ensure!(lab.overview()?.voters == (3, 3), "all three vote: {}", lab.haven(&["status"])?);
    lab.apply(GUEST, &["--wait", "--timeout", "60"])?;
    for _ in 0..2 {
        let from = lab.host_of("kept")?;
        let to = if from == "host1" { "host2" } else { "host1" };
        ensure!(from != WITNESS && runs(lab, &from), "kept is on {from}");
        let begin = Instant::now();
        lab.haven(&["lab", "kill", &from])?;
        lab.wait("the other host runs it", PATIENCE, |lab| runs(lab, to))?;
        println!(
            "  {from} lost its power: it runs on {to} {:.2} s later",
            begin.elapsed().as_secs_f64()
        );
        lab.haven(&["lab", "start", &from])?;
        lab.online(&from)?;
        lab.voting()?;
    }
    for words in ["qemu-system", "haproxy"] {
        ensure!(lab.pids(WITNESS, words).is_empty(), "the witness runs {words}");
    }
    let takes = memory(lab);
    println!("  the witness takes {takes:.1} MiB");
    ensure!(takes > 1.0 && takes < SMALL, "a witness is to be small, and takes {takes:.1} MiB");
    let (host, before) = (lab.host_of("kept")?, lab.pids("host1", "guest=kept"));
    lab.haven(&["lab", "kill", WITNESS])?;
    lab.wait("its loss is told", PATIENCE, |lab| {
        state_of(lab, WITNESS).is_ok_and(|state| state.starts_with("lost"))
    })?;
    std::thread::sleep(Duration::from_secs(3));
    let after = lab.pids("host1", "guest=kept");
    ensure!(runs(lab, &host) && before == after, "the loss of the witness disturbed a guest");
    lab.haven(&["lab", "start", WITNESS])?;
    lab.wait("it is back", PATIENCE, |lab| {
        state_of(lab, WITNESS).is_ok_and(|state| state == "witness")
    })?;
    lab.voting()
}
