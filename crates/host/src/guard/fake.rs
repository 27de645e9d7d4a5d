//! A guard for the simulator: the same rules in virtual time, over VMs that are only records.

use super::{
    Guard, GuardError, GuardStatus, REFUSALS, Registration, START_MARGIN_NS,
    watchdog::{SLACK_NS, TIMEOUT_NS},
};
use crate::{network::fake::Segment, vm::fake::World};
use async_trait::async_trait;
use haven_store::clock::Clock;
use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

/// How long the guard sleeps at most while nothing is due.
const NAP: Duration = Duration::from_millis(250);

/// The rules that a test may take away, to show that they are missed.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// It refuses a start that began in an earlier session.
    pub compares_sessions: bool,
    /// It takes service addresses away at its deadline.
    pub takes_addresses: bool,
}

/// A guard of one simulated host. It is a process of its own: it lives on when the daemon is killed.
pub struct FakeGuard {
    host: String,
    world: Arc<World>,
    segment: Arc<Segment>,
    clock: Clock,
    rules: Rules,
    /// The deadline, and the session under which it was last extended.
    until: Mutex<(u64, u64)>,
    /// Until when the watchdog is fed while a guest is under watch, by this host's clock.
    fed_until: Mutex<u64>,
}

impl FakeGuard {
    /// Watches over `host` in `world`, and its addresses on the `segment`, by this host's clock, for as long as the
    /// host is on.
    #[must_use]
    pub fn spawn(
        host: &str,
        (world, segment): (Arc<World>, Arc<Segment>),
        clock: Clock,
        rules: Rules,
    ) -> Arc<Self> {
        let (host, until, fed_until) = (host.into(), Mutex::default(), Mutex::default());
        let guard = Arc::new(Self { host, world, segment, clock, rules, until, fed_until });
        let watched = Arc::clone(&guard);
        tokio::spawn(async move {
            loop {
                let left = watched.deadline().saturating_sub(watched.clock.boottime_ns());
                if left == 0 {
                    watched.world.kill_all(&watched.host);
                    if watched.rules.takes_addresses {
                        watched.segment.drop_host(&watched.host);
                    }
                }
                let nap = Duration::from_nanos(left).min(NAP);
                watched.clock.sleep(if nap.is_zero() { NAP } else { nap }).await;
            }
        });
        guard
    }

    /// The guard as one daemon speaks to it.
    #[must_use]
    pub fn handle(self: &Arc<Self>, clock: Clock) -> Arc<dyn Guard> {
        Arc::new(Handle { guard: Arc::clone(self), clock })
    }

    /// How long after now the watchdog resets this host if it is fed no more, as `watchdog.rs` feeds it.
    #[must_use]
    pub fn resets_in(&self) -> Duration {
        let now = self.clock.boottime_ns();
        let live = !self.world.processes_on(&self.host).is_empty();
        let fed_until = *self.fed_until.lock().unwrap_or_else(PoisonError::into_inner);
        let last = if live { now.min(fed_until) } else { now };
        Duration::from_nanos((last + TIMEOUT_NS).saturating_sub(now))
    }

    fn fed_until(&self, until: u64) {
        let mut fed = self.fed_until.lock().unwrap_or_else(PoisonError::into_inner);
        *fed = until.max(*fed);
    }

    fn deadline(&self) -> u64 {
        self.until.lock().unwrap_or_else(PoisonError::into_inner).0
    }
}

struct Handle {
    guard: Arc<FakeGuard>,
    clock: Clock,
}

#[async_trait]
impl Guard for Handle {
    async fn extend(&self, session: u64, deadline_ns: u64) -> Result<(), GuardError> {
        self.clock.pass().await;
        let guard = &self.guard;
        let live = !guard.world.running_on(&guard.host).is_empty();
        let mut until = guard.until.lock().unwrap_or_else(PoisonError::into_inner);
        if live && guard.clock.boottime_ns() >= until.0 {
            return Err(GuardError::Refused { vm: guard.host.clone(), why: REFUSALS[4] });
        }
        *until = (deadline_ns.max(until.0), session);
        let last = (until.0 + SLACK_NS).saturating_sub(TIMEOUT_NS);
        if last >= guard.clock.boottime_ns() {
            guard.fed_until(last);
        }
        Ok(())
    }
    async fn register(&self, start: &Registration<'_>) -> Result<(), GuardError> {
        self.clock.pass().await;
        let (deadline, session) = *self.guard.until.lock().unwrap_or_else(PoisonError::into_inner);
        if self.guard.clock.boottime_ns() + START_MARGIN_NS > deadline {
            return Err(GuardError::Refused { vm: start.vm.into(), why: REFUSALS[1] });
        }
        if start.session != session && self.guard.rules.compares_sessions {
            return Err(GuardError::Refused { vm: start.vm.into(), why: REFUSALS[5] });
        }
        // Until now it was fed whatever the deadline was.
        if self.guard.world.processes_on(&self.guard.host).is_empty() {
            self.guard.fed_until(self.guard.clock.boottime_ns());
        }
        Ok(())
    }
    async fn unregister(&self, _vm: &str) -> Result<(), GuardError> {
        Ok(())
    }
    async fn hold(&self, _label: &str) -> Result<(), GuardError> {
        Ok(())
    }
    async fn release(&self, _label: &str) -> Result<(), GuardError> {
        Ok(())
    }
    async fn status(&self) -> Result<GuardStatus, GuardError> {
        self.clock.pass().await;
        let live = self.guard.world.running_on(&self.guard.host).len();
        let live = u32::try_from(live).unwrap_or(u32::MAX);
        Ok(GuardStatus { deadline_ns: self.guard.deadline(), live, fired: 0 })
    }
    async fn replace(&self) {}
}
