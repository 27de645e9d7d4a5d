//! `haven pool …`.

use super::{Removal, create, list, new, reference, remove, show};
use crate::{connect::connect, failure::Failure, out, render::How};
use clap::{Subcommand, ValueEnum};
use haven_host::storage::pool::create_shared;
use haven_model::{
    Object,
    object::Kind,
    pool::{PoolDriverKind, PoolSpec},
};

/// Which engine keeps the volumes.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Driver {
    /// A directory of each host for itself: a disk dies with its host
    Local,
    /// One directory mounted on every host
    Shared,
    /// A directory of each host; every disk is on several hosts at once, and outlives each of them
    Mirrored,
}

/// Commands.
#[derive(Debug, Subcommand)]
pub enum PoolCommand {
    /// Make a pool of a directory that every host has
    #[command(
        after_help = "Examples:\n  haven pool create disks --driver mirrored --path /var/lib/haven/pools/disks\n  haven pool create fast --driver local --path /var/lib/haven/pools/fast\n  haven pool create filer --driver shared --path /mnt/filer/haven"
    )]
    Create {
        /// Its name
        name: String,
        /// The engine
        #[arg(long, value_enum)]
        driver: Driver,
        /// The directory on every host
        #[arg(long)]
        path: String,
        /// On how many hosts each disk of a mirrored pool is: 2 (the default) or 3
        #[arg(long)]
        replicas: Option<u32>,
    },
    /// Mark an empty directory, mounted here, as the shared pool of that path: once, on one host
    ///
    /// Haven writes nothing into a shared pool without its mark, so that a host on which the file system is not mounted
    /// never begins new, empty disks on its own.
    #[command(after_help = "Examples:\n  haven pool mark /mnt/filer/haven")]
    Mark {
        /// The pool's directory
        path: String,
    },
    /// List pools
    #[command(after_help = "Examples:\n  haven pool ls\n  haven pool ls -o json")]
    Ls(How),
    /// Show a pool and what there is to say of it
    #[command(after_help = "Examples:\n  haven pool show filer\n  haven pool show filer -o yaml")]
    Show {
        /// Its name
        name: String,
        #[command(flatten)]
        how: How,
    },
    /// Delete a pool; it goes once no VM uses it
    #[command(after_help = "Examples:\n  haven pool rm fast --wait")]
    Rm(Removal),
}

/// Runs it.
pub async fn run(command: PoolCommand) -> Result<(), Failure> {
    match command {
        PoolCommand::Create { name, driver, path, replicas } => {
            let driver = match driver {
                Driver::Local => PoolDriverKind::Local,
                Driver::Shared => PoolDriverKind::Shared,
                Driver::Mirrored => PoolDriverKind::Mirrored,
            };
            let object = Object::Pool(new(&name, PoolSpec { driver, path, replicas })?);
            create(&connect().await?, object).await.map(drop)
        }
        PoolCommand::Mark { path } => {
            let pool = PoolSpec::new(PoolDriverKind::Shared, path);
            create_shared(&pool).map_err(|error| Failure::other(error.into()))?;
            out::line(format_args!("{} is marked as a shared pool", pool.path));
            Ok(())
        }
        PoolCommand::Ls(how) => list(Kind::Pool, how.output).await,
        PoolCommand::Show { name, how } => show(&reference(Kind::Pool, &name)?, how.output).await,
        PoolCommand::Rm(removal) => remove(Kind::Pool, &removal).await,
    }
}
