//! An older Haven beside this one, as it is during every upgrade: hosts are taken over one after another, and at each
//! step guests move both ways, a lost host is recovered by whoever manages, and both command lines speak to both daemons.
//!
//! `xtask/older.sh` builds the programs of an older commit and runs this with them.

use anyhow::{Context, Result, bail, ensure};
use haven_lab::{
    asking::{Asking, STEADILY, failures},
    drive::Driver,
};
use haven_model::object::Kind;
use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

const MANIFEST: &str = "kind: Network\nname: front\nsubnet: 10.77.0.0/24\n---\n\
    kind: VM\nname: one\nimage: tiny\nmemory: 128MiB\nnetworks:\n- network: front\n---\n\
    kind: Service\nname: pair\nreplicas: 2\ntemplate:\n  spec:\n    image: tiny\n    memory: 128MiB\n    networks:\n    - network: front\n\
    check:\n  mode: http\n  port: 80\nfrontend:\n  address: 10.88.0.101\n  port: 80\n  mode: http\n";
/// What the older version does not know yet; to be brought up to date with the version that it is run with.
const MIGRATION: &str = "kind: VM\nname: one\nimage: tiny\nmemory: 128MiB\nnetworks:\n- network: front\nmigration:\n  downtime: 50ms\n";
const PROGRAMS: [&str; 2] = ["haven", "haven-guard"];
/// Two cores that start a host and everything on it.
const BACK: Duration = Duration::from_secs(60);

fn main() -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: needs root, to make network namespaces");
        return Ok(());
    }
    let Some(older) = std::env::var_os("HAVEN_OLDER").map(PathBuf::from) else {
        println!(
            "skipped: needs HAVEN_OLDER, a folder with `haven` and `haven-guard` of an older version (xtask/older.sh builds them)"
        );
        return Ok(());
    };
    let dir = std::env::var("HAVEN_LAB_DIR").unwrap_or_else(|_| "/tmp/haven-test-lab".into());
    let old = Driver::new(older.join("haven"), PathBuf::from(&dir), 3)?;
    let new = Driver::new(env!("CARGO_BIN_EXE_haven").into(), PathBuf::from(&dir), 3)?;
    let begin = Instant::now();
    let result = beside(&old, &new);
    if result.is_err() {
        println!("{}", new.report());
    }
    let _ = new.haven(&["lab", "down"]);
    result?;
    println!(
        "test an_older_version_beside_this_one ... ok ({:.1} s)",
        begin.elapsed().as_secs_f64()
    );
    Ok(())
}

fn beside(old: &Driver, new: &Driver) -> Result<()> {
    new.haven(&["lab", "down"])?;
    old.haven(&["lab", "up", "--no-power-control"])?;
    old.haven(&["apply", "-f", &written(old, MANIFEST)?, "--wait", "--timeout", "180"])?;
    both_speak(old, new, 0)?;
    for program in PROGRAMS {
        replace(&old.dir.join("bin").join(program), program)?;
    }
    // The managing host comes last, so that the older version decides as long as it can.
    let manager = manager(old)?;
    let mut order: Vec<String> =
        old.hosts.iter().filter(|host| **host != manager).cloned().collect();
    order.push(manager);
    for (number, host) in order.iter().enumerate() {
        let quiet = Asking::start(new, "10.88.0.101:80", STEADILY)?;
        upgrade(new, host)?;
        both_speak(old, new, number + 1)?;
        moves(new, &order)?;
        let asked = quiet.end()?;
        let bad = asked.iter().filter(|asked| !asked.good).count();
        println!("  {host} runs this version: {} questions, {bad} failed", asked.len());
        ensure!(bad == 0, "questions failed while {host} was upgraded: {}", failures(&asked));
        if number + 1 < order.len() {
            // One that was upgraded is lost, then one that was not: whoever manages recovers what it ran.
            lost(new, host)?;
            lost(new, &order[number + 1])?;
        }
    }
    // Only now all understand what the older version did not.
    let manifest = new.haven(&["rebalance", "--dry-run"])?;
    ensure!(manifest.contains("host1"), "{manifest}");
    Ok(())
}

fn written(lab: &Driver, manifest: &str) -> Result<String> {
    let path = lab.dir.join("mixed.yaml");
    std::fs::write(&path, manifest)?;
    Ok(path.display().to_string())
}

