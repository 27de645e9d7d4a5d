//! How a host becomes part of a cluster: `haven init` on the first, `haven join` on the others.

use crate::paths::Paths;
use anyhow::{Context, bail};
use haven_client::{Client, Pin};
use haven_model::{Name, ObjectRef, api::JoinRequest, host::PowerSpec, object::Kind};
use haven_store::{
    file,
    pki::{self, Authority, PkiDir},
    raw::Identity,
    seal::{ClusterKey, Plain, SealError, is_sealed},
    server,
};
use serde::{Deserialize, Serialize};
use std::{net::Ipv4Addr, os::unix::fs::PermissionsExt, path::PathBuf};

/// What a host knows of itself and its cluster before it reaches the store: `STATE/host.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct HostFile {
    /// Its name.
    pub name: Name,
    /// Its address.
    pub address: Ipv4Addr,
    /// The cluster's name, on the host that made it.
    pub cluster: Option<String>,
    /// How its power is controlled, on the host that made the cluster; the password is sealed.
    pub power: Option<PowerSpec>,
    /// It only votes (`haven witness`).
    #[serde(default)]
    pub witness: bool,
    /// Hexadecimal.
    pub heartbeat: String,
    /// Addresses of hosts with a member of the store.
    pub voters: Vec<Ipv4Addr>,
    /// The members as they were when this host's own was added; absent when it runs none.
    pub initial_cluster: Option<String>,
}

impl HostFile {
    fn path(paths: &Paths) -> PathBuf {
        paths.state.join("host.json")
    }

    /// Reads it; nothing while this host belongs to no cluster.
    pub fn load(paths: &Paths) -> anyhow::Result<Option<Self>> {
        let path = Self::path(paths);
        match std::fs::read(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("{} cannot be read", path.display())),
            Ok(text) => Ok(Some(
                serde_json::from_slice(&text)
                    .with_context(|| format!("{} is damaged", path.display()))?,
            )),
        }
    }

    /// Writes it at once and whole; it is on the disk when this returns.
    pub fn save(&self, paths: &Paths) -> anyhow::Result<()> {
        let path = Self::path(paths);
        file::write_whole(&path, &serde_json::to_vec_pretty(self)?)
            .with_context(|| format!("{} cannot be written", path.display()))
    }

    /// Where the store is reached, this host's own member first.
    pub fn endpoints(&self) -> Vec<String> {
        if self.initial_cluster.is_some() {
            super::endpoints(self.address, &self.voters)
        } else {
            self.voters.iter().map(|ip| server::client_url(*ip)).collect()
        }
    }

    /// Notes where the voters are now, so that the next daemon finds the store also when this host's own member is
    /// broken or was replaced. Writes only what differs.
    pub fn remember(&mut self, paths: &Paths, voters: &[Ipv4Addr]) -> anyhow::Result<()> {
        let mut voters = voters.to_vec();
        voters.sort_unstable();
        if voters.is_empty() || voters == self.voters {
            return Ok(());
        }
        let now = Self { voters, ..self.clone() };
        now.save(paths)?;
        *self = now;
        Ok(())
    }

    /// Whether the member here may begin a store of its own: only the one that `haven init` made, and never once
    /// others have voted, or a host that lost its data would be a second cluster.
    pub fn begins_a_cluster(&self) -> bool {
        let alone = self.voters.iter().all(|voter| *voter == self.address);
        let first = self.initial_cluster.as_ref().is_some_and(|all| !all.contains(','));
        self.cluster.is_some() && first && alone
    }

    /// The key of the heartbeats.
    pub fn heartbeat_key(&self) -> anyhow::Result<[u8; 32]> {
        let byte =
            |i: usize| u8::from_str_radix(self.heartbeat.get(2 * i..2 * i + 2).unwrap_or("x"), 16);
        let mut key = [0; 32];
        for (i, slot) in key.iter_mut().enumerate() {
            *slot = byte(i).context("the heartbeat key in host.json is damaged")?;
        }
        Ok(key)
    }
}

