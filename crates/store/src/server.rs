//! Supervision of the host's own etcd member: it is started, restarted when it ends, and kept healthy.
//!
//! The member's process dies with the daemon (a member without its daemon helps nobody, and the store survives the
//! loss of a member); VMs do not.

use crate::{
    pki::PkiDir,
    raw::{EtcdStore, StoreError},
};
use etcd_client::{
    AlarmAction, AlarmOptions, AlarmType, Client, CompactionOptions, MemberAddOptions,
};
use std::{net::Ipv4Addr, path::PathBuf, process::Stdio, sync::atomic::Ordering, time::Duration};
use tokio_util::sync::CancellationToken;

/// Port on which clients reach a member.
pub const CLIENT_PORT: u16 = 7379;
/// Port on which members reach each other.
pub const PEER_PORT: u16 = 7380;
/// Operations, and comparisons, that one transaction may have.
pub const MAX_TXN_OPS: usize = 1024;
/// Bytes that one transaction may have, all in all. A watch brings it in one message, and clients read 4 MiB at most.
pub const MAX_REQUEST_BYTES: usize = 3 << 19;

/// The member of one host.
#[derive(Clone, Debug)]
pub struct MemberConfig {
    /// Its name: the host's.
    pub name: String,
    /// The host's address.
    pub address: Ipv4Addr,
    /// Where its data stands.
    pub data: PathBuf,
    /// Where its output goes.
    pub log: PathBuf,
    /// The certificates.
    pub pki: PkiDir,
    /// `host1=https://…,host2=https://…`, only for a member that starts for the first time.
    pub initial_cluster: String,
    /// Whether that cluster exists already.
    pub existing: bool,
}

/// The size of a member's file at which etcd takes no more writes, bytes: renewals neither, so that every VM would end.
pub const QUOTA: u64 = 2 << 30;
/// At so much in use, bytes, only what makes room is still taken, so that the renewals never meet the quota.
pub const NEARLY_FULL: u64 = QUOTA / 4 * 3;

/// Address at which clients reach the member of a host.
#[must_use]
pub fn client_url(address: Ipv4Addr) -> String {
    format!("https://{address}:{CLIENT_PORT}")
}

/// Address at which members reach the member of a host.
#[must_use]
pub fn peer_url(address: Ipv4Addr) -> String {
    format!("https://{address}:{PEER_PORT}")
}

/// The command that runs a member. Works with etcd 3.4 and later.
#[must_use]
pub fn command(config: &MemberConfig) -> tokio::process::Command {
    let mut command = tokio::process::Command::new("etcd");
    let flag = |name: &str, value: String| format!("--{name}={value}");
    let file = |path: PathBuf| path.display().to_string();
    command
        .arg(flag("name", config.name.clone()))
        .arg(flag("data-dir", file(config.data.clone())))
        .arg(flag("listen-client-urls", client_url(config.address)))
        .arg(flag("advertise-client-urls", client_url(config.address)))
        .arg(flag("listen-peer-urls", peer_url(config.address)))
        .arg(flag("initial-advertise-peer-urls", peer_url(config.address)))
        .arg(flag("initial-cluster", config.initial_cluster.clone()))
        .arg(flag("initial-cluster-state", if config.existing { "existing" } else { "new" }.into()))
        .arg(flag("cert-file", file(config.pki.certificate())))
        .arg(flag("key-file", file(config.pki.key())))
        .arg(flag("trusted-ca-file", file(config.pki.ca())))
        .arg("--client-cert-auth=true")
        .arg(flag("peer-cert-file", file(config.pki.certificate())))
        .arg(flag("peer-key-file", file(config.pki.key())))
        .arg(flag("peer-trusted-ca-file", file(config.pki.ca())))
        .arg("--peer-client-cert-auth=true")
        // Haven's timers rest on these (DESIGN.md section 4).
        .arg("--heartbeat-interval=100")
        .arg("--election-timeout=1000")
        .arg("--pre-vote=true")
        // An apply is one transaction, so that it happens whole or not at all.
        .arg(flag("max-txn-ops", MAX_TXN_OPS.to_string()))
        .arg(flag("max-request-bytes", MAX_REQUEST_BYTES.to_string()))
        .arg(flag("quota-backend-bytes", QUOTA.to_string()))
        .arg("--snapshot-count=10000")
        .arg("--logger=zap")
        .arg("--log-level=warn")
        .env("ETCD_UNSUPPORTED_ARCH", "")
        .stdin(Stdio::null())
        .kill_on_drop(true);
    // SAFETY: prctl is async-signal-safe and touches only the child.
    unsafe {
        command.pre_exec(|| {
            nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
            Ok(())
        });
    }
    command
}

/// In words: which of a member's ports another program has. Asked when no member runs.
#[must_use]
pub fn taken(address: Ipv4Addr) -> Option<String> {
    let is_taken = |port: &u16| {
        let tried = std::net::TcpListener::bind((address, *port));
        tried.is_err_and(|error| error.kind() == std::io::ErrorKind::AddrInUse)
    };
    [CLIENT_PORT, PEER_PORT].into_iter().find(is_taken).map(|port| {
        format!(
            "another program has the port {port}, which etcd needs: end it; `ss -ltnp sport = :{port}` names it"
        )
    })
}

