//! Questions between simulated daemons while the store is stuck.

use crate::net::Net;
use async_trait::async_trait;
use haven_control::manager::promises::Promises;
use haven_host::agent::failsafe::Promisers;
use haven_model::{
    Name, Snapshot,
    failsafe::{PromiseAnswer, PromiseQuestion},
};
use haven_store::clock::Clock;
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::sync::watch;

/// One daemon that answers.
#[derive(Clone)]
pub struct Answerer {
    /// What it promised.
    pub promises: Promises,
    /// Its live copy.
    pub live: watch::Receiver<Arc<Snapshot>>,
    /// Its clock: a paused or dead one answers nothing.
    pub clock: Clock,
}

/// Each host's daemon, by the host's name. A daemon that is started takes the place of the one before.
#[derive(Default)]
pub struct Answering(Mutex<BTreeMap<String, Answerer>>);

impl Answering {
    /// The daemon of a host answers from now on.
    pub fn begin(&self, host: &str, answerer: Answerer) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(host.to_owned(), answerer);
    }

    fn of(&self, host: &str) -> Option<Answerer> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(host).cloned()
    }
}

/// How one daemon asks.
pub struct SimPromisers {
    /// Its host.
    pub host: String,
    /// The network.
    pub net: Arc<Net>,
    /// Its clock.
    pub clock: Clock,
    /// Whom it can ask.
    pub answering: Arc<Answering>,
    /// It takes silence for yes: broken on purpose.
    pub credulous: bool,
}

impl SimPromisers {
    /// A packet's way; for ever when it vanishes.
    async fn carry(&self, from: &str, to: &str) {
        tokio::time::sleep(Duration::from_micros(100 + self.net.random(20_000))).await;
        if !self.net.carries(from, to) {
            std::future::pending::<()>().await;
        }
    }

    async fn exchange(&self, host: &Name, question: &PromiseQuestion) -> PromiseAnswer {
        self.clock.pass().await;
        self.carry(&self.host, host.as_str()).await;
        let Some(daemon) = self.answering.of(host.as_str()) else {
            return std::future::pending().await;
        };
        daemon.clock.pass().await;
        let answer = daemon.promises.answer(question, &daemon.live.borrow());
        self.carry(host.as_str(), &self.host).await;
        self.clock.pass().await;
        answer
    }
}

#[async_trait]
impl Promisers for SimPromisers {
    async fn ask(&self, host: &Name, question: &PromiseQuestion) -> Result<PromiseAnswer, String> {
        if !self.credulous {
            return Ok(self.exchange(host, question).await);
        }
        let patience = Duration::from_millis(200);
        let answer = tokio::time::timeout(patience, self.exchange(host, question)).await;
        let yes = PromiseAnswer { promised: true, why: String::new(), hosts: [].into() };
        Ok(answer.unwrap_or(yes))
    }
}
