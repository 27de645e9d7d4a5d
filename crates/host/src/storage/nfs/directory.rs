//! A directory of an NFS server, as this daemon sees it: NFS version 3 in this process, so no kernel's client waits for a server that
//! is away.
//!
//! Each piece of work has connections of its own. They come from no privileged port, as QEMU's do not.

use crate::{agent::storage::StorageFailure, storage::says};
use haven_model::NfsSpec;
use nfs3_client::{
    ConnectError, MountError, Nfs3Connection, Nfs3ConnectionBuilder, PortmapError, RpcError,
    nfs3_types::{
        nfs3::{
            CREATE3args, FSSTAT3args, LINK3args, LOOKUP3args, Nfs3Option, Nfs3Result, READ3args,
            READDIR3args, REMOVE3args, SETATTR3args, WRITE3args, cookieverf3, createhow3,
            diropargs3, fattr3, filename3, ftype3, nfs_fh3, nfsstat3, sattr3, stable_how,
        },
        rpc::{auth_unix, opaque_auth},
        xdr_codec::Opaque,
    },
    tokio::{TokioConnector, TokioIo},
};
use std::{future::Future, net::IpAddr, time::Duration};
use tokio::net::TcpStream;

/// How long a server may take for an answer.
const ANSWERS: Duration = Duration::from_secs(8);
/// How much of a directory is read at once, bytes.
const LISTS: u32 = 64 << 10;

/// A file of the directory.
#[derive(Clone, Debug)]
pub struct NfsFile {
    handle: nfs_fh3,
    /// How long it is, bytes.
    pub size: u64,
    /// Who may open it.
    pub owner: u32,
    /// What it takes, bytes.
    pub used: u64,
}

/// The room in a directory's file system, bytes.
#[derive(Clone, Copy, Debug)]
pub struct NfsRoom {
    /// In all.
    pub total: u64,
    /// What nobody has.
    pub free: u64,
    /// What may be written yet.
    pub available: u64,
}

/// A directory that was reached.
pub struct Directory {
    of: NfsSpec,
    nfs: Nfs3Connection<TokioIo<TcpStream>>,
    root: nfs_fh3,
}

/// Waits for an answer, not for ever.
async fn within<T>(
    of: &NfsSpec,
    answer: impl Future<Output = Result<T, StorageFailure>>,
) -> Result<T, StorageFailure> {
    tokio::time::timeout(ANSWERS, answer).await.unwrap_or_else(|_| {
        Err(says(format!(
            "the NFS server {} has not answered for {} s; look whether it runs and is reached from this host",
            of.server,
            ANSWERS.as_secs()
        )))
    })
}

fn gone(of: &NfsSpec, error: &RpcError) -> StorageFailure {
    says(format!(
        "the NFS server {} does not answer as one ({error}); look whether it runs and serves NFS version 3 over TCP",
        of.server
    ))
}

fn unreached(of: &NfsSpec, error: &ConnectError) -> StorageFailure {
    let NfsSpec { server, path, .. } = of;
    let ended = |error: &std::io::Error| {
        says(format!(
            "nobody answers as an NFS server at {server} ({error}); correct `server`, or look whether it runs, with rpcbind beside it"
        ))
    };
    match error {
        ConnectError::Io(error) | ConnectError::Portmap(PortmapError::Rpc(RpcError::Io(error))) => {
            ended(error)
        }
        ConnectError::Portmap(error) => says(format!(
            "the NFS server {server} does not serve NFS version 3 over TCP ({error}); switch that on there"
        )),
        ConnectError::Mount(MountError::Rpc(RpcError::Io(error))) => ended(error),
        ConnectError::Mount(MountError::Rpc(error)) => says(format!(
            "the NFS server {server} lets this host not in ({error}); export {path} with `sec=sys` and, where it asks for privileged ports, with `insecure`"
        )),
        ConnectError::Mount(MountError::Denied(why)) => says(format!(
            "the NFS server {server} does not give {path} to this host ({why}); correct `path`, or export that directory to all hosts with `rw`, `no_root_squash` and, on Linux, `insecure`"
        )),
    }
}

