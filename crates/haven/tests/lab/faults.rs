//! Who may run a VM when processes die, freeze and wake, and when hosts and the store are cut off.

use crate::{
    lab::{HOSTS, Lab},
    witness::Witness,
};
use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use std::time::{Duration, Instant};

/// A copy on a host without a watchdog may show signs of life for so long after waking: the guard's 50 ms and one
/// look of the witness.
const GRACE: Duration = Duration::from_millis(70);

/// A guest counts several times a second; on two cores that all hosts share it may be held up for so long.
const SILENT: Duration = Duration::from_secs(2);

/// So long after a cable was mended etcd's members have their streams to each other again: they give up a dead one after
/// 5 s. What a second cut before that does is known fault 39 (docs/decisions/0003-known-faults.md).
pub const RECONNECTED: Duration = Duration::from_secs(7);

/// How long the hosts were without a renewal, as far as their daemons found it worth a word.
fn say_late_renewals(lab: &Lab) {
    for host in &lab.hosts {
        let path = lab.dir.join("hosts").join(host).join("upper/var/log/haven/daemon.log");
        let log = std::fs::read_to_string(path).unwrap_or_default();
        for line in log.lines().filter(|line| line.contains("the store took no renewal for")) {
            println!("  {host}: {line}");
        }
    }
}

/// VMs run on as they were: no copy ended and none began.
pub fn undisturbed(witness: &Witness, span: Duration) -> Result<()> {
    let before = witness.newest();
    std::thread::sleep(span);
    let after = witness.newest();
    if before.len() != 2 {
        bail!("two VMs should count, and these do: {before:?}");
    }
    for (vm, copy) in &before {
        let now = &after[vm];
        if now.boot != copy.boot {
            bail!("{vm} was disturbed: another copy counts now");
        }
        if now.count <= copy.count || now.last.elapsed() > SILENT {
            bail!("{vm} does not count any more");
        }
    }
    Ok(())
}

pub fn daemon_killed(lab: &mut Lab, witness: &Witness) -> Result<()> {
    let host = lab.host_of("tick-1")?;
    lab.signal(&host, "haven daemon", Signal::SIGKILL)?;
    undisturbed(witness, Duration::from_secs(9))?;
    lab.online(&host)?;
    // The new daemon has it in its hands: the reset button works, and the guest boots anew on the same host.
    let before = witness.newest()["tick-1"].boot.clone();
    lab.haven(&["vm", "reset", "tick-1"])?;
    witness.until(Duration::from_secs(60), "tick-1 boots anew", |newest| {
        newest.get("tick-1").is_some_and(|copy| copy.boot != before && copy.host == host)
    })?;
    Ok(())
}

pub fn guard_killed(lab: &mut Lab, witness: &Witness) -> Result<()> {
    let host = lab.host_of("tick-1")?;
    let old = lab.signal(&host, "haven-guard", Signal::SIGKILL)?;
    undisturbed(witness, Duration::from_secs(8))?;
    replaced(lab, &host, &old)
}

pub fn guard_frozen(lab: &mut Lab, witness: &Witness) -> Result<()> {
    let host = lab.host_of("tick-1")?;
    let old = lab.signal(&host, "haven-guard", Signal::SIGSTOP)?;
    undisturbed(witness, Duration::from_secs(8))?;
    replaced(lab, &host, &old)
}

fn replaced(lab: &Lab, host: &str, old: &[i32]) -> Result<()> {
    let now = lab.pids(host, "haven-guard");
    if now.is_empty() || now.iter().any(|pid| old.contains(pid)) {
        bail!("the guard {old:?} was not replaced: {now:?}");
    }
    Ok(())
}

pub fn store_frozen_briefly(lab: &mut Lab, witness: &Witness) -> Result<()> {
    for host in HOSTS {
        lab.signal(host, "etcd --name", Signal::SIGSTOP)?;
    }
    let result = undisturbed(witness, Duration::from_secs(2));
    for host in HOSTS {
        lab.signal(host, "etcd --name", Signal::SIGCONT)?;
    }
    result?;
    undisturbed(witness, Duration::from_secs(6))
}

