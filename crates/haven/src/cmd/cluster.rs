//! Making a cluster, and tokens.

use crate::{
    connect::connect,
    daemon::setup::{self, ThisHost},
    failure::Failure,
};
use clap::{Args, Subcommand};
use haven_model::{Name, host::PowerSpec};
use std::net::Ipv4Addr;

/// About this host.
#[derive(Debug, Args)]
pub struct ThisHostArgs {
    /// This host's address on the network of the cluster
    #[arg(long)]
    address: Ipv4Addr,
    /// This host's name in the cluster; its host name when absent
    #[arg(long)]
    host_name: Option<String>,
    /// Where this host's power is controlled
    #[arg(long)]
    power_url: Option<String>,
    /// User there
    #[arg(long, default_value = "")]
    power_user: String,
    /// Password there
    #[arg(long, default_value = "")]
    power_password: String,
}

impl ThisHostArgs {
    fn host(self) -> Result<ThisHost, Failure> {
        let own = || {
            nix::unistd::gethostname().ok().and_then(|n| n.into_string().ok()).unwrap_or_default()
        };
        let name = self.host_name.unwrap_or_else(own);
        let name = Name::new(name)
            .map_err(|error| Failure::bad(error.to_string(), "give one with --host-name"))?;
        let power = self.power_url.map(|url| PowerSpec {
            url,
            user: self.power_user,
            password: self.power_password,
        });
        Ok(ThisHost { name, address: self.address, power })
    }
}

/// Commands.
#[derive(Debug, Subcommand)]
pub enum ClusterCommand {
    /// Make a cluster of this host
    #[command(after_help = "Examples:\n  haven init --address 10.0.0.1")]
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
    /// Tokens for people and programs
    #[command(subcommand)]
    Token(TokenCommand),
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
            setup::join(&token, &peer, &this.host()?).await.map_err(Failure::other)?;
            println!("this host is part of the cluster");
        }
        ClusterCommand::Token(TokenCommand::Create { name, role, days }) => {
            println!("{}", connect().await?.new_token(&name, &role, days).await?.secret);
        }
        ClusterCommand::Token(TokenCommand::Rm { name }) => {
            connect().await?.end_token(&name).await?
        }
    }
    Ok(())
}
