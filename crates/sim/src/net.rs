//! Who reaches whom, which host runs, and where the store's leader is.

use haven_host::vm::fake_migration::Copies;
use haven_store::clock::Run;
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::{sync::watch, time::Instant};

/// A host as its machine stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Power {
    /// On and executing.
    On,
    /// On, and nothing in it executes.
    Paused,
    /// Off.
    Off,
}

impl Power {
    /// What its processes may do.
    #[must_use]
    pub fn run(self) -> Run {
        match self {
            Power::On => Run::Running,
            Power::Paused => Run::Paused,
            Power::Off => Run::Dead,
        }
    }
}

/// How a host's power controller is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Controller {
    /// It answers.
    Well,
    /// It does not answer, and whoever asks notices.
    Dead,
    /// It takes every request and never answers.
    Hung,
}

/// How bad things are now.
#[derive(Clone, Debug, Default)]
struct Weather {
    /// Packets from the first to the second vanish.
    cuts: BTreeSet<(String, String)>,
    /// Hosts whose uplinks have no link.
    unplugged: BTreeSet<String>,
    /// Power controllers that are not well, by host.
    controllers: BTreeMap<String, Controller>,
    /// Every store request takes so much longer.
    slow_store: Duration,
    /// The store serves nobody.
    store_frozen: bool,
    /// Of a hundred datagrams so many are lost.
    loss: u32,
    /// Of a hundred starts of VMs so many fail.
    failing_starts: u32,
    /// Of a hundred calls to the drivers of storage, network and balance so many fail.
    failing_drivers: u32,
    /// Of a hundred guests that are handed over so many break at the end.
    breaking_copies: u32,
}

struct State {
    power: BTreeMap<String, Power>,
    voters: Vec<String>,
    weather: Weather,
    leader: Option<String>,
    /// An election is under way until then.
    leader_ready: Instant,
    random: StdRng,
}

/// The network and machines of one simulated cluster. All share it.
pub struct Net {
    state: Mutex<State>,
    changed: watch::Sender<u64>,
}

impl Net {
    /// `hosts`, all off; the first three (or one) carry the store.
    #[must_use]
    pub fn new(hosts: &[String], seed: u64) -> Arc<Self> {
        let voters = hosts.iter().take(if hosts.len() >= 3 { 3 } else { 1 }).cloned().collect();
        let power = hosts.iter().map(|host| (host.clone(), Power::Off)).collect();
        let state = State {
            power,
            voters,
            weather: Weather::default(),
            leader: None,
            leader_ready: Instant::now(),
            random: StdRng::seed_from_u64(seed ^ 0x006e_6574),
        };
        Arc::new(Self { state: Mutex::new(state), changed: watch::channel(0).0 })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        {
            let mut state = self.state();
            change(&mut state);
            state.elect();
        }
        self.changed.send_modify(|count| *count += 1);
    }

    /// A number below `limit`, from the seed.
    pub fn random(&self, limit: u64) -> u64 {
        self.state().random.random_range(0..limit.max(1))
    }

    /// Wakes at every change.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// How a host stands.
    #[must_use]
    pub fn power(&self, host: &str) -> Power {
        self.state().power.get(host).copied().unwrap_or(Power::Off)
    }

    /// Sets how a host stands.
    pub fn set_power(&self, host: &str, power: Power) {
        self.change(|state| {
            state.power.insert(host.to_owned(), power);
        });
    }

    /// Packets from one host to another vanish.
    pub fn cut(&self, from: &str, to: &str) {
        self.change(|state| {
            state.weather.cuts.insert((from.to_owned(), to.to_owned()));
        });
    }

    /// They pass again.
    pub fn uncut(&self, from: &str, to: &str) {
        self.change(|state| {
            state.weather.cuts.remove(&(from.to_owned(), to.to_owned()));
        });
    }

    /// A host is cut off from every other.
    pub fn isolate(&self, host: &str) {
        self.change(|state| {
            let others: Vec<String> = state.power.keys().filter(|h| *h != host).cloned().collect();
            for other in others {
                state.weather.cuts.insert((host.to_owned(), other.clone()));
                state.weather.cuts.insert((other, host.to_owned()));
            }
        });
    }

    /// All of the network is well, and the store as fast as ever.
    pub fn heal(&self) {
        self.change(|state| state.weather = Weather::default());
    }

    /// The store stops serving, or goes on.
    pub fn freeze_store(&self, frozen: bool) {
        self.change(|state| state.weather.store_frozen = frozen);
    }

    /// Every request to the store takes so much longer.
    pub fn slow_store(&self, by: Duration) {
        self.change(|state| state.weather.slow_store = by);
    }

    /// So many datagrams of a hundred are lost.
    pub fn lose(&self, percent: u32) {
        self.change(|state| state.weather.loss = percent);
    }

    /// So many starts of VMs of a hundred fail.
    pub fn fail_starts(&self, percent: u32) {
        self.change(|state| state.weather.failing_starts = percent);
    }

    /// So many calls of a hundred to the drivers of storage, network and balance fail.
    pub fn fail_drivers(&self, percent: u32) {
        self.change(|state| state.weather.failing_drivers = percent);
    }

    /// So many guests of a hundred that are handed over break at the end.
    pub fn break_copies(&self, percent: u32) {
        self.change(|state| state.weather.breaking_copies = percent);
    }

