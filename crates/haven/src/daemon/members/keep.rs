//! Keeps the store's members in order: carries out what [`super::rules`] decides, keeps the endpoints current, asks
//! this host's own member how it is, compacts, and gives space back on every member in turn.

use super::{
    Own,
    rules::{self, Seen, Step},
};
use haven_host::agent::{Problems, StoreMember, chain};
use haven_model::{HostStatus, Snapshot, keys};
use haven_store::{
    raw::{Compare, EtcdStore, Op},
    server::{self, Member, MemberState},
    upkeep::Upkeep,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// How often a learner is looked after, and the members when nothing is under way.
const LOOK: (Duration, Duration) = (Duration::from_millis(300), Duration::from_secs(10));
/// The same while the cluster wants another voter, or this host's member does not answer.
const WANTING: Duration = Duration::from_secs(1);
/// Questions in a row that a member must have left without an answer: one may meet a moment of defragmentation.
const SILENT: u32 = 3;
/// Revisions that are kept when the store is full.
const KEPT_WHEN_FULL: i64 = 500;
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
    member: watch::Sender<StoreMember>,
    problems: Arc<Problems>,
    missed: u32,
    upkeep: Upkeep,
    /// Questions in a row that this host's member did not answer.
    unanswered: u32,
    /// A member failed here and no other has answered since.
    failed: bool,
    /// Since when the members of hosts that are there do not answer, by id.
    silent: BTreeMap<u64, Instant>,
    /// The store could not be reached at the last look.
    unreachable: bool,
    /// Why the last step failed; empty when it did not.
    refused: String,
}