/// Keeps the member running until `cancel`. `failed` is told, in words, each time it ends by itself.
pub async fn supervise(
    config: MemberConfig,
    failed: impl Fn(String) + Send,
    cancel: CancellationToken,
) {
    let mut pause = Duration::from_millis(200);
    loop {
        let started = tokio::time::Instant::now();
        let log = std::fs::OpenOptions::new().create(true).append(true).open(&config.log);
        let mut command = command(&config);
        if let Ok(log) = log {
            if let Ok(copy) = log.try_clone() {
                command.stdout(copy);
            }
            command.stderr(log);
        }
        match command.spawn() {
            Ok(mut child) => tokio::select! {
                biased;
                () = cancel.cancelled() => {
                    let _ = child.kill().await;
                    return;
                }
                ended = child.wait() => {
                    let how = ended.map_or_else(|e| e.to_string(), |s| s.to_string());
                    failed(taken(config.address).unwrap_or_else(|| {
                        format!("etcd ended ({how}); its log is {}", config.log.display())
                    }));
                }
            },
            Err(error) => {
                failed(format!("etcd cannot be started ({error}); install the package etcd-server"))
            }
        }
        if started.elapsed() > Duration::from_secs(30) {
            pause = Duration::from_millis(200);
        }
        tokio::select! {
            biased;
            () = cancel.cancelled() => return,
            () = tokio::time::sleep(pause) => {}
        }
        pause = (pause * 2).min(Duration::from_secs(5));
    }
}

/// A member as the store lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its id.
    pub id: u64,
    /// Its name; empty until it first started.
    pub name: String,
    /// Where members reach it.
    pub peer_url: String,
    /// It does not vote yet.
    pub learner: bool,
}

/// What a member says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MemberState {
    /// It leads.
    pub leads: bool,
    /// Bytes of its file that hold something.
    pub used: u64,
    /// The store is over its quota and takes no writes.
    pub full: bool,
    /// Its data differ from the other members'.
    pub corrupt: bool,
}

/// A member that runs answers at once, with or without a quorum.
const STATE_DEADLINE: Duration = Duration::from_secs(1);
/// A person who looks at the cluster waits for this, and would rather see the rest.
const LEADER_DEADLINE: Duration = Duration::from_millis(300);
/// Calls that change members may wait for an election.
const MEMBER_DEADLINE: Duration = Duration::from_secs(5);

/// Rewriting a member's file takes seconds for gigabytes.
const DEFRAGMENT_DEADLINE: Duration = Duration::from_secs(60);

async fn call<T>(
    store: &EtcdStore,
    make: impl AsyncFnOnce(Client) -> Result<T, etcd_client::Error>,
) -> Result<T, StoreError> {
    let (index, client) = store.client();
    match tokio::time::timeout(MEMBER_DEADLINE, make(client)).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => {
            store.rotate(index);
            Err(StoreError::Refused { source: Box::new(error) })
        }
        Err(_) => {
            store.rotate(index);
            Err(StoreError::Unknown(MEMBER_DEADLINE))
        }
    }
}

impl EtcdStore {
    /// All members.
    ///
    /// # Errors
    /// As [`EtcdStore::get`].
    pub async fn members(&self) -> Result<Vec<Member>, StoreError> {
        call(self, async |mut client: Client| {
            let list = client.member_list().await?;
            let member = |m: &etcd_client::Member| Member {
                id: m.id(),
                name: m.name().to_owned(),
                peer_url: m.peer_urls().first().cloned().unwrap_or_default(),
                learner: m.is_learner(),
            };
            Ok(list.members().iter().map(member).collect())
        })
        .await
    }

    /// Adds a member that learns before it votes.
    ///
    /// # Errors
    /// [`StoreError::Refused`] with what etcd said, for example that another learner is still catching up.
    pub async fn add_learner(&self, peer_url: String) -> Result<u64, StoreError> {
        call(self, async move |mut client: Client| {
            let options = MemberAddOptions::new().with_is_learner();
            let added = client.member_add([peer_url], Some(options)).await?;
            Ok(added.member().map_or(0, etcd_client::Member::id))
        })
        .await
    }

    /// Lets a learner vote.
    ///
    /// # Errors
    /// [`StoreError::Refused`] while it has not caught up.
    pub async fn promote(&self, id: u64) -> Result<(), StoreError> {
        call(self, async move |mut client: Client| client.member_promote(id).await.map(|_| ()))
            .await
    }

    /// Removes a member.
    ///
    /// # Errors
    /// [`StoreError::Refused`] when that would lose the quorum.
    pub async fn remove_member(&self, id: u64) -> Result<(), StoreError> {
        call(self, async move |mut client: Client| client.member_remove(id).await.map(|_| ())).await
    }

