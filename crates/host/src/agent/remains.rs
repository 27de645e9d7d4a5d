//! What a former session left on this host, and its end.

use super::lease::Remains;
use crate::{guard::Guard, vm::driver::VmDriver};
use async_trait::async_trait;
use std::{sync::Arc, time::Duration};

/// A process that was signalled is mostly gone within milliseconds. So long, and so often, this waits for it; what
/// takes longer is asked for again.
const GOING: (Duration, u32) = (Duration::from_millis(5), 20);

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
        for _ in 0..GOING.1 {
            match self.vms.kill_all() {
                Ok(0) => return self.guard.status().await.is_ok_and(|status| status.live == 0),
                Ok(_) => tokio::time::sleep(GOING.0).await,
                Err(error) => {
                    tracing::error!(
                        error = &error as &dyn std::error::Error,
                        "what an earlier session left may not have ended"
                    );
                    return false;
                }
            }
        }
        false
    }
}