    /// The uplinks of a host have no link any more, or have it again. The network between the hosts is another one.
    pub fn unplug(&self, host: &str, unplugged: bool) {
        self.change(|state| {
            let all = &mut state.weather.unplugged;
            _ = if unplugged { all.insert(host.to_owned()) } else { all.remove(host) };
        });
    }

    /// Whether the uplinks of a host have no link.
    #[must_use]
    pub fn is_unplugged(&self, host: &str) -> bool {
        self.state().weather.unplugged.contains(host)
    }

    /// A host's power controller is from now on so.
    pub fn set_controller(&self, host: &str, controller: Controller) {
        self.change(|state| {
            state.weather.controllers.insert(host.to_owned(), controller);
        });
    }

    /// How a host's power controller is.
    #[must_use]
    pub fn controller(&self, host: &str) -> Controller {
        self.state().weather.controllers.get(host).copied().unwrap_or(Controller::Well)
    }

    /// Whether this start of a VM fails.
    pub fn start_fails(&self) -> bool {
        let mut state = self.state();
        let percent = state.weather.failing_starts;
        percent > 0 && state.random.random_range(0..100) < percent
    }

    /// Whether this call to a driver of storage, network or balance fails.
    pub fn driver_fails(&self) -> bool {
        let mut state = self.state();
        let percent = state.weather.failing_drivers;
        percent > 0 && state.random.random_range(0..100) < percent
    }

    /// Whether this datagram is lost.
    pub fn loses(&self) -> bool {
        let mut state = self.state();
        let percent = state.weather.loss;
        percent > 0 && state.random.random_range(0..100) < percent
    }

    /// Whether a packet from one host comes to another now; the receiver may be paused.
    #[must_use]
    pub fn carries(&self, from: &str, to: &str) -> bool {
        let state = self.state();
        let off = |host: &str| state.power.get(host) == Some(&Power::Off);
        !off(from) && !off(to) && !state.cut(from, to)
    }

    /// Whether two hosts can talk now.
    #[must_use]
    pub fn talk(&self, a: &str, b: &str) -> bool {
        self.state().talk(a, b)
    }

    /// Whether a host's request is served by the store now.
    ///
    /// # Errors
    /// When it is not: the time at which it is worth asking again, if that is known.
    pub fn serves(&self, host: &str) -> Result<(), Option<Instant>> {
        let state = self.state();
        if state.weather.store_frozen {
            return Err(None);
        }
        let Some(leader) = &state.leader else { return Err(None) };
        let through = |voter: &&String| state.talk(host, voter) && state.talk(voter, leader);
        if !state.voters.iter().any(|voter| through(&voter)) {
            return Err(None);
        }
        if Instant::now() < state.leader_ready {
            return Err(Some(state.leader_ready));
        }
        Ok(())
    }

    /// How long a request or an answer is under way.
    pub fn delay(&self) -> Duration {
        let mut state = self.state();
        let base = Duration::from_micros(state.random.random_range(300..3_000));
        let slow = state.weather.slow_store;
        if slow.is_zero() { base } else { base + slow.mul_f64(state.random.random_range(0.5..1.5)) }
    }

    /// The store's leader.
    #[must_use]
    pub fn leader(&self) -> Option<String> {
        self.state().leader.clone()
    }
}

impl Copies for Net {
    fn reach(&self, from: &str, to: &str) -> bool {
        self.talk(from, to)
    }
    fn takes(&self) -> Duration {
        Duration::from_millis(50 + self.random(2_000))
    }
    fn follows(&self) -> Duration {
        Duration::from_millis(20 + self.random(3_000))
    }
    fn breaks(&self) -> Option<bool> {
        let mut state = self.state();
        let percent = state.weather.breaking_copies;
        let breaks = percent > 0 && state.random.random_range(0..100) < percent;
        breaks.then(|| state.random.random_bool(0.5))
    }
    fn torn_answers(&self) -> bool {
        self.random(2) == 0
    }
}

impl State {
    fn cut(&self, from: &str, to: &str) -> bool {
        self.weather.cuts.contains(&(from.to_owned(), to.to_owned()))
    }

    fn talk(&self, a: &str, b: &str) -> bool {
        let on = |host: &str| self.power.get(host) == Some(&Power::On);
        on(a) && on(b) && !self.cut(a, b) && !self.cut(b, a)
    }

    /// Keeps the leader while it has a quorum, else elects another if there is a quorum.
    fn elect(&mut self) {
        let quorum = self.voters.len() / 2 + 1;
        let leads = |state: &Self, host: &String| {
            state.voters.iter().filter(|voter| state.talk(host, voter)).count() >= quorum
        };
        if let Some(leader) = &self.leader
            && leads(self, leader)
        {
            return;
        }
        let candidates: Vec<String> =
            self.voters.iter().filter(|voter| leads(self, voter)).cloned().collect();
        if candidates.is_empty() {
            self.leader = None;
            return;
        }
        let first = self.leader.is_none();
        let index = self.random.random_range(0..candidates.len());
        self.leader = Some(candidates[index].clone());
        let election = Duration::from_millis(self.random.random_range(700..2_000));
        self.leader_ready = Instant::now() + if first { election / 4 } else { election };
    }
}
