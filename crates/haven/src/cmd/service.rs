//! `haven service …`.

use super::{Removal, list, reference, remove, said, show, wait};
use crate::{connect::connect, failure::Failure, render::How};
use clap::{Args, Subcommand};
use haven_client::Client;
use haven_model::{api::Item, object::Kind};
use std::time::Duration;

/// Whether a command returns before what it asked for is so.
#[derive(Args, Clone, Copy, Debug)]
pub struct Patience {
    /// Wait until all members are as wanted, and ready
    #[arg(long)]
    wait: bool,
    /// How long, seconds
    #[arg(long, default_value_t = 180)]
    timeout: u64,
}

impl Patience {
    async fn keep(self, client: &Client, item: &Item) -> Result<(), Failure> {
        if !self.wait {
            return Ok(());
        }
        let asked = (item.object.reference(), item.object.meta().generation);
        wait::ready(client, &[asked], Duration::from_secs(self.timeout)).await
    }
}

/// Commands.
#[derive(Debug, Subcommand)]
pub enum ServiceCommand {
    /// List services
    #[command(after_help = "Examples:\n  haven service ls\n  haven service ls -o json")]
    Ls(How),
    /// Show a service, its members, and what there is to say of it
    #[command(
        after_help = "Examples:\n  haven service show hello\n  haven service show hello -o yaml"
    )]
    Show {
        /// Its name
        name: String,
        #[command(flatten)]
        how: How,
    },
    /// Change the number of members
    #[command(
        after_help = "Examples:\n  haven service scale hello 5\n  haven service scale hello 5 --wait"
    )]
    Scale {
        /// Its name
        name: String,
        /// How many members it shall have
        replicas: u32,
        #[command(flatten)]
        patience: Patience,
    },
    /// Replace all members, a few at a time
    #[command(
        after_help = "Examples:\n  haven service restart hello\n  haven service restart hello --wait --timeout 600"
    )]
    Restart {
        /// Its name
        name: String,
        #[command(flatten)]
        patience: Patience,
    },
    /// Let the new members of a canary or blue-green update into the whole service
    #[command(
        after_help = "Examples:\n  haven service promote hello\n  haven service promote hello --wait --timeout 600"
    )]
    Promote {
        /// Its name
        name: String,
        #[command(flatten)]
        patience: Patience,
    },
    /// Delete a service and its members
    #[command(after_help = "Examples:\n  haven service rm hello --wait")]
    Rm(Removal),
}

/// Runs it.
pub async fn run(command: ServiceCommand) -> Result<(), Failure> {
    match command {
        ServiceCommand::Ls(how) => list(Kind::Service, how.output).await?,
        ServiceCommand::Show { name, how } => {
            show(&reference(Kind::Service, &name)?, how.output).await?;
        }
        ServiceCommand::Scale { name, replicas, patience } => {
            let name = reference(Kind::Service, &name)?.name;
            let client = connect().await?;
            let item = client.scale(name.as_str(), replicas).await?;
            said(&item);
            patience.keep(&client, &item).await?;
        }
        ServiceCommand::Restart { name, patience } => {
            let name = reference(Kind::Service, &name)?.name;
            let client = connect().await?;
            let item = client.restart(name.as_str()).await?;
            said(&item);
            patience.keep(&client, &item).await?;
        }
        ServiceCommand::Promote { name, patience } => {
            let name = reference(Kind::Service, &name)?.name;
            let client = connect().await?;
            let item = client.promote(name.as_str()).await?;
            said(&item);
            patience.keep(&client, &item).await?;
        }
        ServiceCommand::Rm(removal) => remove(Kind::Service, &removal).await?,
    }
    Ok(())
}
