//! Which cluster a command speaks to. The first that is given: `--context`, `HAVEN_SOCKET`, `HAVEN_ADDRESS` with
//! `HAVEN_FINGERPRINT` and `HAVEN_TOKEN`, `HAVEN_CONTEXT`, the saved cluster in use; else the daemon of this host,
//! else the lab of this machine. A socket that a dead daemon left behind is passed over.

use crate::{
    context::{Contexts, LOCAL, directory, fingerprint},
    failure::Failure,
    paths::Paths,
};
use haven_client::{Client, ClientError, Pin};
use std::{
    io::ErrorKind,
    path::{Path, PathBuf},
    sync::OnceLock,
    time::Duration,
};
use tokio::{net::UnixStream, time::timeout};

/// What `--context` said.
static CHOSEN: OnceLock<String> = OnceLock::new();

/// Notes what `--context` said.
pub fn choose(context: Option<String>) {
    if let Some(context) = context {
        CHOSEN.get_or_init(|| context);
    }
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// The cluster of this command.
pub async fn connect() -> Result<Client, Failure> {
    if let Some(name) = CHOSEN.get() {
        return by_name(name).await;
    }
    if let Some(socket) = variable("HAVEN_SOCKET") {
        return Ok(Client::local(socket.into()));
    }
    if let Some(address) = variable("HAVEN_ADDRESS") {
        let Some(pin) = variable("HAVEN_FINGERPRINT") else {
            return Err(Failure::bad(
                "HAVEN_ADDRESS is set and HAVEN_FINGERPRINT is not",
                "set both, or neither; `haven context add` saves them for good",
            ));
        };
        return Ok(Client::remote(address, &Pin(fingerprint(&pin)?), variable("HAVEN_TOKEN")));
    }
    if let Some(name) = variable("HAVEN_CONTEXT") {
        return by_name(&name).await;
    }
    let saved = directory().map(|dir| Contexts::load(&dir)).transpose()?.unwrap_or_default();
    match &saved.current {
        Some(name) if name != LOCAL => saved.get(name)?.client(),
        _ => here().await,
    }
}

async fn by_name(name: &str) -> Result<Client, Failure> {
    if name == LOCAL {
        return here().await;
    }
    let saved = directory().map(|dir| Contexts::load(&dir)).transpose()?.unwrap_or_default();
    saved.get(name)?.client()
}

/// What a socket is good for.
enum Socket {
    Listening,
    /// Nobody listens, and why.
    Dead(String),
    /// Somebody may listen, but not to this user.
    Denied,
}

async fn probe(path: &Path) -> Socket {
    // One whose queue is full has a daemon, if a slow one.
    let Ok(connected) = timeout(Duration::from_secs(1), UnixStream::connect(path)).await else {
        return Socket::Listening;
    };
    match connected.map_err(|error| (error.kind(), error)) {
        Ok(_) | Err((ErrorKind::WouldBlock, _)) => Socket::Listening,
        Err((ErrorKind::PermissionDenied, _)) => Socket::Denied,
        Err((ErrorKind::NotFound, _)) => Socket::Dead("is not there".into()),
        Err((_, error)) => Socket::Dead(format!("is left of a daemon that has ended ({error})")),
    }
}

/// The daemon of this host, else the lab of this machine.
async fn here() -> Result<Client, Failure> {
    let own = Paths::from_env().run.join("api.sock");
    let why = match probe(&own).await {
        Socket::Listening => return Ok(Client::local(own)),
        Socket::Denied => {
            return Err(Failure::bad(
                format!("{} is for root alone", own.display()),
                "use sudo, or save the cluster with a token: `haven context add --help`",
            ));
        }
        Socket::Dead(why) => why,
    };
    let lab = lab_sockets();
    let mut live = Vec::new();
    for path in &lab {
        if matches!(probe(path).await, Socket::Listening) {
            live.push(path.clone());
        }
    }
    if let Ok(client) = Client::first_of(&live).await {
        return Ok(client);
    }
    let of_lab = match (lab.len(), live.len()) {
        (0, _) => "there is no lab on this machine".to_owned(),
        (all, 0) => format!("none of the lab's {all} hosts listens"),
        (_, some) => format!("{some} hosts of the lab listen and none answers"),
    };
    let hint = match lab.len() {
        0 => {
            "is the daemon running? On one machine, `haven lab up` starts a cluster; one elsewhere is saved with `haven context add`"
        }
        _ => {
            "switch a host on with `haven lab start HOST`, or begin again: `haven lab down`, `haven lab up`"
        }
    };
    let at = own.display().to_string();
    let error = ClientError::Unreachable { at, why: format!("it {why}, and {of_lab}") };
    Err(Failure::from(error).hint(hint))
}

/// The sockets of the lab's hosts.
fn lab_sockets() -> Vec<PathBuf> {
    let lab = PathBuf::from(
        std::env::var("HAVEN_LAB_DIR").unwrap_or_else(|_| "/var/lib/haven-lab".into()),
    );
    let text = std::fs::read(lab.join("context.json")).unwrap_or_default();
    let context: serde_json::Value = serde_json::from_slice(&text).unwrap_or_default();
    let sockets = context["sockets"].as_array().into_iter().flatten();
    sockets.filter_map(|socket| socket.as_str().map(Into::into)).collect()
}
