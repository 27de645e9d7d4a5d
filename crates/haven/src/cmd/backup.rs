//! `haven backup …`: VMs kept outside the cluster, and made again from there.

use super::{Removal, create, list, migrate::bar, new, reference, remove, show, wait};
use crate::{
    connect::connect,
    failure::Failure,
    out,
    render::{self, How},
};
use clap::{Args, Subcommand};
use haven_client::Client;
use haven_model::{
    Bytes, Name, Object, TargetSpec,
    api::{BackupAsked, BackupList, RestoreAsked, VerifyAsked},
    backup::{BackupRun, S3Spec, Verification},
    object::Kind,
};
use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// Between two looks.
const PAUSE: Duration = Duration::from_millis(200);

/// Commands.
#[derive(Debug, Subcommand)]
pub enum BackupCommand {
    /// Where backups go
    #[command(subcommand)]
    Target(TargetCommand),
    /// Back up a VM, while its guest runs or not
    #[command(
        after_help = "Examples:\n  haven backup run db\n  haven backup run db --to offsite --no-wait\n  haven backup run db --cancel"
    )]
    Run(RunBackup),
    /// When VMs are backed up, and how the last backup of each stands
    #[command(after_help = "Examples:\n  haven backup status\n  haven backup status -o json")]
    Status(How),
    /// List backups
    #[command(
        after_help = "Examples:\n  haven backup ls\n  haven backup ls db\n  haven backup ls --in offsite -o json"
    )]
    Ls {
        /// Only those of this VM
        vm: Option<String>,
        /// Only those in this target
        #[arg(long = "in", value_name = "TARGET")]
        target: Option<String>,
        #[command(flatten)]
        how: How,
    },
    /// List what stands at a place of a backup, or which places there are
    #[command(
        after_help = "Examples:\n  haven backup files db newest\n  haven backup files db 20261130T021500Z root:1:/etc"
    )]
    Files {
        /// Of which VM
        vm: String,
        /// Which backup, as `haven backup ls` names it; or `newest`
        id: String,
        /// DISK:/PATH or DISK:PARTITION:/PATH
        at: Option<String>,
        /// The target, when there are several
        #[arg(long = "in", value_name = "TARGET")]
        target: Option<String>,
        #[command(flatten)]
        how: How,
    },
    /// Get a single file out of a backup
    #[command(
        after_help = "Examples:\n  haven backup extract db newest root:1:/etc/fstab\n  haven backup extract db 20261130T021500Z root:1:/srv/dump.sql --into dump.sql"
    )]
    Extract {
        /// Of which VM
        vm: String,
        /// Which backup, as `haven backup ls` names it; or `newest`
        id: String,
        /// DISK:/PATH or DISK:PARTITION:/PATH
        at: String,
        /// The file to write, which must not be there; what it holds is printed when absent
        #[arg(long, value_name = "FILE")]
        into: Option<PathBuf>,
        /// The target, when there are several
        #[arg(long = "in", value_name = "TARGET")]
        target: Option<String>,
    },
    /// Make a VM from a backup, under its own name or another one
    #[command(
        after_help = "Examples:\n  haven backup restore db --as db-yesterday\n  haven backup restore db 20261130T021500Z --as db-old --pool fast --stopped"
    )]
    Restore(Restore),
    /// Read backups again and compare them with their checksums
    #[command(
        after_help = "Examples:\n  haven backup verify\n  haven backup verify db --in offsite\n  haven backup verify db 20261130T021500Z"
    )]
    Verify(Verify),
    /// Remove a backup; what others do not share with it goes a week later
    #[command(after_help = "Examples:\n  haven backup rm db 20261130T021500Z")]
    Rm {
        /// Of which VM
        vm: String,
        /// Which backup, as `haven backup ls` names it
        id: String,
        /// The target, when there are several
        #[arg(long = "in", value_name = "TARGET")]
        target: Option<String>,
    },
}

/// Targets.
#[derive(Debug, Subcommand)]
pub enum TargetCommand {
    /// Have backups go to a directory that every host has, or to a bucket that speaks S3; it must be empty
    #[command(
        after_help = "Examples:\n  haven backup target create nas --directory /mnt/nas/haven\n  haven backup target create offsite --s3 https://s3.example.net --bucket haven --access-key AK --secret-key-file key.txt"
    )]
    Create(NewTarget),
    /// Make the target of a manifest ready: what is at its place must be empty, or a target already
    #[command(after_help = "Examples:\n  haven backup target mark offsite")]
    Mark {
        /// Its name
        name: String,
    },
    /// List targets
    #[command(after_help = "Examples:\n  haven backup target ls\n  haven backup target ls -o json")]
    Ls(How),
    /// Show a target and who uses it; its key is never shown
    #[command(after_help = "Examples:\n  haven backup target show offsite -o yaml")]
    Show {
        /// Its name
        name: String,
        #[command(flatten)]
        how: How,
    },
    /// Forget a target once no VM uses it; the backups in it stay
    #[command(after_help = "Examples:\n  haven backup target rm nas --wait")]
    Rm(Removal),
}

