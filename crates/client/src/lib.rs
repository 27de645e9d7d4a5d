//! The typed client of the API: for the command line, for hosts among each other, for the lab and the tests.
//!
//! It reaches a daemon over its unix socket (as root of that host), or over TLS with a token. One connection per
//! request: requests are few, and a dead host is noticed at once.

mod backups;
mod events;
mod snapshots;
mod tls;
mod upload;

pub use events::EventStream;
pub use tls::Pin;

use haven_model::{
    Event, Incident, Object, ObjectRef,
    api::{
        Applied, ApplyRequest, Balance, CheckAsked, ClusterItem, DrainView, Item, JoinAnswer,
        JoinRequest, MaintenanceAsked, MaintenanceView, ManifestFile, MigrationAsked,
        MigrationView, Overview, Page, ProblemBody, Rehearsal, Secret, TokenLine, VolumeView,
    },
    event::AuditEntry,
    failsafe::{PromiseAnswer, PromiseQuestion},
    object::Kind,
    power::FenceTest,
};
use http_body_util::{BodyExt, Full, combinators::UnsyncBoxBody};
use hyper::{
    Request, Response, StatusCode,
    body::{Bytes, Incoming},
    client::conn::http1,
};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use std::{path::PathBuf, sync::Arc, time::Duration};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite},
    net::{TcpStream, UnixStream},
};

/// What went wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// No daemon answers.
    #[error("no daemon of the cluster answers at {at}: {why}")]
    Unreachable {
        /// Where.
        at: String,
        /// What the system said.
        why: String,
    },
    /// A daemon took the request and gave no answer.
    #[error("{at} gave no answer within {} s{}", .within.as_secs(), if *.change {
        "; whether the change was made is not known"
    } else {
        ""
    })]
    NoAnswer {
        /// Where.
        at: String,
        /// How long it had.
        within: Duration,
        /// Whether the request was to change something.
        change: bool,
    },
    /// The daemon said no.
    #[error("{}", .0.detail)]
    Refused(Box<ProblemBody>),
    /// What was to be sent cannot be read to its end.
    #[error("it cannot be read to its end: {0}")]
    Source(String),
    /// The answer is not what this version expects.
    #[error("the daemon's answer cannot be read: {0}")]
    Unexpected(String),
}

/// Where a daemon is.
#[derive(Clone)]
enum Target {
    Unix(PathBuf),
    Tls { address: String, pin: Arc<rustls::ClientConfig>, token: Option<String> },
}

/// A client of one daemon.
#[derive(Clone)]
pub struct Client {
    target: Target,
}

type Body = UnsyncBoxBody<Bytes, std::io::Error>;
/// Bytes both ways.
pub trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// How long a daemon has to take a connection, TLS included.
const CONNECT: Duration = Duration::from_secs(3);
/// How long it has to begin its answer. Joining is the slowest: the store takes a new member meanwhile.
const ANSWER: Duration = Duration::from_secs(60);
/// How long it may be silent within an answer.
const SILENCE: Duration = Duration::from_secs(30);

/// The most entries that a page of what happened has.
const LARGEST_PAGE: usize = 5000;

/// A word as one part of a path: whatever it holds, it stays one part.
#[must_use]
pub fn encode(text: &str) -> String {
    let part = |byte: u8| match byte {
        b if b.is_ascii_alphanumeric() || b"-_~".contains(&b) => char::from(b).to_string(),
        // A part of one or two dots would be another path.
        b'.' if !text.trim_matches('.').is_empty() => ".".into(),
        b => format!("%{b:02X}"),
    };
    text.bytes().map(part).collect()
}

/// An object's part of a path.
fn path_of(of: &ObjectRef) -> String {
    format!("{}/{}", encode(of.kind.as_str()), encode(of.name.as_str()))
}

fn full(text: Vec<u8>) -> Body {
    Full::new(Bytes::from(text)).map_err(|never| match never {}).boxed_unsync()
}

impl Client {
    /// The daemon behind a unix socket.
    #[must_use]
    pub fn local(socket: PathBuf) -> Self {
        Self { target: Target::Unix(socket) }
    }

    /// A daemon at `HOST:PORT`, known by its authority.
    #[must_use]
    pub fn remote(address: String, pin: &Pin, token: Option<String>) -> Self {
        Self { target: Target::Tls { address, pin: Arc::new(pin.config()), token } }
    }

