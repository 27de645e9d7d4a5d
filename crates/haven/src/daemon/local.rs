//! What the API and the agent need of this host and of the other hosts' daemons.

use super::{
    API_PORT, members,
    pieces::ReplicaPieces,
    setup::{HostFile, seal_power},
};
use crate::paths::Paths;
use async_trait::async_trait;
use haven_client::Client;
use haven_control::api::{LocalHost, serve::Duplex};
use haven_host::{
    agent::tunnel::Load,
    agent::{
        failsafe::Promisers,
        storage::{StorageFailure, VolumeName},
    },
    storage::{
        backup::{
            files::{self, At},
            repository::Repository,
            target::Targets,
        },
        files::Fetch,
        gluster::GlusterMounts,
        images::ImageStore,
        nfs::volumes::NfsPools,
        rbd::volumes::RbdPools,
    },
    vm::driver::VmDriver,
};
use haven_model::{
    Bytes, Name, PoolSpec, RbdSpec, Snapshot,
    api::{BackupFiles, BackupList, JoinAnswer, JoinRequest},
    backup::Backup,
    failsafe::{PromiseAnswer, PromiseQuestion},
    image::ImageFile,
    volume::VolumeRef,
};
use haven_store::{
    pki::{Current, PkiDir},
    raw::EtcdStore,
    seal::ClusterKey,
    server,
};
use std::{net::Ipv4Addr, path::PathBuf, sync::Arc};
use tokio::{io::AsyncRead, sync::watch};

/// Other hosts, by mutual TLS.
#[derive(Clone)]
pub struct Peers {
    me: Name,
    tls: Arc<rustls::ClientConfig>,
    live: watch::Receiver<Arc<Snapshot>>,
}

impl Peers {
    /// With this host's certificate.
    pub fn new(
        current: &Current,
        me: Name,
        live: watch::Receiver<Arc<Snapshot>>,
    ) -> anyhow::Result<Self> {
        Ok(Self { me, tls: Arc::new(current.client_config()?), live })
    }

    /// The way into the process on `host` that takes `vm`.
    pub async fn way_into(
        &self,
        host: &Name,
        vm: &str,
        load: Load,
    ) -> Result<Box<dyn haven_client::Duplex>, String> {
        let address = self.live.borrow().hosts.get(host).map(|host| host.spec.address);
        let address = address.ok_or_else(|| format!("there is no host {host}"))?;
        let client = self.client(address);
        let what = match load {
            Load::Memory => "incoming",
            Load::Disks => "incoming/disks",
        };
        client.upgrade(&format!("/v1/vms/{vm}/{what}")).await.map_err(|error| error.to_string())
    }

    /// The whole answer of a host's API to a GET.
    pub async fn get(&self, host: &Name, path: &str) -> Result<Vec<u8>, String> {
        let address = self.live.borrow().hosts.get(host).map(|host| host.spec.address);
        let address = address.ok_or_else(|| format!("there is no host {host}"))?;
        self.client(address).bytes(path).await.map_err(|error| error.to_string())
    }

    fn client(&self, host: Ipv4Addr) -> Client {
        Client::as_host(format!("{host}:{API_PORT}"), Arc::clone(&self.tls))
    }
}

#[async_trait]
impl Promisers for Peers {
    async fn ask(&self, host: &Name, question: &PromiseQuestion) -> Result<PromiseAnswer, String> {
        let address = self.live.borrow().hosts.get(host).map(|host| host.spec.address);
        let address = address.ok_or_else(|| "this host does not know it".to_owned())?;
        self.client(address).promise(question).await.map_err(|error| error.to_string())
    }
}

#[async_trait]
impl Fetch for Peers {
    async fn fetch(&self, file: &ImageFile, into: &ImageStore) -> Result<(), StorageFailure> {
        let snapshot = Arc::clone(&self.live.borrow());
        let mut why = "no host has it".to_owned();
        let holds = |name: &Name| {
            snapshot.host_status.get(name).is_some_and(|s| s.images.contains(&file.sha256))
        };
        // Those that say so are asked first; one that has just imported it may not have said so yet.
        let mut hosts: Vec<_> =
            snapshot.hosts.iter().filter(|(name, _)| **name != self.me).collect();
        hosts.sort_by_key(|(name, _)| (!holds(name), (*name).clone()));
        for (name, host) in hosts {
            if !snapshot.session_open(name) {
                continue;
            }
            match self.client(host.spec.address).stream(&format!("/v1/blobs/{}", file.sha256)).await
            {
                Ok(stream) => return into.import(stream, Some(&file.sha256)).await.map(|_| ()),
                Err(error) => why = format!("{name}: {error}"),
            }
        }
        Err(StorageFailure {
            what: format!(
                "the image file {} cannot be fetched ({why}); import the image again with `haven image import`",
                &file.sha256[..file.sha256.len().min(12)]
            ),
        })
    }
}