/// Runs until `cancel`.
pub async fn keep(
    store: EtcdStore,
    live: watch::Receiver<Arc<Snapshot>>,
    own: Own,
    member: watch::Sender<StoreMember>,
    problems: Arc<Problems>,
    cancel: CancellationToken,
) {
    let mut keeper = Keeper {
        store,
        live,
        own,
        member,
        problems,
        missed: 0,
        upkeep: Upkeep::new(KEPT_REVISIONS, FRAGMENTED),
        unanswered: 0,
        failed: false,
        silent: BTreeMap::new(),
        unreachable: false,
        refused: String::new(),
    };
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
                if !std::mem::replace(&mut self.unreachable, true) {
                    let why = chain(&error);
                    tracing::warn!(
                        "the store does not answer; more than half of its voters must run: {why}"
                    );
                }
                return LOOK.0;
            }
        };
        if std::mem::take(&mut self.unreachable) {
            tracing::info!("the store answers again");
        }
        let my_url = server::peer_url(self.own.host.address);
        self.endpoints(&members).await;
        self.judge_own(members.iter().find(|member| member.peer_url == my_url)).await;
        let snapshot = Arc::clone(&self.live.borrow());
        if snapshot.revision == 0 {
            return LOOK.0;
        }
        self.correct(&members, &snapshot).await;
        let silent_ms = self.silent_ms(&members, &snapshot);
        let step = rules::next(&Seen {
            me: &self.own.host.name,
            my_url: &my_url,
            runs_one: self.own.host.initial_cluster.is_some(),
            members: &members,
            silent_ms: &silent_ms,
            snapshot: &snapshot,
            now_ms: crate::daemon::wall_ms(),
        });
        self.missed = if step == Step::Forget { self.missed + 1 } else { 0 };
        let fewer =
            members.len() < snapshot.hosts.len().min(snapshot.cluster_spec().voters as usize);
        let done = self.carry_out(step, &members).await;
        let why = done.as_ref().err().map(|error| format!("{error:#}")).unwrap_or_default();
        if !why.is_empty() && why != self.refused {
            // The store takes a new member only while all others have been connected for 5 s.
            tracing::warn!(error = %why, "the store's members could not be put in order yet");
        }
        self.refused = why;
        let pause = done.unwrap_or(LOOK.1);
        if fewer || self.unanswered > 0 { pause.min(WANTING) } else { pause }
    }

    /// What lost hosts said last names members that are no more: nobody shall count those as voters. A host that
    /// returns says itself what it has.
    async fn correct(&self, members: &[Member], snapshot: &Snapshot) {
        for (name, status) in rules::outdated(members, snapshot) {
            let key = keys::host_status(name);
            let corrected = HostStatus { etcd_member: None, ..(*status.value).clone() };
            let Ok(value) = serde_json::to_vec(&corrected) else { continue };
            let unchanged = Compare::ModRevision(key.clone(), status.revision);
            // Refused when somebody else was faster, and looked at again if it failed.
            if let Err(error) =
                self.store.txn(vec![unchanged], vec![Op::Put(key, value.into())]).await
            {
                tracing::debug!(error = %chain(&error), host = %name, "a status was not corrected");
            }
        }
    }

    /// Does it; how long until the next look.
    async fn carry_out(&mut self, step: Step, members: &[Member]) -> anyhow::Result<Duration> {
        match step {
            Step::Rest => Ok(LOOK.1),
            Step::Begin => {
                tracing::warn!("this host runs the member that was added for it");
                self.begin(members)?;
                Ok(LOOK.0)
            }
            Step::Promote(id) => {
                match self.store.promote(id).await {
                    Ok(()) => tracing::info!("this host's member of the store votes now"),
                    Err(error) => {
                        tracing::debug!(error = %chain(&error), "not yet a voter");
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
                self.store.add_learner(url).await?;
                tracing::info!("this host runs a member of the store from now on");
                self.begin(members)?;
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

    /// Runs this host's member beside these, of which its own may be one.
    fn begin(&mut self, members: &[Member]) -> anyhow::Result<()> {
        let url = server::peer_url(self.own.host.address);
        let others = members.iter().filter(|m| m.peer_url != url && !m.name.is_empty());
        let others = others.map(|m| format!("{}={}", m.name, m.peer_url));
        let mine = format!("{}={url}", self.own.host.name);
        self.own.begin(others.chain([mine]).collect::<Vec<_>>().join(","))
    }

    /// Asks this host's member how it is, tells a person what is wrong with it, and makes room when it is full.
    async fn judge_own(&mut self, mine: Option<&Member>) {
        let voter = mine.filter(|member| !member.learner);
        let url = server::client_url(self.own.host.address);
        let mut problem = None;
        match self.store.state_of(&url).await {
            Ok(Some(state)) if voter.is_some() => {
                (self.unanswered, self.failed) = (0, false);
                problem = said(&state);
                if state.full && state.leads {
                    let until = self.live.borrow().revision - KEPT_WHEN_FULL;
                    tracing::error!(
                        "the store is full and takes no writes; old revisions are forgotten now"
                    );
                    if let Err(error) = self.store.make_room(until).await {
                        tracing::error!(error = %chain(&error), "no room could be made in the store");
                    }
                }
            }
            Ok(_) => self.unanswered = 0,
            Err(error) if voter.is_some() => {
                self.unanswered += 1;
                self.failed |= self.unanswered >= SILENT;
                let how = self.own.ended.said().unwrap_or_else(|| chain(&error));
                problem = self.failed.then(|| {
                    format!("its member does not answer ({how}); while it does not, fewer hosts can be lost")
                });
            }
            Err(_) => {}
        }
        self.problems.set("store", problem);
        let now = StoreMember { id: voter.map(|member| member.id), silent: self.failed };
        self.member.send_if_modified(|shown| std::mem::replace(shown, now) != now);
    }

    /// How long members do not answer whose hosts are there and say so, milliseconds.
    fn silent_ms(&mut self, members: &[Member], snapshot: &Snapshot) -> BTreeMap<u64, i64> {
        let silent = |member: &Member| {
            let of = snapshot
                .hosts
                .iter()
                .find(|(_, h)| server::peer_url(h.spec.address) == member.peer_url);
            of.is_some_and(|(name, _)| {
                let status = snapshot.host_status.get(name);
                snapshot.session_open(name) && status.is_some_and(|s| s.etcd_silent)
            })
        };
        let ids: BTreeSet<u64> = members.iter().filter(|m| silent(m)).map(|m| m.id).collect();
        self.silent.retain(|id, _| ids.contains(id));
        for id in ids {
            self.silent.entry(id).or_insert_with(Instant::now);
        }
        let ms = |since: &Instant| i64::try_from(since.elapsed().as_millis()).unwrap_or(i64::MAX);
        self.silent.iter().map(|(id, since)| (*id, ms(since))).collect()
    }

    /// The manager forgets old revisions, and gives their space back on one member after another.
    async fn compact(&mut self) {
        let snapshot = Arc::clone(&self.live.borrow());
        let me = &self.own.host.name;
        let manages = snapshot.manager.as_ref().is_some_and(|m| m.holder == *me);
        if manages && let Err(error) = self.upkeep.run(&self.store, snapshot.revision).await {
            let error = chain(&error);
            tracing::warn!(%error, "the store's old revisions could not be cleared away");
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

/// What is wrong with a member that answers.
fn said(state: &MemberState) -> Option<String> {
    let mib = state.used >> 20;
    if state.corrupt {
        return Some("its data differ from the other members' (etcd's alarm CORRUPT): take this host out with `haven host remove` and join it again".into());
    }
    if state.full {
        return Some("the store is full: nothing can be written, and VMs end when their leases run out; delete objects that nobody needs".into());
    }
    (state.used > server::NEARLY_FULL).then(|| {
        format!(
            "the store holds {mib} MiB of {} MiB: delete objects that nobody needs",
            server::QUOTA >> 20
        )
    })
}

/// The addresses of the members that vote.
fn voters(members: &[Member]) -> Vec<std::net::Ipv4Addr> {
    let ip = |url: &str| url.strip_prefix("https://")?.rsplit_once(':')?.0.parse().ok();
    members.iter().filter(|m| !m.learner).filter_map(|m| ip(&m.peer_url)).collect()
}
