//! `haven lab …`.

use crate::{
    host_init::{self, Layout},
    lab::{Lab, tool},
    power, up,
};
use anyhow::{Context, Result, bail};
use clap::Subcommand;
use std::{os::unix::process::CommandExt, path::PathBuf};

/// A cluster on this machine.
#[derive(Debug, Subcommand)]
pub enum LabCommand {
    /// Make hosts and a cluster of them
    #[command(after_help = "Examples:\n  haven lab up\n  haven lab up --hosts 5")]
    Up {
        /// How many hosts [default: 3, or as many as this lab has]
        #[arg(long)]
        hosts: Option<u32>,
        /// Only switch the hosts on; make no cluster
        #[arg(long)]
        bare: bool,
        /// Do not tell the cluster how to switch hosts off: a lost host is recovered when its lease has expired
        #[arg(long)]
        no_power_control: bool,
        /// The last host is only the cluster's witness
        #[arg(long)]
        witness: bool,
    },
    /// End all of it
    #[command(after_help = "Examples:\n  haven lab down")]
    Down,
    /// Cut a host's power
    #[command(after_help = "Examples:\n  haven lab kill host2")]
    Kill { host: String },
    /// Switch a host on
    #[command(after_help = "Examples:\n  haven lab start host2")]
    Start { host: String },
    /// Cut a host off the network, wholly or from one other host
    #[command(
        after_help = "Examples:\n  haven lab cut host2\n  haven lab cut host2 --from host1\n  haven lab cut host2 --from host1 --one-way"
    )]
    Cut {
        host: String,
        /// Only from this host
        #[arg(long)]
        from: Option<String>,
        /// Packets of HOST to the other vanish; those back pass
        #[arg(long, requires = "from")]
        one_way: bool,
    },
    /// Mend all cables
    #[command(after_help = "Examples:\n  haven lab heal")]
    Heal,
    /// Stop every process of a host
    #[command(after_help = "Examples:\n  haven lab pause host2")]
    Pause { host: String },
    /// Let a paused host go on
    #[command(after_help = "Examples:\n  haven lab resume host2")]
    Resume { host: String },
    /// Take the watchdogs out, or put them back: they reset a host that was paused for 2 s
    #[command(after_help = "Examples:\n  haven lab watchdog off\n  haven lab watchdog on host2")]
    Watchdog {
        /// `on` or `off`
        #[arg(action = clap::ArgAction::Set, value_parser = clap::builder::BoolishValueParser::new())]
        on: bool,
        /// Only of this host
        host: Option<String>,
    },
    /// A shell in a host, or in the client outside the cluster
    #[command(after_help = "Examples:\n  haven lab shell host1\n  haven lab shell client")]
    Shell { place: String },
    /// Run a command in a host, or in the client outside the cluster
    #[command(after_help = "Examples:\n  haven lab exec client -- curl -s http://10.88.0.100/")]
    Exec {
        place: String,
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    #[command(hide = true)]
    HostInit {
        #[arg(long)]
        lower: PathBuf,
        #[arg(long)]
        host_dir: PathBuf,
        #[arg(long)]
        shared: PathBuf,
        #[arg(long)]
        binaries: PathBuf,
        #[arg(long)]
        name: String,
        #[arg(long)]
        watchdog: Option<PathBuf>,
    },
    #[command(hide = true)]
    PowerApi,
    /// The prefix of this lab's namespaces
    #[command(hide = true)]
    Id,
}

/// Runs it.
///
/// # Errors
/// With a sentence that says what to do.
pub async fn run(command: LabCommand) -> Result<()> {
    if let LabCommand::HostInit { lower, host_dir, shared, binaries, name, watchdog } = command {
        return host_init::run(&Layout { lower, host_dir, shared, binaries, watchdog, name });
    }
    need_root()?;
    let mut lab = Lab::open()?;
    match command {
        LabCommand::Up { hosts, bare, no_power_control, witness } => {
            lab.state.witness |= witness;
            lab.state.no_power_control |= no_power_control;
            up::up(&mut lab, hosts, bare).await
        }
        LabCommand::Down => lab.down(),
        LabCommand::Kill { host } => lab.power_off(&host),
        LabCommand::Start { host } => lab.power_on(&host),
        LabCommand::Cut { host, from, one_way } => cut(&mut lab, &host, from, one_way),
        LabCommand::Heal => {
            lab.state.cuts.clear();
            lab.save()?;
            lab.set_cuts()?;
            lab.hosts()
                .iter()
                .filter(|host| lab.init(host).is_some())
                .try_for_each(|host| lab.set_cable(host, true))
        }
        LabCommand::Pause { host } => lab.set_paused(&host, true),
        LabCommand::Resume { host } => lab.set_paused(&host, false),
        LabCommand::Watchdog { on, host } => {
            let hosts = host.map_or_else(|| lab.hosts(), |host| vec![host]);
            hosts.iter().try_for_each(|host| crate::watchdog::set(&lab, host, on))
        }
        LabCommand::Shell { place } => {
            let error = lab.command(&place, "bash")?.exec();
            Err(error).context("the shell cannot be started")
        }
        LabCommand::Exec { place, command } => {
            let error = lab.command(&place, &command[0])?.args(&command[1..]).exec();
            Err(error).with_context(|| format!("`{}` cannot be started there", command[0]))
        }
        LabCommand::Id => {
            println!("{}", lab.state.id);
            Ok(())
        }
        LabCommand::PowerApi => power::serve(&lab),
        LabCommand::HostInit { .. } => Ok(()),
    }
}

/// Refuses whoever is not root.
///
/// # Errors
/// With what to do.
pub fn need_root() -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("the lab makes namespaces and needs root; run it with sudo");
    }
    Ok(())
}

fn cut(lab: &mut Lab, host: &str, from: Option<String>, one_way: bool) -> Result<()> {
    lab.host(host)?;
    let Some(other) = from else {
        return lab.set_cable(host, false);
    };
    lab.host(&other)?;
    lab.state.cuts.push((host.to_owned(), other.clone()));
    if !one_way {
        lab.state.cuts.push((other, host.to_owned()));
    }
    lab.save()?;
    lab.set_cuts()
}

/// Used by tests: what is left of a lab on this machine.
///
/// # Errors
/// When `ip` cannot be asked.
pub fn leftovers(id: &str) -> Result<Vec<String>> {
    let prefix = format!("{id}-");
    let spaces = tool("ip", &["netns", "list"])?;
    Ok(spaces.lines().filter(|line| line.starts_with(&prefix)).map(str::to_owned).collect())
}
