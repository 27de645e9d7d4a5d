//! One schedule, played on the lab.

use crate::Lab;
use anyhow::{Context, Result, bail, ensure};
use haven_lab::schedule::{Fault, Schedule};
use haven_model::{
    vm::DiskState,
    volume::{ReplicaState, Volume},
};
use nix::sys::signal::Signal;
use std::{
    collections::BTreeSet,
    os::unix::fs::FileExt,
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

/// All is well again within this time once all is mended.
const PATIENCE: Duration = Duration::from_secs(120);
/// Behind the records of a scribe: nobody writes there.
const BEHIND: u64 = 4 << 20;

/// Plays it and judges.
pub fn play(lab: &Lab, schedule: &Schedule) -> Result<()> {
    broken(lab, schedule)?;
    settled(lab)?;
    anew(lab)?;
    same(lab)?;
    schedule.damage.iter().try_for_each(|vm| damaged(lab, vm))
}

/// The record of its disk.
pub fn volume(lab: &Lab, vm: &str) -> Result<Volume> {
    let name = format!("{vm}.root");
    let view = lab.ask(|client| {
        let name = name.clone();
        async move { client.volume(&name).await }
    })?;
    view.volume.with_context(|| format!("{name} is mirrored"))
}

/// Breaks and mends, each thing at its time.
fn broken(lab: &Lab, schedule: &Schedule) -> Result<()> {
    let mut moments: Vec<(Duration, bool, &Fault)> = Vec::new();
    for step in &schedule.steps {
        moments.push((step.at, true, &step.fault));
        if !step.fault.mends_itself() {
            moments.push((step.until, false, &step.fault));
        }
    }
    moments.sort_by_key(|(at, ..)| *at);
    let begin = Instant::now();
    let mut cuts: Vec<&Fault> = Vec::new();
    for (at, breaks, fault) in moments {
        std::thread::sleep(at.saturating_sub(begin.elapsed()));
        if matches!(fault, Fault::CutOff(_) | Fault::CutOneWay(..) | Fault::Cut(..)) {
            cuts.retain(|other| *other != fault);
            cuts.extend(breaks.then_some(fault));
            cut(lab, &cuts)?;
        } else if breaks {
            begins(lab, fault)?;
        } else {
            ends(lab, fault)?;
        }
    }
    Ok(())
}

/// The cables that are cut now, and no others.
fn cut(lab: &Lab, cuts: &[&Fault]) -> Result<()> {
    lab.haven(&["lab", "heal"])?;
    for fault in cuts {
        match fault {
            Fault::CutOff(host) => lab.haven(&["lab", "cut", host])?,
            Fault::CutOneWay(from, to) => {
                lab.haven(&["lab", "cut", from, "--from", to, "--one-way"])?
            }
            Fault::Cut(one, other) => lab.haven(&["lab", "cut", one, "--from", other])?,
            _ => continue,
        };
    }
    Ok(())
}

/// The processes of a host, which may have none of that sort at the moment.
fn signal(lab: &Lab, host: &str, words: &str, signal: Signal) {
    let _ = lab.signal(host, words, signal);
}

fn begins(lab: &Lab, fault: &Fault) -> Result<()> {
    match fault {
        Fault::KillDaemon(host) => signal(lab, host, "haven daemon", Signal::SIGKILL),
        Fault::KillStorage(host) => signal(lab, host, "qemu-storage-daemon", Signal::SIGKILL),
        Fault::FreezeStorage(host) => signal(lab, host, "qemu-storage-daemon", Signal::SIGSTOP),
        Fault::KillVm(vm) => {
            for host in &lab.hosts {
                signal(lab, host, &format!("guest={vm}"), Signal::SIGKILL);
            }
        }
        // It may be refused: its hosts are broken, too.
        Fault::Move(vm) => drop(lab.haven(&["vm", "migrate", vm, "--no-wait"])),
        Fault::Grow(vm) => grow(lab, vm),
        Fault::Power(host) => drop(lab.haven(&["lab", "kill", host])?),
        Fault::AllPower(hosts) => {
            for host in hosts {
                lab.haven(&["lab", "kill", host])?;
            }
        }
        Fault::Pause(host) => drop(lab.haven(&["lab", "pause", host])?),
        Fault::Fill(host) => {
            // As much as there is; that it ends with "no space" is what it is for.
            let mut zeros = std::io::repeat(0);
            let mut file = std::fs::File::create(lab.disk(host).join("filler"))?;
            let full = std::io::copy(&mut zeros, &mut file).err().context("it never ends")?;
            ensure!(full.kind() == std::io::ErrorKind::StorageFull, "{full}");
        }
        Fault::CutOff(_) | Fault::CutOneWay(..) | Fault::Cut(..) => {}
    }
    Ok(())
}

/// By 1 MiB, if anybody answers.
fn grow(lab: &Lab, vm: &str) {
    if let Ok(volume) = volume(lab, vm) {
        let (name, size) = (format!("{vm}.root"), (volume.size.0 >> 20) + 1);
        let args = ["volume", "resize", &name, &format!("{size}MiB"), "--no-wait"];
        let grows = lab.haven(&args).is_ok();
        lab.grown.fetch_add(u64::from(grows), Ordering::Relaxed);
    }
}

/// Its guest sees its disk as it is wanted.
fn attached(lab: &Lab, vm: &str) -> bool {
    let name = format!("{vm}.root");
    let view = lab.ask(|client| {
        let name = name.clone();
        async move { client.volume(&name).await }
    });
    view.is_ok_and(|view| view.state == DiskState::Attached)
}

fn ends(lab: &Lab, fault: &Fault) -> Result<()> {
    match fault {
        Fault::Power(host) => drop(lab.haven(&["lab", "start", host])?),
        Fault::AllPower(hosts) => {
            for host in hosts {
                lab.haven(&["lab", "start", host])?;
                std::thread::sleep(Duration::from_millis(700));
            }
        }
        Fault::Pause(host) => drop(lab.haven(&["lab", "resume", host])?),
        Fault::FreezeStorage(host) => signal(lab, host, "qemu-storage-daemon", Signal::SIGCONT),
        Fault::Fill(host) => std::fs::remove_file(lab.disk(host).join("filler"))?,
        _ => {}
    }
    Ok(())
}

/// Nothing that a guest said is wrong. A disk that does not take something stops its guest, and gives it no error.
fn judged(lab: &Lab) -> Result<()> {
    for vm in Lab::vms() {
        let failed = lab.judge().of(&vm).failed;
        ensure!(failed == 0, "{vm} was told {failed} times that a write failed");
    }
    let violations = lab.judge().violations();
    ensure!(violations.is_empty(), "{}", violations.join("; "));
    Ok(())
}

/// All hosts are there, all replicas count, and each guest writes on.
pub fn settled(lab: &Lab) -> Result<()> {
    for host in &lab.hosts {
        lab.online(host)?;
    }
    lab.voting()?;
    for vm in Lab::vms() {
        let counts =
            |volume: &Volume| volume.replicas.values().all(|state| *state == ReplicaState::Counted);
        let whole = lab.wait(&format!("all replicas of {vm} count"), PATIENCE, |_| {
            volume(lab, &vm).is_ok_and(|volume| counts(&volume))
        });
        whole.with_context(|| format!("{:?}", volume(lab, &vm)))?;
        let seen = lab
            .wait(&format!("{vm} has its disk as it is wanted"), PATIENCE, |_| attached(lab, &vm));
        seen.with_context(|| lab.haven(&["explain", &format!("vm/{vm}")]).unwrap_or_default())?;
        let then = lab.judge().of(&vm).wrote;
        let on = lab
            .wait(&format!("{vm} writes on"), PATIENCE, |_| lab.judge().of(&vm).wrote > then + 3);
        on.with_context(|| format!("{:?}", lab.judge().of(&vm)))?;
    }
    judged(lab)
}

/// Each guest is started anew, and finds what it was told to be written.
pub fn anew(lab: &Lab) -> Result<()> {
    for vm in Lab::vms() {
        let boots = lab.judge().of(&vm).boots;
        lab.haven(&["vm", "reset", &vm])?;
        lab.wait(&format!("{vm} reads its disk anew"), PATIENCE, |_| {
            lab.judge().of(&vm).boots > boots
        })?;
    }
    judged(lab)
}

/// All replicas of each disk hold the same.
pub fn same(lab: &Lab) -> Result<()> {
    for vm in Lab::vms() {
        let said = lab.haven(&["volume", "check", &format!("{vm}.root")])?;
        ensure!(said.contains("all of it is the same on"), "{said}");
    }
    Ok(())
}

/// A replica changes what it holds: that is found, and repaired.
pub fn damaged(lab: &Lab, vm: &str) -> Result<()> {
    let owner = lab.host_of(vm)?;
    let all = volume(lab, vm)?.replicas;
    let others: BTreeSet<_> = all.keys().filter(|host| host.as_str() != owner).collect();
    let host = others.first().context("it has another replica")?;
    // While one is taken in it is noted what the others would lack; that is not all that a bad one lacks.
    if let Some(third) = others.last().filter(|third| *third != host) {
        lab.signal(third.as_str(), "qemu-storage-daemon", Signal::SIGKILL)?;
        let two = |volume: Volume| volume.counted().count() == 2;
        lab.wait("it counts no more", PATIENCE, |_| volume(lab, vm).is_ok_and(two))?;
        settled(lab)?;
    }
    let pool = lab.disk(host.as_str()).join(if all.len() == 3 { "pool-3" } else { "pool-2" });
    let mut files = std::fs::read_dir(&pool)?.flatten().map(|entry| entry.path());
    let named = |path: &std::path::PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        name.starts_with(&format!("{vm}.root.")) && name.ends_with(".raw")
    };
    let path = files.find(named).with_context(|| format!("{} lacks {vm}", pool.display()))?;
    std::fs::File::options().write(true).open(path)?.write_all_at(b"not what it held", BEHIND)?;
    let name = format!("{vm}.root");
    let Err(said) = lab.haven(&["volume", "check", &name]) else {
        bail!("a replica of {vm} on {host} was damaged, and nobody says so");
    };
    let differs = format!("the replica on {host} differs from that on");
    ensure!(said.to_string().contains(&differs), "{said:#}");
    lab.haven(&["volume", "check", &name, "--repair"])?;
    settled(lab)?;
    same(lab)
}
