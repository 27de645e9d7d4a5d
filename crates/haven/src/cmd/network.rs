//! `haven network …`.

use super::{Removal, create, list, new, reference, remove, show};
use crate::{connect::connect, failure::Failure, render::How};
use clap::{Args, Subcommand, ValueEnum};
use haven_model::{
    NetworkSpec, Object,
    network::NetworkKind,
    object::{Kind, Stored},
};
use ipnet::Ipv4Net;
use std::net::Ipv4Addr;

/// How the hosts carry a network.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Driver {
    /// VXLAN between the hosts
    Overlay,
    /// A bridge that every host has already
    Bridge,
}

/// What is wanted of a network.
#[derive(Debug, Args)]
pub struct NewNetwork {
    /// Its name
    name: String,
    /// The guests' subnet, for example 10.77.0.0/24; its first address is the gateway's
    #[arg(long)]
    subnet: Ipv4Net,
    /// How the hosts carry it
    #[arg(long, value_enum, default_value = "overlay")]
    driver: Driver,
    /// The hosts' bridge, for --driver bridge
    #[arg(long, required_if_eq("driver", "bridge"))]
    bridge: Option<String>,
    /// VXLAN network identifier; chosen when absent
    #[arg(long)]
    vni: Option<u32>,
    /// A name server for the guests; may be given several times
    #[arg(long)]
    nameserver: Vec<Ipv4Addr>,
    /// Largest packet guests may send, bytes
    #[arg(long, default_value_t = 1450)]
    mtu: u32,
    /// Guests do not reach the world through their host's address
    #[arg(long)]
    no_nat: bool,
}

impl NewNetwork {
    fn object(self) -> Result<Stored<NetworkSpec>, Failure> {
        let driver = match self.driver {
            Driver::Overlay => NetworkKind::Overlay,
            Driver::Bridge => NetworkKind::Bridge,
        };
        if driver == NetworkKind::Overlay && self.bridge.is_some() {
            let hint = "add --driver bridge, or leave --bridge out";
            return Err(Failure::bad("--bridge is given and the driver is overlay", hint));
        }
        let spec = NetworkSpec {
            driver,
            subnet: self.subnet,
            nat: !self.no_nat,
            vni: self.vni,
            bridge: self.bridge,
            nameservers: self.nameserver,
            mtu: self.mtu,
        };
        new(&self.name, spec)
    }
}

/// Commands.
#[derive(Debug, Subcommand)]
pub enum NetworkCommand {
    /// Make a network
    #[command(
        after_help = "Examples:\n  haven network create front --subnet 10.77.0.0/24\n  haven network create office --driver bridge --bridge br0 --subnet 192.168.7.0/24 --no-nat"
    )]
    Create(NewNetwork),
    /// List networks
    #[command(after_help = "Examples:\n  haven network ls\n  haven network ls -o wide")]
    Ls(How),
    /// Show a network and what there is to say of it
    #[command(
        after_help = "Examples:\n  haven network show front\n  haven network show front -o yaml"
    )]
    Show {
        /// Its name
        name: String,
        #[command(flatten)]
        how: How,
    },
    /// Delete a network; it goes once no VM uses it
    #[command(after_help = "Examples:\n  haven network rm front --wait")]
    Rm(Removal),
}

/// Runs it.
pub async fn run(command: NetworkCommand) -> Result<(), Failure> {
    match command {
        NetworkCommand::Create(network) => {
            let object = Object::Network(network.object()?);
            create(&connect().await?, object).await.map(drop)
        }
        NetworkCommand::Ls(how) => list(Kind::Network, how.output).await,
        NetworkCommand::Show { name, how } => {
            show(&reference(Kind::Network, &name)?, how.output).await
        }
        NetworkCommand::Rm(removal) => remove(Kind::Network, &removal).await,
    }
}
