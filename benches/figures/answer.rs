//! Host power cut until its VM, started on another host, gives a good answer: what a person waits for who has one copy
//! of a service. Of it the guest's own boot is a part that is not Haven's.
//!
//! The address is held by a host that stays, so that only the VM is waited for; the client asks every 10 ms.

use crate::{address, sample::Sample};
use anyhow::{Context, Result};
use haven_lab::{
    asking::{Asking, OFTEN},
    drive::Driver,
};
use std::time::{Duration, Instant};

/// So long is asked after the power cut.
const SPAN: Duration = Duration::from_secs(14);

pub fn run(lab: &Driver, runs: usize) -> Result<()> {
    for host in ["host2", "host3"] {
        lab.label(host, "guests", "yes")?;
    }
    let manifest = address::SERVICE
        .replace("replicas: 2", "replicas: 1")
        .replace("template:\n  spec:\n", address::PINNED);
    lab.apply(&manifest, &["--wait", "--timeout", "300"])?;
    let mut sample = Sample::default();
    for run in 0..runs {
        for host in &lab.hosts {
            lab.online(host)?;
        }
        lab.voting()?;
        lab.wait("the member is ready", Duration::from_secs(120), |lab| {
            lab.overview().is_ok_and(|seen| seen.services.iter().any(|s| s.ready == 1))
        })?;
        let seen = lab.overview()?;
        let of = seen.hosts.iter().find(|line| line.vms > 0).context("the member has a host")?;
        let holder = seen.services.first().map(|s| s.holder.clone()).unwrap_or_default();
        if of.name == holder {
            println!("  run {run}: left out, the address is on the member's own host");
            continue;
        }
        let asking = Asking::start(lab, address::ADDRESS, OFTEN)?;
        std::thread::sleep(Duration::from_secs(1));
        let cut = Instant::now();
        lab.haven(&["lab", "kill", &of.name])?;
        std::thread::sleep(SPAN);
        let asked = asking.end()?;
        lab.haven(&["lab", "start", &of.name])?;
        // What was answered at the cut still came from the old copy.
        let good = asked.iter().filter(|a| a.good && a.begin > cut + Duration::from_secs(1));
        let first = good.map(|a| a.end).min().context("no answer came back at all")?;
        let seconds = (first - cut).as_secs_f64();
        println!("  run {run}, member on {}: {seconds:.3} s", of.name);
        sample.push(seconds);
    }
    let what = "host power cut -> first good answer from its VM elsewhere";
    sample.print(what, f64::INFINITY, f64::INFINITY);
    Ok(())
}
