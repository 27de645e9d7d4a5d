//! Which cluster a command speaks to: `HAVEN_SOCKET`, the daemon of this host, an address with a token
//! (`HAVEN_ADDRESS`, `HAVEN_FINGERPRINT`, `HAVEN_TOKEN`), or the lab of this machine.

use crate::{failure::Failure, paths::Paths};
use haven_client::{Client, Pin};
use std::path::PathBuf;

/// The first that is there.
pub async fn connect() -> Result<Client, Failure> {
    if let Ok(socket) = std::env::var("HAVEN_SOCKET") {
        return Ok(Client::local(socket.into()));
    }
    if let Ok(address) = std::env::var("HAVEN_ADDRESS") {
        let Ok(pin) = std::env::var("HAVEN_FINGERPRINT") else {
            return Err(Failure::bad(
                "HAVEN_ADDRESS is set and HAVEN_FINGERPRINT is not",
                "set both, or neither",
            ));
        };
        return Ok(Client::remote(address, &Pin(pin), std::env::var("HAVEN_TOKEN").ok()));
    }
    let own = Paths::from_env().run.join("api.sock");
    if own.exists() {
        return Ok(Client::local(own));
    }
    let lab = PathBuf::from(
        std::env::var("HAVEN_LAB_DIR").unwrap_or_else(|_| "/var/lib/haven-lab".into()),
    );
    let text = std::fs::read(lab.join("context.json")).unwrap_or_default();
    let context: serde_json::Value = serde_json::from_slice(&text).unwrap_or_default();
    let sockets: Vec<PathBuf> = context["sockets"]
        .as_array()
        .map(|list| list.iter().filter_map(|socket| socket.as_str().map(Into::into)).collect())
        .unwrap_or_default();
    if sockets.is_empty() {
        return Err(haven_client::ClientError::Unreachable {
            at: own.display().to_string(),
            why: "there is no daemon and no lab on this machine".into(),
        }
        .into());
    }
    Ok(Client::first_of(&sockets).await?)
}
