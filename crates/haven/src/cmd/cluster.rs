//! Making a cluster, and tokens.

use super::context::ContextCommand;
use crate::{
    connect::connect,
    daemon::setup::{self, ThisHost},
    failure::Failure,
    out,
    render::{self, How},
};
use clap::{Args, Subcommand};
use haven_model::{Name, api::TokenLine, host::PowerSpec};
use std::{
    net::Ipv4Addr,
    path::{Path, PathBuf},
};

/// About this host.
#[derive(Debug, Args)]
pub struct ThisHostArgs {
    /// This host's address on the network of the cluster
    #[arg(long)]
    address: Ipv4Addr,
    /// This host's name in the cluster; its host name when absent
    #[arg(long)]
    host_name: Option<String>,
    /// Where this host's power is controlled, over Redfish; `haven edit` sets up other ways
    #[arg(long)]
    power_url: Option<String>,
    /// User there
    #[arg(long, default_value = "")]
    power_user: String,
    /// Password there. Others can see it in the list of processes: better is --power-password-file, or the
    /// environment's HAVEN_POWER_PASSWORD
    #[arg(long)]
    power_password: Option<String>,
    /// A file that holds the password, or - for standard input
    #[arg(long, conflicts_with = "power_password")]
    power_password_file: Option<PathBuf>,
    /// SHA-256 of the power controller's certificate, for an https:// address
    #[arg(long, requires = "power_url")]
    power_fingerprint: Option<String>,
    /// A file with the certificate of the authority that signed it, PEM
    #[arg(long, requires = "power_url", conflicts_with = "power_fingerprint")]
    power_ca: Option<PathBuf>,
    /// Take whatever certificate the power controller shows
    #[arg(long, requires = "power_url", conflicts_with_all = ["power_fingerprint", "power_ca"])]
    power_insecure: bool,
}

/// The password from the first place that has one.
fn password(
    given: Option<String>,
    file: Option<&Path>,
    environment: Option<String>,
) -> Result<String, Failure> {
    let Some(path) = file else {
        return Ok(given.or(environment).unwrap_or_default());
    };
    let text = match path.as_os_str() == "-" {
        true => std::io::read_to_string(std::io::stdin()),
        false => std::fs::read_to_string(path),
    };
    let text = text.map_err(|error| {
        let message = format!("the password file {} cannot be read: {error}", path.display());
        Failure::bad(message, "check the path")
    })?;
    let password = text.trim_end_matches(['\r', '\n']);
    if password.is_empty() {
        let message = format!("the password file {} is empty", path.display());
        return Err(Failure::bad(message, "put the password in its first line"));
    }
    Ok(password.to_owned())
}

/// The name that was given, or that of the machine.
fn own_name(given: Option<String>) -> Result<Name, Failure> {
    let own =
        || nix::unistd::gethostname().ok().and_then(|n| n.into_string().ok()).unwrap_or_default();
    Name::new(given.unwrap_or_else(own))
        .map_err(|error| Failure::bad(error.to_string(), "give one with --host-name"))
}

impl ThisHostArgs {
    fn host(self) -> Result<ThisHost, Failure> {
        let name = own_name(self.host_name)?;
        let file = self.power_password_file.as_deref();
        let environment = std::env::var("HAVEN_POWER_PASSWORD").ok();
        let password = password(self.power_password, file, environment)?;
        let ca = self.power_ca.map(|path| {
            std::fs::read_to_string(&path).map_err(|error| {
                let message = format!("{} cannot be read: {error}", path.display());
                Failure::bad(message, "check the path")
            })
        });
        let (ca, fingerprint) = (ca.transpose()?, self.power_fingerprint);
        let insecure = self.power_insecure;
        let power = self.power_url.map(|url| {
            let user = self.power_user;
            PowerSpec { url, user, password, ca, fingerprint, insecure, ..PowerSpec::default() }
        });
        if let Some((_, what, hint)) = power.iter().flat_map(PowerSpec::problems).next() {
            let hint = format!("{hint}; here `--power-url`, `--power-fingerprint` and so on");
            return Err(Failure::bad(what, hint));
        }
        Ok(ThisHost { name, address: self.address, power })
    }
}

/// Commands.
#[derive(Debug, Subcommand)]
pub enum ClusterCommand {
    /// Make a cluster of this host
    #[command(
        after_help = "Examples:\n  haven init --address 10.0.0.1\n  haven init --address 10.0.0.1 --power-url https://bmc1/redfish/v1/Systems/1 --power-fingerprint SHA256 --power-user haven --power-password-file /root/bmc1"
    )]
    Init {
        /// The cluster's name
        #[arg(long, default_value = "haven")]
        name: String,
        #[command(flatten)]
        this: ThisHostArgs,
    },
    /// Make this host part of a cluster
    #[command(after_help = "Examples:\n  haven join TOKEN 10.0.0.1 --address 10.0.0.2")]
    Join {
        /// From `haven host invite`
        token: String,
        /// Any host of the cluster
        peer: String,
        #[command(flatten)]
        this: ThisHostArgs,
    },
    /// Make this machine the witness of a cluster: it votes and runs nothing
    ///
    /// A cluster of two hosts cannot tell the loss of one from a cut between them, unless a third machine votes. It
    /// needs the packages of Haven and etcd, some 64 MiB of memory, and an address that both hosts reach. A machine
    /// witnesses for many clusters, each with an address of its own: HAVEN_STATE_DIR, HAVEN_RUN_DIR and HAVEN_LOG_DIR
    /// name the directories of each.
    #[command(after_help = "Examples:\n  haven witness TOKEN 10.0.0.1 --address 10.0.0.9")]
    Witness {
        /// From `haven host invite`
        token: String,
        /// Any host of the cluster
        peer: String,
        /// This machine's address, which the hosts reach
        #[arg(long)]
        address: Ipv4Addr,
        /// Its name in the cluster; its host name when absent
        #[arg(long)]
        host_name: Option<String>,
    },
    /// Tokens for people and programs
    #[command(subcommand)]
    Token(TokenCommand),
    /// Saved clusters, to work from elsewhere
    #[command(subcommand)]
    Context(ContextCommand),
}

