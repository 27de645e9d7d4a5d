//! Host power cut until a VM with a mirrored disk is started on another host, where that its disks are shut is proof enough:
//! `storage-fenced`. Nothing controls the power of the hosts.

use crate::{
    failover::vms,
    mirrored::{KEPT, whole},
    sample::Sample,
};
use anyhow::{Context, Result, ensure};
use haven_lab::drive::Driver;
use haven_model::ProofKind;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

const PATIENCE: Duration = Duration::from_secs(60);

pub fn run(lab: &Driver, runs: usize) -> Result<()> {
    lab.change_cluster(|spec| spec.fencing.push(ProofKind::StorageFenced))?;
    lab.apply(KEPT, &["--wait", "--timeout", "120"])?;
    let mut all = Sample::default();
    for run in 0..runs {
        whole(lab, "kept")?;
        let host = lab.host_of("kept")?;
        let began = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64();
        lab.haven(&["lab", "kill", &host])?;
        lab.wait("it starts elsewhere", PATIENCE, |lab| {
            vms(lab).is_ok_and(|all| all.get("kept").is_some_and(|(on, _)| *on != host))
        })?;
        let (_, ms) = vms(lab)?.remove("kept").context("it runs")?;
        let took = ms as f64 / 1000.0 - began;
        let events = lab.haven(&["events", "--limit", "50"])?;
        ensure!(events.contains("(storage-fenced)"), "another proof was quicker");
        println!("  run {run}, {host}: {took:.3} s");
        all.push(took);
        lab.haven(&["lab", "start", &host])?;
        lab.online(&host)?;
        lab.voting()?;
    }
    all.print(
        "host power cut -> VM with a mirrored disk started elsewhere, storage-fenced",
        2.5,
        f64::INFINITY,
    );
    Ok(())
}