/// What `haven init` and `haven join` are told about this host.
#[derive(Clone, Debug)]
pub struct ThisHost {
    /// Its name.
    pub name: Name,
    /// Its address.
    pub address: Ipv4Addr,
    /// How its power is controlled.
    pub power: Option<PowerSpec>,
}

/// Seals the password of a host's power controller, unless it is.
pub fn seal_power(key: &ClusterKey, host: &Name, power: &mut PowerSpec) -> Result<(), SealError> {
    if !power.password.is_empty() && !is_sealed(&power.password) {
        let of = ObjectRef::new(Kind::Host, host.clone());
        power.password = key.seal(&of, &Plain::new(std::mem::take(&mut power.password)))?;
    }
    Ok(())
}

fn prepare(paths: &Paths) -> anyhow::Result<PkiDir> {
    if HostFile::load(paths)?.is_some() {
        bail!(
            "this host is part of a cluster already ({} exists)",
            HostFile::path(paths).display()
        );
    }
    for (path, mode) in [(&paths.state, 0o711), (&paths.log, 0o755)] {
        std::fs::create_dir_all(path)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
    }
    Ok(PkiDir(paths.state.join("pki")))
}

/// Makes a cluster of this host.
pub fn init(cluster: &str, this: &ThisHost) -> anyhow::Result<()> {
    let paths = Paths::from_env();
    let pki = prepare(&paths)?;
    let authority = Authority::create(cluster)?;
    let (key, request) = pki::request(this.name.as_str())?;
    let certificate = authority.sign(&request, this.name.as_str(), &[this.address.into()])?;
    let identity = Identity { ca: authority.certificate.clone(), certificate, key };
    pki.save(&identity, Some(&authority.key))?;
    let mut power = this.power.clone();
    if let Some(power) = &mut power {
        let key = ClusterKey::derive(&authority)?;
        seal_power(&key, &this.name, power)?;
    }
    let heartbeat = format!("{}{}", uuid::Uuid::new_v4().simple(), uuid::Uuid::new_v4().simple());
    HostFile {
        name: this.name.clone(),
        address: this.address,
        cluster: Some(cluster.to_owned()),
        power,
        witness: false,
        heartbeat,
        voters: vec![this.address],
        initial_cluster: Some(format!("{}={}", this.name, server::peer_url(this.address))),
    }
    .save(&paths)
}

/// Makes this host part of the cluster of the daemon at `peer`, or only its witness.
pub async fn join(token: &str, peer: &str, this: &ThisHost, witness: bool) -> anyhow::Result<()> {
    let paths = Paths::from_env();
    let pki = prepare(&paths)?;
    let (secret, fingerprint) = token
        .rsplit_once('.')
        .context("this is not a join token; make one with `haven host invite`")?;
    let peer =
        if peer.contains(':') { peer.to_owned() } else { format!("{peer}:{}", super::API_PORT) };
    let client = Client::remote(peer, &Pin(fingerprint.to_owned()), None);
    let (key, request) = pki::request(this.name.as_str())?;
    let answer = client
        .join(&JoinRequest {
            secret: secret.to_owned(),
            host: this.name.clone(),
            address: this.address,
            power: this.power.clone(),
            witness,
            request,
        })
        .await?;
    let identity = Identity { ca: answer.ca, certificate: answer.certificate, key };
    pki.save(&identity, Some(&answer.ca_key))?;
    let host = |url: &String| url.strip_prefix("https://")?.rsplit_once(':')?.0.parse().ok();
    HostFile {
        name: this.name.clone(),
        address: this.address,
        cluster: None,
        // The host that let it in has written it.
        power: None,
        witness,
        heartbeat: answer.heartbeat_key,
        voters: answer.endpoints.iter().filter_map(host).collect(),
        // Its daemon adds a member of the store once it runs, if the cluster wants another.
        initial_cluster: None,
    }
    .save(&paths)
}
