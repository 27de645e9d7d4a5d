//! Backups that are read again and compared with their checksums when somebody asks for it; and once a day, what no backup
//! names any more is removed from targets. The first host by name does both for the whole cluster.
//!
//! The record is the task: when that host is lost, the next one begins it anew.

use crate::{
    agent::{AgentParts, storage::StorageFailure},
    storage::backup::{
        repository::{ChunkId, Repository},
        target,
    },
};
use futures::{StreamExt, stream};
use haven_model::{
    Name, ObjectRef, Severity, Snapshot,
    backup::{Backup, TaskOutcome, Verification},
    keys,
    object::Kind,
};
use haven_store::{
    clock::Mono,
    raw::{Compare, Op},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};
use tokio_util::sync::CancellationToken;

/// How often it is told how far it is.
const TELL: Duration = Duration::from_secs(1);
/// The pause after one.
const AGAIN: Duration = Duration::from_secs(1);
/// So many chunks are read at once.
const AT_ONCE: usize = 4;
/// So much of what is damaged is named.
const NAMED: usize = 16;
/// Between two sweeps of a target, and before the first.
const SWEEPS: Duration = Duration::from_secs(86_400);
const FIRST_SWEEP: Duration = Duration::from_secs(3600);

/// Compares and sweeps until `cancel`.
pub async fn run(parts: Arc<AgentParts>, cancel: CancellationToken) {
    let mut live = parts.live.clone();
    let mut sweeps = parts.clock.now().plus(FIRST_SWEEP);
    while !cancel.is_cancelled() {
        let now = Arc::clone(&live.borrow_and_update());
        let mine = is_first(&parts, &now);
        let due = now.verifications.iter().find(|(_, of)| mine && of.outcome.is_none());
        if let Some((target, _)) = due {
            tokio::select! {
                biased;
                () = cancel.cancelled() => return,
                () = verify(&parts, target) => {}
            }
            // Nothing is begun anew on what was read before the last word of it.
            tokio::select! {
                () = cancel.cancelled() => {}
                () = parts.clock.sleep(AGAIN) => {}
            }
            continue;
        }
        let rest = Duration::from_nanos(sweeps.0.saturating_sub(parts.clock.now().0));
        tokio::select! {
            biased;
            () = cancel.cancelled() => {}
            changed = live.changed() => if changed.is_err() { return },
            () = parts.clock.sleep(rest) => {
                sweeps = parts.clock.now().plus(SWEEPS);
                if mine {
                    tokio::select! {
                        biased;
                        () = cancel.cancelled() => return,
                        () = sweep(&parts, &now) => {}
                    }
                }
            }
        }
    }
}

/// Whether this is the first host that is there.
fn is_first(parts: &AgentParts, now: &Snapshot) -> bool {
    let mut hosts = now
        .hosts
        .iter()
        .filter(|(name, host)| !host.spec.witness && !host.meta.deleting && now.session_open(name));
    parts.current_session().is_some() && hosts.next().is_some_and(|(name, _)| *name == parts.me)
}

async fn sweep(parts: &AgentParts, now: &Snapshot) {
    for target in now.targets.keys() {
        let swept = async {
            let repository = target::repository(now, parts.secrets.as_ref(), target)?;
            repository.ready().await?;
            repository.sweep().await
        };
        match swept.await {
            Ok(swept) => tracing::info!(%target, ?swept, "what no backup names is removed"),
            Err(failure) => tracing::warn!(%target, %failure, "it cannot be swept"),
        }
    }
}

/// One comparison, as long as it is this host's.
struct Task<'a> {
    parts: &'a AgentParts,
    target: &'a Name,
    record: Verification,
    revision: i64,
    told: Mono,
}

/// The record is somebody else's by now.
struct Over;

async fn verify(parts: &AgentParts, target: &Name) {
    let live = Arc::clone(&parts.live.borrow());
    let Some(record) = live.verifications.get(target) else { return };
    tracing::info!(%target, "the backups in it are compared with their checksums");
    let (of, revision) = ((*record.value).clone(), record.revision);
    let of = Verification { done: 0, total: 0, damaged: Vec::new(), ..of };
    let mut task = Task { parts, target, record: of, revision, told: parts.clock.now() };
    let (well, message) = match task.read(&live).await {
        Ok(Ok(end)) => end,
        Ok(Err(failure)) => (false, failure.what),
        Err(Over) => return,
    };
    let at_ms = (parts.wall_ms)();
    task.record.outcome = Some(TaskOutcome { at_ms, well, message: message.clone() });
    let severity = if well { Severity::Info } else { Severity::Error };
    let object = ObjectRef::new(Kind::Target, target.clone());
    let event = format!("the backups were compared with their checksums: {message}");
    let event = parts.event(&object, severity, event);
    let _ = task.tell(Some(event)).await;
}

