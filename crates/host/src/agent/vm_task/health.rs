//! The health of a guest, as its checks tell it.

use super::VmTask;
use crate::{agent::health_watch::Health, health::Target};
use haven_model::{Snapshot, service::Protocol};

impl VmTask {
    /// What the health check asks while the guest runs here.
    pub(super) fn health_target(&self, snapshot: &Snapshot) -> Option<Target> {
        self.running.filter(|_| self.incoming.is_none())?;
        let check = snapshot.vms.get(&self.vm)?.spec.check.as_ref()?;
        let ip = snapshot.placements.get(&self.vm)?.nics.first()?.ip;
        Some(Target {
            address: std::net::SocketAddr::new(ip.into(), check.port),
            http_path: (check.mode == Protocol::Http).then(|| check.path.clone()),
            interval: check.interval.duration(),
            timeout: check.timeout.duration(),
        })
    }

    pub(super) fn health(&mut self, Health { state: ready, answered }: Health) {
        if self.running.is_none() {
            return;
        }
        if answered || ready == Some(false) {
            self.unproven = false;
        }
        if ready == self.ready {
            return;
        }
        self.ready = ready;
        if ready == Some(true) {
            let now = (self.parts.wall_ms)();
            self.ready_ms.get_or_insert(now);
            self.ready_since_ms = Some(now);
        }
    }
}