/// A running host keeps the file that it was started with.
fn replace(at: &Path, program: &str) -> Result<()> {
    let here = Path::new(env!("CARGO_BIN_EXE_haven")).with_file_name(program);
    let beside = at.with_extension("new");
    std::fs::copy(&here, &beside).with_context(|| format!("{} is copied", here.display()))?;
    std::fs::rename(&beside, at)?;
    Ok(())
}

fn manager(lab: &Driver) -> Result<String> {
    let overview = lab.overview()?;
    let manages =
        |host: &&haven_model::api::HostLine| host.roles.iter().any(|role| role == "manager");
    let host = overview.hosts.iter().find(manages).context("a host manages")?;
    Ok(host.name.clone())
}

/// Drained, restarted under this version, and given back what it had.
fn upgrade(lab: &Driver, host: &str) -> Result<()> {
    lab.haven(&["host", "drain", host, "--wait", "--timeout", "180"])?;
    lab.haven(&["lab", "kill", host])?;
    lab.haven(&["lab", "start", host])?;
    lab.wait(&format!("{host} is back"), BACK, |lab| {
        lab.haven(&["host", "ls"]).is_ok_and(|list| {
            list.lines().any(|line| line.contains(host) && line.contains("drained"))
        })
    })?;
    lab.voting()?;
    lab.haven(&["host", "undrain", host, "--bring-back", "--wait", "--timeout", "180"])?;
    lab.online(host)
}

/// Both versions' commands get on with whatever answers them, and as many hosts as should be are of this version.
fn both_speak(old: &Driver, new: &Driver, upgraded: usize) -> Result<()> {
    for lab in [old, new] {
        for words in [&["status"][..], &["vm", "ls"], &["events"], &["get", "service/pair"]] {
            lab.haven(words)?;
        }
        let shown = lab.haven(&["get", "vm/one", "-o", "yaml"])?;
        let path = written(lab, &shown)?;
        let said = lab.haven(&["apply", "-f", &path])?;
        ensure!(
            said.contains("unchanged"),
            "what was shown changes nothing when it is applied: {said}"
        );
    }
    // What an older host could not read is refused by a newer one, and unknown to an older one.
    let path = written(new, MIGRATION)?;
    let refused = new.command(&["apply", "-f", &path]).output()?;
    let all = upgraded == new.hosts.len();
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(
        refused.status.success() == all,
        "what came after that version, with {upgraded} hosts of this one: {said}"
    );
    if !all {
        println!("  refused with {upgraded} of this version: {}", said.trim().replace('\n', " "));
    }
    Ok(())
}

/// The VM goes to every host and back, live.
fn moves(lab: &Driver, hosts: &[String]) -> Result<()> {
    for host in hosts.iter().chain(hosts) {
        if lab.host_of("one")? != *host {
            lab.haven(&["vm", "migrate", "one", "--to", host, "--timeout", "120"])?;
        }
    }
    Ok(())
}

/// A power cut of a host with the VM on it.
fn lost(lab: &Driver, host: &str) -> Result<()> {
    if lab.host_of("one")? != host {
        lab.haven(&["vm", "migrate", "one", "--to", host, "--timeout", "120"])?;
    }
    lab.haven(&["lab", "kill", host])?;
    let begin = Instant::now();
    lab.wait("the VM runs elsewhere", BACK, |lab| {
        let list = lab.ask(|client| async move { client.list(Kind::Vm).await });
        list.is_ok_and(|list| {
            list.iter().any(|item| {
                item.object.meta().name.as_str() == "one"
                    && item.host.as_ref().is_some_and(|on| on.as_str() != host)
                    && matches!(item.state.as_str(), "ready" | "running")
            })
        })
    })?;
    println!(
        "  {host} was lost: its VM ran elsewhere after {:.1} s",
        begin.elapsed().as_secs_f64()
    );
    let copies: usize = lab
        .hosts
        .iter()
        .filter(|other| *other != host)
        .map(|other| lab.pids(other, "guest=one").len())
        .sum();
    if copies != 1 {
        bail!("{copies} copies of the VM run");
    }
    lab.haven(&["lab", "start", host])?;
    lab.online(host)?;
    lab.voting()?;
    let ready = |lab: &Driver| {
        lab.overview()
            .is_ok_and(|overview| overview.down.is_empty() && overview.vms.0 == overview.vms.1)
    };
    lab.wait("all runs again", BACK, ready)
}
