//! `haven host …`.

use super::{Removal, drain, fence::FenceCommand, list, maintenance, reference, remove, show};
use crate::{connect::connect, failure::Failure, out, render::How};
use clap::Subcommand;
use haven_client::ClientError;
use haven_model::{Object, maintenance::Work, object::Kind};

/// Commands.
#[derive(Debug, Subcommand)]
pub enum HostCommand {
    /// List hosts
    #[command(after_help = "Examples:\n  haven host ls\n  haven host ls -o wide")]
    Ls(How),
    /// Show a host and what there is to say of it
    #[command(after_help = "Examples:\n  haven host show host1\n  haven host show host1 -o json")]
    Show {
        /// Its name
        name: String,
        #[command(flatten)]
        how: How,
    },
    /// Place no new VMs on a host; those that run there stay
    #[command(after_help = "Examples:\n  haven host cordon host3")]
    Cordon {
        /// Its name
        name: String,
    },
    /// Let a host take new VMs again
    #[command(after_help = "Examples:\n  haven host uncordon host3")]
    Uncordon {
        /// Its name
        name: String,
    },
    /// Move everything away from a host, which takes nothing new until `undrain`; what cannot leave is told
    #[command(
        after_help = "Examples:\n  haven host drain host3\n  haven host drain host3 --wait --timeout 300"
    )]
    Drain(drain::Draining),
    /// End the drain of a host: it takes VMs again
    #[command(
        after_help = "Examples:\n  haven host undrain host3\n  haven host undrain host3 --bring-back"
    )]
    Undrain(drain::Undraining),
    /// Restart hosts, one after another: each is emptied before and gets back what it had
    #[command(after_help = "Examples:\n  haven host reboot host3\n  haven host reboot --rolling")]
    Reboot(maintenance::Worked),
    /// Upgrade Haven on hosts, one after another: each is emptied before and gets back what it had
    #[command(after_help = "Examples:\n  haven host upgrade host3\n  haven host upgrade --rolling")]
    Upgrade(maintenance::Worked),
    /// How the restarts or upgrades of hosts stand; let them go on, or end them
    #[command(
        after_help = "Examples:\n  haven host maintenance\n  haven host maintenance --resume\n  haven host maintenance --end"
    )]
    Maintenance(maintenance::Looked),
    /// Power fencing
    #[command(subcommand)]
    Fence(FenceCommand),
    /// Print a join token, good for one host and one hour
    #[command(after_help = "Examples:\n  haven host invite")]
    Invite,
    /// Remove a host from the cluster; it goes once no VM is on it and its daemon has ended
    #[command(visible_alias = "rm", after_help = "Examples:\n  haven host remove host3 --wait")]
    Remove(Removal),
}

/// Runs it.
pub async fn run(command: HostCommand) -> Result<(), Failure> {
    match command {
        HostCommand::Ls(how) => list(Kind::Host, how.output).await,
        HostCommand::Show { name, how } => show(&reference(Kind::Host, &name)?, how.output).await,
        HostCommand::Cordon { name } => cordon(&name, true).await,
        HostCommand::Uncordon { name } => cordon(&name, false).await,
        HostCommand::Drain(wanted) => drain::drain(wanted).await,
        HostCommand::Undrain(wanted) => drain::undrain(wanted).await,
        HostCommand::Reboot(wanted) => maintenance::begin(Work::Reboot, wanted).await,
        HostCommand::Upgrade(wanted) => maintenance::begin(Work::Upgrade, wanted).await,
        HostCommand::Maintenance(wanted) => maintenance::look(wanted).await,
        HostCommand::Fence(command) => super::fence::run(command).await,
        HostCommand::Invite => {
            out::line(connect().await?.invite().await?.secret);
            Ok(())
        }
        HostCommand::Remove(removal) => remove(Kind::Host, &removal).await,
    }
}

/// Changes the one word, over the version that was read; reads again when somebody else was quicker.
async fn cordon(name: &str, cordoned: bool) -> Result<(), Failure> {
    let what = reference(Kind::Host, name)?;
    let client = connect().await?;
    let mut tries = 0;
    loop {
        let mut item = client.object(&what).await?;
        let Object::Host(host) = &mut item.object else {
            return Err(Failure::failed(format!("{what} is not a host"), ""));
        };
        if host.spec.cordoned == cordoned {
            let state = if cordoned { "cordoned" } else { "not cordoned" };
            out::line(format_args!("{what} is {state} already"));
            return Ok(());
        }
        host.spec.cordoned = cordoned;
        match client.replace(&item).await {
            Ok(_) => {
                let state = if cordoned { "cordoned" } else { "takes new VMs again" };
                out::line(format_args!("{what} {state}"));
                return Ok(());
            }
            Err(ClientError::Refused(body)) if body.status == 409 && tries < 5 => {
                tries += 1;
                tokio::time::sleep(std::time::Duration::from_millis(200)).await;
            }
            Err(error) => return Err(error.into()),
        }
    }
}