/// Two hosts of three do not reach each other, in one direction or in both: each still reaches the third, renews through
/// it if it must, and nobody is suspected by a majority.
pub fn cut_from_one(lab: &mut Lab, witness: &Witness) -> Result<()> {
    let seen = lab.overview()?;
    let leads = |roles: &[String]| roles.iter().any(|role| role == "store leader");
    let Some(leader) = seen.hosts.iter().find(|line| leads(&line.roles)) else {
        bail!("no host leads the store");
    };
    let leader = leader.name.as_str();
    let Some(other) = HOSTS.into_iter().find(|host| *host != leader) else {
        bail!("one host is the cluster");
    };
    let cuts: [&[&str]; 3] = [
        &[leader, "--from", other, "--one-way"],
        &[other, "--from", leader, "--one-way"],
        &[leader, "--from", other],
    ];
    for cut in cuts {
        undisturbed(witness, RECONNECTED)?;
        lab.haven(&[&["lab", "cut"], cut].concat())?;
        let result = undisturbed(witness, Duration::from_secs(8));
        lab.haven(&["lab", "heal"])?;
        result.with_context(|| format!("cut {}", cut.join(" ")))?;
        lab.voting()?;
    }
    Ok(())
}

/// A host that hears all and is heard by none.
pub fn unheard(lab: &mut Lab, witness: &Witness) -> Result<()> {
    let host = lab.host_of("tick-1")?;
    let begin = Instant::now();
    for other in HOSTS.into_iter().filter(|other| *other != host) {
        lab.haven(&["lab", "cut", &host, "--from", other, "--one-way"])?;
    }
    let result = moved(witness, &host, begin);
    lab.haven(&["lab", "heal"])?;
    result
}