/// What a target is made of.
#[derive(Debug, Args)]
pub struct NewTarget {
    /// Its name
    name: String,
    /// A directory at which every host finds the same file system
    #[arg(long, value_name = "PATH", required_unless_present = "s3", conflicts_with = "s3")]
    directory: Option<String>,
    /// The server of a bucket: https://HOST[:PORT]
    #[arg(long, value_name = "URL", requires_all = ["bucket", "access_key", "secret_key_file"])]
    s3: Option<String>,
    /// The bucket
    #[arg(long, requires = "s3")]
    bucket: Option<String>,
    /// What the names of all objects begin with
    #[arg(long, requires = "s3")]
    prefix: Option<String>,
    /// The bucket's region
    #[arg(long, requires = "s3", default_value = "us-east-1")]
    region: String,
    /// The id of the key
    #[arg(long, requires = "s3")]
    access_key: Option<String>,
    /// A file that holds the key; the cluster keeps it sealed
    #[arg(long, value_name = "FILE", requires = "s3")]
    secret_key_file: Option<PathBuf>,
    /// A file with the authority of the server's certificate, PEM
    #[arg(long, value_name = "FILE", requires = "s3")]
    ca: Option<PathBuf>,
}

/// A backup to be made.
#[derive(Debug, Args)]
pub struct RunBackup {
    /// Which VM
    vm: String,
    /// Where to; where its spec says, or to the only target, when absent
    #[arg(long, value_name = "TARGET")]
    to: Option<Name>,
    /// End the one that goes on
    #[arg(long, conflicts_with = "to")]
    cancel: bool,
    /// Ask for it, and do not wait for its end
    #[arg(long)]
    no_wait: bool,
}

/// A VM to be made.
#[derive(Debug, Args)]
pub struct Restore {
    /// Of which VM the backup is
    vm: Name,
    /// Which backup, as `haven backup ls` names it; the newest when absent
    id: Option<String>,
    /// The name of the new VM
    #[arg(long = "as", value_name = "NAME")]
    name: Option<Name>,
    /// The target, when there are several
    #[arg(long = "in", value_name = "TARGET")]
    target: Option<Name>,
    /// The pool of its disks, when it is not to be that of before
    #[arg(long)]
    pool: Option<Name>,
    /// Do not start it
    #[arg(long)]
    stopped: bool,
    /// Ask for it, and do not wait until it runs
    #[arg(long)]
    no_wait: bool,
    /// How long to wait, seconds
    #[arg(long, default_value_t = 3600)]
    timeout: u64,
}

/// A comparison.
#[derive(Debug, Args)]
pub struct Verify {
    /// Only those of this VM
    vm: Option<Name>,
    /// Only this one
    id: Option<String>,
    /// The target, when there are several
    #[arg(long = "in", value_name = "TARGET")]
    target: Option<Name>,
    /// End the one that goes on
    #[arg(long)]
    cancel: bool,
    /// Ask for it, and do not wait for its end
    #[arg(long)]
    no_wait: bool,
}

/// Runs it.
pub async fn run(command: BackupCommand) -> Result<(), Failure> {
    match command {
        BackupCommand::Target(command) => target(command).await,
        BackupCommand::Run(asked) => backup(asked).await,
        BackupCommand::Status(how) => {
            let all = connect().await?.backups().await?;
            out::print(&render::value(&all, how.output, |_| render::backup_status(&all)));
            Ok(())
        }
        BackupCommand::Ls { vm, target, how } => {
            let client = connect().await?;
            let lists = held(&client, vm.as_deref(), target).await?;
            out::print(&render::value(&lists, how.output, |_| render::backups(&lists)));
            out::warn(
                lists.iter().flat_map(|(_, list)| list.unreadable.iter().map(String::as_str)),
            );
            Ok(())
        }
        BackupCommand::Files { vm, id, at, target, how } => {
            let client = connect().await?;
            let target = one_target(&client, target.as_deref()).await?;
            let found = client.backup_files(target.as_str(), &vm, &id, at.as_deref()).await?;
            out::print(&render::value(&found, how.output, |_| render::backup_files(&found)));
            Ok(())
        }
        BackupCommand::Extract { vm, id, at, into, target } => {
            let client = connect().await?;
            let target = one_target(&client, target.as_deref()).await?;
            let file = client.backup_file(target.as_str(), &vm, &id, &at).await?;
            extract(file, into.as_deref()).await
        }
        BackupCommand::Restore(asked) => restore(asked).await,
        BackupCommand::Verify(asked) => verify(asked).await,
        BackupCommand::Rm { vm, id, target } => {
            let client = connect().await?;
            let target = one_target(&client, target.as_deref()).await?;
            client.remove_backup(target.as_str(), &vm, &id).await?;
            out::line(format_args!("the backup {id} of {vm} in {target} is removed"));
            Ok(())
        }
    }
}

