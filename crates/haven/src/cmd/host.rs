//! `haven host …`.

use crate::{
    connect::connect,
    failure::Failure,
    render::{self, Output},
};
use clap::Subcommand;
use haven_model::{ObjectRef, object::Kind};

/// Commands.
#[derive(Debug, Subcommand)]
pub enum HostCommand {
    /// List hosts
    #[command(after_help = "Examples:\n  haven host ls -o wide")]
    Ls {
        /// How
        #[arg(short, long, value_enum, default_value_t)]
        output: Output,
    },
    /// Show a host and what there is to say of it
    #[command(after_help = "Examples:\n  haven host show host1")]
    Show { name: String },
    /// Print a join token, good for one host and one hour
    #[command(after_help = "Examples:\n  haven host invite")]
    Invite,
    /// Remove a host from the cluster
    #[command(after_help = "Examples:\n  haven host remove host3")]
    Remove { name: String },
}

/// Runs it.
pub async fn run(command: HostCommand) -> Result<(), Failure> {
    let client = connect().await?;
    let reference = |name: &str| -> Result<ObjectRef, Failure> {
        format!("host/{name}")
            .parse()
            .map_err(|e: haven_model::ModelError| Failure::bad(e.to_string(), ""))
    };
    match command {
        HostCommand::Ls { output } => {
            print!("{}", render::items(&client.list(Kind::Host).await?, output))
        }
        HostCommand::Show { name } => {
            print!("{}", render::items(&[client.object(&reference(&name)?).await?], Output::Wide));
            client.explain(&reference(&name)?).await?.iter().for_each(|line| println!("{line}"));
        }
        HostCommand::Invite => println!("{}", client.invite().await?.secret),
        HostCommand::Remove { name } => {
            println!("{}", client.delete(&reference(&name)?).await?.state)
        }
    }
    Ok(())
}
