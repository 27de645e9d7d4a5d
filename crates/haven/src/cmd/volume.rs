//! `haven volume …`: mirrored disks and where they are.

use crate::{
    connect::connect,
    failure::Failure,
    out,
    render::{self, How},
};
use clap::Subcommand;

/// Commands.
#[derive(Debug, Subcommand)]
pub enum VolumeCommand {
    /// List mirrored disks with their hosts
    #[command(after_help = "Examples:\n  haven volume ls\n  haven volume ls -o json")]
    Ls(How),
    /// Show a mirrored disk and how each of its replicas is
    #[command(after_help = "Examples:\n  haven volume show db.data")]
    Show {
        /// Its name: VM.DISK
        name: String,
        #[command(flatten)]
        how: How,
    },
}

/// Runs it.
pub async fn run(command: VolumeCommand) -> Result<(), Failure> {
    match command {
        VolumeCommand::Ls(how) => {
            let all = connect().await?.volumes().await?;
            out::print(&render::value(&all, how.output, |_| render::volumes(&all)));
        }
        VolumeCommand::Show { name, how } => {
            let one = connect().await?.volume(&name).await?;
            out::print(&render::value(&one, how.output, |_| render::volume(&one)));
        }
    }
    Ok(())
}