    /// A daemon at `HOST:PORT`, reached as a host of the cluster.
    #[must_use]
    pub fn as_host(address: String, config: Arc<rustls::ClientConfig>) -> Self {
        Self { target: Target::Tls { address, pin: config, token: None } }
    }

    /// The first of several local daemons that answers.
    ///
    /// # Errors
    /// [`ClientError::Unreachable`] when none does.
    pub async fn first_of(sockets: &[PathBuf]) -> Result<Self, ClientError> {
        let mut last = None;
        for socket in sockets {
            let client = Self::local(socket.clone());
            match tokio::time::timeout(CONNECT, client.version()).await {
                Ok(Ok(_)) => return Ok(client),
                Ok(Err(error)) => last = Some(error),
                Err(_) => {}
            }
        }
        Err(last.unwrap_or_else(|| ClientError::Unreachable {
            at: sockets.iter().map(|s| s.display().to_string()).collect::<Vec<_>>().join(", "),
            why: "no answer".into(),
        }))
    }

    fn place(&self) -> String {
        match &self.target {
            Target::Unix(path) => path.display().to_string(),
            Target::Tls { address, .. } => address.clone(),
        }
    }

    fn unreachable(&self, why: impl std::fmt::Display) -> ClientError {
        ClientError::Unreachable { at: self.place(), why: why.to_string() }
    }

    async fn connect(&self) -> Result<Box<dyn Duplex>, ClientError> {
        let late =
            || self.unreachable(format!("it took no connection within {} s", CONNECT.as_secs()));
        tokio::time::timeout(CONNECT, self.open()).await.map_err(|_| late())?
    }

    async fn open(&self) -> Result<Box<dyn Duplex>, ClientError> {
        match &self.target {
            Target::Unix(path) => {
                let stream = UnixStream::connect(path).await;
                Ok(Box::new(stream.map_err(|error| self.unreachable(error))?))
            }
            Target::Tls { address, pin, .. } => {
                let stream = TcpStream::connect(address).await;
                let stream = stream.map_err(|error| self.unreachable(error))?;
                let name = rustls_pki_types::ServerName::try_from("haven").expect("a good name");
                let tls =
                    tokio_rustls::TlsConnector::from(Arc::clone(pin)).connect(name, stream).await;
                Ok(Box::new(tls.map_err(|error| self.unreachable(error))?))
            }
        }
    }

    /// Sends a request and waits [`ANSWER`] for the head of the answer.
    async fn send(
        &self,
        request: hyper::http::request::Builder,
        body: Body,
    ) -> Result<Response<Incoming>, ClientError> {
        let change = request.method_ref().is_some_and(|method| method != hyper::Method::GET);
        let answer = self.exchange(request, body);
        tokio::time::timeout(ANSWER, answer).await.map_err(|_| ClientError::NoAnswer {
            at: self.place(),
            within: ANSWER,
            change,
        })?
    }

    /// Sends a request and waits for the head of the answer as long as it takes.
    async fn exchange(
        &self,
        request: hyper::http::request::Builder,
        body: Body,
    ) -> Result<Response<Incoming>, ClientError> {
        let stream = self.connect().await?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| self.unreachable(error))?;
        tokio::spawn(connection.with_upgrades());
        let mut request = request.header("host", "haven");
        if let Target::Tls { token: Some(token), .. } = &self.target {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let request =
            request.body(body).map_err(|error| ClientError::Unexpected(error.to_string()))?;
        let response =
            sender.send_request(request).await.map_err(|error| self.unreachable(error))?;
        if response.status().is_success() || response.status() == StatusCode::SWITCHING_PROTOCOLS {
            return Ok(response);
        }
        let status = response.status();
        let text = read(response).await?;
        let problem: ProblemBody = serde_json::from_slice(&text).unwrap_or_else(|_| ProblemBody {
            title: status.to_string(),
            status: status.as_u16(),
            detail: String::from_utf8_lossy(&text).into_owned(),
            ..ProblemBody::default()
        });
        Err(ClientError::Refused(Box::new(problem)))
    }

