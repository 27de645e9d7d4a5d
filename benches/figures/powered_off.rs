//! Host power cut until its VM is started on another host, where a power controller can be asked; proof `powered-off`.
//!
//! Measured as `failover.rs` does, on a lab whose machine offers a power controller for each host. The hosts are cut in
//! turn, whatever roles they have.

use crate::{
    failover::{fail, manifest, vms, well},
    sample::Sample,
};
use anyhow::{Result, ensure};
use haven_lab::drive::Driver;

pub fn run(lab: &Driver, runs: usize) -> Result<()> {
    lab.apply(&manifest(), &[])?;
    let (mut all, mut from_proof) = (Sample::default(), Sample::default());
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
        let took = fail(lab, host)?;
        ensure!(took.proof.contains("read as off"), "another proof was quicker: {}", took.proof);
        println!(
            "  run {run}, {host} ({}): {:.3} s, {:.3} s of it after the proof",
            roles.join(", "),
            took.whole,
            took.from_proof
        );
        all.push(took.whole);
        from_proof.push(took.from_proof);
    }
    all.print("host power cut -> VM started elsewhere, powered-off", 2.5, 2.5);
    from_proof.print("proof powered-off -> VM started elsewhere", f64::INFINITY, f64::INFINITY);
    Ok(())
}
