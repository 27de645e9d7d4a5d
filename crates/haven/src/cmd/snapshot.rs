//! `haven vm snapshot …`, and `haven volume snapshot` and `revert`: disks of a VM as they were, kept in themselves.

use crate::{
    connect::connect,
    failure::Failure,
    out,
    render::{self, How},
};
use clap::{Args, Subcommand};
use haven_client::Client;
use haven_model::{
    Name, Object, ObjectRef,
    api::{RevertAsked, SnapshotAsked, SnapshotView},
    object::Kind,
    vm_snapshot::{SnapshotState, VmSnapshot},
    volume::VolumeRef,
};
use std::time::{Duration, Instant};

/// How long a VM that was told to stop is waited for.
const STOPS: Duration = Duration::from_secs(60);
/// Between two looks.
const PAUSE: Duration = Duration::from_millis(200);

/// Commands.
#[derive(Debug, Subcommand)]
pub enum SnapshotCommand {
    /// Keep all disks of a VM as they are at one instant, while its guest runs or not
    #[command(
        after_help = "Examples:\n  haven vm snapshot create db\n  haven vm snapshot create db before-upgrade"
    )]
    Create {
        /// The VM
        vm: String,
        /// What the snapshot is called; after the time unless it is said
        name: Option<Name>,
        #[command(flatten)]
        wait: Waiting,
    },
    /// List the snapshots of a VM
    #[command(
        after_help = "Examples:\n  haven vm snapshot ls db\n  haven vm snapshot ls db -o json"
    )]
    Ls {
        /// The VM
        vm: String,
        #[command(flatten)]
        how: How,
    },
    /// Make the disks of a VM that is stopped what they were in a snapshot; what was written since is lost
    #[command(
        after_help = "Examples:\n  haven vm stop db && haven vm snapshot revert db before-upgrade && haven vm start db"
    )]
    Revert {
        /// The VM
        vm: String,
        /// The snapshot
        name: Name,
        #[command(flatten)]
        wait: Waiting,
    },
    /// Remove a snapshot; its VM stays as it is
    #[command(after_help = "Examples:\n  haven vm snapshot rm db before-upgrade")]
    Rm {
        /// The VM
        vm: String,
        /// The snapshot
        name: Name,
        #[command(flatten)]
        wait: Waiting,
    },
}

/// Whether its end is waited for.
#[derive(Clone, Copy, Debug, Args)]
pub struct Waiting {
    /// Ask for it, and do not wait for its end
    #[arg(long)]
    no_wait: bool,
    /// How long it is waited for, seconds
    #[arg(long, default_value_t = 180)]
    timeout: u64,
}

/// Runs it.
pub async fn run(command: SnapshotCommand) -> Result<(), Failure> {
    match command {
        SnapshotCommand::Create { vm, name, wait } => {
            create(&vm, SnapshotAsked { name, disks: Vec::new() }, wait).await
        }
        SnapshotCommand::Ls { vm, how } => {
            let all = connect().await?.snapshots(&vm).await?;
            out::print(&render::value(&all, how.output, |_| render::snapshots(&all)));
            Ok(())
        }
        SnapshotCommand::Revert { vm, name, wait } => {
            revert(&vm, &name, RevertAsked::default(), wait).await
        }
        SnapshotCommand::Rm { vm, name, wait } => {
            let client = connect().await?;
            let asked = client.remove_snapshot(&vm, name.as_str()).await?;
            match end(&client, &vm, &asked, wait).await? {
                End::Gone => out::line(format_args!("{vm}: the snapshot {name} is removed")),
                End::NotYet => out::line(later(&vm, &name, "is being removed")),
                End::Is(now) => return Err(otherwise(&vm, &name, &now.snapshot)),
            }
            Ok(())
        }
    }
}

/// `VM.DISK`, as somebody typed it.
fn disk(name: &str) -> Result<VolumeRef, Failure> {
    VolumeRef::parse(name).ok_or_else(|| {
        Failure::bad(format!("`{name}` is no disk of a VM"), "write VM.DISK, for example db.data")
    })
}

/// Keeps one disk.
pub async fn create_of(name: &str, called: Option<Name>, wait: Waiting) -> Result<(), Failure> {
    let of = disk(name)?;
    create(of.vm.as_str(), SnapshotAsked { name: called, disks: vec![of.disk] }, wait).await
}

/// Makes one disk what it was.
pub async fn revert_of(name: &str, called: &Name, wait: Waiting) -> Result<(), Failure> {
    let of = disk(name)?;
    revert(of.vm.as_str(), called, RevertAsked { disks: vec![of.disk] }, wait).await
}

