//! `haven rehearse …`: what would happen, by the code that decides when it does.

use super::reference;
use crate::{
    connect::connect,
    failure::Failure,
    out,
    render::{self, How},
};
use clap::Subcommand;
use haven_model::object::Kind;

/// Commands.
#[derive(Debug, Subcommand)]
pub enum RehearseCommand {
    /// What would happen if these hosts lost their power now
    #[command(
        after_help = "Examples:\n  haven rehearse fail host3\n  haven rehearse fail host2 host3 -o json"
    )]
    Fail {
        /// Their names
        #[arg(required = true)]
        hosts: Vec<String>,
        #[command(flatten)]
        how: How,
    },
    /// What would happen if this host were drained now
    #[command(after_help = "Examples:\n  haven rehearse drain host3")]
    Drain {
        /// Its name
        host: String,
        #[command(flatten)]
        how: How,
    },
}

/// Runs it.
pub async fn run(command: RehearseCommand) -> Result<(), Failure> {
    let (what, hosts, how) = match command {
        RehearseCommand::Fail { hosts, how } => ("fail", hosts, how),
        RehearseCommand::Drain { host, how } => ("drain", vec![host], how),
    };
    for host in &hosts {
        reference(Kind::Host, host)?;
    }
    let told = connect().await?.rehearse(what, &hosts).await?;
    out::print(&render::value(&told, how.output, |wide| render::rehearsal(&told, wide)));
    Ok(())
}