    /// Forgets revisions older than `revision`.
    ///
    /// # Errors
    /// [`StoreError::Refused`] when that is compacted already.
    pub async fn compact(&self, revision: i64) -> Result<(), StoreError> {
        call(self, async move |mut client: Client| {
            client.compact(revision, Some(CompactionOptions::new())).await.map(|_| ())
        })
        .await
    }

    /// The member that leads, as the member in use knows it; none during an election.
    ///
    /// # Errors
    /// As [`EtcdStore::get`].
    pub async fn leader(&self) -> Result<Option<u64>, StoreError> {
        let (_, mut client) = self.client();
        match tokio::time::timeout(LEADER_DEADLINE, client.status()).await {
            Ok(Ok(status)) => Ok(Some(status.leader()).filter(|id| *id != 0)),
            Ok(Err(error)) => Err(StoreError::Refused { source: Box::new(error) }),
            Err(_) => Err(StoreError::Unknown(LEADER_DEADLINE)),
        }
    }

    /// What the member at this endpoint says of itself; nothing when this handle does not use that endpoint.
    ///
    /// # Errors
    /// [`StoreError::Unknown`] when it does not answer within a second, [`StoreError::Refused`] when it cannot be
    /// reached.
    pub async fn state_of(&self, endpoint: &str) -> Result<Option<MemberState>, StoreError> {
        let Some(mut client) = self.client_of(endpoint) else { return Ok(None) };
        let status = match tokio::time::timeout(STATE_DEADLINE, client.status()).await {
            Ok(Ok(status)) => status,
            Ok(Err(error)) => return Err(StoreError::Refused { source: Box::new(error) }),
            Err(_) => return Err(StoreError::Unknown(STATE_DEADLINE)),
        };
        let alarm = |name: &str| status.errors().iter().any(|error| error.contains(name));
        let used = u64::try_from(status.raft_used_db_size()).unwrap_or(0);
        self.note_used(used);
        Ok(Some(MemberState {
            leads: status.header().is_some_and(|h| h.member_id() == status.leader()),
            used,
            full: alarm("alarm:NOSPACE"),
            corrupt: alarm("alarm:CORRUPT"),
        }))
    }

    /// Notes how much of the store is in use, bytes, as a member says.
    pub fn note_used(&self, used: u64) {
        self.nearly_full.store(used > NEARLY_FULL, Ordering::Relaxed);
    }

    /// Whether a member said last that the store is nearly full: then nothing more may be added to it.
    #[must_use]
    pub fn nearly_full(&self) -> bool {
        self.nearly_full.load(Ordering::Relaxed)
    }

    /// Lets a store that is over its quota take writes again, if forgetting what is older than `revision` makes enough
    /// room; if not, etcd raises its alarm again at the next write.
    ///
    /// # Errors
    /// [`StoreError::Refused`] with what a member said.
    pub async fn make_room(&self, revision: i64) -> Result<(), StoreError> {
        let forgotten = call(self, async move |mut client: Client| {
            let wait = CompactionOptions::new().with_physical();
            client.compact(revision, Some(wait)).await.map(|_| ())
        });
        if let Err(error) = forgotten.await {
            tracing::debug!(%error, "perhaps compacted already");
        }
        // What is in use is counted late, so that nothing is asked before.
        self.defragment_each(None).await?;
        call(self, async |mut client: Client| {
            // An alarm is of one member, and only that one's id takes it back.
            let alarms = client.alarm(AlarmAction::Get, AlarmType::Nospace, None).await?;
            for member in alarms.alarms().iter().map(|alarm| alarm.member_id()) {
                let mut of = AlarmOptions::new();
                of.with_member(member);
                client.alarm(AlarmAction::Deactivate, AlarmType::Nospace, Some(of)).await?;
            }
            Ok(())
        })
        .await
    }

    /// Gives the space of forgotten revisions back to the file system, on one member after another, where at least
    /// `wasted` bytes are unused and the file is twice as large as it must be, or near the quota: that counts what is
    /// unused as well. With `None` it is done always. A member answers nobody meanwhile.
    ///
    /// # Errors
    /// [`StoreError::Refused`] with what a member said; those after it are left as they are.
    pub async fn defragment_each(&self, wasted: Option<i64>) -> Result<(), StoreError> {
        for mut client in self.clients() {
            let work = async {
                let status = client.status().await?;
                let (size, used) = (status.db_size(), status.raft_used_db_size());
                let near = u64::try_from(size).is_ok_and(|size| size > NEARLY_FULL);
                let worth = |wasted| size - used > wasted && (near || size > 2 * used);
                if wasted.is_none_or(worth) {
                    client.defragment().await?;
                }
                Ok(())
            };
            match tokio::time::timeout(DEFRAGMENT_DEADLINE, work).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => {
                    let error: etcd_client::Error = error;
                    return Err(StoreError::Refused { source: Box::new(error) });
                }
                Err(_) => return Err(StoreError::Unknown(DEFRAGMENT_DEADLINE)),
            }
        }
        Ok(())
    }
}
