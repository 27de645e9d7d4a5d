//! A host with much to do: what would help is told, and then done while the guests run on.

use crate::{lab::Lab, witness::Witness};
use anyhow::{Context, Result, bail, ensure};
use haven_model::{ClusterSpec, RebalancePolicy, api::Balance, units::Millis};
use std::time::{Duration, Instant};

/// Works three quarters of the time: both of them keep three quarters of the two CPUs of their host.
const WORK: &str = "#!/bin/sh\n(while :; do :; done) & work=$!\nwhile :; do sleep 0.3; kill -STOP $work; sleep 0.1; kill -CONT $work; done\n";
const BUSY: [&str; 2] = ["busy-1", "busy-2"];
/// To boot, and to be measured for a window; on two cores that have this and all else to do.
const MEASURED: Duration = Duration::from_secs(90);

fn balance(lab: &Lab) -> Result<Balance> {
    let told = lab.haven(&["rebalance", "--dry-run", "-o", "json"])?;
    serde_json::from_str(&told).context("`haven rebalance --dry-run` is read")
}

/// Both busy guests begin on one host.
pub fn relieved(lab: &mut Lab, witness: &Witness) -> Result<()> {
    lab.change_cluster(|spec| spec.rebalance_window = Millis(10_000))?;
    for host in ["host2", "host3"] {
        lab.haven(&["host", "cordon", host])?;
    }
    for vm in BUSY {
        let manifest = format!(
            "kind: VM\nname: {vm}\nimage: tiny\nmemory: 128MiB\nnetworks:\n- network: front\nuserData: {WORK:?}\n"
        );
        lab.apply(&manifest, &["--wait", "--timeout", "120"])?;
    }
    for host in ["host2", "host3"] {
        lab.haven(&["host", "uncordon", host])?;
    }
    let hosts = BUSY.map(|vm| lab.host_of(vm));
    ensure!(hosts.iter().all(|host| host.as_ref().is_ok_and(|host| host == "host1")), "{hosts:?}");
    witness.moves(true);
    let begin = Instant::now();
    let helps = |lab: &haven_lab::drive::Driver| {
        let told = lab.haven(&["rebalance", "--dry-run"]).unwrap_or_default();
        told.contains("1. busy-")
    };
    lab.wait("the busy host is measured", MEASURED, helps)?;
    let told = lab.haven(&["rebalance", "--dry-run"])?;
    println!("  told after {:.1} s:\n{told}", begin.elapsed().as_secs_f64());
    let status = lab.haven(&["status"])?;
    ensure!(status.contains("for balance"), "`haven status` gives no advice:\n{status}");
    // Advice moves nothing.
    ensure!(BUSY.iter().all(|vm| lab.host_of(vm).is_ok_and(|host| host == "host1")), "one moved");
    lab.change_cluster(|spec| spec.rebalance = RebalancePolicy::Auto)?;
    let begin = Instant::now();
    lab.wait("one of them moves by itself", MEASURED, |lab| {
        BUSY.iter().any(|vm| lab.host_of(vm).is_ok_and(|host| host != "host1"))
    })?;
    println!("  one moved by itself {:.1} s after that was allowed", begin.elapsed().as_secs_f64());
    lab.wait("the loads are even", MEASURED, |lab| {
        let told = lab.haven(&["rebalance", "--dry-run"]).unwrap_or_default();
        told.contains("no move would help") && !told.contains("not measured")
    })?;
    let moved = BUSY.iter().filter(|vm| lab.host_of(vm).is_ok_and(|host| host != "host1")).count();
    let boots = BUSY.map(|vm| lab.boots_of(vm));
    if moved != 1 || boots != [1, 1] {
        bail!("{moved} of two moved, and one should; they booted {boots:?} times");
    }
    println!("{}", lab.haven(&["rebalance", "--dry-run"])?);
    ensure!(balance(lab)?.policy == RebalancePolicy::Auto);
    for vm in BUSY {
        lab.haven(&["delete", &format!("vm/{vm}"), "--wait"])?;
    }
    let default = ClusterSpec::default();
    lab.change_cluster(|spec| {
        (spec.rebalance, spec.rebalance_window) = (default.rebalance, default.rebalance_window);
    })?;
    witness.moves(false);
    Ok(())
}
