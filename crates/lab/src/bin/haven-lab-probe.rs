//! A stand-in for the `haven` binary in this crate's own tests: only `lab …`.

use clap::Parser;
use haven_lab::command::{LabCommand, run};

#[derive(Parser)]
enum Probe {
    /// The lab
    #[command(subcommand)]
    Lab(LabCommand),
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let Probe::Lab(command) = Probe::parse();
    run(command).await
}