    async fn call<T: DeserializeOwned>(
        &self,
        method: &str,
        path: &str,
        body: Vec<u8>,
    ) -> Result<T, ClientError> {
        let request =
            Request::builder().method(method).uri(path).header("content-type", "application/json");
        let text = read(self.send(request, full(body)).await?).await?;
        let text: &[u8] = if text.is_empty() { b"null" } else { &text };
        serde_json::from_slice(text).map_err(|error| ClientError::Unexpected(error.to_string()))
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.call("GET", path, Vec::new()).await
    }

    /// The daemon's version.
    ///
    /// # Errors
    /// As all methods here: see [`ClientError`].
    pub async fn version(&self) -> Result<String, ClientError> {
        let map: std::collections::BTreeMap<String, String> = self.get("/v1/version").await?;
        Ok(map.get("version").cloned().unwrap_or_default())
    }

    /// The cluster on one screen.
    #[expect(clippy::missing_errors_doc, reason = "all methods fail as ClientError says")]
    pub async fn status(&self) -> Result<Overview, ClientError> {
        self.get("/v1/status").await
    }

    /// Whether this daemon promises to close no session of a host that cannot renew. Only hosts ask this.
    #[expect(clippy::missing_errors_doc, reason = "all methods fail as ClientError says")]
    pub async fn promise(&self, question: &PromiseQuestion) -> Result<PromiseAnswer, ClientError> {
        let host = encode(question.host.as_str());
        self.get(&format!("/v1/promise?host={host}&session={}", question.session)).await
    }

    /// The cluster's own spec.
    #[expect(clippy::missing_errors_doc, reason = "all methods fail as ClientError says")]
    pub async fn cluster(&self) -> Result<ClusterItem, ClientError> {
        self.get("/v1/cluster").await
    }

    /// Writes the cluster's own spec over the version that was read.
    #[expect(clippy::missing_errors_doc, reason = "all methods fail as ClientError says")]
    pub async fn replace_cluster(&self, item: &ClusterItem) -> Result<ClusterItem, ClientError> {
        self.call("PUT", "/v1/cluster", serde_json::to_vec(item).unwrap_or_default()).await
    }

    /// All objects of a kind.
    #[expect(clippy::missing_errors_doc, reason = "all methods fail as ClientError says")]
    pub async fn list(&self, kind: Kind) -> Result<Vec<Item>, ClientError> {
        self.all(&format!("/v1/objects/{kind}")).await
    }

    /// Every page of a list in order of names.
    async fn all<T: DeserializeOwned>(&self, path: &str) -> Result<Vec<T>, ClientError> {
        let (mut items, mut after) = (Vec::new(), String::new());
        loop {
            let page: Page<T> = self.get(&format!("{path}{after}")).await?;
            items.extend(page.items);
            match page.next {
                None => return Ok(items),
                Some(next) => after = format!("?after={}", encode(&next)),
            }
        }
    }

    /// So many of the last entries of a list in order of time, over as many pages as it takes; the oldest first.
    async fn last<T: DeserializeOwned>(
        &self,
        path: &str,
        limit: usize,
    ) -> Result<Vec<T>, ClientError> {
        let (mut pages, mut wanted, mut before) = (Vec::new(), limit, String::new());
        while wanted > 0 {
            let size = wanted.min(LARGEST_PAGE);
            let page: Page<T> = self.get(&format!("{path}?limit={size}{before}")).await?;
            wanted = wanted.saturating_sub(size);
            pages.push(page.items);
            match page.next {
                None => break,
                Some(next) => before = format!("&before={}", encode(&next)),
            }
        }
        Ok(pages.into_iter().rev().flatten().collect())
    }

    /// One object.
    #[expect(clippy::missing_errors_doc, reason = "all methods fail as ClientError says")]
    pub async fn object(&self, of: &ObjectRef) -> Result<Item, ClientError> {
        self.get(&format!("/v1/objects/{}", path_of(of))).await
    }

    /// Writes an object over the version that was read; at version 0 it must not be there yet.
    #[expect(clippy::missing_errors_doc, reason = "all methods fail as ClientError says")]
    pub async fn replace(&self, item: &Item) -> Result<Item, ClientError> {
        let body = serde_json::to_vec(item).unwrap_or_default();
        let path = format!("/v1/objects/{}", path_of(&item.object.reference()));
        self.call("PUT", &path, body).await
    }

