//! The commands, by what they are about.

pub mod backup;
pub mod certificate;
mod clone;
pub mod cluster;
pub mod context;
mod drain;
pub mod edit;
pub mod fence;
pub mod files;
pub mod host;
pub mod image;
pub mod lab;
mod maintenance;
mod migrate;
pub mod network;
pub mod objects;
pub mod pool;
pub mod rebalance;
pub mod rehearse;
pub mod service;
mod snapshot;
pub mod vm;
pub mod volume;
pub mod wait;
pub mod watch;

use crate::{
    connect::connect,
    failure::Failure,
    out,
    render::{self, Output},
};
use clap::Args;
use haven_client::Client;
use haven_model::{
    Meta, Name, Object, ObjectRef,
    api::Item,
    object::{Kind, Stored},
};
use std::time::Duration;

/// How an object is removed.
#[derive(Debug, Args)]
pub struct Removal {
    /// Its name
    name: String,
    /// Wait until nothing of it is left
    #[arg(long)]
    wait: bool,
    /// How long, seconds
    #[arg(long, default_value_t = 180)]
    timeout: u64,
}

/// `KIND/NAME` from a name that somebody typed.
fn reference(kind: Kind, name: &str) -> Result<ObjectRef, Failure> {
    Ok(ObjectRef::new(kind, Name::new(name)?))
}

/// An object that is not in the cluster yet.
fn new<T>(name: &str, spec: T) -> Result<Stored<T>, Failure> {
    Ok(Stored { meta: Meta::new(Name::new(name)?, String::new(), 0), spec })
}

/// Makes an object; never changes one that is there.
async fn create(client: &Client, object: Object) -> Result<Item, Failure> {
    let item = client.create(object).await?;
    out::line(format_args!("{} created", item.object.reference()));
    out::warn(std::iter::once(item.warning.as_str()));
    Ok(item)
}

/// Prints all objects of a kind.
async fn list(kind: Kind, output: Output) -> Result<(), Failure> {
    out::print(&render::items(&connect().await?.list(kind).await?, output));
    Ok(())
}

/// Prints an object, a service's members, and what there is to say of it.
async fn show(what: &ObjectRef, output: Output) -> Result<(), Failure> {
    let client = connect().await?;
    let item = client.object(what).await?;
    let members = match what.kind {
        Kind::Service => client.list(Kind::Vm).await?,
        _ => Vec::new(),
    };
    let members: Vec<Item> =
        members.into_iter().filter(|m| m.object.meta().owner.as_ref() == Some(what)).collect();
    let explain = client.explain(what).await?;
    out::print(&render::shown(&item, &members, &explain, output));
    Ok(())
}

/// Deletes an object.
async fn remove(kind: Kind, removal: &Removal) -> Result<(), Failure> {
    let what = reference(kind, &removal.name)?;
    let client = connect().await?;
    client.delete(&what).await?;
    out::line(format_args!("{what} deleting"));
    if removal.wait {
        wait::gone(&client, &[what], Duration::from_secs(removal.timeout)).await?;
    }
    Ok(())
}

/// Says what became of an object.
fn said(item: &Item) {
    out::line(format_args!("{}: {}", item.object.reference(), item.state));
    out::warn(std::iter::once(item.warning.as_str()));
}
