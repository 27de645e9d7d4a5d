//! Disks that come, go, and grow.

use crate::{connect::connect, failure::Failure, out};
use clap::Args;
use haven_client::Client;
use haven_model::{
    Bytes, Name, Object, ObjectRef, VmSpec,
    api::{Item, VolumeView},
    object::Kind,
    vm::{DISKS, DiskSpec, DiskState, pending_words},
    volume::VolumeRef,
};
use std::time::{Duration, Instant};

/// Between two looks.
const PAUSE: Duration = Duration::from_millis(100);
/// How long it is waited for.
const PATIENCE: Duration = Duration::from_secs(30);
/// How much of a disk's name its guest sees: the length of a serial number of virtio.
const SERIAL: usize = 20;

/// A disk that is to be added.
#[derive(Debug, Args)]
pub struct New {
    /// Its name: VM.DISK
    name: String,
    /// How large its guest shall see it, for example 20GiB
    size: Bytes,
    /// The pool in which it shall be; that of the VM's other disks when left out
    #[arg(long)]
    pool: Option<Name>,
    /// The image that it is made from; it is empty when left out
    #[arg(long)]
    image: Option<Name>,
    /// What is written on it lies encrypted in its pool; it stays so
    #[arg(long)]
    encrypted: bool,
}

/// A disk that is there.
#[derive(Debug, Args)]
pub struct Named {
    /// Its name: VM.DISK
    name: String,
    /// Ask for it, and do not wait until it is so
    #[arg(long)]
    no_wait: bool,
}

/// A VM as it stands, and which of its disks is meant.
struct Asked {
    client: Client,
    of: VolumeRef,
    item: Item,
}

impl Asked {
    async fn read(name: &str) -> Result<Self, Failure> {
        let of = VolumeRef::parse(name).ok_or_else(|| {
            Failure::bad(
                format!("`{name}` is no disk of a VM"),
                "write VM.DISK, for example db.data",
            )
        })?;
        let client = connect().await?;
        let item = client.object(&ObjectRef::new(Kind::Vm, of.vm.clone())).await?;
        Ok(Self { client, of, item })
    }

    fn spec(&mut self) -> Result<&mut VmSpec, Failure> {
        match &mut self.item.object {
            Object::Vm(vm) => Ok(&mut vm.spec),
            _ => {
                Err(Failure::bad(format!("`{}` is no VM", self.of.vm), "`haven vm ls` lists them"))
            }
        }
    }

    fn disk(&mut self) -> Result<&mut DiskSpec, Failure> {
        let of = self.of.clone();
        let disks = &mut self.spec()?.disks;
        let names: Vec<String> = disks.iter().map(|disk| disk.name.to_string()).collect();
        disks.iter_mut().find(|disk| disk.name == of.disk).ok_or_else(|| {
            let has = match names.as_slice() {
                [] => "it has none".to_owned(),
                names => format!("it has: {}", names.join(", ")),
            };
            Failure::bad(format!("{} has no disk `{}`", of.vm, of.disk), has)
        })
    }

    /// Writes it over what was read.
    async fn write(&self) -> Result<(), Failure> {
        let item = self.client.replace(&self.item).await?;
        out::warn(std::iter::once(item.warning.as_str()));
        Ok(())
    }

    /// Waits until the disk is as it is wanted, as far as that can be while its VM runs.
    async fn settled(&self) -> Result<VolumeView, Failure> {
        let (name, begin) = (self.of.to_string(), Instant::now());
        loop {
            let view = self.client.volume(&name).await?;
            if view.state != DiskState::Changing {
                return Ok(view);
            }
            if begin.elapsed() >= PATIENCE {
                let why = match view.message.as_str() {
                    "" => format!("{name} is not as it is wanted yet"),
                    message => format!("{name} is not as it is wanted yet: {message}"),
                };
                let hint = format!(
                    "it is tried on until it is; `haven volume show {name}` tells how it stands"
                );
                return Err(Failure::failed(why, hint));
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    fn at_its_next_start(&self) {
        out::line(pending_words(&self.of.vm, &[DISKS.to_owned()]));
    }
}

/// Adds one.
pub async fn create(new: New) -> Result<(), Failure> {
    let mut asked = Asked::read(&new.name).await?;
    let of = asked.of.clone();
    let disks = &asked.spec()?.disks;
    if disks.iter().any(|disk| disk.name == of.disk) {
        return Err(Failure::conflict(
            format!("{} has a disk `{}` already; nothing was changed", of.vm, of.disk),
            format!("give the new one another name, or `haven volume attach {of}`"),
        ));
    }
    let Some(pool) = new.pool.or_else(|| disks.first().map(|disk| disk.pool.clone())) else {
        return Err(Failure::bad(
            format!("{} has no disk yet, so nothing says in which pool one belongs", of.vm),
            "give `--pool`; `haven pool ls` lists them",
        ));
    };
    let disk = DiskSpec::new(of.disk.clone(), new.size, pool.clone());
    asked.spec()?.disks.push(DiskSpec {
        image: new.image,
        detached: true,
        encrypted: new.encrypted,
        ..disk
    });
    asked.write().await?;
    out::line(format_args!(
        "{of}: {} in the pool {pool}{}; `haven volume attach {of}` lets its guest see it",
        new.size,
        if new.encrypted { ", encrypted" } else { "" }
    ));
    Ok(())
}

/// Attaches one, or detaches it.
pub async fn attach(disk: Named, attached: bool) -> Result<(), Failure> {
    let mut asked = Asked::read(&disk.name).await?;
    let of = asked.of.clone();
    let its = asked.disk()?;
    if its.detached != attached {
        let is = if attached { "attached" } else { "detached" };
        return Err(Failure::conflict(
            format!("{of} is {is} already; nothing was changed"),
            format!("`haven volume show {of}` tells how it stands"),
        ));
    }
    its.detached = !attached;
    asked.write().await?;
    if disk.no_wait {
        out::line(format_args!(
            "{of} is asked to be {}",
            if attached { "attached" } else { "detached" }
        ));
        return Ok(());
    }
    match asked.settled().await?.state {
        DiskState::Attached => {
            let serial: String = of.disk.as_str().chars().take(SERIAL).collect();
            out::line(format_args!(
                "{of} is attached; its guest finds it as /dev/disk/by-id/virtio-{serial}"
            ));
        }
        DiskState::Detached => {
            out::line(format_args!("{of} is detached; what is on it stays"));
        }
        DiskState::Off => {
            out::line(format_args!("{} does not run; its guest sees {of} when it does", of.vm));
        }
        DiskState::Changing | DiskState::NextStart => asked.at_its_next_start(),
    }
    Ok(())
}

/// Removes one.
pub async fn remove(name: &str) -> Result<(), Failure> {
    let client = connect().await?;
    // One that is not there is told by the removal.
    let encrypted = client.volume(name).await.is_ok_and(|view| view.encrypted);
    client.remove_volume(name).await?;
    let key = if encrypted { ", and its key with it: nobody can read it any more" } else { "" };
    out::line(format_args!("{name} is removed{key}"));
    Ok(())
}

/// Makes one larger.
pub async fn resize(name: &str, size: Bytes, no_wait: bool) -> Result<(), Failure> {
    let mut asked = Asked::read(name).await?;
    let before = std::mem::replace(&mut asked.disk()?.size, size);
    asked.write().await?;
    out::line(format_args!("{name}: {before} -> {size}"));
    if !no_wait && asked.settled().await?.state == DiskState::NextStart {
        asked.at_its_next_start();
    }
    Ok(())
}
