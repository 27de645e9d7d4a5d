//! `haven vm clone`: a VM that is made of another one.

use super::wait;
use crate::{connect::connect, failure::Failure, out};
use clap::Args;
use haven_model::{Name, api::CloneAsked};
use std::time::Duration;

/// What is to be made.
#[derive(Debug, Args)]
pub struct CloneVm {
    /// The VM that is there; it runs on, if it runs
    source: String,
    /// The name of the new VM
    name: Name,
    /// What the source was in this snapshot, instead of what it is now
    #[arg(long)]
    snapshot: Option<Name>,
    /// Do not start it
    #[arg(long)]
    stopped: bool,
    /// Ask for it, and do not wait until it runs
    #[arg(long)]
    no_wait: bool,
    /// How long to wait, seconds
    #[arg(long, default_value_t = 3600)]
    timeout: u64,
}

/// Runs it.
pub async fn run(wanted: CloneVm) -> Result<(), Failure> {
    let CloneVm { source, name, snapshot, stopped, no_wait, timeout } = wanted;
    let client = connect().await?;
    let asked = CloneAsked { name: name.clone(), snapshot, stopped };
    let applied = client.clone_vm(&source, &asked).await?;
    for one in &applied {
        out::line(format_args!("{} {}", one.object, one.outcome));
        out::warn(std::iter::once(one.warning.as_str()));
    }
    if stopped {
        out::line(
            "its disks are made when it is started; until then the snapshot of the source stays",
        );
        return Ok(());
    }
    if no_wait {
        out::line(format_args!("`haven vm show {name}` tells how it stands"));
        return Ok(());
    }
    wait::ready(&client, &wait::asked(&applied)?, Duration::from_secs(timeout)).await
}
