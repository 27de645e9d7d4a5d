//! Power fencing: the seam to whatever switches a host's power, and the driver for the Redfish-like interface that
//! the lab offers. A host counts as off only when that was read back.

use async_trait::async_trait;
use base64::Engine;
use std::time::Duration;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

/// Where a host's power is controlled.
#[derive(Clone, Debug)]
pub struct PowerConfig {
    /// For example `http://10.88.0.254:8000/redfish/v1/Systems/host1`.
    pub url: String,
    /// User there.
    pub user: String,
    /// Password there.
    pub password: String,
}

/// Whether a host has power.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerState {
    /// It has.
    On,
    /// It has not.
    Off,
}

/// The power controller did not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[error("the power controller {url} {what}")]
pub struct PowerError {
    /// Which one.
    pub url: String,
    /// In words.
    pub what: String,
}

/// Switches power.
#[async_trait]
pub trait PowerDriver: Send + Sync {
    /// Reads it.
    async fn state(&self, power: &PowerConfig) -> Result<PowerState, PowerError>;
    /// Switches it off; returns when it was read back as off.
    async fn power_off(&self, power: &PowerConfig) -> Result<(), PowerError>;
}

/// How long one request may take.
const DEADLINE: Duration = Duration::from_secs(1);
/// How often the power is read back.
const READS: u32 = 20;

/// Speaks the subset of Redfish that switches a system, over plain HTTP (the lab's; a real controller's TLS comes
/// with the drivers of a later issue).
pub struct LabPower;

impl LabPower {
    async fn request(
        &self,
        power: &PowerConfig,
        method: &str,
        path: &str,
        body: &str,
    ) -> Result<String, PowerError> {
        let failed = |what: String| PowerError { url: power.url.clone(), what };
        let rest = power
            .url
            .strip_prefix("http://")
            .ok_or_else(|| failed("is not an http:// address".into()))?;
        let (host, base) = rest.split_once('/').unwrap_or((rest, ""));
        let login = base64::engine::general_purpose::STANDARD
            .encode(format!("{}:{}", power.user, power.password));
        let text = format!(
            "{method} /{base}{path} HTTP/1.0\r\nHost: {host}\r\nAuthorization: Basic {login}\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        let talk = async {
            let mut stream = TcpStream::connect(host).await?;
            stream.write_all(text.as_bytes()).await?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await?;
            std::io::Result::Ok(answer)
        };
        let answer = tokio::time::timeout(DEADLINE, talk).await;
        let answer = answer.map_err(|_| failed(format!("did not answer within {DEADLINE:?}")))?;
        let answer = answer.map_err(|error| failed(format!("cannot be reached ({error})")))?;
        let status = answer.split_whitespace().nth(1).unwrap_or_default();
        if status.starts_with('2') {
            Ok(answer.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).unwrap_or_default())
        } else {
            Err(failed(format!(
                "answered with status {status}; check the host's power user and password"
            )))
        }
    }
}

#[async_trait]
impl PowerDriver for LabPower {
    async fn state(&self, power: &PowerConfig) -> Result<PowerState, PowerError> {
        let body = self.request(power, "GET", "", "").await?;
        let value: serde_json::Value = serde_json::from_str(&body).unwrap_or_default();
        match value["PowerState"].as_str() {
            Some("On") => Ok(PowerState::On),
            Some("Off") => Ok(PowerState::Off),
            other => Err(PowerError {
                url: power.url.clone(),
                what: format!("tells no power state ({other:?})"),
            }),
        }
    }

    async fn power_off(&self, power: &PowerConfig) -> Result<(), PowerError> {
        self.request(power, "POST", "/Actions/ComputerSystem.Reset", r#"{"ResetType":"ForceOff"}"#)
            .await?;
        for _ in 0..READS {
            if self.state(power).await? == PowerState::Off {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Err(PowerError { url: power.url.clone(), what: "still tells that the power is on".into() })
    }
}

#[cfg(test)]
#[path = "fence_test.rs"]
mod fence_test;
