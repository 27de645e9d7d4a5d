//! `haven volume …`: disks of VMs, how large they are and whether their guests see them ([`disks`]); of mirrored ones where they
//! are, and whether their replicas are the same.

mod disks;

use super::{
    migrate::bar,
    snapshot::{self, Waiting},
};
use crate::{
    connect::connect,
    failure::Failure,
    out,
    render::{self, How},
};
use clap::{Args, Subcommand};
use haven_client::Client;
use haven_model::{
    Bytes, Name,
    api::{CheckAsked, VolumeView},
    volume::VolumeCheck,
};
use std::time::{Duration, Instant};

/// Between two looks.
const PAUSE: Duration = Duration::from_millis(200);

/// Commands.
#[derive(Debug, Subcommand)]
pub enum VolumeCommand {
    /// List the disks of VMs, with the hosts of mirrored ones
    #[command(after_help = "Examples:\n  haven volume ls\n  haven volume ls -o json")]
    Ls(How),
    /// Show a disk, and how each replica of a mirrored one is
    #[command(after_help = "Examples:\n  haven volume show db.data")]
    Show {
        /// Its name: VM.DISK
        name: String,
        #[command(flatten)]
        how: How,
    },
    /// Add a disk to a VM, which its guest does not see before it is attached
    #[command(
        after_help = "Examples:\n  haven volume create db.logs 20GiB\n  haven volume create db.logs 20GiB --pool fast && haven volume attach db.logs"
    )]
    Create(disks::New),
    /// Let the guest of a VM see a disk, while it runs or not
    #[command(after_help = "Examples:\n  haven volume attach db.logs")]
    Attach(disks::Named),
    /// Take a disk from the guest of a VM, while it runs or not; what is on it stays
    #[command(
        after_help = "A guest does not refuse a disk that it uses: unmount it there first.\n\nExamples:\n  haven volume detach db.logs"
    )]
    Detach(disks::Named),
    /// Remove a disk that is detached, with all that is on it
    #[command(after_help = "Examples:\n  haven volume detach db.logs && haven volume rm db.logs")]
    Rm {
        /// Its name: VM.DISK
        name: String,
    },
    /// Make a disk larger, while its guest runs or not
    #[command(after_help = "Examples:\n  haven volume resize db.data 100GiB")]
    Resize {
        /// Its name: VM.DISK
        name: String,
        /// How large its guest shall see it, for example 100GiB
        size: Bytes,
        /// Ask for it, and do not wait until it is so
        #[arg(long)]
        no_wait: bool,
    },
    /// Keep a disk as it is now, while its guest runs or not
    #[command(
        after_help = "Examples:\n  haven volume snapshot db.data\n  haven volume snapshot db.data before-import\n  haven vm snapshot ls db"
    )]
    Snapshot {
        /// Its name: VM.DISK
        name: String,
        /// What the snapshot is called; after the time unless it is said
        snapshot: Option<Name>,
        #[command(flatten)]
        wait: Waiting,
    },
    /// Make a disk of a VM that is stopped what it was in a snapshot; what was written to it since is lost
    #[command(after_help = "Examples:\n  haven volume revert db.data before-import")]
    Revert {
        /// Its name: VM.DISK
        name: String,
        /// The snapshot
        snapshot: Name,
        #[command(flatten)]
        wait: Waiting,
    },
    /// Compare the replicas of a mirrored disk, while its guest runs or not
    #[command(
        after_help = "Examples:\n  haven volume check db.data\n  haven volume check db.data --repair"
    )]
    Check(Check),
}

/// A comparison.
#[derive(Debug, Args)]
pub struct Check {
    /// Its name: VM.DISK
    name: String,
    /// Have replicas that differ copied anew from the one that the guest reads
    #[arg(long)]
    repair: bool,
    /// End the comparison that goes on
    #[arg(long, conflicts_with = "repair")]
    cancel: bool,
    /// Ask for it, and do not wait for its end
    #[arg(long)]
    no_wait: bool,
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
        VolumeCommand::Snapshot { name, snapshot, wait } => {
            snapshot::create_of(&name, snapshot, wait).await?;
        }
        VolumeCommand::Revert { name, snapshot, wait } => {
            snapshot::revert_of(&name, &snapshot, wait).await?;
        }
        VolumeCommand::Create(new) => disks::create(new).await?,
        VolumeCommand::Attach(disk) => disks::attach(disk, true).await?,
        VolumeCommand::Detach(disk) => disks::attach(disk, false).await?,
        VolumeCommand::Rm { name } => disks::remove(&name).await?,
        VolumeCommand::Resize { name, size, no_wait } => {
            disks::resize(&name, size, no_wait).await?
        }
        VolumeCommand::Check(check) => compare(check).await?,
    }
    Ok(())
}

async fn compare(check: Check) -> Result<(), Failure> {
    let (name, client) = (&check.name, connect().await?);
    if check.cancel {
        client.cancel_check(name).await?;
        out::line(format_args!("the comparison of {name} is ended"));
        return Ok(());
    }
    let begun = client.check_volume(name, &CheckAsked { repair: check.repair }).await?;
    if check.no_wait {
        out::line(format_args!(
            "the replicas of {name} are compared; `haven volume show {name}` tells how it stands"
        ));
        return Ok(());
    }
    match begun.check {
        Some(begun) => follow(&client, name, &begun.id).await,
        None => Ok(()),
    }
}

/// Shows how a comparison comes on, until it has ended.
async fn follow(client: &Client, name: &str, id: &str) -> Result<(), Failure> {
    let (begin, bar) = (Instant::now(), bar());
    loop {
        let view = client.volume(name).await?;
        let Some(check) = view.check.as_ref().filter(|check| check.id == id) else {
            return Err(Failure::failed(
                format!("somebody else had {name} compared meanwhile"),
                format!("`haven volume show {name}` tells what came of it"),
            ));
        };
        if let Some(outcome) = &check.outcome {
            bar.finish_and_clear();
            if outcome.well {
                out::line(format_args!("{name}: {}", outcome.message));
                return Ok(());
            }
            return Err(Failure::failed(
                format!("{name}: {}", outcome.message),
                format!("`haven volume show {name}` tells how its replicas are"),
            ));
        }
        bar.set_length(view.size.0);
        bar.set_position(check.done.0);
        bar.set_message(figures(&view, check, begin.elapsed()));
        tokio::time::sleep(PAUSE).await;
    }
}

/// How far it is, how fast it goes, and when it is expected to end.
fn figures(view: &VolumeView, check: &VolumeCheck, passed: Duration) -> String {
    let mib = |bytes: u64| Bytes::mib(bytes >> 20);
    let (size, done) = (view.size.0, check.done.0);
    let rate = (done as f64 / passed.as_secs_f64().max(0.1)) as u64;
    let so_far = format!("{} of {} compared", mib(done), mib(size));
    if rate == 0 {
        return so_far;
    }
    let left = size.saturating_sub(done) / rate;
    format!("{so_far}, {} per second, about {left} s left", mib(rate))
}