/// This host for the API.
pub struct Local {
    images: ImageStore,
    vms: Arc<dyn VmDriver>,
    peers: Peers,
    pieces: ReplicaPieces,
    targets: Targets,
    rbd: RbdPools,
    gluster: GlusterMounts,
    store: EtcdStore,
    host: HostFile,
    pki: PkiDir,
}

impl Local {
    /// Puts it together.
    pub fn new(
        paths: &Paths,
        host: &HostFile,
        current: &Current,
        store: EtcdStore,
        vms: Arc<dyn VmDriver>,
        live: watch::Receiver<Arc<Snapshot>>,
        (targets, rbd, gluster): (Targets, RbdPools, GlusterMounts),
    ) -> anyhow::Result<Self> {
        let peers = Peers::new(current, host.name.clone(), live.clone())?;
        Ok(Self {
            images: ImageStore::new(paths.state.join("images")),
            vms,
            pieces: ReplicaPieces { me: host.name.clone(), live, peers: peers.clone() },
            peers,
            targets,
            rbd,
            gluster,
            store,
            host: host.clone(),
            pki: PkiDir(paths.state.join("pki")),
        })
    }

    /// A backup, and where it is.
    async fn backup(
        &self,
        target: &Name,
        vm: &Name,
        id: &str,
    ) -> Result<(Repository, Backup), StorageFailure> {
        let repository = self.targets.repository(target)?;
        let backup = repository.read(vm, id).await?;
        Ok((repository, backup))
    }

    /// Where the store is reached.
    async fn endpoints(&self) -> Result<Vec<String>, String> {
        let members = self.store.members().await;
        let members = members.map_err(|error| haven_host::agent::chain(&error))?;
        let ip = |url: &str| -> Option<Ipv4Addr> {
            url.strip_prefix("https://")?.rsplit_once(':')?.0.parse().ok()
        };
        let voters = members.iter().filter(|member| !member.learner);
        Ok(voters.filter_map(|member| ip(&member.peer_url)).map(server::client_url).collect())
    }
}

#[async_trait]
impl LocalHost for Local {
    async fn import(
        &self,
        from: Box<dyn AsyncRead + Send + Unpin>,
        expected: Option<String>,
    ) -> Result<ImageFile, String> {
        let imported = self
            .images
            .import(from, expected.as_deref())
            .await
            .map_err(|error| error.to_string())?;
        Ok(ImageFile { sha256: imported.sha256, size: Bytes(imported.size) })
    }

    async fn disk_format(&self, file: &ImageFile) -> Result<String, String> {
        let path = self.images.path(&file.sha256);
        let output = tokio::process::Command::new("qemu-img")
            .args(["info", "--output=json"])
            .arg(&path)
            .output()
            .await
            .map_err(|error| {
                format!("qemu-img cannot be started ({error}); install the package qemu-utils")
            })?;
        let value: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        value["format"]
            .as_str()
            .map(str::to_owned)
            .ok_or_else(|| "this is not a disk that QEMU can read".into())
    }

    fn blob(&self, sha256: &str) -> Option<PathBuf> {
        self.images.list().contains(sha256).then(|| self.images.path(sha256))
    }

    fn console(&self, vm: &str) -> PathBuf {
        self.vms.console(vm)
    }

    fn log(&self, vm: &str) -> PathBuf {
        self.vms.log(vm)
    }

    fn disks_in(&self, vm: &str) -> Option<PathBuf> {
        self.vms.disks_in(vm)
    }

    fn way_in(&self, vm: &str) -> Result<Box<dyn Duplex>, String> {
        let way = self.vms.way_in(vm);
        let way = way.ok_or_else(|| format!("no process here waits for {vm}"))?;
        let tell = |error: std::io::Error| format!("the way into {vm} cannot be used: {error}");
        way.set_nonblocking(true).map_err(tell)?;
        Ok(Box::new(tokio::net::UnixStream::from_std(way).map_err(tell)?))
    }

