//! A guard for the simulator: the same rules in virtual time, over VMs that are only records.

use super::{Guard, GuardError, GuardStatus, START_MARGIN_NS};
use crate::vm::fake::World;
use async_trait::async_trait;
use haven_store::clock::Clock;
use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

/// A guard of one simulated host.
pub struct FakeGuard {
    host: String,
    world: Arc<World>,
    clock: Clock,
    deadline_ns: Arc<Mutex<u64>>,
}

impl FakeGuard {
    /// Watches over `host` in `world` by this host's clock.
    #[must_use]
    pub fn spawn(host: &str, world: Arc<World>, clock: Clock) -> Arc<Self> {
        let guard = Arc::new(Self { host: host.into(), world, clock, deadline_ns: Arc::default() });
        let watched = Arc::clone(&guard);
        tokio::spawn(async move {
            loop {
                watched.clock.sleep(Duration::from_millis(10)).await;
                if watched.clock.boottime_ns() >= watched.deadline() {
                    watched.world.kill_all(&watched.host);
                }
            }
        });
        guard
    }

    fn deadline(&self) -> u64 {
        *self.deadline_ns.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl Guard for FakeGuard {
    async fn extend(&self, deadline_ns: u64) -> Result<(), GuardError> {
        let live = !self.world.running_on(&self.host).is_empty();
        let mut deadline = self.deadline_ns.lock().unwrap_or_else(PoisonError::into_inner);
        if live && self.clock.boottime_ns() >= *deadline {
            return Err(GuardError::Refused { vm: self.host.clone(), why: super::REFUSALS[4] });
        }
        *deadline = deadline_ns.max(*deadline);
        Ok(())
    }
    async fn register(&self, vm: &str, _pid: i32, _tap: &str) -> Result<(), GuardError> {
        if self.clock.boottime_ns() + START_MARGIN_NS > self.deadline() {
            return Err(GuardError::Refused { vm: vm.into(), why: super::REFUSALS[1] });
        }
        Ok(())
    }
    async fn unregister(&self, _vm: &str) -> Result<(), GuardError> {
        Ok(())
    }
    async fn replace(&self) {}
    async fn status(&self) -> Result<GuardStatus, GuardError> {
        let live = u32::try_from(self.world.running_on(&self.host).len()).unwrap_or(u32::MAX);
        Ok(GuardStatus { deadline_ns: self.deadline(), live, fired: 0 })
    }
}