    /// Makes an object that must not be there yet.
    #[expect(clippy::missing_errors_doc, reason = "all methods fail as ClientError says")]
    pub async fn create(&self, object: Object) -> Result<Item, ClientError> {
        let (state, host, columns) = (String::new(), None, std::collections::BTreeMap::new());
        let warning = String::new();
        self.replace(&Item { resource_version: 0, object, state, host, columns, warning }).await
    }

    /// Deletes an object.
    #[expect(clippy::missing_errors_doc, reason = "all methods fail as ClientError says")]
    pub async fn delete(&self, of: &ObjectRef) -> Result<Item, ClientError> {
        self.call("DELETE", &format!("/v1/objects/{}", path_of(of)), Vec::new()).await
    }

    /// Applies manifests.
    #[expect(clippy::missing_errors_doc, reason = "all methods fail as ClientError says")]
    pub async fn apply(
        &self,
        files: Vec<ManifestFile>,
        dry_run: bool,
    ) -> Result<Vec<Applied>, ClientError> {
        let body = serde_json::to_vec(&ApplyRequest { files, dry_run }).unwrap_or_default();
        self.call("POST", "/v1/apply", body).await
    }

    /// `start`, `stop` or `reset` of a VM.
    #[expect(clippy::missing_errors_doc, reason = "all methods fail as ClientError says")]
    pub async fn vm(&self, vm: &str, action: &str) -> Result<Item, ClientError> {
        self.call("POST", &format!("/v1/vms/{}/{}", encode(vm), encode(action)), Vec::new()).await
    }

    /// Asks for a VM to be moved while it runs.
    #[expect(clippy::missing_errors_doc, reason = "all methods fail as ClientError says")]
    pub async fn migrate(
        &self,
        vm: &str,
        asked: &MigrationAsked,
    ) -> Result<MigrationView, ClientError> {
        let body = serde_json::to_vec(asked).unwrap_or_default();
        self.call("POST", &format!("/v1/vms/{}/migration", encode(vm)), body).await
    }

    /// How the last live migration of a VM stands.
    #[expect(clippy::missing_errors_doc, reason = "all methods fail as ClientError says")]
    pub async fn migration(&self, vm: &str) -> Result<MigrationView, ClientError> {
        self.get(&format!("/v1/vms/{}/migration", encode(vm))).await
    }

    /// Takes a live migration back.
    #[expect(clippy::missing_errors_doc, reason = "all methods fail as ClientError says")]
    pub async fn cancel_migration(&self, vm: &str) -> Result<MigrationView, ClientError> {
        self.call("DELETE", &format!("/v1/vms/{}/migration", encode(vm)), Vec::new()).await
    }

    /// What would happen if these hosts failed, or this one were drained; `what` is `fail` or `drain`.
    #[expect(clippy::missing_errors_doc, reason = "all methods fail as ClientError says")]
    pub async fn rehearse(&self, what: &str, hosts: &[String]) -> Result<Rehearsal, ClientError> {
        let hosts: Vec<String> = hosts.iter().map(|host| encode(host)).collect();
        self.get(&format!("/v1/rehearse/{}?hosts={}", encode(what), hosts.join(","))).await
    }

    /// Asks for the replicas of a mirrored disk to be compared.
    #[expect(clippy::missing_errors_doc, reason = "all methods fail as ClientError says")]
    pub async fn check_volume(
        &self,
        name: &str,
        asked: &CheckAsked,
    ) -> Result<VolumeView, ClientError> {
        let body = serde_json::to_vec(asked).expect("what is asked for is plain data");
        self.call("POST", &format!("/v1/volumes/{}/check", encode(name)), body).await
    }

    /// Ends that.
    #[expect(clippy::missing_errors_doc, reason = "all methods fail as ClientError says")]
    pub async fn cancel_check(&self, name: &str) -> Result<VolumeView, ClientError> {
        self.call("DELETE", &format!("/v1/volumes/{}/check", encode(name)), Vec::new()).await
    }

    /// Removes a detached disk, with all that is on it.
    #[expect(clippy::missing_errors_doc, reason = "all methods fail as ClientError says")]
    pub async fn remove_volume(&self, name: &str) -> Result<(), ClientError> {
        self.call("DELETE", &format!("/v1/volumes/{}", encode(name)), Vec::new()).await
    }

