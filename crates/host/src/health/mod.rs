//! The host's own check of a guest: a page or a connection, with a deadline; a little memory against flapping.

pub mod hang;

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
    use super::{Counter, NetProber, Prober, Target};
    use std::time::Duration;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };

    /// What the prober finds of a guest that says this to whoever asks, and then keeps silent.
    async fn found(says: &'static str, http_path: Option<&str>) -> bool {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let guest = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut asked = [0; 64];
            let length = stream.read(&mut asked).await.unwrap();
            if asked[..length].starts_with(b"GET /health HTTP/1.0\r\n") {
                stream.write_all(says.as_bytes()).await.unwrap();
            }
            tokio::time::sleep(Duration::from_secs(5)).await;
        });
        let timeout = Duration::from_millis(300);
        let target =
            Target { address, http_path: http_path.map(Into::into), interval: timeout, timeout };
        let answer = NetProber.probe(&target).await;
        guest.abort();
        answer
    }

    #[tokio::test]
    async fn a_page_must_be_good_and_a_connection_only_be_taken() {
        let page = Some("/health");
        assert!(found("HTTP/1.1 200 OK\r\n\r\n", page).await);
        assert!(found("HTTP/1.0 302 Found\r\n\r\n", page).await);
        assert!(!found("HTTP/1.1 503 Busy\r\n\r\n", page).await);
        assert!(!found("HTTP/1.1 404 Not Found\r\n\r\n", page).await);
        assert!(!found("220 mail.example ready\r\n", page).await, "another protocol");
        assert!(!found("", page).await, "it takes the question and never answers");
        assert!(found("", None).await, "a connection is enough");
        let free = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let timeout = Duration::from_millis(300);
        for http_path in [None, Some("/".to_owned())] {
            let target = Target { address: free, http_path, interval: timeout, timeout };
            assert!(!NetProber.probe(&target).await, "nobody listens");
        }
    }

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