impl Directory {
    /// Reaches a directory as a user there.
    ///
    /// # Errors
    /// A sentence on the first thing that is wrong.
    pub async fn open(of: &NfsSpec, user: u32) -> Result<Self, StorageFailure> {
        let address = within(of, address(of)).await?;
        let auth = auth_unix {
            machinename: Opaque::borrowed(b"haven"),
            uid: user,
            gid: user,
            ..auth_unix::default()
        };
        let mount = Nfs3ConnectionBuilder::new(TokioConnector, address.to_string(), &of.path)
            .connect_from_privileged_port(false)
            .credential(opaque_auth::auth_unix(&auth))
            .mount();
        let nfs = within(of, async { mount.await.map_err(|error| unreached(of, &error)) }).await?;
        let root = nfs.root_nfs_fh3();
        Ok(Self { of: of.clone(), nfs, root })
    }

    fn refused(&self, what: &str, why: nfsstat3) -> StorageFailure {
        let NfsSpec { server, path, .. } = &self.of;
        says(match why {
            nfsstat3::NFS3ERR_NOSPC | nfsstat3::NFS3ERR_DQUOT => {
                format!("{path} of the NFS server {server} is full; make room there")
            }
            nfsstat3::NFS3ERR_ROFS => {
                format!("{path} of the NFS server {server} may only be read; export it with `rw`")
            }
            nfsstat3::NFS3ERR_ACCES | nfsstat3::NFS3ERR_PERM => format!(
                "the NFS server {server} does not let this host {what} in {path} ({why}); export it with `rw`, `no_root_squash` and without `all_squash`, and let everybody pass through the directory (`chmod 711`)"
            ),
            _ => format!(
                "the NFS server {server} could not {what} in {path} ({why}); its log tells more"
            ),
        })
    }