    /// Disks of VMs.
    #[expect(clippy::missing_errors_doc, reason = "all methods fail as ClientError says")]
    pub async fn volumes(&self) -> Result<Vec<VolumeView>, ClientError> {
        self.get("/v1/volumes").await
    }

    /// A disk of a VM, `vm.disk`.
    #[expect(clippy::missing_errors_doc, reason = "all methods fail as ClientError says")]
    pub async fn volume(&self, name: &str) -> Result<VolumeView, ClientError> {
        self.get(&format!("/v1/volumes/{}", encode(name))).await
    }

    /// How even the load of hosts is, and which moves would help.
    #[expect(clippy::missing_errors_doc, reason = "all methods fail as ClientError says")]
    pub async fn balance(&self) -> Result<Balance, ClientError> {
        self.get("/v1/balance").await
    }

    /// Begins the moves that help.
    #[expect(clippy::missing_errors_doc, reason = "all methods fail as ClientError says")]
    pub async fn rebalance(&self) -> Result<Balance, ClientError> {
        self.call("POST", "/v1/balance", Vec::new()).await
    }

    /// How the restarts or upgrades of hosts stand.
    #[expect(clippy::missing_errors_doc, reason = "all methods fail as ClientError says")]
    pub async fn maintenance(&self) -> Result<MaintenanceView, ClientError> {
        self.get("/v1/maintenance").await
    }

    /// Asks for hosts to be restarted or upgraded, one after another.
    #[expect(clippy::missing_errors_doc, reason = "all methods fail as ClientError says")]
    pub async fn maintain(&self, asked: &MaintenanceAsked) -> Result<MaintenanceView, ClientError> {
        let body = serde_json::to_vec(asked).expect("what is asked is plain data");
        self.call("POST", "/v1/maintenance", body).await
    }

    /// Lets that go on after it has stopped.
    #[expect(clippy::missing_errors_doc, reason = "all methods fail as ClientError says")]
    pub async fn resume_maintenance(&self) -> Result<MaintenanceView, ClientError> {
        self.call("POST", "/v1/maintenance/resume", Vec::new()).await
    }

    /// Ends that: no further host has its turn.
    #[expect(clippy::missing_errors_doc, reason = "all methods fail as ClientError says")]
    pub async fn end_maintenance(&self) -> Result<MaintenanceView, ClientError> {
        self.call("POST", "/v1/maintenance/end", Vec::new()).await
    }

    /// Asks for a host to be emptied.
    #[expect(clippy::missing_errors_doc, reason = "all methods fail as ClientError says")]
    pub async fn drain(&self, host: &str) -> Result<DrainView, ClientError> {
        self.call("POST", &format!("/v1/hosts/{}/drain", encode(host)), Vec::new()).await
    }

    /// How the drain of a host stands.
    #[expect(clippy::missing_errors_doc, reason = "all methods fail as ClientError says")]
    pub async fn drained(&self, host: &str) -> Result<DrainView, ClientError> {
        self.get(&format!("/v1/hosts/{}/drain", encode(host))).await
    }

    /// Ends the drain of a host.
    #[expect(clippy::missing_errors_doc, reason = "all methods fail as ClientError says")]
    pub async fn undrain(&self, host: &str, bring_back: bool) -> Result<DrainView, ClientError> {
        let path = format!("/v1/hosts/{}/drain?bringBack={bring_back}", encode(host));
        self.call("DELETE", &path, Vec::new()).await
    }

    /// Reads a host's power from the hosts that could have to switch it off. Switches nothing.
    #[expect(clippy::missing_errors_doc, reason = "all methods fail as ClientError says")]
    pub async fn fence_test(&self, host: &str) -> Result<FenceTest, ClientError> {
        self.call("POST", &format!("/v1/hosts/{}/fence/test", encode(host)), Vec::new()).await
    }

    /// Changes the number of a service's members.
    #[expect(clippy::missing_errors_doc, reason = "all methods fail as ClientError says")]
    pub async fn scale(&self, service: &str, replicas: u32) -> Result<Item, ClientError> {
        let path = format!("/v1/services/{}/scale/{replicas}", encode(service));
        self.call("POST", &path, Vec::new()).await
    }