/// Two of three hosts lose their power: the third one alone may run nothing, and all comes back with them.
pub fn quorum_lost(lab: &mut Lab, witness: &Witness) -> Result<()> {
    let stays = lab.host_of("tick-1")?;
    let gone: Vec<&str> = HOSTS.into_iter().filter(|host| *host != stays).collect();
    let begin = Instant::now();
    for host in &gone {
        lab.haven(&["lab", "kill", host])?;
    }
    while witness.running() > 0 {
        if begin.elapsed() > Duration::from_secs(6) {
            bail!("{stays} runs VMs although it is alone");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    println!("  alone, it ended its VMs within {:.2} s", begin.elapsed().as_secs_f64());
    std::thread::sleep(Duration::from_secs(5));
    if witness.running() > 0 {
        bail!("{stays} started VMs although it is alone");
    }
    let told = lab.command(&["status"]).output()?;
    let said = [told.stdout, told.stderr].map(|said| String::from_utf8_lossy(&said).into_owned());
    if !said.concat().contains("quorum") {
        bail!("without a quorum `haven status` should say so: {}", said.concat());
    }
    let since = Instant::now();
    for host in &gone {
        lab.haven(&["lab", "start", host])?;
    }
    witness.until(Duration::from_secs(120), "both VMs count again", |newest| {
        newest.values().filter(|copy| copy.last > since).count() == 2
    })
}

/// The member that leads: the others must find a new leader, and who speaks to it another member.
pub fn member_frozen(lab: &mut Lab, witness: &Witness) -> Result<()> {
    let seen = lab.overview()?;
    let leads = |roles: &[String]| roles.iter().any(|role| role == "store leader");
    let Some(host) = seen.hosts.iter().find(|line| leads(&line.roles)) else {
        bail!("no host leads the store");
    };
    let host = host.name.clone();
    lab.signal(&host, "etcd --name", Signal::SIGSTOP)?;
    let result = undisturbed(witness, Duration::from_secs(8));
    lab.signal(&host, "etcd --name", Signal::SIGCONT)?;
    say_late_renewals(lab);
    result?;
    undisturbed(witness, Duration::from_secs(4))
}

/// The VM runs on another host; how long after `since`.
fn moved(witness: &Witness, from: &str, since: Instant) -> Result<()> {
    let old = from.to_owned();
    witness.until(Duration::from_secs(90), "tick-1 runs elsewhere", move |newest| {
        newest.get("tick-1").is_some_and(|copy| copy.host != old)
    })?;
    let last = witness
        .last_of("tick-1", from)
        .map_or(0.0, |at| at.saturating_duration_since(since).as_secs_f64());
    let first = witness.newest()["tick-1"].first.saturating_duration_since(since).as_secs_f64();
    println!(
        "  old copy: last sign {last:.2} s after the fault; new copy: first {first:.2} s after"
    );
    Ok(())
}

pub fn daemon_stopped(lab: &mut Lab, witness: &Witness) -> Result<()> {
    let host = lab.host_of("tick-1")?;
    let begin = Instant::now();
    lab.signal(&host, "haven daemon", Signal::SIGSTOP)?;
    let result = moved(witness, &host, begin);
    lab.signal(&host, "haven daemon", Signal::SIGCONT)?;
    result
}

pub fn cut_off(lab: &mut Lab, witness: &Witness) -> Result<()> {
    let host = lab.host_of("tick-1")?;
    let begin = Instant::now();
    lab.haven(&["lab", "cut", &host])?;
    let result = moved(witness, &host, begin);
    lab.haven(&["lab", "heal"])?;
    result
}

pub fn paused_with_watchdog(lab: &mut Lab, witness: &Witness) -> Result<()> {
    let host = lab.host_of("tick-1")?;
    let old = lab.pids(&host, "host-init");
    let boot = witness.newest()["tick-1"].boot.clone();
    lab.haven(&["lab", "pause", &host])?;
    // The host may be back before its lease expires, and then runs the VM anew itself.
    witness.until(Duration::from_secs(90), "tick-1 runs anew", move |newest| {
        newest.get("tick-1").is_some_and(|copy| copy.boot != boot)
    })?;
    let now = lab.pids(&host, "host-init");
    if now.is_empty() || now == old {
        bail!("the watchdog did not reset {host}: {old:?}, {now:?}");
    }
    Ok(())
}

pub fn paused_without(lab: &mut Lab, witness: &Witness) -> Result<()> {
    let host = lab.host_of("tick-1")?;
    lab.haven(&["lab", "watchdog", "off"])?;
    let begin = Instant::now();
    lab.haven(&["lab", "pause", &host])?;
    let result = moved(witness, &host, begin);
    // From here on the old copy may be seen, for a moment.
    let woken = lab.resume(&host);
    witness.woken(woken, GRACE);
    result?;
    std::thread::sleep(Duration::from_secs(2));
    if let Some(last) = witness.last_of("tick-1", &host) {
        let after = last.checked_duration_since(woken);
        println!("  last sign of the old copy after waking: {after:?} (grace {GRACE:?})");
    }
    lab.haven(&["lab", "watchdog", "on"])?;
    Ok(())
}

/// The store is stuck as a whole: while all hosts answer each other nothing is ended and nothing started; a host that is
/// cut off then ends its VMs before anybody could run them.
pub fn store_frozen_for_long(lab: &mut Lab, witness: &Witness) -> Result<()> {
    let host = lab.host_of("tick-1")?;
    for host in HOSTS {
        lab.signal(host, "etcd --name", Signal::SIGSTOP)?;
    }
    let result = frozen(lab, witness, &host);
    for host in HOSTS {
        lab.signal(host, "etcd --name", Signal::SIGCONT)?;
    }
    lab.haven(&["lab", "heal"])?;
    result?;
    let since = Instant::now();
    witness.until(Duration::from_secs(90), "both VMs count again", |newest| {
        newest.values().filter(|copy| copy.last > since).count() == 2
    })?;
    let events = lab.haven(&["events"])?;
    let told = |host: &&&str| events.contains(&format!("the store took no renewal of {host} for"));
    // Those that run nothing lived by promises too.
    if HOSTS.iter().filter(told).count() == 0 {
        bail!("no event tells that hosts ran on without the store:\n{events}");
    }
    Ok(())
}

fn frozen(lab: &Lab, witness: &Witness, host: &str) -> Result<()> {
    undisturbed(witness, Duration::from_secs(60))?;
    lab.haven(&["lab", "cut", host])?;
    let begin = Instant::now();
    while witness.running() > 0 {
        if begin.elapsed() > Duration::from_secs(5) {
            bail!("{} VMs run on although a host does not answer", witness.running());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    println!(
        "  without the answer of one host all VMs ended within {:.2} s",
        begin.elapsed().as_secs_f64()
    );
    Ok(())
}
