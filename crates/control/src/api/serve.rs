//! How the API is reached: a unix socket for root of this host, TLS for everybody else.

use super::{
    ApiState,
    auth::{A_HOST, Caller, Role, caller},
    error::ApiError,
    routes::router,
};
use axum::{
    Router,
    extract::Request,
    http::StatusCode,
    response::{IntoResponse, Response},
};
use haven_model::Name;
use hyper::body::Incoming;
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use std::{
    convert::Infallible, net::SocketAddr, os::unix::fs::PermissionsExt, path::Path, sync::Arc,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener},
    sync::watch,
};
use tokio_util::sync::CancellationToken;
use tower::Service;

/// Bytes both ways.
pub trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// Joins a connection that is being upgraded with `far` until one of them ends.
pub fn upgrade(mut request: Request, mut far: Box<dyn Duplex>) {
    let upgrading = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        if let Ok(near) = upgrading.await {
            let _ = tokio::io::copy_bidirectional(&mut TokioIo::new(near), &mut far).await;
        }
    });
}

/// Finds out who calls, and answers.
pub(super) async fn answer(app: &Router, make: &MakeCaller, mut request: Request) -> Response {
    match make.of(request.headers()).await {
        Ok(caller) => {
            request.extensions_mut().insert(caller);
            match app.clone().call(request).await {
                Ok(response) => response,
                Err(never) => match never {},
            }
        }
        Err(error) => error.into_response(),
    }
}

async fn serve_connection(stream: impl Duplex + 'static, app: Router, make: MakeCaller) {
    let service = hyper::service::service_fn(move |request: hyper::Request<Incoming>| {
        let (app, make) = (app.clone(), make.clone());
        async move { Ok::<_, Infallible>(answer(&app, &make, request.map(axum::body::Body::new)).await) }
    });
    let builder = auto::Builder::new(TokioExecutor::new());
    let _ = builder.serve_connection_with_upgrades(TokioIo::new(stream), service).await;
}

/// How it is known who calls on a connection.
#[derive(Clone)]
pub(super) enum MakeCaller {
    /// Root of this host.
    Local(Caller),
    /// A host of the cluster by its certificate, or somebody with a token.
    Remote { state: ApiState, from: String, host: Option<String> },
}

impl MakeCaller {
    async fn of(&self, headers: &axum::http::HeaderMap) -> super::error::ApiResult<Caller> {
        match self {
            MakeCaller::Local(caller) => Ok(caller.clone()),
            MakeCaller::Remote { state, from, host } => {
                caller(state, headers, from.clone(), host.clone()).await
            }
        }
    }
}

/// Serves root of this host until `cancel`.
///
/// # Errors
/// When the socket cannot be made.
pub async fn serve_unix(
    path: &Path,
    state: ApiState,
    cancel: CancellationToken,
) -> std::io::Result<()> {
    let _ = std::fs::remove_file(path);
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    let root =
        Caller { who: format!("root on {}", state.me), role: Role::Admin, from: "local".into() };
    let app = router(state);
    loop {
        let accepted = tokio::select! {
            biased;
            () = cancel.cancelled() => return Ok(()),
            accepted = listener.accept() => accepted,
        };
        let Ok((stream, _)) = accepted else { continue };
        let is_root = stream.peer_cred().is_ok_and(|peer| peer.uid() == 0);
        if is_root {
            tokio::spawn(serve_connection(stream, app.clone(), MakeCaller::Local(root.clone())));
        }
    }
}

/// Tells root of this host why the API is not there yet, until `cancel`: the store has no quorum, say.
///
/// # Errors
/// When the socket cannot be made.
pub async fn serve_waiting(
    path: &Path,
    me: &Name,
    why: watch::Receiver<Option<String>>,
    cancel: CancellationToken,
) -> std::io::Result<()> {
    let _ = std::fs::remove_file(path);
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    let me = me.clone();
    let app = Router::new().fallback(move || {
        let why = why.borrow().clone().unwrap_or_else(|| "it has only begun".into());
        let detail = format!(
            "{me} waits for the store, of which more than half of the voters must run: {why}"
        );
        let hint = "start the other hosts; the daemon's log and etcd.log of this host say more";
        async move { ApiError::new(StatusCode::SERVICE_UNAVAILABLE, detail, hint) }
    });
    axum::serve(listener, app).with_graceful_shutdown(cancel.cancelled_owned()).await
}

/// Serves everybody else until `cancel`.
///
/// # Errors
/// When the port is in use.
pub async fn serve_tls(
    address: SocketAddr,
    tls: Arc<rustls::ServerConfig>,
    state: ApiState,
    cancel: CancellationToken,
) -> std::io::Result<()> {
    serve_listener(TcpListener::bind(address).await?, tls, state, cancel).await
}

/// Serves everybody else on a port that is open already, until `cancel`.
///
/// # Errors
/// None so far.
pub async fn serve_listener(
    listener: TcpListener,
    tls: Arc<rustls::ServerConfig>,
    state: ApiState,
    cancel: CancellationToken,
) -> std::io::Result<()> {
    let acceptor = tokio_rustls::TlsAcceptor::from(tls);
    let app = router(state.clone());
    loop {
        let accepted = tokio::select! {
            biased;
            () = cancel.cancelled() => return Ok(()),
            accepted = listener.accept() => accepted,
        };
        let Ok((stream, peer)) = accepted else {
            continue;
        };
        let (acceptor, app, state) = (acceptor.clone(), app.clone(), state.clone());
        tokio::spawn(async move {
            let Ok(stream) = acceptor.accept(stream).await else {
                return;
            };
            // Only the cluster's authority signs client certificates, and only for hosts.
            let host = stream.get_ref().1.peer_certificates().map(|_| A_HOST.to_owned());
            let make = MakeCaller::Remote { state, from: peer.ip().to_string(), host };
            serve_connection(stream, app, make).await;
        });
    }
}
