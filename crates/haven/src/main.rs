//! `haven`: one binary that is the command line and the daemon.

mod cmd;
mod connect;
mod context;
mod daemon;
mod failure;
mod help;
mod out;
mod paths;
mod render;

#[cfg(test)]
mod main_test;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use failure::Failure;
use std::{path::Path, process::ExitCode};

/// Turns a few Linux servers into one cluster that keeps services running when servers die.
#[derive(Debug, Parser)]
#[command(
    name = "haven",
    version,
    after_help = "Begin with `haven lab up` on one machine, or `haven init` on the first of several.\n`haven COMMAND --help` shows examples."
)]
pub struct Cli {
    /// Speak to this saved cluster, or with `local` to this machine's own
    #[arg(long, global = true, value_name = "NAME")]
    context: Option<String>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    #[command(flatten)]
    Cluster(cmd::cluster::ClusterCommand),
    #[command(flatten)]
    Objects(cmd::objects::ObjectsCommand),
    /// Virtual machines
    #[command(subcommand)]
    Vm(cmd::vm::VmCommand),
    /// Services and their addresses
    #[command(subcommand)]
    Service(cmd::service::ServiceCommand),
    /// Certificates of services, for TLS at the balancer
    #[command(subcommand)]
    Certificate(cmd::certificate::CertificateCommand),
    /// Images, which disks are made from
    #[command(subcommand)]
    Image(cmd::image::ImageCommand),
    /// Pools, where volumes live
    #[command(subcommand)]
    Pool(cmd::pool::PoolCommand),
    /// Mirrored disks, and where they are
    #[command(subcommand)]
    Volume(cmd::volume::VolumeCommand),
    /// Backups of VMs, and where they go
    #[command(subcommand)]
    Backup(cmd::backup::BackupCommand),
    /// Networks, which VMs are plugged into
    #[command(subcommand)]
    Network(cmd::network::NetworkCommand),
    /// Servers of the cluster
    #[command(subcommand)]
    Host(cmd::host::HostCommand),
    /// Move VMs live from hosts with much to do to hosts with little
    Rebalance(cmd::rebalance::Rebalance),
    /// What would happen if hosts failed or one were drained; nothing is changed
    #[command(subcommand)]
    Rehearse(cmd::rehearse::RehearseCommand),
    #[command(flatten)]
    Watch(cmd::watch::WatchCommand),
    /// A real cluster on this machine, to try and to test
    #[command(subcommand)]
    Lab(cmd::lab::LabCommand),
    /// What systemd runs: the daemon of this host
    #[command(after_help = "Examples:\n  haven daemon")]
    Daemon,
    /// Print shell completions
    #[command(
        after_help = "Examples:\n  haven completions bash > /etc/bash_completion.d/haven\n  haven completions zsh > ~/.zfunc/_haven"
    )]
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Write man pages into a directory, which is made if need be
    #[command(after_help = "Examples:\n  haven man /usr/local/share/man/man1")]
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

/// The command line as people see it.
fn command() -> clap::Command {
    help::grouped(Cli::command())
}

fn main() -> ExitCode {
    let cli = match Cli::from_arg_matches(&command().get_matches()) {
        Ok(cli) => cli,
        Err(error) => error.exit(),
    };
    connect::choose(cli.context);
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

/// How long the end of the process waits for what it began.
const SHUTDOWN: std::time::Duration = std::time::Duration::from_millis(500);

/// Runs it to its end. Input and output that hang, as on a pool that does not answer, keep nobody waiting.
fn finish<T>(runtime: tokio::runtime::Runtime, work: impl Future<Output = T>) -> T {
    let result = runtime.block_on(work);
    runtime.shutdown_timeout(SHUTDOWN);
    result
}

fn run(command: Command) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| Failure::other(error.into()))?;
    finish(runtime, dispatch(command))
}

async fn dispatch(command: Command) -> Result<(), Failure> {
    match command {
        Command::Cluster(command) => cmd::cluster::run(command).await,
        Command::Objects(command) => cmd::objects::run(command).await,
        Command::Vm(command) => cmd::vm::run(command).await,
        Command::Service(command) => cmd::service::run(command).await,
        Command::Certificate(command) => cmd::certificate::run(command).await,
        Command::Image(command) => cmd::image::run(command).await,
        Command::Pool(command) => cmd::pool::run(command).await,
        Command::Volume(command) => cmd::volume::run(command).await,
        Command::Backup(command) => cmd::backup::run(command).await,
        Command::Network(command) => cmd::network::run(command).await,
        Command::Host(command) => cmd::host::run(command).await,
        Command::Rebalance(asked) => cmd::rebalance::run(asked).await,
        Command::Rehearse(command) => cmd::rehearse::run(command).await,
        Command::Watch(command) => cmd::watch::run(command).await,
        Command::Lab(command) => cmd::lab::run(command).await,
        Command::Daemon => {
            log();
            daemon::run().await.map_err(Failure::other)
        }
        Command::Completions { shell } => {
            out::print(&completions(shell));
            Ok(())
        }
        Command::Man { dir } => {
            let pages = man(&dir)?;
            out::line(format_args!("{pages} pages in {}", dir.display()));
            Ok(())
        }
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
        out::line("1 passed, 0 failed");
        return Ok(());
    }
    let line = there.lines().zip(text.lines()).take_while(|(a, b)| a == b).count() + 1;
    Err(Failure::bad(
        format!("`{shown}` is not what the code gives, from line {line} on"),
        "write it with `cargo run -p xtask -- openapi` and commit it",
    ))
}

/// The completions of a shell.
fn completions(shell: clap_complete::Shell) -> String {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut command(), "haven", &mut text);
    String::from_utf8_lossy(&text).into_owned()
}

/// Writes a page for every command, and says how many there are.
fn man(directory: &Path) -> Result<usize, Failure> {
    let failed = |error: std::io::Error| {
        let message = format!("man pages cannot be written to {}: {error}", directory.display());
        Failure::bad(message, "name a directory that you may write to")
    };
    std::fs::create_dir_all(directory).map_err(failed)?;
    clap_mangen::generate_to(Cli::command(), directory).map_err(failed)?;
    let mut command = Cli::command();
    command.build();
    Ok(pages(&command))
}

fn pages(command: &clap::Command) -> usize {
    let below = command.get_subcommands().filter(|c| !c.is_hide_set() && c.get_name() != "help");
    1 + below.map(pages).sum::<usize>()
}
