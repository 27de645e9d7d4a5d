//! What a former session left on this host, and its end.

use super::lease::Remains;
use crate::{guard::Guard, vm::driver::VmDriver};
use async_trait::async_trait;
use std::sync::Arc;

/// The VMs of this host, as its driver and its guard see them.
pub struct HostRemains {
    /// The guard of this host.
    pub guard: Arc<dyn Guard>,
    /// What runs VMs here.
    pub vms: Arc<dyn VmDriver>,
}

#[async_trait]
impl Remains for HostRemains {
    async fn cleared(&self) -> bool {
        let Ok(list) = self.vms.list().await else {
            return false;
        };
        for vm in list {
            if let Err(error) = self.vms.kill(&vm.vm).await {
                tracing::error!(
                    error = &error as &dyn std::error::Error,
                    "a VM of an earlier session does not end"
                );
                return false;
            }
        }
        self.guard.status().await.is_ok_and(|status| status.live == 0)
    }
}