    fn here<'a>(&self, name: &'a str) -> diropargs3<'a> {
        let name = filename3(Opaque::borrowed(name.as_bytes()));
        diropargs3 { dir: self.root.clone(), name }
    }

    /// A file; nothing when it is not there.
    ///
    /// # Errors
    /// When that is not known, or it is no file.
    pub async fn find(&mut self, name: &str) -> Result<Option<NfsFile>, StorageFailure> {
        let args = LOOKUP3args { what: self.here(name) };
        let of = self.of.clone();
        let call = self.nfs.lookup(&args);
        let found = within(&of, async { call.await.map_err(|e| gone(&of, &e)) }).await?;
        let found = match found {
            Nfs3Result::Ok(found) => found,
            Nfs3Result::Err((nfsstat3::NFS3ERR_NOENT, _)) => return Ok(None),
            Nfs3Result::Err((why, _)) => return Err(self.refused(&format!("look for {name}"), why)),
        };
        let attributes = match found.obj_attributes {
            Nfs3Option::Some(attributes) => attributes,
            Nfs3Option::None => self.attributes(&found.object, name).await?,
        };
        if !matches!(attributes.type_, ftype3::NF3REG) {
            let NfsSpec { server, path, .. } = &self.of;
            return Err(says(format!(
                "{path}/{name} of the NFS server {server} is no file; look who made it, and remove it"
            )));
        }
        let fattr3 { size, uid, used, .. } = attributes;
        Ok(Some(NfsFile { handle: found.object, size, owner: uid, used }))
    }

    async fn attributes(&mut self, handle: &nfs_fh3, name: &str) -> Result<fattr3, StorageFailure> {
        let args = nfs3_client::nfs3_types::nfs3::GETATTR3args { object: handle.clone() };
        let of = self.of.clone();
        let call = self.nfs.getattr(&args);
        let told = within(&of, async { call.await.map_err(|e| gone(&of, &e)) }).await?;
        match told {
            Nfs3Result::Ok(told) => Ok(told.obj_attributes),
            Nfs3Result::Err((why, _)) => Err(self.refused(&format!("look at {name}"), why)),
        }
    }

    /// Makes a file of this length that only `owner` may open, and none where there is one.
    ///
    /// # Errors
    /// A sentence; also when it is there.
    pub async fn create(
        &mut self,
        name: &str,
        size: u64,
        owner: u32,
    ) -> Result<NfsFile, StorageFailure> {
        let how =
            createhow3::GUARDED(sattr3 { mode: Nfs3Option::Some(0o600), ..sattr3::default() });
        let args = CREATE3args { where_: self.here(name), how };
        let of = self.of.clone();
        let call = self.nfs.create(&args);
        let made = within(&of, async { call.await.map_err(|e| gone(&of, &e)) }).await?;
        if let Nfs3Result::Err((why, _)) = made {
            return Err(self.refused(&format!("make {name}"), why));
        }
        let made = self.find(name).await?;
        let made = made.ok_or_else(|| self.vanished(name))?;
        // Beside the owner, for not all servers take both at once when a file is made.
        self.set(
            &made,
            name,
            sattr3 {
                mode: Nfs3Option::Some(0o600),
                uid: Nfs3Option::Some(owner),
                gid: Nfs3Option::Some(owner),
                ..sattr3::default()
            },
        )
        .await?;
        self.set(&made, name, sattr3 { size: Nfs3Option::Some(size), ..sattr3::default() }).await?;
        Ok(NfsFile { size, owner, ..made })
    }

    fn vanished(&self, name: &str) -> StorageFailure {
        let NfsSpec { server, path, .. } = &self.of;
        says(format!(
            "{path}/{name} of the NFS server {server} is gone again; does somebody remove files there?"
        ))
    }

    async fn set(
        &mut self,
        file: &NfsFile,
        name: &str,
        attributes: sattr3,
    ) -> Result<(), StorageFailure> {
        let args = SETATTR3args {
            object: file.handle.clone(),
            new_attributes: attributes,
            guard: Nfs3Option::None,
        };
        let of = self.of.clone();
        let call = self.nfs.setattr(&args);
        match within(&of, async { call.await.map_err(|e| gone(&of, &e)) }).await? {
            Nfs3Result::Ok(_) => Ok(()),
            Nfs3Result::Err((why, _)) => {
                Err(self.refused(&format!("give {name} another size or owner"), why))
            }
        }
    }

    /// Gives a file to another owner, to whom alone it is open from then on.
    ///
    /// # Errors
    /// When it is not known whether it has it.
    pub async fn give(
        &mut self,
        file: &NfsFile,
        name: &str,
        owner: u32,
    ) -> Result<(), StorageFailure> {
        let to = sattr3 {
            mode: Nfs3Option::Some(0o600),
            uid: Nfs3Option::Some(owner),
            gid: Nfs3Option::Some(owner),
            ..sattr3::default()
        };
        self.set(file, name, to).await?;
        let now = self.find(name).await?.ok_or_else(|| self.vanished(name))?;
        if now.owner == owner {
            return Ok(());
        }
        let NfsSpec { server, path, .. } = &self.of;
        Err(says(format!(
            "the NFS server {server} does not give files of {path} to whom it is told (it says {} for {owner}); export it with `no_root_squash` and without `all_squash`",
            now.owner
        )))
    }

    /// Makes a file longer.
    ///
    /// # Errors
    /// A sentence.
    pub async fn lengthen(
        &mut self,
        file: &NfsFile,
        name: &str,
        size: u64,
    ) -> Result<(), StorageFailure> {
        self.set(file, name, sattr3 { size: Nfs3Option::Some(size), ..sattr3::default() }).await
    }

    /// Gives a whole file its name, unless there is one of that name; whether it has it.
    ///
    /// # Errors
    /// A sentence.
    pub async fn publish(&mut self, file: &NfsFile, name: &str) -> Result<bool, StorageFailure> {
        let args = LINK3args { file: file.handle.clone(), link: self.here(name) };
        let of = self.of.clone();
        let call = self.nfs.link(&args);
        match within(&of, async { call.await.map_err(|e| gone(&of, &e)) }).await? {
            Nfs3Result::Ok(_) => Ok(true),
            Nfs3Result::Err((nfsstat3::NFS3ERR_EXIST, _)) => Ok(false),
            Nfs3Result::Err((why, _)) => Err(self.refused(&format!("link {name}"), why)),
        }
    }

    /// Removes a file; fine when it is not there.
    ///
    /// # Errors
    /// A sentence.
    pub async fn remove(&mut self, name: &str) -> Result<(), StorageFailure> {
        let args = REMOVE3args { object: self.here(name) };
        let of = self.of.clone();
        let call = self.nfs.remove(&args);
        match within(&of, async { call.await.map_err(|e| gone(&of, &e)) }).await? {
            Nfs3Result::Ok(_) | Nfs3Result::Err((nfsstat3::NFS3ERR_NOENT, _)) => Ok(()),
            Nfs3Result::Err((why, _)) => Err(self.refused(&format!("remove {name}"), why)),
        }
    }

    /// Writes the beginning of a file, onto the server's disk; whether it may.
    ///
    /// # Errors
    /// When that is not known.
    pub async fn write(
        &mut self,
        file: &NfsFile,
        name: &str,
        text: &[u8],
    ) -> Result<bool, StorageFailure> {
        let args = WRITE3args {
            file: file.handle.clone(),
            offset: 0,
            count: u32::try_from(text.len()).unwrap_or(u32::MAX),
            stable: stable_how::FILE_SYNC,
            data: Opaque::borrowed(text),
        };
        let of = self.of.clone();
        let call = self.nfs.write(&args);
        match within(&of, async { call.await.map_err(|e| gone(&of, &e)) }).await? {
            Nfs3Result::Ok(_) => Ok(true),
            Nfs3Result::Err((nfsstat3::NFS3ERR_ACCES | nfsstat3::NFS3ERR_PERM, _)) => Ok(false),
            Nfs3Result::Err((why, _)) => Err(self.refused(&format!("write {name}"), why)),
        }
    }

    /// The beginning of a file.
    ///
    /// # Errors
    /// A sentence.
    pub async fn read(
        &mut self,
        file: &NfsFile,
        name: &str,
        most: u32,
    ) -> Result<Vec<u8>, StorageFailure> {
        let args = READ3args { file: file.handle.clone(), offset: 0, count: most };
        let of = self.of.clone();
        let call = self.nfs.read(&args);
        match within(&of, async { call.await.map_err(|e| gone(&of, &e)) }).await? {
            Nfs3Result::Ok(read) => Ok(read.data.into_owned()),
            Nfs3Result::Err((why, _)) => Err(self.refused(&format!("read {name}"), why)),
        }
    }

    /// The names of all that is there.
    ///
    /// # Errors
    /// A sentence.
    pub async fn names(&mut self) -> Result<Vec<String>, StorageFailure> {
        let (mut names, mut cookie, mut verifier) = (Vec::new(), 0, cookieverf3::default());
        let of = self.of.clone();
        loop {
            let dir = self.root.clone();
            let args = READDIR3args { dir, cookie, cookieverf: verifier, count: LISTS };
            let call = self.nfs.readdir(&args);
            let list = within(&of, async { call.await.map_err(|e| gone(&of, &e)) }).await?;
            let list = match list {
                Nfs3Result::Ok(list) => list,
                Nfs3Result::Err((why, _)) => return Err(self.refused("list the files", why)),
            };
            let entries = list.reply.entries.into_inner();
            verifier = list.cookieverf;
            let Some(last) = entries.last().map(|last| last.cookie) else { return Ok(names) };
            cookie = last;
            let text = |name: &[u8]| String::from_utf8_lossy(name).into_owned();
            let new = entries.iter().map(|entry| text(entry.name.0.as_ref()));
            names.extend(new.filter(|name| name != "." && name != ".."));
            if list.reply.eof {
                return Ok(names);
            }
        }
    }

    /// The room.
    ///
    /// # Errors
    /// A sentence.
    pub async fn room(&mut self) -> Result<NfsRoom, StorageFailure> {
        let args = FSSTAT3args { fsroot: self.root.clone() };
        let of = self.of.clone();
        let call = self.nfs.fsstat(&args);
        match within(&of, async { call.await.map_err(|e| gone(&of, &e)) }).await? {
            Nfs3Result::Ok(told) => {
                Ok(NfsRoom { total: told.tbytes, free: told.fbytes, available: told.abytes })
            }
            Nfs3Result::Err((why, _)) => Err(self.refused("tell the room", why)),
        }
    }
}

/// The server's address. QEMU finds it by itself.
async fn address(of: &NfsSpec) -> Result<IpAddr, StorageFailure> {
    let wrong = |why: String| {
        says(format!(
            "the NFS server `{}` has no IPv4 address that this host can find ({why}); correct `server`",
            of.server
        ))
    };
    let found = tokio::net::lookup_host((of.server.as_str(), 0)).await;
    let mut found = found.map_err(|error| wrong(error.to_string()))?;
    let first = found.find(std::net::SocketAddr::is_ipv4);
    first.map(|at| at.ip()).ok_or_else(|| wrong("it has others".into()))
}
