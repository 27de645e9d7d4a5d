//! Host power cut until its VM is started on another host, where a power controller can be asked; proof `powered-off`.
//!
//! Measured as `failover.rs` does, on a lab whose machine offers a power controller for each host. The hosts are cut in
//! turn, whatever roles they have.

use crate::{
    failover::{fail, manifest, vms, well},
    sample::Sample,
};
use anyhow::{Context, Result, ensure};
use haven_lab::drive::Driver;

pub fn run(lab: &Driver, runs: usize) -> Result<()> {
    lab.apply(&manifest(), &[])?;
    let mut all = Sample::default();
    for run in 0..runs {
        well(lab)?;
        let host = &lab.hosts[run % lab.hosts.len()];
        let roles: Vec<String> = lab
            .overview()?
            .hosts
            .into_iter()
            .filter(|line| line.name == *host)
            .flat_map(|line| line.roles)
            .collect();
        ensure!(vms(lab)?.values().any(|(on, _)| on == host), "{host} runs a VM");
        let seconds = fail(lab, host)?;
        let incident = lab.ask(|client| async move { client.incidents().await })?.pop();
        let steps = incident.map(|incident| incident.steps).unwrap_or_default();
        let proof = steps.iter().find(|step| step.phase == "proof").context("a lost host")?;
        ensure!(
            proof.message.contains("read as off"),
            "another proof was quicker: {}",
            proof.message
        );
        println!("  run {run}, {host} ({}): {seconds:.3} s", roles.join(", "));
        all.push(seconds);
    }
    all.print("host power cut -> VM started elsewhere, powered-off", 2.5, 2.5);
    Ok(())
}
