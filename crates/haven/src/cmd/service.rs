//! `haven service …`.

use super::{Removal, list, reference, remove, said, show};
use crate::{connect::connect, failure::Failure, render::How};
use clap::Subcommand;
use haven_model::object::Kind;

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
    #[command(after_help = "Examples:\n  haven service scale hello 5")]
    Scale {
        /// Its name
        name: String,
        /// How many members it shall have
        replicas: u32,
    },
    /// Replace all members, a few at a time
    #[command(after_help = "Examples:\n  haven service restart hello")]
    Restart {
        /// Its name
        name: String,
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
        ServiceCommand::Scale { name, replicas } => {
            let name = reference(Kind::Service, &name)?.name;
            said(&connect().await?.scale(name.as_str(), replicas).await?);
        }
        ServiceCommand::Restart { name } => {
            let name = reference(Kind::Service, &name)?.name;
            said(&connect().await?.restart(name.as_str()).await?);
        }
        ServiceCommand::Rm(removal) => remove(Kind::Service, &removal).await?,
    }
    Ok(())
}