/// What is to be read, and whose it is.
type Wanted = BTreeMap<ChunkId, BTreeSet<String>>;

impl Task<'_> {
    /// Writes the record over the one that this wrote last.
    async fn tell(&mut self, event: Option<Op>) -> Result<(), Over> {
        let key = keys::verification(self.target);
        let value = serde_json::to_vec(&self.record).expect("a record is plain data");
        let mut ops = vec![Op::Put(key.clone(), value.into())];
        ops.extend(event);
        let over = vec![Compare::ModRevision(key, self.revision)];
        match self.parts.store.txn(over, ops).await {
            Ok(outcome) if outcome.succeeded => {
                self.revision = outcome.revision;
                Ok(())
            }
            Ok(_) | Err(_) => Err(Over),
        }
    }

    fn damaged(&mut self, what: String) {
        if self.record.damaged.len() < NAMED {
            self.record.damaged.push(what);
        }
    }

    /// Reads all that is asked for: whether it is whole, in words.
    async fn read(
        &mut self,
        live: &Snapshot,
    ) -> Result<Result<(bool, String), StorageFailure>, Over> {
        let opened = async {
            let repository = target::repository(live, self.parts.secrets.as_ref(), self.target)?;
            repository.ready().await?;
            let list = repository.list(self.record.vm.as_ref()).await?;
            Ok::<_, StorageFailure>((repository, list))
        };
        let (repository, list) = match opened.await {
            Ok(opened) => opened,
            Err(failure) => return Ok(Err(failure)),
        };
        let mut bad = BTreeSet::new();
        for (key, why) in list.unreadable {
            self.damaged(format!("{key}: {why}"));
            bad.insert(key);
        }
        let one = self.record.backup.clone();
        let asked = |backup: &Backup| one.as_ref().is_none_or(|id| backup.id == *id);
        let backups: Vec<Backup> = list.backups.into_iter().filter(asked).collect();
        let (wanted, broken) = self.wanted(&repository, &backups).await;
        bad.extend(broken);
        self.record.total = wanted.len() as u64;
        self.tell(None).await?;
        let reads = wanted.into_iter().map(|(id, of)| {
            let repository = repository.clone();
            async move { (id, repository.get(&id).await, of) }
        });
        let mut reads = stream::iter(reads).buffer_unordered(AT_ONCE);
        while let Some((id, read, of)) = reads.next().await {
            if let Err(failure) = read {
                // It may be away as a whole, which says nothing of what it holds.
                if let Err(away) = repository.ready().await {
                    return Ok(Err(away));
                }
                // The next backup that reads the same content writes it again.
                if let Err(failure) = repository.condemn(&id).await {
                    tracing::warn!(%failure, "a damaged chunk cannot be put out of the way");
                }
                let names: Vec<&str> = of.iter().map(String::as_str).collect();
                self.damaged(format!("{} (in {})", failure.what, names.join(", ")));
                bad.extend(of);
            }
            self.record.done += 1;
            let now = self.parts.clock.now();
            if now.since(self.told) >= TELL {
                self.told = now;
                self.tell(None).await?;
            }
        }
        let (chunks, count) = (self.record.done, backups.len());
        Ok(Ok(match bad.len() {
            0 => (true, format!("{count} are whole ({chunks} chunks read)")),
            some => {
                let names: Vec<&str> = bad.iter().take(NAMED).map(String::as_str).collect();
                (false, format!("{some} of {count} are damaged: {}", names.join(", ")))
            }
        }))
    }

    /// All chunks of these backups, with the backups that need each; and the backups whose lists of them cannot be read.
    async fn wanted(
        &mut self,
        repository: &Repository,
        backups: &[Backup],
    ) -> (Wanted, BTreeSet<String>) {
        let (mut wanted, mut broken) = (Wanted::new(), BTreeSet::new());
        for backup in backups {
            let name = format!("{} of {}", backup.id, backup.vm);
            for disk in &backup.disks {
                match repository.index(backup, &disk.name).await {
                    Ok(index) => {
                        for id in index.chunks.into_iter().flatten() {
                            wanted.entry(id).or_default().insert(name.clone());
                        }
                    }
                    Err(failure) => {
                        self.damaged(failure.what);
                        broken.insert(name.clone());
                    }
                }
            }
        }
        (wanted, broken)
    }
}
