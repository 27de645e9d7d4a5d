//! `haven`: one binary that is the command line, the daemon and the guard.

mod cmd;
mod connect;
mod daemon;
mod failure;
mod paths;
mod render;

use clap::{CommandFactory, Parser, Subcommand};
use failure::Failure;
use std::process::ExitCode;

/// Turns a few Linux servers into one cluster that keeps services running when servers die.
#[derive(Debug, Parser)]
#[command(
    name = "haven",
    version,
    after_help = "Begin with `haven lab up` on one machine, or `haven init` on the first of several."
)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    #[command(flatten)]
    Cluster(cmd::cluster::ClusterCommand),
    #[command(flatten)]
    Objects(cmd::objects::ObjectsCommand),
    /// Virtual machines (tolerance)
    #[command(subcommand)]
    Vm(cmd::vm::VmCommand),
    /// Services and their addresses (balance)
    #[command(subcommand)]
    Service(cmd::service::ServiceCommand),
    /// Images (storage)
    #[command(subcommand)]
    Image(cmd::image::ImageCommand),
    /// Servers of the cluster (tolerance)
    #[command(subcommand)]
    Host(cmd::host::HostCommand),
    #[command(flatten)]
    Watch(cmd::watch::WatchCommand),
    /// A real cluster on this machine, to try and to test
    #[command(subcommand)]
    Lab(haven_lab::command::LabCommand),
    /// What systemd runs: the daemon of this host
    #[command(after_help = "Examples:\n  haven daemon")]
    Daemon,
    /// What systemd runs: the guard of this host
    #[command(after_help = "Examples:\n  haven guard")]
    Guard,
    /// Print shell completions
    #[command(after_help = "Examples:\n  haven completions bash > /etc/bash_completion.d/haven")]
    Completions {
        /// bash, zsh, fish
        shell: clap_complete::Shell,
    },
    /// Write man pages into a directory
    #[command(hide = true)]
    Man {
        /// The directory
        dir: std::path::PathBuf,
    },
    /// Write the API's description (OpenAPI 3.1)
    #[command(hide = true)]
    Openapi {
        /// Only say whether the file is what the code gives
        #[arg(long)]
        check: bool,
        /// The file
        #[arg(default_value = "docs/openapi.json")]
        file: std::path::PathBuf,
    },
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprint!("{failure}");
            ExitCode::from(failure.code)
        }
    }
}

fn log() {
    use tracing_subscriber::EnvFilter;
    let filter = EnvFilter::try_from_env("HAVEN_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(false)
        .with_writer(std::io::stderr)
        .init();
}

fn run(command: Command) -> Result<(), Failure> {
    // The guard is a process of its own kind: no runtime, no allocation after its start.
    if matches!(command, Command::Guard) {
        log();
        let options = haven_host::guard::process::GuardOptions {
            run_dir: paths::Paths::from_env().run,
            watchdog: std::env::var_os("HAVEN_WATCHDOG").map(Into::into),
        };
        return haven_host::guard::process::run(&options)
            .map_err(|error| Failure::other(error.into()));
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| Failure::other(error.into()))?;
    runtime.block_on(dispatch(command))
}

async fn dispatch(command: Command) -> Result<(), Failure> {
    match command {
        Command::Cluster(command) => cmd::cluster::run(command).await,
        Command::Objects(command) => cmd::objects::run(command).await,
        Command::Vm(command) => cmd::vm::run(command).await,
        Command::Service(command) => cmd::service::run(command).await,
        Command::Image(command) => cmd::image::run(command).await,
        Command::Host(command) => cmd::host::run(command).await,
        Command::Watch(command) => cmd::watch::run(command).await,
        Command::Lab(command) => haven_lab::command::run(command).await.map_err(Failure::other),
        Command::Daemon => {
            log();
            daemon::run().await.map_err(Failure::other)
        }
        Command::Guard => Ok(()),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "haven", &mut std::io::stdout());
            Ok(())
        }
        Command::Man { dir } => clap_mangen::generate_to(Cli::command(), dir)
            .map_err(|error| Failure::other(error.into())),
        Command::Openapi { check, file } => openapi(check, &file),
    }
}

fn openapi(check: bool, file: &std::path::Path) -> Result<(), Failure> {
    let text = haven_control::api::openapi::text();
    let shown = file.display();
    if !check {
        return std::fs::write(file, text).map_err(|error| {
            let hint = "run this at the root of the tree, or name a file that can be written";
            Failure::bad(format!("`{shown}` cannot be written ({error})"), hint)
        });
    }
    let there = std::fs::read_to_string(file).map_err(|error| {
        let hint = "run this at the root of the tree; `cargo run -p xtask -- openapi` writes it";
        Failure::bad(format!("`{shown}` cannot be read ({error})"), hint)
    })?;
    if there == text {
        println!("1 passed, 0 failed");
        return Ok(());
    }
    let line = there.lines().zip(text.lines()).take_while(|(a, b)| a == b).count() + 1;
    Err(Failure::bad(
        format!("`{shown}` is not what the code gives, from line {line} on"),
        "write it with `cargo run -p xtask -- openapi` and commit it",
    ))
}

#[cfg(test)]
mod tests {
    use super::Cli;
    use clap::CommandFactory;

    fn leaves(command: &clap::Command, path: &str, found: &mut Vec<(String, bool)>) {
        let path = format!("{path} {}", command.get_name());
        let subs: Vec<_> = command
            .get_subcommands()
            .filter(|c| c.get_name() != "help" && !c.is_hide_set())
            .collect();
        if subs.is_empty() {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            found.push((path.clone(), help.contains("Examples:")));
        }
        subs.into_iter().for_each(|sub| leaves(sub, &path, found));
    }

    #[test]
    fn the_command_line_is_sound_and_every_command_has_an_example() {
        Cli::command().debug_assert();
        let mut found = Vec::new();
        leaves(&Cli::command(), "", &mut found);
        let missing: Vec<_> = found.iter().filter(|(_, example)| !example).collect();
        assert!(missing.is_empty(), "without an example: {missing:?}");
        assert!(found.len() > 30);
    }
}
