//! The host's own check of a guest: a page or a connection, with a deadline; a little memory against flapping.

use async_trait::async_trait;
use std::{net::SocketAddr, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// The guest.
    pub address: SocketAddr,
    /// The page; only a connection when absent.
    pub http_path: Option<String>,
    /// How often.
    pub interval: Duration,
    /// How long an answer may take.
    pub timeout: Duration,
}

/// Asks.
#[async_trait]
pub trait Prober: Send + Sync {
    /// True when the guest answered as it should.
    async fn probe(&self, target: &Target) -> bool;
}

/// Failures in a row after which a guest that was well is not.
pub const FALL: u32 = 3;

/// Turns single answers into a state.
#[derive(Clone, Debug, Default)]
pub struct Counter {
    state: Option<bool>,
    failures: u32,
}

impl Counter {
    /// One that goes on from what was known.
    #[must_use]
    pub fn of(state: Option<bool>) -> Self {
        Self { state, failures: 0 }
    }

    /// Counts one answer; the state, or nothing while the guest never answered and may still be booting.
    pub fn count(&mut self, answered: bool) -> Option<bool> {
        if answered {
            self.failures = 0;
            self.state = Some(true);
        } else {
            self.failures += 1;
            if self.state.is_some() && self.failures >= FALL {
                self.state = Some(false);
            }
        }
        self.state
    }
}

/// Asks over the network.
pub struct NetProber;

#[async_trait]
impl Prober for NetProber {
    async fn probe(&self, target: &Target) -> bool {
        tokio::time::timeout(target.timeout, ask(target)).await.unwrap_or(false)
    }
}

async fn ask(target: &Target) -> bool {
    let Ok(mut stream) = TcpStream::connect(target.address).await else {
        return false;
    };
    let Some(path) = &target.http_path else {
        return true;
    };
    let request = format!(
        "GET {path} HTTP/1.0\r\nHost: {}\r\nUser-Agent: haven\r\n\r\n",
        target.address.ip()
    );
    if stream.write_all(request.as_bytes()).await.is_err() {
        return false;
    }
    let mut answer = [0u8; 12];
    // "HTTP/1.1 200": the first digit of the status decides.
    stream.read_exact(&mut answer).await.is_ok()
        && answer.starts_with(b"HTTP/1.")
        && matches!(answer[9], b'2' | b'3')
}

#[cfg(test)]
mod tests {
    use super::Counter;

    #[test]
    fn one_failure_does_not_make_a_guest_ill() {
        let mut counter = Counter::default();
        assert_eq!(counter.count(false), None);
        assert_eq!(counter.count(true), Some(true));
        assert_eq!(counter.count(false), Some(true));
        assert_eq!(counter.count(false), Some(true));
        assert_eq!(counter.count(false), Some(false));
        assert_eq!(counter.count(true), Some(true));
    }
}
