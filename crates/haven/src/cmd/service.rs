//! `haven service …`.

use crate::{
    connect::connect,
    failure::Failure,
    render::{self, Output},
};
use clap::Subcommand;
use haven_model::{ObjectRef, object::Kind};

/// Commands.
#[derive(Debug, Subcommand)]
pub enum ServiceCommand {
    /// List services
    #[command(after_help = "Examples:\n  haven service ls")]
    Ls {
        /// How
        #[arg(short, long, value_enum, default_value_t)]
        output: Output,
    },
    /// Show a service, its members, and what there is to say of it
    #[command(after_help = "Examples:\n  haven service show hello")]
    Show { name: String },
    /// Change the number of members
    #[command(after_help = "Examples:\n  haven service scale hello 5")]
    Scale { name: String, replicas: u32 },
    /// Replace all members, a few at a time
    #[command(after_help = "Examples:\n  haven service restart hello")]
    Restart { name: String },
}

/// Runs it.
pub async fn run(command: ServiceCommand) -> Result<(), Failure> {
    let client = connect().await?;
    match command {
        ServiceCommand::Ls { output } => {
            print!("{}", render::items(&client.list(Kind::Service).await?, output))
        }
        ServiceCommand::Show { name } => {
            let bad = |e: haven_model::ModelError| Failure::bad(e.to_string(), "");
            let what: ObjectRef = format!("service/{name}").parse().map_err(bad)?;
            print!("{}", render::items(&[client.object(&what).await?], Output::Wide));
            let members = client.list(Kind::Vm).await?;
            let members: Vec<_> = members
                .into_iter()
                .filter(|m| m.object.meta().owner.as_ref() == Some(&what))
                .collect();
            println!();
            print!("{}", render::items(&members, Output::Wide));
            println!();
            client.explain(&what).await?.iter().for_each(|line| println!("{line}"));
        }
        ServiceCommand::Scale { name, replicas } => {
            println!("{}", client.scale(&name, replicas).await?.state)
        }
        ServiceCommand::Restart { name } => println!("{}", client.restart(&name).await?.state),
    }
    Ok(())
}
