//! The typed client of the API: for the command line, for hosts among each other, for the lab and the tests.
//!
//! It reaches a daemon over its unix socket (as root of that host), or over TLS with a token. One connection per
//! request: requests are few, and a dead host is noticed at once.

mod tls;

pub use tls::Pin;

use haven_model::{
    Event, Incident, ObjectRef,
    api::{
        Applied, ApplyRequest, Item, JoinAnswer, JoinRequest, List, ManifestFile, Overview,
        ProblemBody, Secret,
    },
    event::AuditEntry,
    object::Kind,
};
use http_body_util::{BodyExt, Full, StreamBody, combinators::BoxBody};
use hyper::{
    Request, Response, StatusCode,
    body::{Bytes, Frame, Incoming},
    client::conn::http1,
};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use std::{path::PathBuf, sync::Arc, time::Duration};
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite},
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
    /// The daemon said no.
    #[error("{}", .0.detail)]
    Refused(Box<ProblemBody>),
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

type Body = BoxBody<Bytes, std::io::Error>;
/// Bytes both ways.
pub trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

const CONNECT: Duration = Duration::from_secs(2);

fn full(text: Vec<u8>) -> Body {
    Full::new(Bytes::from(text)).map_err(|never| match never {}).boxed()
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
        match &self.target {
            Target::Unix(path) => {
                let stream =
                    UnixStream::connect(path).await.map_err(|error| self.unreachable(error))?;
                Ok(Box::new(stream))
            }
            Target::Tls { address, pin, .. } => {
                let connected = tokio::time::timeout(CONNECT, TcpStream::connect(address)).await;
                let stream =
                    connected.map_err(|_| self.unreachable("it did not answer in time"))?;
                let stream = stream.map_err(|error| self.unreachable(error))?;
                let name = rustls_pki_types::ServerName::try_from("haven").expect("a good name");
                let tls =
                    tokio_rustls::TlsConnector::from(Arc::clone(pin)).connect(name, stream).await;
                Ok(Box::new(tls.map_err(|error| self.unreachable(error))?))
            }
        }
    }

    async fn send(
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

    /// All objects of a kind.
    #[expect(clippy::missing_errors_doc, reason = "all methods fail as ClientError says")]
    pub async fn list(&self, kind: Kind) -> Result<Vec<Item>, ClientError> {
        let (mut items, mut after) = (Vec::new(), String::new());
        loop {
            let page: List = self.get(&format!("/v1/objects/{kind}{after}")).await?;
            items.extend(page.items);
            match page.next {
                None => return Ok(items),
                Some(next) => after = format!("?after={next}"),
            }
        }
    }

    /// One object.
    #[expect(clippy::missing_errors_doc, reason = "all methods fail as ClientError says")]
    pub async fn object(&self, of: &ObjectRef) -> Result<Item, ClientError> {
        self.get(&format!("/v1/objects/{of}")).await
    }

    /// Deletes an object.
    #[expect(clippy::missing_errors_doc, reason = "all methods fail as ClientError says")]
    pub async fn delete(&self, of: &ObjectRef) -> Result<Item, ClientError> {
        self.call("DELETE", &format!("/v1/objects/{of}"), Vec::new()).await
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
        self.call("POST", &format!("/v1/vms/{vm}/{action}"), Vec::new()).await
    }

    /// Changes the number of a service's members.
    #[expect(clippy::missing_errors_doc, reason = "all methods fail as ClientError says")]
    pub async fn scale(&self, service: &str, replicas: u32) -> Result<Item, ClientError> {
        self.call("POST", &format!("/v1/services/{service}/scale/{replicas}"), Vec::new()).await
    }

    /// Replaces all members of a service, a few at a time.
    #[expect(clippy::missing_errors_doc, reason = "all methods fail as ClientError says")]
    pub async fn restart(&self, service: &str) -> Result<Item, ClientError> {
        self.call("POST", &format!("/v1/services/{service}/restart"), Vec::new()).await
    }

    /// The last events.
    #[expect(clippy::missing_errors_doc, reason = "all methods fail as ClientError says")]
    pub async fn events(&self, limit: usize) -> Result<Vec<Event>, ClientError> {
        self.get(&format!("/v1/events?limit={limit}")).await
    }

    /// Calls `each` with every event that comes; ends with the connection.
    #[expect(clippy::missing_errors_doc, reason = "all methods fail as ClientError says")]
    pub async fn follow(&self, mut each: impl FnMut(Event)) -> Result<(), ClientError> {
        let response =
            self.send(Request::builder().uri("/v1/events/follow"), full(Vec::new())).await?;
        let frames = response.into_body().into_data_stream();
        let stream = futures::TryStreamExt::map_err(frames, std::io::Error::other);
        let mut lines = tokio_util::io::StreamReader::new(Box::pin(stream)).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            if let Some(event) =
                line.strip_prefix("data: ").and_then(|text| serde_json::from_str(text).ok())
            {
                each(event);
            }
        }
        Ok(())
    }

    /// All incidents.
    #[expect(clippy::missing_errors_doc, reason = "all methods fail as ClientError says")]
    pub async fn incidents(&self) -> Result<Vec<Incident>, ClientError> {
        self.get("/v1/incidents").await
    }

    /// The audit log's last entries.
    #[expect(clippy::missing_errors_doc, reason = "all methods fail as ClientError says")]
    pub async fn audit(&self, limit: usize) -> Result<Vec<AuditEntry>, ClientError> {
        self.get(&format!("/v1/audit?limit={limit}")).await
    }

    /// What there is to say of an object.
    #[expect(clippy::missing_errors_doc, reason = "all methods fail as ClientError says")]
    pub async fn explain(&self, of: &ObjectRef) -> Result<Vec<String>, ClientError> {
        self.get(&format!("/v1/explain/{of}")).await
    }

    /// What a VM's console said.
    #[expect(clippy::missing_errors_doc, reason = "all methods fail as ClientError says")]
    pub async fn log(&self, vm: &str) -> Result<Vec<u8>, ClientError> {
        self.bytes(&format!("/v1/vms/{vm}/log")).await
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

    /// A join token.
    #[expect(clippy::missing_errors_doc, reason = "all methods fail as ClientError says")]
    pub async fn invite(&self) -> Result<Secret, ClientError> {
        self.call("POST", "/v1/invite", Vec::new()).await
    }

    /// A new token with a role.
    #[expect(clippy::missing_errors_doc, reason = "all methods fail as ClientError says")]
    pub async fn new_token(
        &self,
        name: &str,
        role: &str,
        days: i64,
    ) -> Result<Secret, ClientError> {
        self.call("POST", &format!("/v1/tokens/{name}?role={role}&days={days}"), Vec::new()).await
    }

    /// Ends a token.
    #[expect(clippy::missing_errors_doc, reason = "all methods fail as ClientError says")]
    pub async fn end_token(&self, name: &str) -> Result<(), ClientError> {
        self.call("DELETE", &format!("/v1/tokens/{name}"), Vec::new()).await
    }

    /// Asks to become part of the cluster.
    #[expect(clippy::missing_errors_doc, reason = "all methods fail as ClientError says")]
    pub async fn join(&self, request: &JoinRequest) -> Result<JoinAnswer, ClientError> {
        self.call("POST", "/v1/join", serde_json::to_vec(request).unwrap_or_default()).await
    }

    /// Imports a part of an image: `disk`, `kernel` or `initrd`. `query` is `checksum=…&cmdline=…`, encoded.
    #[expect(clippy::missing_errors_doc, reason = "all methods fail as ClientError says")]
    pub async fn import(
        &self,
        image: &str,
        part: &str,
        query: &str,
        from: impl AsyncRead + Send + Sync + Unpin + 'static,
    ) -> Result<Item, ClientError> {
        let frames = tokio_util::io::ReaderStream::with_capacity(from, 1 << 16);
        let body = StreamBody::new(futures::TryStreamExt::map_ok(frames, Frame::data)).boxed();
        let request =
            Request::builder().method("PUT").uri(format!("/v1/import/{image}/{part}?{query}"));
        let text = read(self.send(request, body).await?).await?;
        serde_json::from_slice(&text).map_err(|error| ClientError::Unexpected(error.to_string()))
    }
}

async fn read(response: Response<Incoming>) -> Result<Vec<u8>, ClientError> {
    let frames = response.into_body().into_data_stream();
    let stream = futures::TryStreamExt::map_err(frames, std::io::Error::other);
    let mut text = Vec::new();
    let mut reader = tokio_util::io::StreamReader::new(Box::pin(stream));
    reader
        .read_to_end(&mut text)
        .await
        .map_err(|error| ClientError::Unexpected(error.to_string()))?;
    Ok(text)
}
