//! What lies between a simulated daemon and the store.

use crate::net::Net;
use haven_store::{clock::Clock, memory::Path};
use std::{sync::Arc, time::Duration};
use tonic::Status;

/// A broken connection is noticed after this, as by the keep-alive of HTTP/2.
const KEEP_ALIVE: Duration = Duration::from_secs(2);

/// The way of one daemon.
pub struct StorePath {
    /// Its host.
    pub host: String,
    /// The network.
    pub net: Arc<Net>,
    /// Its clock: a paused daemon sends and hears nothing.
    pub clock: Clock,
}

impl StorePath {
    /// Waits until the store serves this host.
    async fn served(&self) {
        let mut changes = self.net.changes();
        loop {
            changes.borrow_and_update();
            match self.net.serves(&self.host) {
                Ok(()) => return,
                Err(Some(ready)) => tokio::time::sleep_until(ready).await,
                Err(None) => {
                    if changes.changed().await.is_err() {
                        std::future::pending::<()>().await;
                    }
                }
            }
        }
    }
}

#[async_trait::async_trait]
impl Path for StorePath {
    async fn arrive(&self) -> Result<(), Status> {
        self.clock.pass().await;
        self.served().await;
        tokio::time::sleep(self.net.delay()).await;
        // Cut on its way: it never arrives, and the sender's deadline is all that ends it.
        if self.net.serves(&self.host).is_err() {
            std::future::pending::<()>().await;
        }
        Ok(())
    }

    fn lingers(&self) -> bool {
        self.net.random(2) == 0
    }

    async fn come_back(&self) -> Result<(), Status> {
        tokio::time::sleep(self.net.delay()).await;
        if tokio::time::timeout(KEEP_ALIVE, self.served()).await.is_err() {
            return Err(Status::unavailable("the connection was lost"));
        }
        self.clock.pass().await;
        Ok(())
    }
}