    /// Replaces all members of a service, a few at a time.
    #[expect(clippy::missing_errors_doc, reason = "all methods fail as ClientError says")]
    pub async fn restart(&self, service: &str) -> Result<Item, ClientError> {
        self.call("POST", &format!("/v1/services/{}/restart", encode(service)), Vec::new()).await
    }

    /// Lets the new members of a canary or blue-green update into the whole service.
    #[expect(clippy::missing_errors_doc, reason = "all methods fail as ClientError says")]
    pub async fn promote(&self, service: &str) -> Result<Item, ClientError> {
        self.call("POST", &format!("/v1/services/{}/promote", encode(service)), Vec::new()).await
    }

    /// The last events.
    #[expect(clippy::missing_errors_doc, reason = "all methods fail as ClientError says")]
    pub async fn events(&self, limit: usize) -> Result<Vec<Event>, ClientError> {
        self.last("/v1/events", limit).await
    }

    /// Events as they come, from now on or from behind the one with this id.
    #[expect(clippy::missing_errors_doc, reason = "all methods fail as ClientError says")]
    pub async fn follow(&self, after: Option<&str>) -> Result<EventStream, ClientError> {
        let mut request = Request::builder().uri("/v1/events/follow");
        if let Some(id) = after {
            request = request.header("last-event-id", id);
        }
        Ok(EventStream::of(self.send(request, full(Vec::new())).await?, self.place()))
    }

    /// All incidents.
    #[expect(clippy::missing_errors_doc, reason = "all methods fail as ClientError says")]
    pub async fn incidents(&self) -> Result<Vec<Incident>, ClientError> {
        self.last("/v1/incidents", usize::MAX).await
    }

    /// The audit log's last entries.
    #[expect(clippy::missing_errors_doc, reason = "all methods fail as ClientError says")]
    pub async fn audit(&self, limit: usize) -> Result<Vec<AuditEntry>, ClientError> {
        self.last("/v1/audit", limit).await
    }

    /// What there is to say of an object.
    #[expect(clippy::missing_errors_doc, reason = "all methods fail as ClientError says")]
    pub async fn explain(&self, of: &ObjectRef) -> Result<Vec<String>, ClientError> {
        self.get(&format!("/v1/explain/{}", path_of(of))).await
    }

    /// What a VM's console said.
    #[expect(clippy::missing_errors_doc, reason = "all methods fail as ClientError says")]
    pub async fn log(&self, vm: &str) -> Result<Vec<u8>, ClientError> {
        self.bytes(&format!("/v1/vms/{}/log", encode(vm))).await
    }

    /// The whole answer to a GET.
    #[expect(clippy::missing_errors_doc, reason = "all methods fail as ClientError says")]
    pub async fn bytes(&self, path: &str) -> Result<Vec<u8>, ClientError> {
        read(self.send(Request::builder().uri(path), full(Vec::new())).await?).await
    }

    /// The answer to a GET as it comes.
    #[expect(clippy::missing_errors_doc, reason = "all methods fail as ClientError says")]
    pub async fn stream(
        &self,
        path: &str,
    ) -> Result<impl AsyncRead + Send + Unpin + use<>, ClientError> {
        let response = self.send(Request::builder().uri(path), full(Vec::new())).await?;
        let frames = response.into_body().into_data_stream();
        let stream = futures::TryStreamExt::map_err(frames, std::io::Error::other);
        Ok(tokio_util::io::StreamReader::new(Box::pin(stream)))
    }

    /// Opens a byte stream, for a console.
    #[expect(clippy::missing_errors_doc, reason = "all methods fail as ClientError says")]
    pub async fn upgrade(&self, path: &str) -> Result<Box<dyn Duplex>, ClientError> {
        let request = Request::builder()
            .uri(path)
            .header("connection", "upgrade")
            .header("upgrade", "haven-console");
        let response = self.send(request, full(Vec::new())).await?;
        let upgraded = hyper::upgrade::on(response).await;
        Ok(Box::new(TokioIo::new(upgraded.map_err(|error| self.unreachable(error))?)))
    }

    /// A VM's console.
    #[expect(clippy::missing_errors_doc, reason = "all methods fail as ClientError says")]
    pub async fn console(&self, vm: &str) -> Result<Box<dyn Duplex>, ClientError> {
        self.upgrade(&format!("/v1/vms/{}/console", encode(vm))).await
    }