    async fn admit(&self, request: &JoinRequest) -> Result<JoinAnswer, String> {
        let authority = self.pki.load_authority().map_err(|error| error.to_string())?;
        let certificate = authority
            .sign(&request.request, request.host.as_str(), &[request.address.into()])
            .map_err(|error| error.to_string())?;
        let endpoints = self.endpoints().await?;
        let mut power = request.power.clone();
        if let Some(power) = &mut power {
            let key = ClusterKey::derive(&authority).map_err(|error| error.to_string())?;
            let sealed = seal_power(&key, &request.host, power);
            sealed.map_err(|error| error.to_string())?;
        }
        let record = members::host_record(&request.host, request.address, power, request.witness);
        self.store.txn(vec![], vec![record]).await.map_err(|error| error.to_string())?;
        Ok(JoinAnswer {
            certificate,
            ca: authority.certificate,
            ca_key: authority.key,
            heartbeat_key: self.host.heartbeat.clone(),
            endpoints,
        })
    }

    async fn relay(&self, host: Ipv4Addr, path: &str) -> Result<Box<dyn Duplex>, String> {
        let stream =
            self.peers.client(host).upgrade(path).await.map_err(|error| error.to_string())?;
        Ok(Box::new(stream))
    }

    async fn pieces(&self, of: &VolumeRef, from: u64, count: u64) -> Result<Vec<u8>, String> {
        let hashes = self.pieces.here(of, from, count).await;
        hashes.map(|hashes| hashes.concat()).map_err(|failure| failure.what)
    }

    async fn kept(
        &self,
        volume: &VolumeRef,
        vm_uid: &str,
        copy: &str,
        from: u64,
    ) -> Result<Vec<u8>, String> {
        let VolumeRef { vm, disk } = volume.clone();
        let volume = VolumeName { vm, disk, vm_uid: vm_uid.to_owned() };
        let part = self.pieces.kept_here(&volume, copy, from).await;
        part.map(|part| part.to_bytes()).map_err(|failure| failure.what)
    }

    async fn check_ceph(&self, pool: &Name, rbd: &RbdSpec) -> Result<String, String> {
        self.rbd.check(pool, rbd).await.map_err(|failure| failure.what)
    }

    async fn check_filer(&self, pool: &PoolSpec, only_asked: bool) -> Result<String, String> {
        let checked = match (&pool.nfs, &pool.gluster) {
            (Some(nfs), _) => NfsPools.check(nfs, only_asked).await,
            (_, Some(gluster)) => self.gluster.check(gluster, only_asked).await,
            (None, None) => {
                Err(StorageFailure { what: "no pool of such a filer is known here".into() })
            }
        };
        checked.map_err(|failure| failure.what)
    }

    async fn mark_target(&self, target: &Name) -> Result<(), String> {
        let repository = self.targets.repository(target).map_err(|failure| failure.what)?;
        repository.create(super::wall_ms()).await.map_err(|failure| failure.what)
    }

    async fn backups(&self, target: &Name, vm: Option<&Name>) -> Result<BackupList, String> {
        let listed = async {
            let repository = self.targets.repository(target)?;
            repository.ready().await?;
            repository.list(vm).await
        };
        let listed = listed.await.map_err(|failure: StorageFailure| failure.what)?;
        let unreadable = listed.unreadable.into_iter();
        let unreadable = unreadable.map(|(key, why)| format!("{target}: {key}: {why}")).collect();
        Ok(BackupList { backups: listed.backups, unreadable })
    }

    async fn backup_files(
        &self,
        target: &Name,
        vm: &Name,
        id: &str,
        at: Option<&str>,
    ) -> Result<BackupFiles, String> {
        let found = async {
            let (repository, backup) = self.backup(target, vm, id).await?;
            let Some(at) = at else {
                let systems = files::systems(&repository, &backup).await?;
                return Ok(BackupFiles { systems, files: Vec::new() });
            };
            let files = files::list(&repository, &backup, At::parse(at)?).await?;
            Ok(BackupFiles { systems: Vec::new(), files })
        };
        found.await.map_err(|failure: StorageFailure| failure.what)
    }

    async fn backup_file(
        &self,
        target: &Name,
        vm: &Name,
        id: &str,
        at: &str,
    ) -> Result<(u64, Box<dyn AsyncRead + Send + Unpin>), String> {
        let found = async {
            let (repository, backup) = self.backup(target, vm, id).await?;
            files::read(&repository, &backup, At::parse(at)?).await
        };
        found.await.map_err(|failure: StorageFailure| failure.what)
    }

    async fn remove_backup(&self, target: &Name, vm: &Name, id: &str) -> Result<(), String> {
        let removed = async {
            let repository = self.targets.repository(target)?;
            repository.ready().await?;
            repository.remove(vm, id).await
        };
        removed.await.map_err(|failure: StorageFailure| failure.what)
    }

    async fn fetch(&self, host: Ipv4Addr, path: &str) -> Result<Vec<u8>, String> {
        self.peers.client(host).bytes(path).await.map_err(|error| error.to_string())
    }
}