/// Brings a file to where it is wanted.
async fn extract(
    mut file: impl tokio::io::AsyncRead + Unpin,
    into: Option<&Path>,
) -> Result<(), Failure> {
    let broke = |error: std::io::Error| {
        let hint = "`haven backup verify` tells whether the backup is whole";
        Failure::failed(format!("the file did not come whole: {error}"), hint)
    };
    let Some(path) = into else {
        tokio::io::copy(&mut file, &mut tokio::io::stdout()).await.map_err(broke)?;
        return Ok(());
    };
    let shown = path.display();
    let made = tokio::fs::OpenOptions::new().write(true).create_new(true).open(path).await;
    let mut made = made.map_err(|error| {
        Failure::bad(format!("{shown} cannot be made: {error}"), "name a file that is not there")
    })?;
    let copied = tokio::io::copy(&mut file, &mut made).await;
    let bytes = match copied {
        Ok(bytes) => bytes,
        Err(error) => {
            let _ = tokio::fs::remove_file(path).await;
            return Err(broke(error));
        }
    };
    made.sync_all().await.map_err(broke)?;
    out::line(format_args!("{shown}: {bytes} bytes"));
    Ok(())
}

async fn target(command: TargetCommand) -> Result<(), Failure> {
    match command {
        TargetCommand::Create(given) => {
            let name = given.name.clone();
            let client = connect().await?;
            let object = Object::Target(new(&name, spec(given)?)?);
            create(&client, object).await?;
            client.mark_target(&name).await.map_err(|error| {
                let hint = format!(
                    "mend that and run `haven backup target mark {name}`, or forget it: `haven backup target rm {name}`"
                );
                Failure::from(error).hinting(hint)
            })?;
            out::line(format_args!("target/{name} is ready"));
            Ok(())
        }
        TargetCommand::Mark { name } => {
            connect().await?.mark_target(&name).await?;
            out::line(format_args!("target/{name} is ready"));
            Ok(())
        }
        TargetCommand::Ls(how) => list(Kind::Target, how.output).await,
        TargetCommand::Show { name, how } => {
            show(&reference(Kind::Target, &name)?, how.output).await
        }
        TargetCommand::Rm(removal) => remove(Kind::Target, &removal).await,
    }
}

fn read(path: &PathBuf) -> Result<String, Failure> {
    std::fs::read_to_string(path).map_err(|error| {
        let message = format!("{} cannot be read: {error}", path.display());
        Failure::bad(message, "check the path and its owner")
    })
}

fn spec(given: NewTarget) -> Result<TargetSpec, Failure> {
    let Some(endpoint) = given.s3 else {
        return Ok(TargetSpec { directory: given.directory, s3: None });
    };
    let secret_key = given.secret_key_file.as_ref().map(read).transpose()?.unwrap_or_default();
    let s3 = S3Spec {
        endpoint,
        bucket: given.bucket.unwrap_or_default(),
        prefix: given.prefix,
        region: given.region,
        access_key: given.access_key.unwrap_or_default(),
        secret_key: secret_key.trim().to_owned(),
        ca: given.ca.as_ref().map(read).transpose()?,
    };
    Ok(TargetSpec { directory: None, s3: Some(s3) })
}

/// All targets, or the one that is named.
async fn targets(client: &Client, named: Option<&str>) -> Result<Vec<Name>, Failure> {
    if let Some(named) = named {
        return Ok(vec![Name::new(named)?]);
    }
    let all = client.list(Kind::Target).await?;
    Ok(all.iter().map(|item| item.object.meta().name.clone()).collect())
}

/// The target that is named, or the only one.
async fn one_target(client: &Client, named: Option<&str>) -> Result<Name, Failure> {
    let all = targets(client, named).await?;
    match all.as_slice() {
        [one] => Ok(one.clone()),
        [] => Err(Failure::bad(
            "there is no target, so there are no backups",
            "`haven backup target create NAME --directory PATH` makes one",
        )),
        several => {
            let names: Vec<&str> = several.iter().map(Name::as_str).collect();
            Err(Failure::bad(
                format!("there are several targets: {}", names.join(", ")),
                "name one with `--in`",
            ))
        }
    }
}

/// What targets hold.
async fn held(
    client: &Client,
    vm: Option<&str>,
    target: Option<String>,
) -> Result<Vec<(Name, BackupList)>, Failure> {
    let mut lists = Vec::new();
    for target in targets(client, target.as_deref()).await? {
        let list = client.target_backups(target.as_str(), vm).await?;
        lists.push((target, list));
    }
    Ok(lists)
}

