//! `haven volume …`: disks of VMs, how large they are; of mirrored ones where they are, and whether their replicas are the same.

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
    Bytes, Name, Object, ObjectRef,
    api::{CHANGED, CheckAsked, VolumeView},
    object::Kind,
    vm::pending_words,
    volume::{VolumeCheck, VolumeRef},
};
use std::time::{Duration, Instant};

/// Between two looks.
const PAUSE: Duration = Duration::from_millis(200);

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
    /// Make a disk larger; its VM takes that up when it is started anew
    #[command(
        after_help = "Examples:\n  haven volume resize db.data 100GiB\n  haven volume resize db.data 100GiB && haven vm reset db"
    )]
    Resize {
        /// Its name: VM.DISK
        name: String,
        /// How large its guest shall see it, for example 100GiB
        size: Bytes,
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
        VolumeCommand::Resize { name, size } => resize(&name, size).await?,
        VolumeCommand::Snapshot { name, snapshot, wait } => {
            snapshot::create_of(&name, snapshot, wait).await?;
        }
        VolumeCommand::Revert { name, snapshot, wait } => {
            snapshot::revert_of(&name, &snapshot, wait).await?;
        }
        VolumeCommand::Check(check) => compare(check).await?,
    }
    Ok(())
}

async fn resize(name: &str, size: Bytes) -> Result<(), Failure> {
    let of = VolumeRef::parse(name).ok_or_else(|| {
        Failure::bad(format!("`{name}` is no disk of a VM"), "write VM.DISK, for example db.data")
    })?;
    let client = connect().await?;
    let mut item = client.object(&ObjectRef::new(Kind::Vm, of.vm.clone())).await?;
    let Object::Vm(vm) = &mut item.object else {
        return Err(Failure::bad(format!("`{}` is no VM", of.vm), "`haven vm ls` lists them"));
    };
    let names: Vec<String> = vm.spec.disks.iter().map(|disk| disk.name.to_string()).collect();
    let disk = vm.spec.disks.iter_mut().find(|disk| disk.name == of.disk);
    let disk = disk.ok_or_else(|| {
        Failure::bad(
            format!("{} has no disk `{}`", of.vm, of.disk),
            format!("it has: {}", names.join(", ")),
        )
    })?;
    let before = std::mem::replace(&mut disk.size, size);
    let item = client.replace(&item).await?;
    out::line(format_args!("{name}: {before} -> {size}"));
    out::warn(std::iter::once(item.warning.as_str()));
    if let Some(parts) = item.columns.get(CHANGED) {
        let parts: Vec<String> = parts.split(", ").map(str::to_owned).collect();
        out::line(pending_words(&of.vm, &parts));
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
        bar.set_length(view.volume.size.0);
        bar.set_position(check.done.0);
        bar.set_message(figures(&view, check, begin.elapsed()));
        tokio::time::sleep(PAUSE).await;
    }
}

/// How far it is, how fast it goes, and when it is expected to end.
fn figures(view: &VolumeView, check: &VolumeCheck, passed: Duration) -> String {
    let mib = |bytes: u64| Bytes::mib(bytes >> 20);
    let (size, done) = (view.volume.size.0, check.done.0);
    let rate = (done as f64 / passed.as_secs_f64().max(0.1)) as u64;
    let so_far = format!("{} of {} compared", mib(done), mib(size));
    if rate == 0 {
        return so_far;
    }
    let left = size.saturating_sub(done) / rate;
    format!("{so_far}, {} per second, about {left} s left", mib(rate))
}
