//! Automation: `tidy` checks the laws of the tree, `drill` runs the main job on a lab and judges it, `install-drill`
//! walks the install guide on machines with systemd, `openapi` writes the API's description.

mod drill;
mod install_drill;
mod machines;
mod tidy;

use anyhow::bail;
use clap::Parser;
use std::process::Command;

#[derive(Parser)]
enum Task {
    /// Check the laws of the tree
    Tidy,
    /// Make a lab (or use the one that is up), run the example, cut a host's power, judge what happens
    Drill,
    /// Install the package on three machines with systemd and walk docs/guide/install.md; by hand, 10 minutes
    InstallDrill {
        /// Build the package as it is shipped, not with the profile `dev`
        #[arg(long)]
        release: bool,
    },
    /// Write docs/openapi.json from the code
    Openapi {
        /// Only fail when it is not what the code gives
        #[arg(long)]
        check: bool,
    },
}

fn main() -> anyhow::Result<()> {
    match Task::parse() {
        Task::Tidy => tidy::run(),
        Task::Drill => drill::run(),
        Task::InstallDrill { release } => install_drill::run(release),
        Task::Openapi { check } => openapi(check),
    }
}

/// The code stands in `haven-control`, on which nothing here depends (see `tidy`), so `haven` itself is asked.
fn openapi(check: bool) -> anyhow::Result<()> {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    // Not `-p haven`, which would build it with other features, and anew.
    command.args(["run", "--quiet", "--bin", "haven", "--", "openapi"]);
    if check {
        command.arg("--check");
    }
    if !command.status()?.success() {
        bail!("`haven openapi` failed; what it said stands above");
    }
    Ok(())
}