/// Tokens.
#[derive(Debug, Subcommand)]
pub enum TokenCommand {
    /// Make a token; it is shown once
    #[command(after_help = "Examples:\n  haven token create ci --role operator --days 30")]
    Create {
        /// Its name
        name: String,
        /// viewer, operator or admin
        #[arg(long, value_parser = ["viewer", "operator", "admin"])]
        role: String,
        /// It ends after so many days
        #[arg(long, default_value_t = 365)]
        days: i64,
    },
    /// List tokens, without their secrets
    #[command(after_help = "Examples:\n  haven token ls\n  haven token ls -o json")]
    Ls(How),
    /// End a token
    #[command(after_help = "Examples:\n  haven token rm ci")]
    Rm {
        /// Its name
        name: String,
    },
}

/// Runs it.
pub async fn run(command: ClusterCommand) -> Result<(), Failure> {
    match command {
        ClusterCommand::Init { name, this } => {
            setup::init(&name, &this.host()?).map_err(Failure::other)?;
            println!(
                "cluster `{name}` is made; other hosts join with the command that `haven host invite` prints"
            );
        }
        ClusterCommand::Join { token, peer, this } => {
            setup::join(&token, &peer, &this.host()?, false).await.map_err(Failure::other)?;
            println!("this host is part of the cluster");
        }
        ClusterCommand::Witness { token, peer, address, host_name } => {
            let this = ThisHost { name: own_name(host_name)?, address, power: None };
            setup::join(&token, &peer, &this, true).await.map_err(Failure::other)?;
            println!("this machine is the cluster's witness");
        }
        ClusterCommand::Token(command) => token(command).await?,
        ClusterCommand::Context(command) => super::context::run(command)?,
    }
    Ok(())
}

async fn token(command: TokenCommand) -> Result<(), Failure> {
    match command {
        TokenCommand::Create { name, role, days } => {
            let name = Name::new(name)?;
            out::line(connect().await?.new_token(name.as_str(), &role, days).await?.secret);
        }
        TokenCommand::Ls(how) => {
            let tokens = connect().await?.tokens().await?;
            let now = jiff::Timestamp::now().as_millisecond();
            out::print(&render::value(&tokens, how.output, |wide| {
                tokens_table(&tokens, now, wide)
            }));
        }
        TokenCommand::Rm { name } => {
            let name = Name::new(name)?;
            let ended = connect().await?.end_token(name.as_str()).await;
            ended.map_err(|error| match Failure::from(error) {
                missing if missing.code == 3 => missing.hint("`haven token ls` lists them"),
                other => other,
            })?;
            out::line(format_args!("token {name} ended"));
        }
    }
    Ok(())
}

fn tokens_table(tokens: &[TokenLine], now_ms: i64, wide: bool) -> String {
    let mut head = vec!["name", "role", "ends"];
    head.extend(wide.then_some("days left"));
    let rows = tokens.iter().map(|token| {
        let ends = render::time(token.expires_ms);
        let ends = if token.expires_ms < now_ms { format!("{ends} (expired)") } else { ends };
        let mut row = vec![token.name.clone(), token.role.clone(), ends];
        let left = (token.expires_ms - now_ms).max(0) / 86_400_000;
        row.extend(wide.then(|| left.to_string()));
        row
    });
    render::table(&head, rows.collect())
}

#[cfg(test)]
mod tests {
    use super::{password, tokens_table};
    use haven_model::api::TokenLine;

    #[test]
    fn tokens_as_a_list_shows_them() {
        let line = |name: &str, role: &str, expires_ms| TokenLine {
            name: name.into(),
            role: role.into(),
            expires_ms,
        };
        let tokens = [line("ci", "operator", 1_800_000_000_000), line("old", "viewer", 1000)];
        let (plain, wide) = (
            tokens_table(&tokens, 1_790_000_000_000, false),
            tokens_table(&tokens, 1_790_000_000_000, true),
        );
        insta::assert_snapshot!(format!("{plain}\n{wide}"));
    }

    #[test]
    fn the_password_comes_from_the_file_then_the_flag_then_the_environment() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("p");
        std::fs::write(&path, " a b \n").unwrap();
        assert_eq!(password(None, Some(&path), Some("env".into())).unwrap(), " a b ");
        assert_eq!(password(Some("flag".into()), None, Some("env".into())).unwrap(), "flag");
        assert_eq!(password(None, None, Some("env".into())).unwrap(), "env");
        assert_eq!(password(None, None, None).unwrap(), "");
        std::fs::write(&path, "\n").unwrap();
        assert_eq!(password(None, Some(&path), None).unwrap_err().code, 2);
        assert_eq!(password(None, Some(&directory.path().join("q")), None).unwrap_err().code, 2);
    }
}
