//! This host's own certificate: signed anew, by this host, long before it ends. Nothing restarts for it: the API and the
//! connections to other hosts use the new one from their next handshake on, and etcd reads its files at each.

use super::setup::HostFile;
use haven_host::agent::{Problems, chain};
use haven_store::{
    clock::Clock,
    pki::{Current, HOST_LIFE, PkiDir, PkiError},
    raw::{EtcdStore, Identity},
};
use std::{sync::Arc, time::Duration};
use tokio_util::sync::CancellationToken;

/// How often this host looks at it. A third of its life is 275 days.
const LOOK: Duration = Duration::from_secs(3600);

/// Signs a new one if it is time; the new one, if there is one.
pub fn renew(pki: &PkiDir, host: &HostFile, now_ms: i64) -> Result<Option<Identity>, PkiError> {
    pki.renew(host.name.as_str(), host.address.into(), HOST_LIFE, now_ms)
}

/// The certificate with which a daemon begins. It is renewed before anybody sees it: one that ended while this host was
/// away is refused everywhere.
pub fn at_start(pki: &PkiDir, host: &HostFile) -> Result<Identity, PkiError> {
    if let Err(error) = renew(pki, host, super::wall_ms()) {
        tracing::error!("this host's certificate cannot be renewed: {}", chain(&error));
    }
    pki.load()
}

/// What is needed to renew it while the daemon runs.
pub struct Renewal {
    /// Where it stands.
    pub pki: PkiDir,
    /// Whose it is.
    pub host: HostFile,
    /// What this host's connections use.
    pub current: Current,
    /// The same as PEM.
    pub in_use: String,
    /// The store, which is shown it.
    pub store: EtcdStore,
    /// Where it is told when it does not work.
    pub problems: Arc<Problems>,
}

impl Renewal {
    /// Renews it whenever it is time, until `cancel`.
    pub async fn keep(mut self, clock: Clock, cancel: CancellationToken) {
        while !cancel.is_cancelled() {
            self.look(super::wall_ms()).await;
            tokio::select! {
                biased;
                () = cancel.cancelled() => {}
                () = clock.sleep(LOOK) => {}
            }
        }
    }

    /// Renews it if it is time, and has the one that is there used.
    pub async fn look(&mut self, now_ms: i64) {
        let renewed = renew(&self.pki, &self.host, now_ms).map(drop);
        let why = match renewed.and_then(|()| self.pki.load()) {
            Ok(identity) if identity.certificate == self.in_use => None,
            Ok(identity) => self.take_up(identity).await.err(),
            Err(error) => Some(format!("it cannot be renewed: {}", chain(&error))),
        };
        if self.problems.set("certificate of this host", why.clone())
            && let Some(why) = why
        {
            tracing::error!("this host's certificate: {why}");
        }
    }

    async fn take_up(&mut self, identity: Identity) -> Result<(), String> {
        let unused = |error: &dyn std::error::Error| {
            format!("a new one is there and cannot be used: {}", chain(error))
        };
        self.current.replace(&identity).map_err(|error| unused(&error))?;
        let certificate = identity.certificate.clone();
        self.store.show(identity).await.map_err(|error| unused(&error))?;
        self.in_use = certificate;
        tracing::info!("this host's certificate was renewed");
        Ok(())
    }
}
