//! The judge: hears of every change at the instant at which it happens and checks the invariants then.

use crate::{
    invariants::{self, Invariant},
    net::Power,
};
use etcd_event::Event;
use haven_host::network::fake::Segment;
use haven_model::Snapshot;
use haven_plan::storage::shutting;
use std::{
    collections::BTreeMap,
    net::Ipv4Addr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::time::Instant;

/// One key's change, as the store's witness tells it.
pub mod etcd_event {
    /// The key, and its value with its revision, or nothing when it was deleted.
    pub type Event = (String, Option<Vec<u8>>, i64);
}

/// A VM that runs somewhere.
#[derive(Clone, Copy, Debug)]
pub struct Running {
    /// The epoch under which it was started.
    pub epoch: u64,
    /// Since when.
    pub since: Instant,
}

/// Everything that is so at one instant.
pub struct Facts {
    /// Since the beginning.
    pub now: Duration,
    /// The store's contents.
    pub snapshot: Snapshot,
    /// What runs: (host, VM).
    pub running: BTreeMap<(String, String), Running>,
    /// What runs there and can write nothing any more: its disks were shut, and it was started elsewhere for that.
    pub fenced: BTreeMap<(String, String), Instant>,
    /// How every host stands.
    pub power: BTreeMap<String, Power>,
    /// When a paused host went on last.
    pub woke: BTreeMap<String, Instant>,
    /// Who answers for which address.
    pub segment: Arc<Segment>,
    /// Something else than power has failed, or a person has changed something.
    pub disturbed: bool,
}

impl Facts {
    /// The hosts that execute a VM now, without a copy that can write nothing.
    #[must_use]
    pub fn executing(&self, vm: &str) -> Vec<&str> {
        let on = |host: &String| self.power.get(host) == Some(&Power::On);
        let keys = self.running.keys().filter(|key| !self.fenced.contains_key(*key));
        keys.filter(|(host, name)| name == vm && on(host)).map(|(host, _)| host.as_str()).collect()
    }

    /// What runs on a host from which it was taken for its disks' sake, and not for the host's.
    fn newly_fenced(&self, before: &Snapshot) -> Vec<(String, String)> {
        let placements = self.snapshot.placements.iter();
        let taken = placements.filter_map(|(vm, placement)| {
            let old = before.placements.get(vm).filter(|old| old.host != placement.host)?;
            let key = (old.host.to_string(), vm.to_string());
            let live = self.snapshot.session_open(&old.host) && self.running.contains_key(&key);
            let shut = shutting::shut(before, before.vms.get(vm)?, old);
            (live && shut).then_some(key)
        });
        taken.collect()
    }
}

/// What just happened.
pub enum Step<'a> {
    /// A VM began to run.
    Started {
        /// Where.
        host: &'a str,
        /// Which.
        vm: &'a str,
        /// Under which epoch.
        epoch: u64,
    },
    /// A VM ended.
    Ended {
        /// Where.
        host: &'a str,
        /// Which.
        vm: &'a str,
    },
    /// A host's power changed.
    Power {
        /// Which.
        host: &'a str,
    },
    /// A transaction was done; the store's contents before it.
    Transaction(&'a Snapshot),
}

struct Inner {
    facts: Facts,
    invariants: Vec<Box<dyn Invariant>>,
    violations: Vec<String>,
    transcript: Vec<String>,
    steps: u64,
}

/// The judge of one run.
pub struct Judge {
    begun: Instant,
    inner: Mutex<Inner>,
}

impl Judge {
    /// Judges from now on. With `grace` a copy on a host that just woke may overlap for so long (no watchdog).
    #[must_use]
    pub fn new(grace: Duration, segment: Arc<Segment>) -> Self {
        let facts = Facts {
            now: Duration::ZERO,
            snapshot: Snapshot::default(),
            running: BTreeMap::new(),
            fenced: BTreeMap::new(),
            power: BTreeMap::new(),
            woke: BTreeMap::new(),
            segment,
            disturbed: false,
        };
        let inner = Inner {
            facts,
            invariants: invariants::all(grace),
            violations: Vec::new(),
            transcript: Vec::new(),
            steps: 0,
        };
        Self { begun: Instant::now(), inner: Mutex::new(inner) }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.facts.now = self.begun.elapsed();
        inner
    }

    /// A line of the transcript.
    pub fn note(&self, line: &str) {
        self.lock().note(line);
    }

    /// Something else than power fails from now on, or a person changes something.
    pub fn disturb(&self) {
        self.lock().facts.disturbed = true;
    }

    /// A VM began or ended.
    pub fn world(&self, host: &str, vm: &str, epoch: u64, started: bool) {
        let mut inner = self.lock();
        let key = (host.to_owned(), vm.to_owned());
        inner.facts.fenced.remove(&key);
        let step = if started {
            inner.facts.running.insert(key, Running { epoch, since: Instant::now() });
            inner.note(&format!("{vm} runs on {host}, epoch {epoch}"));
            Step::Started { host, vm, epoch }
        } else {
            inner.facts.running.remove(&key);
            inner.note(&format!("{vm} ended on {host}, epoch {epoch}"));
            Step::Ended { host, vm }
        };
        inner.check(&step);
    }

    /// A host's power changed.
    pub fn power(&self, host: &str, power: Power) {
        let mut inner = self.lock();
        let before = inner.facts.power.insert(host.to_owned(), power);
        if before == Some(Power::Paused) && power == Power::On {
            inner.facts.woke.insert(host.to_owned(), Instant::now());
        }
        inner.note(&format!("{host} is {power:?}"));
        inner.check(&Step::Power { host });
    }

    /// A transaction was done.
    pub fn transaction(&self, revision: i64, events: &[Event]) {
        let mut inner = self.lock();
        let before = inner.facts.snapshot.clone();
        for (key, value, at) in events {
            let raw = value.as_ref().map(|value| (value.as_slice(), *at));
            inner.facts.snapshot.apply(key, raw);
            inner.tell(key, value.as_deref());
        }
        inner.facts.snapshot.revision = revision;
        let fenced = inner.facts.newly_fenced(&before);
        let now = Instant::now();
        inner.facts.fenced.extend(fenced.into_iter().map(|key| (key, now)));
        inner.check(&Step::Transaction(&before));
    }

    /// Since when a guest with this address runs on a host.
    #[must_use]
    pub fn guest_since(&self, host: &str, ip: Ipv4Addr) -> Option<Instant> {
        let inner = self.lock();
        let mut placements = inner.facts.snapshot.placements.iter();
        let (vm, _) = placements.find(|(_, p)| p.nics.iter().any(|nic| nic.ip == ip))?;
        inner.facts.running.get(&(host.to_owned(), vm.to_string())).map(|running| running.since)
    }

    /// Reads the facts.
    pub fn read<T>(&self, read: impl FnOnce(&Facts) -> T) -> T {
        read(&self.lock().facts)
    }

    /// Something is wrong that no invariant names.
    pub fn accuse(&self, what: String) {
        self.lock().accuse(what);
    }

    /// Checks what must hold at the end.
    pub fn end(&self) {
        let mut inner = self.lock();
        let found: Vec<String> = inner
            .invariants
            .iter()
            .filter_map(|invariant| invariant.at_end(&inner.facts).err())
            .collect();
        for what in found {
            inner.accuse(what);
        }
    }

    /// Steps, violations and transcript.
    #[must_use]
    pub fn verdict(&self) -> (u64, Vec<String>, Vec<String>) {
        let inner = self.lock();
        (inner.steps, inner.violations.clone(), inner.transcript.clone())
    }
}

impl Inner {
    fn note(&mut self, line: &str) {
        let ms = self.facts.now.as_millis();
        self.transcript.push(format!("{:>4}.{:03} {line}", ms / 1000, ms % 1000));
    }

    fn accuse(&mut self, what: String) {
        self.note(&format!("VIOLATION {what}"));
        if !self.violations.contains(&what) {
            self.violations.push(what);
        }
    }

    fn check(&mut self, step: &Step<'_>) {
        self.steps += 1;
        let mut found = Vec::new();
        for invariant in &mut self.invariants {
            if let Err(what) = invariant.check(&self.facts, step) {
                found.push(what);
            }
        }
        for what in found {
            self.accuse(what);
        }
    }

    /// The transactions that tell a story go into the transcript; renewals and statuses would drown it.
    fn tell(&mut self, key: &str, value: Option<&[u8]>) {
        let text = || String::from_utf8_lossy(value.unwrap_or(b"deleted")).into_owned();
        let short = key.trim_start_matches("/haven/").to_owned();
        let closed = || text().contains("\"closed\":true");
        if short.starts_with("leases/") && closed()
            || short.starts_with("placement/")
            || short.starts_with("status/vm/")
            || short.starts_with("status/migration/")
            || short.starts_with("migrations/")
            || short.starts_with("volumes/")
            || short.starts_with("status/replica/")
            || short.starts_with("drains/")
            || short == "maintenance"
            || short == "manager"
            || short.starts_with("lost/")
        {
            let line = format!("{short} = {}", text());
            self.note(&line);
        }
    }
}
