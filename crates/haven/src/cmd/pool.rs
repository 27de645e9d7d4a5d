//! `haven pool …`.

use super::{Removal, create, list, new, reference, remove, show};
use crate::{connect::connect, failure::Failure, out, render::How};
use clap::{Args, Subcommand, ValueEnum};
use haven_host::storage::pool::create_shared;
use haven_model::{
    Object,
    object::Kind,
    pool::{GlusterSpec, NfsSpec, PoolDriverKind, PoolSpec, RbdSpec},
};
use std::path::PathBuf;

/// Which engine keeps the volumes.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Driver {
    /// A directory of each host for itself: a disk dies with its host
    Local,
    /// One directory mounted on every host
    Shared,
    /// A directory of each host; every disk is on several hosts at once, and outlives each of them
    Mirrored,
    /// A pool of a Ceph cluster, which keeps each disk on several servers of its own
    Rbd,
    /// A directory of an NFS server, which QEMU reaches by itself: no host mounts it
    Nfs,
    /// A Gluster volume, which each host mounts by itself
    Gluster,
}

/// Where a pool of a filer is.
#[derive(Debug, Args)]
pub struct OnFiler {
    /// The NFS server, or the servers of the Gluster volume, separated by commas
    #[arg(long, value_name = "ADDRESS", value_delimiter = ',')]
    server: Vec<String>,
    /// The directory that the NFS server exports, or one in the Gluster volume
    #[arg(long, value_name = "PATH")]
    directory: Option<String>,
    /// The Gluster volume
    #[arg(long)]
    volume: Option<String>,
}

impl OnFiler {
    /// The parts of a spec.
    fn specs(self, driver: Driver) -> Result<(Option<NfsSpec>, Option<GlusterSpec>), Failure> {
        let Self { server, directory, volume } = self;
        let wrong = |what: &str, hint: &str| Err(Failure::bad(what, hint));
        match (driver, server.as_slice(), directory, volume) {
            (Driver::Nfs, [server], Some(path), None) => {
                Ok((Some(NfsSpec { server: server.clone(), path, mark: None }), None))
            }
            (Driver::Nfs, ..) => wrong(
                "a pool of an NFS server is of one server and one directory",
                "give --server and --directory, and no --volume",
            ),
            (Driver::Gluster, [_, ..], directory, Some(volume)) => {
                Ok((None, Some(GlusterSpec { servers: server, volume, directory, mark: None })))
            }
            (Driver::Gluster, ..) => wrong(
                "a pool of a Gluster volume needs servers and a volume",
                "give --server and --volume",
            ),
            (_, [], None, None) => Ok((None, None)),
            _ => wrong(
                "--server, --directory and --volume belong to pools of filers",
                "leave them out, or write --driver nfs or --driver gluster",
            ),
        }
    }
}

/// Where a pool of Ceph's is.
#[derive(Debug, Args)]
pub struct InCeph {
    /// A monitor of the Ceph cluster, HOST or HOST:PORT; several are separated by commas
    #[arg(long, value_name = "ADDRESS", value_delimiter = ',')]
    monitor: Vec<String>,
    /// The user there, without `client.`
    #[arg(long)]
    user: Option<String>,
    /// A file that holds its key (`ceph auth get-key client.USER`), `-` for standard input; the cluster keeps it sealed
    #[arg(long, value_name = "FILE")]
    key_file: Option<PathBuf>,
    /// The pool's name there
    #[arg(long, value_name = "POOL")]
    ceph_pool: Option<String>,
    /// The namespace in it
    #[arg(long)]
    namespace: Option<String>,
}

impl InCeph {
    /// The part of a spec, if anything of it was given.
    fn spec(self) -> Result<Option<RbdSpec>, Failure> {
        let Self { monitor, user, key_file, ceph_pool, namespace } = self;
        let nothing = monitor.is_empty() && user.is_none() && key_file.is_none();
        if nothing && ceph_pool.is_none() && namespace.is_none() {
            return Ok(None);
        }
        let missing = |flag: &str| {
            let hint = "a pool of Ceph's needs --monitor, --user, --key-file and --ceph-pool";
            Failure::bad(format!("`{flag}` is missing"), hint)
        };
        if monitor.is_empty() {
            return Err(missing("--monitor"));
        }
        let user = user.ok_or_else(|| missing("--user"))?;
        let file = key_file.ok_or_else(|| missing("--key-file"))?;
        let pool = ceph_pool.ok_or_else(|| missing("--ceph-pool"))?;
        let key = match file.as_os_str() == "-" {
            true => std::io::read_to_string(std::io::stdin()),
            false => std::fs::read_to_string(&file),
        };
        let key = key.map_err(|error| {
            let what = format!("the key cannot be read from {} ({error})", file.display());
            Failure::bad(what, "check the path and its owner")
        })?;
        let key = key.trim().to_owned();
        Ok(Some(RbdSpec { monitors: monitor, user, key, pool, namespace, fsid: None }))
    }
}

/// Commands.
#[derive(Debug, Subcommand)]
#[expect(clippy::large_enum_variant, reason = "there is one, made of the command line")]
pub enum PoolCommand {
    /// Make a pool of a directory that every host has, of one of a Ceph cluster, or of a filer
    #[command(
        after_help = "Examples:\n  haven pool create disks --driver mirrored --path /var/lib/haven/pools/disks\n  haven pool create fast --driver local --path /var/lib/haven/pools/fast\n  haven pool create filer --driver shared --path /mnt/filer/haven\n  haven pool create ceph --driver rbd --monitor 10.0.0.1,10.0.0.2 --user haven --key-file haven.key --ceph-pool vm\n  haven pool create nas --driver nfs --server 10.0.0.9 --directory /srv/vms\n  haven pool create bricks --driver gluster --server 10.0.0.1,10.0.0.2,10.0.0.3 --volume vms"
    )]
    Create {
        /// Its name
        name: String,
        /// The engine
        #[arg(long, value_enum)]
        driver: Driver,
        /// The directory on every host; none for a pool of Ceph's or of a filer
        #[arg(long, default_value = "", hide_default_value = true)]
        path: String,
        /// On how many hosts each disk of a mirrored pool is: 2 (the default) or 3
        #[arg(long)]
        replicas: Option<u32>,
        #[command(flatten)]
        ceph: InCeph,
        #[command(flatten)]
        filer: OnFiler,
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
        PoolCommand::Create { name, driver, path, replicas, ceph, filer } => {
            let (nfs, gluster) = filer.specs(driver)?;
            let driver = match driver {
                Driver::Local => PoolDriverKind::Local,
                Driver::Shared => PoolDriverKind::Shared,
                Driver::Mirrored => PoolDriverKind::Mirrored,
                Driver::Rbd => PoolDriverKind::Rbd,
                Driver::Nfs => PoolDriverKind::Nfs,
                Driver::Gluster => PoolDriverKind::Gluster,
            };
            let rbd = ceph.spec()?;
            let spec = PoolSpec { driver, path, replicas, rbd, nfs, gluster };
            let object = Object::Pool(new(&name, spec)?);
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
