//! `haven vm …`.

use super::{
    Removal,
    clone::{self, CloneVm},
    create, files, list,
    migrate::{self, Move},
    new, reference, remove, said, show,
    snapshot::{self, SnapshotCommand},
    wait,
};
use crate::{connect::connect, failure::Failure, out, render::How};
use clap::{Args, Subcommand};
use haven_model::{
    Bytes, MigrationOptions, ModelError, Name, Object, ObjectRef, VmSpec,
    object::Kind,
    units::Millis,
    vm::{AffinitySpec, DiskSpec, NicSpec, Priority, RestartPolicy},
};
use std::{os::fd::AsFd, path::PathBuf, time::Duration};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// What is wanted of a VM.
#[derive(Debug, Args)]
pub struct NewVm {
    /// Its name
    name: String,
    /// For example 2GiB
    #[arg(long)]
    memory: Bytes,
    /// Virtual CPUs
    #[arg(long, default_value_t = 1)]
    cpus: u32,
    /// An image that boots directly
    #[arg(long)]
    image: Option<String>,
    /// NETWORK[=ADDRESS]; may be given several times
    #[arg(long)]
    network: Vec<String>,
    /// NAME:SIZE:POOL[:IMAGE]; may be given several times
    #[arg(long)]
    disk: Vec<String>,
    /// KEY=VALUE, for spread rules; may be given several times
    #[arg(long)]
    label: Vec<String>,
    /// A file for cloud-init
    #[arg(long)]
    user_data: Option<PathBuf>,
    /// low, normal, high or critical: who gets a host first
    #[arg(long, default_value = "normal", value_parser = priority)]
    priority: Priority,
    /// vm/NAME or service/NAME that must be ready before it is started; may be given several times
    #[arg(long)]
    after: Vec<String>,
    /// Make it, and do not start it
    #[arg(long)]
    stopped: bool,
    /// Wait until it runs
    #[arg(long)]
    wait: bool,
    /// How long, seconds
    #[arg(long, default_value_t = 180)]
    timeout: u64,
}

/// Commands.
#[derive(Debug, Subcommand)]
pub enum VmCommand {
    /// Make a VM; one that is there already is never changed
    #[command(
        after_help = "Examples:\n  haven vm create web-1 --image tiny --memory 128MiB --network front --wait\n  haven vm create db --memory 4GiB --cpus 2 --disk root:20GiB:fast:debian --network front=10.77.0.20"
    )]
    Create(NewVm),
    /// List VMs
    #[command(after_help = "Examples:\n  haven vm ls\n  haven vm ls -o json")]
    Ls(How),
    /// Show a VM and what there is to say of it
    #[command(after_help = "Examples:\n  haven vm show web-1\n  haven vm show web-1 -o wide")]
    Show {
        /// Its name
        name: String,
        #[command(flatten)]
        how: How,
    },
    /// Start a VM
    #[command(after_help = "Examples:\n  haven vm start web-1")]
    Start {
        /// Its name
        name: String,
    },
    /// Shut a VM down
    #[command(after_help = "Examples:\n  haven vm stop web-1")]
    Stop {
        /// Its name
        name: String,
    },
    /// Press a VM's reset button; what was changed of it takes effect
    #[command(after_help = "Examples:\n  haven vm reset web-1")]
    Reset {
        /// Its name
        name: String,
    },
    /// Move a VM to another host while it runs
    #[command(
        after_help = "Examples:\n  haven vm migrate web-1\n  haven vm migrate web-1 --to host2 --downtime 100\n  haven vm migrate web-1 --cancel"
    )]
    Migrate(Move),
    /// Its disks as they were, kept in themselves
    #[command(subcommand)]
    Snapshot(SnapshotCommand),
    /// Make a VM of another one, with what is on its disks; the source runs on
    #[command(
        after_help = "Examples:\n  haven vm clone db db-test\n  haven vm clone db db-before --snapshot before-upgrade --stopped"
    )]
    Clone(CloneVm),
    /// Delete a VM, with its disks and its snapshots
    #[command(after_help = "Examples:\n  haven vm rm web-1 --wait")]
    Rm(Removal),
    /// Open a VM's console; Ctrl-] leaves it
    #[command(after_help = "Examples:\n  haven vm console web-1")]
    Console {
        /// Its name
        name: String,
    },
    /// What a VM's console said
    #[command(after_help = "Examples:\n  haven vm log web-1")]
    Log {
        /// Its name
        name: String,
    },
}