async fn backup(asked: RunBackup) -> Result<(), Failure> {
    let (vm, client) = (&asked.vm, connect().await?);
    if asked.cancel {
        client.cancel_backup(vm).await?;
        out::line(format_args!("the backup of {vm} is ended"));
        return Ok(());
    }
    let begun = client.run_backup(vm, &BackupAsked { to: asked.to }).await?;
    let Some(run) = begun.run else { return Ok(()) };
    if asked.no_wait {
        out::line(format_args!(
            "{vm} is backed up to {}; `haven backup status` tells how it stands",
            run.to
        ));
        return Ok(());
    }
    let (begin, bar) = (Instant::now(), bar());
    loop {
        let now = client.backup(vm).await?;
        let Some(now) = now.run.filter(|now| now.id == run.id) else {
            return Err(Failure::failed(
                format!("somebody else had {vm} backed up meanwhile"),
                "`haven backup status` tells what came of it",
            ));
        };
        if let Some(outcome) = &now.outcome {
            bar.finish_and_clear();
            return told(
                vm,
                outcome.well,
                &outcome.message,
                "`haven events` tells what came before",
            );
        }
        bar.set_length(now.total.0);
        bar.set_position(now.done.0);
        bar.set_message(figures(&now, begin.elapsed()));
        tokio::time::sleep(PAUSE).await;
    }
}

/// Says how something ended.
fn told(what: &str, well: bool, message: &str, hint: &str) -> Result<(), Failure> {
    if well {
        out::line(format_args!("{what}: {message}"));
        return Ok(());
    }
    Err(Failure::failed(format!("{what}: {message}"), hint))
}

/// How far a backup is, how fast it goes, and when it is expected to end.
fn figures(run: &BackupRun, passed: Duration) -> String {
    let mib = |bytes: u64| Bytes::mib(bytes >> 20);
    let (total, done) = (run.total.0, run.done.0);
    let rate = (done as f64 / passed.as_secs_f64().max(0.1)) as u64;
    if total == 0 || rate == 0 {
        return "begins".into();
    }
    let left = total.saturating_sub(done) / rate;
    format!("{} of {} read, {} per second, about {left} s left", mib(done), mib(total), mib(rate))
}

async fn restore(asked: Restore) -> Result<(), Failure> {
    let client = connect().await?;
    let target = match asked.target {
        Some(target) => target,
        None => one_target(&client, None).await?,
    };
    let stopped = asked.stopped;
    let applied = client
        .restore(&RestoreAsked {
            target,
            vm: asked.vm,
            backup: asked.id,
            name: asked.name,
            pool: asked.pool,
            stopped,
        })
        .await?;
    let asked_for = wait::asked(&applied)?;
    for one in &applied {
        out::line(format_args!("{} {}", one.object, one.outcome));
        out::warn(std::iter::once(one.warning.as_str()));
    }
    if stopped || asked.no_wait {
        out::line("its disks are made from the backup when it is started");
        return Ok(());
    }
    wait::ready(&client, &asked_for, Duration::from_secs(asked.timeout)).await
}

async fn verify(asked: Verify) -> Result<(), Failure> {
    let client = connect().await?;
    let named = asked.target.as_ref().map(Name::as_str);
    let target = one_target(&client, named).await?;
    let name = target.as_str();
    if asked.cancel {
        client.cancel_verification(name).await?;
        out::line(format_args!("the comparison of {target} is ended"));
        return Ok(());
    }
    let of = VerifyAsked { vm: asked.vm, backup: asked.id };
    let begun = client.verify_backups(name, &of).await?;
    if asked.no_wait {
        out::line(format_args!("the backups in {target} are compared with their checksums"));
        return Ok(());
    }
    let (begin, bar) = (Instant::now(), bar());
    loop {
        let now = client.verification(name).await?;
        if now.id != begun.id {
            return Err(Failure::failed(
                format!("somebody else had {target} compared meanwhile"),
                "run it again",
            ));
        }
        if let Some(outcome) = &now.outcome {
            bar.finish_and_clear();
            now.damaged.iter().for_each(out::line);
            let hint = "what is damaged cannot be restored: back the VM up again; the earlier backups that are whole can still be used";
            return told(name, outcome.well, &outcome.message, hint);
        }
        bar.set_length(now.total);
        bar.set_position(now.done);
        bar.set_message(read_so_far(&now, begin.elapsed()));
        tokio::time::sleep(PAUSE).await;
    }
}

fn read_so_far(now: &Verification, passed: Duration) -> String {
    let rate = now.done as f64 / passed.as_secs_f64().max(0.1);
    if rate < 0.1 {
        return "begins".into();
    }
    let left = now.total.saturating_sub(now.done) as f64 / rate;
    format!("{} of {} chunks, about {left:.0} s left", now.done, now.total)
}
