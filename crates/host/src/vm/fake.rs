//! VMs that are only records, for the simulator. All hosts share one [`World`], so that a judge outside sees who
//! runs what.

use super::driver::{Exit, RunningVm, VmDriver, VmError, VmEvent, VmLaunch};
use crate::guard::Guard;
use async_trait::async_trait;
use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::sync::broadcast;

/// Who runs what: (host, VM) to epoch.
#[derive(Default)]
pub struct World {
    running: Mutex<BTreeMap<(String, String), u64>>,
    events: Mutex<BTreeMap<String, broadcast::Sender<VmEvent>>>,
}

impl World {
    /// Everything that runs now.
    #[must_use]
    pub fn running(&self) -> BTreeMap<(String, String), u64> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The VMs that a host runs.
    #[must_use]
    pub fn running_on(&self, host: &str) -> Vec<(String, u64)> {
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        running
            .iter()
            .filter(|((on, _), _)| on == host)
            .map(|((_, vm), epoch)| (vm.clone(), *epoch))
            .collect()
    }

    /// Ends everything on a host: its guard fired, or its power is gone.
    pub fn kill_all(&self, host: &str) {
        for (vm, _) in self.running_on(host) {
            self.end(host, &vm, Exit::Crashed);
        }
    }

    /// Ends one VM and tells the host's driver.
    pub fn end(&self, host: &str, vm: &str, how: Exit) {
        let key = (host.to_owned(), vm.to_owned());
        let epoch = self.running.lock().unwrap_or_else(PoisonError::into_inner).remove(&key);
        let events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        if let (Some(epoch), Some(sender)) = (epoch, events.get(host)) {
            let _ = sender.send(VmEvent::Exited { vm: vm.to_owned(), epoch, how });
        }
    }

    fn subscribe(&self, host: &str) -> broadcast::Receiver<VmEvent> {
        let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        events.entry(host.to_owned()).or_insert_with(|| broadcast::channel(256).0).subscribe()
    }
}

/// Runs records on one host.
pub struct FakeVmDriver {
    /// This host.
    pub host: String,
    /// Shared by all hosts.
    pub world: Arc<World>,
    /// Its guard.
    pub guard: Arc<dyn Guard>,
    /// How long a start takes.
    pub start_takes: Duration,
}

#[async_trait]
impl VmDriver for FakeVmDriver {
    async fn start(&self, launch: &VmLaunch) -> Result<RunningVm, VmError> {
        tokio::time::sleep(self.start_takes).await;
        self.guard
            .register(&launch.vm, 1, "")
            .await
            .map_err(|source| VmError::Guard { vm: launch.vm.clone(), source })?;
        let key = (self.host.clone(), launch.vm.clone());
        self.world.running.lock().unwrap_or_else(PoisonError::into_inner).insert(key, launch.epoch);
        Ok(RunningVm { vm: launch.vm.clone(), epoch: launch.epoch, pid: 1 })
    }
    async fn list(&self) -> Result<Vec<RunningVm>, VmError> {
        let on = self.world.running_on(&self.host);
        Ok(on.into_iter().map(|(vm, epoch)| RunningVm { vm, epoch, pid: 1 }).collect())
    }
    async fn stop(&self, vm: &str, _grace: Duration) -> Result<(), VmError> {
        tokio::time::sleep(Duration::from_millis(50)).await;
        self.kill(vm).await
    }
    async fn kill(&self, vm: &str) -> Result<(), VmError> {
        self.world.end(&self.host, vm, Exit::Killed);
        Ok(())
    }
    async fn reset(&self, _vm: &str) -> Result<(), VmError> {
        Ok(())
    }
    fn events(&self) -> broadcast::Receiver<VmEvent> {
        self.world.subscribe(&self.host)
    }
    fn console(&self, _vm: &str) -> PathBuf {
        PathBuf::new()
    }
    fn log(&self, _vm: &str) -> PathBuf {
        PathBuf::new()
    }
}