/// `NAME:SIZE:POOL[:IMAGE]`.
fn disk(text: &str) -> Result<DiskSpec, Failure> {
    let wrong = |why: String| {
        Failure::bad(
            format!("`{text}` is not a disk{why}"),
            "write NAME:SIZE:POOL[:IMAGE], for example root:10GiB:fast:debian",
        )
    };
    let parts: Vec<&str> = text.split(':').collect();
    let ([name, size, pool] | [name, size, pool, _]) = parts.as_slice() else {
        return Err(wrong(String::new()));
    };
    let because = |error: ModelError| wrong(format!(": {error}"));
    let name = Name::new(*name).map_err(because)?;
    let (size, pool) = (size.parse().map_err(because)?, Name::new(*pool).map_err(because)?);
    let image = parts.get(3).map(|image| Name::new(*image)).transpose().map_err(because)?;
    Ok(DiskSpec { image, ..DiskSpec::new(name, size, pool) })
}

/// `NETWORK[=ADDRESS]`.
fn nic(text: &str) -> Result<NicSpec, Failure> {
    let (network, address) = text.split_once('=').map_or((text, None), |(n, a)| (n, Some(a)));
    let address = address.map(|a| a.parse()).transpose().map_err(|_| {
        Failure::bad(
            format!("`{text}` has no IPv4 address behind `=`"),
            "write NETWORK or NETWORK=ADDRESS",
        )
    })?;
    Ok(NicSpec { network: Name::new(network)?, address })
}

/// As a manifest writes it.
fn priority(text: &str) -> Result<Priority, String> {
    serde_json::from_value(text.into())
        .map_err(|_| format!("`{text}` is no priority: write low, normal, high or critical"))
}

/// `KEY=VALUE`.
fn label(text: &str) -> Result<(String, String), Failure> {
    let (key, value) = text
        .split_once('=')
        .filter(|(key, _)| !key.is_empty())
        .ok_or_else(|| Failure::bad(format!("`{text}` is not a label"), "write KEY=VALUE"))?;
    Ok((key.to_owned(), value.to_owned()))
}

impl NewVm {
    fn object(&self) -> Result<Object, Failure> {
        let spec = VmSpec {
            cpus: self.cpus,
            memory: self.memory,
            image: self.image.as_deref().map(Name::new).transpose()?,
            disks: self.disk.iter().map(|d| disk(d)).collect::<Result<_, _>>()?,
            networks: self.network.iter().map(|n| nic(n)).collect::<Result<_, _>>()?,
            user_data: self
                .user_data
                .as_ref()
                .map(|path| files::one(path))
                .transpose()?
                .map(|f| f.text),
            restart: RestartPolicy::default(),
            affinity: AffinitySpec::default(),
            priority: self.priority,
            after: self.after.iter().map(|what| what.parse()).collect::<Result<_, _>>()?,
            after_timeout: None,
            running: !self.stopped,
            stop_grace: Millis(10_000),
            resets: 0,
            check: None,
            hang: None,
            migration: MigrationOptions::default(),
            backup: None,
            snapshot: None,
            isolation: Default::default(),
        };
        let mut vm = new(&self.name, spec)?;
        vm.meta.labels = self.label.iter().map(|l| label(l)).collect::<Result<_, _>>()?;
        Ok(Object::Vm(vm))
    }
}

