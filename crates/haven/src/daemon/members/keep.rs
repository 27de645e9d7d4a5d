//! Keeps the store's members in order: carries out what [`super::rules`] decides, keeps the endpoints current,
//! compacts, and gives space back on every member in turn.

use super::{
    Own,
    rules::{self, Seen, Step},
};
use haven_model::Snapshot;
use haven_store::{
    raw::EtcdStore,
    server::{self, Member},
};
use std::{sync::Arc, time::Duration};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// How often a learner is looked after, and the members when nothing is under way.
const LOOK: (Duration, Duration) = (Duration::from_millis(300), Duration::from_secs(10));
/// Revisions that stay readable behind the newest.
const KEPT_REVISIONS: i64 = 10_000;
/// A member's file is defragmented when so much of it, in bytes, and more than half of it is unused.
const FRAGMENTED: i64 = 100 << 20;
/// A member is taken for removed when the list lacked it so often in a row: a member that lags may answer once.
const MISSED: u32 = 3;

struct Keeper {
    store: EtcdStore,
    live: watch::Receiver<Arc<Snapshot>>,
    own: Own,
    member: watch::Sender<Option<u64>>,
    missed: u32,
    compacted: i64,
}

/// Runs until `cancel`.
pub async fn keep(
    store: EtcdStore,
    live: watch::Receiver<Arc<Snapshot>>,
    own: Own,
    member: watch::Sender<Option<u64>>,
    cancel: CancellationToken,
) {
    let mut keeper = Keeper { store, live, own, member, missed: 0, compacted: 0 };
    while !cancel.is_cancelled() {
        let pause = keeper.look().await;
        keeper.compact().await;
        tokio::select! {
            biased;
            () = cancel.cancelled() => {}
            () = tokio::time::sleep(pause) => {}
        }
    }
}

impl Keeper {
    async fn look(&mut self) -> Duration {
        let members = match self.store.members().await {
            Ok(members) => members,
            Err(error) => {
                tracing::debug!(%error, "the members cannot be listed");
                return LOOK.0;
            }
        };
        let my_url = server::peer_url(self.own.host.address);
        let mine = members.iter().find(|member| member.peer_url == my_url);
        self.member.send_if_modified(|now| {
            let next = mine.filter(|member| !member.learner).map(|member| member.id);
            std::mem::replace(now, next) != next
        });
        self.endpoints(&members).await;
        let snapshot = Arc::clone(&self.live.borrow());
        if snapshot.revision == 0 {
            return LOOK.0;
        }
        let step = rules::next(&Seen {
            me: &self.own.host.name,
            my_url: &my_url,
            runs_one: self.own.host.initial_cluster.is_some(),
            members: &members,
            snapshot: &snapshot,
            now_ms: crate::daemon::wall_ms(),
        });
        self.missed = if step == Step::Forget { self.missed + 1 } else { 0 };
        match self.carry_out(step, &members).await {
            Ok(pause) => pause,
            Err(error) => {
                tracing::warn!(
                    error = format!("{error:#}"),
                    "the store's members could not be put in order"
                );
                LOOK.1
            }
        }
    }

    /// Does it; how long until the next look.
    async fn carry_out(&mut self, step: Step, members: &[Member]) -> anyhow::Result<Duration> {
        match step {
            Step::Rest => Ok(LOOK.1),
            Step::Promote(id) => {
                match self.store.promote(id).await {
                    Ok(()) => tracing::info!("this host's member of the store votes now"),
                    Err(error) => {
                        tracing::debug!(error = %haven_host::agent::chain(&error), "not yet a voter");
                    }
                }
                Ok(LOOK.0)
            }
            Step::Remove { id, why } => {
                tracing::warn!(member = id, why, "a member is taken out of the store");
                self.store.remove_member(id).await?;
                Ok(LOOK.0)
            }
            Step::Add => {
                let url = server::peer_url(self.own.host.address);
                self.store.add_learner(url.clone()).await?;
                let others = members.iter().map(|m| format!("{}={}", m.name, m.peer_url));
                let mine = format!("{}={url}", self.own.host.name);
                let all: Vec<String> = others.chain([mine]).collect();
                tracing::warn!("this host runs a member of the store from now on");
                self.own.begin(all.join(","))?;
                Ok(LOOK.0)
            }
            Step::Forget if self.missed < MISSED => Ok(LOOK.0 * 5),
            Step::Forget => {
                tracing::warn!("this host's member was taken out of the store while it was away");
                self.own.forget().await?;
                Ok(LOOK.0)
            }
        }
    }

    /// The manager forgets old revisions, and gives their space back on one member after another.
    async fn compact(&mut self) {
        let snapshot = Arc::clone(&self.live.borrow());
        let me = &self.own.host.name;
        let manages = snapshot.manager.as_ref().is_some_and(|m| m.holder == *me);
        let until = snapshot.revision - KEPT_REVISIONS;
        if !manages || until <= self.compacted + KEPT_REVISIONS / 10 {
            return;
        }
        match self.store.compact(until).await {
            Ok(()) => self.compacted = until,
            Err(error) => return tracing::debug!(%error, "the store could not be compacted"),
        }
        if let Err(error) = self.store.defragment_each(FRAGMENTED).await {
            tracing::warn!(%error, "a member's file could not be defragmented");
        }
    }

    /// The store is reached over its voters, this host's own first; they are remembered for the next daemon.
    async fn endpoints(&mut self, members: &[Member]) {
        let voters = voters(members);
        if voters.is_empty() {
            return;
        }
        let host = &mut self.own.host;
        if let Err(error) = host.remember(&self.own.paths, &voters) {
            tracing::warn!(
                error = format!("{error:#}"),
                "the store's voters cannot be noted; free some space in the state directory"
            );
        }
        let all = if voters.contains(&host.address) {
            crate::daemon::endpoints(host.address, &voters)
        } else {
            voters.iter().map(|ip| server::client_url(*ip)).collect()
        };
        if let Err(error) = self.store.set_endpoints(all).await {
            tracing::warn!(%error, "the members' addresses cannot be used");
        }
    }
}

/// The addresses of the members that vote.
fn voters(members: &[Member]) -> Vec<std::net::Ipv4Addr> {
    let ip = |url: &str| url.strip_prefix("https://")?.rsplit_once(':')?.0.parse().ok();
    members.iter().filter(|m| !m.learner).filter_map(|m| ip(&m.peer_url)).collect()
}