    /// A join token.
    #[expect(clippy::missing_errors_doc, reason = "all methods fail as ClientError says")]
    pub async fn invite(&self) -> Result<Secret, ClientError> {
        self.call("POST", "/v1/invite", Vec::new()).await
    }

    /// All tokens, without their secrets.
    #[expect(clippy::missing_errors_doc, reason = "all methods fail as ClientError says")]
    pub async fn tokens(&self) -> Result<Vec<TokenLine>, ClientError> {
        self.all("/v1/tokens").await
    }

    /// A new token with a role.
    #[expect(clippy::missing_errors_doc, reason = "all methods fail as ClientError says")]
    pub async fn new_token(
        &self,
        name: &str,
        role: &str,
        days: i64,
    ) -> Result<Secret, ClientError> {
        let path = format!("/v1/tokens/{}?role={}&days={days}", encode(name), encode(role));
        self.call("POST", &path, Vec::new()).await
    }

    /// Ends a token.
    #[expect(clippy::missing_errors_doc, reason = "all methods fail as ClientError says")]
    pub async fn end_token(&self, name: &str) -> Result<(), ClientError> {
        self.call("DELETE", &format!("/v1/tokens/{}", encode(name)), Vec::new()).await
    }

    /// Asks to become part of the cluster.
    #[expect(clippy::missing_errors_doc, reason = "all methods fail as ClientError says")]
    pub async fn join(&self, request: &JoinRequest) -> Result<JoinAnswer, ClientError> {
        self.call("POST", "/v1/join", serde_json::to_vec(request).unwrap_or_default()).await
    }
}

async fn read(response: Response<Incoming>) -> Result<Vec<u8>, ClientError> {
    let frames = response.into_body().into_data_stream();
    let stream = futures::TryStreamExt::map_err(frames, std::io::Error::other);
    let mut text = Vec::new();
    let mut reader = tokio_util::io::StreamReader::new(Box::pin(stream));
    loop {
        match tokio::time::timeout(SILENCE, reader.read_buf(&mut text)).await {
            Ok(Ok(0)) => return Ok(text),
            Ok(Ok(_)) => {}
            Ok(Err(error)) => return Err(ClientError::Unexpected(error.to_string())),
            Err(_) => {
                let why = format!("it broke off for {} s", SILENCE.as_secs());
                return Err(ClientError::Unexpected(why));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Client, ClientError, encode};
    use tokio::io::AsyncReadExt;

    /// A daemon that takes connections, reads, and says nothing.
    fn mute() -> (std::path::PathBuf, tokio::task::JoinHandle<()>) {
        let name = format!("haven-mute-{}-{}.sock", std::process::id(), line!());
        let path = std::env::temp_dir().join(name);
        let _ = std::fs::remove_file(&path);
        let listener = tokio::net::UnixListener::bind(&path).unwrap();
        let task = tokio::spawn(async move {
            let mut open = Vec::new();
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut head = [0; 1024];
                let _ = stream.read(&mut head).await;
                open.push(stream);
            }
        });
        (path, task)
    }

    #[tokio::test(start_paused = true)]
    async fn a_daemon_that_says_nothing_is_given_up() {
        let (path, daemon) = mute();
        let client = Client::local(path.clone());
        let look = client.status().await.unwrap_err();
        let change = client.vm("web", "stop").await.unwrap_err();
        assert!(matches!(look, ClientError::NoAnswer { change: false, .. }), "{look}");
        assert!(matches!(change, ClientError::NoAnswer { change: true, .. }), "{change}");
        assert!(change.to_string().ends_with("whether the change was made is not known"));
        daemon.abort();
        let _ = std::fs::remove_file(path);
    }

    #[test]
    fn whatever_a_name_holds_it_stays_one_part_of_a_path() {
        assert_eq!(encode("web-1"), "web-1");
        assert_eq!(encode("debian-13.1"), "debian-13.1");
        assert_eq!(encode("../tokens/x?a=1#b c%"), "..%2Ftokens%2Fx%3Fa%3D1%23b%20c%25");
        assert_eq!(encode(".."), "%2E%2E");
        assert_eq!(encode("ü"), "%C3%BC");
    }
}