/// Runs it.
pub async fn run(command: VmCommand) -> Result<(), Failure> {
    let named = |name: &str| reference(Kind::Vm, name);
    match command {
        VmCommand::Create(vm) => {
            let object = vm.object()?;
            let client = connect().await?;
            let item = create(&client, object).await?;
            if vm.wait {
                let asked = (item.object.reference(), item.object.meta().generation);
                wait::ready(&client, &[asked], Duration::from_secs(vm.timeout)).await?;
            }
        }
        VmCommand::Ls(how) => list(Kind::Vm, how.output).await?,
        VmCommand::Show { name, how } => show(&named(&name)?, how.output).await?,
        VmCommand::Start { name } => act(&named(&name)?, "start").await?,
        VmCommand::Stop { name } => act(&named(&name)?, "stop").await?,
        VmCommand::Reset { name } => act(&named(&name)?, "reset").await?,
        VmCommand::Migrate(wanted) => migrate::run(wanted).await?,
        VmCommand::Snapshot(command) => snapshot::run(command).await?,
        VmCommand::Clone(wanted) => clone::run(wanted).await?,
        VmCommand::Rm(removal) => remove(Kind::Vm, &removal).await?,
        VmCommand::Console { name } => {
            let name = named(&name)?.name;
            console(connect().await?.console(name.as_str()).await?).await?;
        }
        VmCommand::Log { name } => {
            let name = named(&name)?.name;
            let text = connect().await?.log(name.as_str()).await?;
            out::print(&String::from_utf8_lossy(&text));
        }
    }
    Ok(())
}

async fn act(what: &ObjectRef, action: &str) -> Result<(), Failure> {
    said(&connect().await?.vm(what.name.as_str(), action).await?);
    Ok(())
}

/// The key that leaves a console: Ctrl-].
const LEAVE: u8 = 0x1d;

/// Joins the terminal with a console until Ctrl-] or the end of either.
async fn console(stream: Box<dyn haven_client::Duplex>) -> Result<(), Failure> {
    use nix::sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr};
    let stdin = std::io::stdin();
    let saved = tcgetattr(stdin.as_fd()).ok();
    if let Some(saved) = &saved {
        let mut raw = saved.clone();
        cfmakeraw(&mut raw);
        let _ = tcsetattr(stdin.as_fd(), SetArg::TCSANOW, &raw);
        eprint!("connected; Ctrl-] leaves\r\n");
    }
    let (mut from, mut to) = tokio::io::split(stream);
    let (mut input, mut output) = (tokio::io::stdin(), tokio::io::stdout());
    let (mut typed, mut said) = ([0; 1024], [0; 4096]);
    let mut listening = true;
    loop {
        tokio::select! {
            biased;
            read = from.read(&mut said) => match read {
                Ok(n) if n > 0 => {
                    let _ = output.write_all(&said[..n]).await;
                    let _ = output.flush().await;
                }
                _ => break,
            },
            read = input.read(&mut typed), if listening => match read {
                Ok(n) if n > 0 => {
                    let left = typed[..n].iter().position(|key| *key == LEAVE);
                    if to.write_all(&typed[..left.unwrap_or(n)]).await.is_err() || left.is_some() {
                        break;
                    }
                }
                // The end of a pipe leaves time for the answer; a terminal leaves at once.
                Ok(0) if saved.is_none() => listening = false,
                _ => break,
            },
            () = tokio::time::sleep(Duration::from_secs(1)), if !listening => break,
        }
    }
    if let Some(saved) = &saved {
        let _ = tcsetattr(stdin.as_fd(), SetArg::TCSANOW, saved);
    }
    // A thread may still sit in a read of the terminal; the process ends without it.
    std::process::exit(0)
}

#[cfg(test)]
mod tests {
    use super::{disk, label, nic};

    #[test]
    fn disks_cards_and_labels_are_read_or_refused_with_words() {
        let root = disk("root:20GiB:fast:debian").unwrap();
        assert_eq!((root.size.to_string(), root.image.is_some()), ("20GiB".into(), true));
        assert!(disk("root:20GiB:fast").unwrap().image.is_none());
        assert_eq!(nic("front=10.77.0.9").unwrap().address, Some([10, 77, 0, 9].into()));
        assert_eq!(label("tier=web=1").unwrap(), ("tier".into(), "web=1".into()));
        let wrong = [
            disk("root").unwrap_err(),
            disk("root:20G:fast").unwrap_err(),
            disk("root:20GiB:fast:debian:x").unwrap_err(),
            disk("root:20GiB:fast\nimage: evil").unwrap_err(),
            nic("front=here").unwrap_err(),
            label("tier").unwrap_err(),
        ];
        let said: Vec<String> = wrong.iter().map(ToString::to_string).collect();
        insta::assert_snapshot!(said.join(""));
    }
}