async fn create(vm: &str, asked: SnapshotAsked, wait: Waiting) -> Result<(), Failure> {
    let client = connect().await?;
    let asked = client.take_snapshot(vm, &asked).await?;
    let name = &asked.name;
    match end(&client, vm, &asked, wait).await? {
        End::Is(now) if now.snapshot.state == SnapshotState::There => {
            out::line(format_args!("{vm}: {name} is taken, {}", now.snapshot.shows()));
            Ok(())
        }
        End::Is(now) => Err(otherwise(vm, name, &now.snapshot)),
        End::Gone => Err(removed(vm, name)),
        End::NotYet => {
            out::line(later(vm, name, "is being taken"));
            Ok(())
        }
    }
}

async fn revert(vm: &str, name: &Name, asked: RevertAsked, wait: Waiting) -> Result<(), Failure> {
    let client = connect().await?;
    comes_to_its_end(&client, vm).await?;
    let asked = client.revert(vm, name.as_str(), &asked).await?;
    let before = asked.snapshot.reverted_ms;
    match end(&client, vm, &asked, wait).await? {
        End::Is(now)
            if now.snapshot.state == SnapshotState::There && now.snapshot.reverted_ms != before =>
        {
            out::line(format_args!(
                "{vm}: what was {} is again; `haven vm start {vm}` starts it",
                match asked.snapshot.back.as_slice() {
                    [one] => format!("its disk `{one}` in {name}"),
                    _ => format!("in {name}"),
                }
            ));
            Ok(())
        }
        End::Is(now) => Err(otherwise(vm, name, &now.snapshot)),
        End::Gone => Err(removed(vm, name)),
        End::NotYet => {
            out::line(later(vm, name, "is being reverted to"));
            Ok(())
        }
    }
}

/// Waits for a VM that was told to stop.
async fn comes_to_its_end(client: &Client, vm: &str) -> Result<(), Failure> {
    let (of, begin) = (ObjectRef::new(Kind::Vm, Name::new(vm)?), Instant::now());
    while begin.elapsed() < STOPS {
        let item = client.object(&of).await?;
        let stops = matches!(&item.object, Object::Vm(vm) if !vm.spec.running);
        if !stops || item.state == "stopped" {
            break;
        }
        tokio::time::sleep(PAUSE).await;
    }
    Ok(())
}

fn later(vm: &str, name: &Name, what: &str) -> String {
    format!("the snapshot {name} of {vm} {what}; `haven vm snapshot ls {vm}` tells how it stands")
}

fn removed(vm: &str, name: &Name) -> Failure {
    Failure::failed(
        format!("{vm}: the snapshot {name} was removed meanwhile"),
        format!("`haven vm snapshot ls {vm}` lists those that there are"),
    )
}

/// It came otherwise than it was wanted.
fn otherwise(vm: &str, name: &Name, now: &VmSnapshot) -> Failure {
    let why = match now.message.as_str() {
        "" => format!("it is {}", now.state),
        why => why.to_owned(),
    };
    Failure::failed(
        format!("{vm}: the snapshot {name}: {why}"),
        format!("`haven vm snapshot ls {vm}` tells how it stands, `haven events` what came before"),
    )
}

/// What became of a snapshot.
enum End {
    Is(Box<SnapshotView>),
    Gone,
    NotYet,
}

/// Waits until there is nothing more to be done about it.
async fn end(
    client: &Client,
    vm: &str,
    asked: &SnapshotView,
    wait: Waiting,
) -> Result<End, Failure> {
    if wait.no_wait {
        return Ok(End::NotYet);
    }
    let (begin, mut told) = (Instant::now(), String::new());
    loop {
        let all = client.snapshots(vm).await?;
        let now = all.into_iter().find(|now| now.snapshot.id == asked.snapshot.id);
        let Some(now) = now else { return Ok(End::Gone) };
        if !now.snapshot.is_due() {
            return Ok(End::Is(Box::new(now)));
        }
        let why = now.waiting.unwrap_or_default();
        if begin.elapsed() >= Duration::from_secs(wait.timeout) {
            let so_far = if why.is_empty() { String::new() } else { format!(": {why}") };
            return Err(Failure::failed(
                format!(
                    "{vm}: the snapshot {} is {} after {} s{so_far}",
                    asked.name, now.snapshot.state, wait.timeout
                ),
                format!("it goes on by itself; `haven vm snapshot ls {vm}` tells how it stands"),
            ));
        }
        if !why.is_empty() && why != told {
            out::line(format_args!("waiting: {why}"));
            told = why;
        }
        tokio::time::sleep(PAUSE).await;
    }
}
