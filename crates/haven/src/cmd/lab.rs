//! `haven lab …`: all but lists is the lab's own (`crates/lab/src/command.rs`).

use crate::{
    failure::Failure,
    out,
    render::{self, How},
};
use clap::Subcommand;
use haven_lab::{
    command,
    lab::{HostLine, Lab},
};

/// A cluster on this machine.
#[derive(Debug, Subcommand)]
pub enum LabCommand {
    /// List the hosts
    #[command(after_help = "Examples:\n  haven lab ls\n  haven lab ls -o wide")]
    Ls(How),
    #[command(flatten)]
    Lab(command::LabCommand),
}

/// Runs it.
pub async fn run(command: LabCommand) -> Result<(), Failure> {
    match command {
        LabCommand::Ls(how) => {
            command::need_root().map_err(Failure::other)?;
            let hosts = Lab::open().map_err(Failure::other)?.list();
            out::print(&render::value(&hosts, how.output, |wide| table(&hosts, wide)));
            Ok(())
        }
        LabCommand::Lab(command) => command::run(command).await.map_err(Failure::other),
    }
}

fn table(hosts: &[HostLine], wide: bool) -> String {
    let mut head = vec!["host", "address", "power"];
    head.extend(if wide { &["cable", "cut from"][..] } else { &[] });
    let rows = hosts.iter().map(|host| {
        let mut row = vec![host.name.clone(), host.address.clone(), host.power.to_owned()];
        if wide {
            row.extend([host.cable.to_owned(), host.cut_from.join(", ")]);
        }
        row
    });
    render::table(&head, rows.collect())
}
