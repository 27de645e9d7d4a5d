//! The seam to whatever switches a host's power, and the choice between the drivers.

use super::{fence_agent::FenceAgent, redfish::Redfish};
use async_trait::async_trait;
use haven_model::{PowerKind, PowerProblem, PowerSpec, PowerState};

/// Switches power. Passwords in the spec are in the clear here.
#[async_trait]
pub trait PowerDriver: Send + Sync {
    /// Reads it, and touches nothing.
    ///
    /// # Errors
    /// With what is wrong and what to do.
    async fn state(&self, power: &PowerSpec) -> Result<PowerState, PowerProblem>;
    /// Switches it off; returns when it was read back as off.
    ///
    /// # Errors
    /// With what is wrong and what to do; whether the host has power is not known then.
    async fn off(&self, power: &PowerSpec) -> Result<(), PowerProblem>;
}

/// Every driver; the spec says which is asked.
#[derive(Default)]
pub struct Drivers {
    redfish: Redfish,
    agent: FenceAgent,
}

impl Drivers {
    fn of(&self, power: &PowerSpec) -> &dyn PowerDriver {
        match power.driver {
            PowerKind::Redfish => &self.redfish,
            PowerKind::Agent => &self.agent,
        }
    }
}

#[async_trait]
impl PowerDriver for Drivers {
    async fn state(&self, power: &PowerSpec) -> Result<PowerState, PowerProblem> {
        self.of(power).state(power).await
    }
    async fn off(&self, power: &PowerSpec) -> Result<(), PowerProblem> {
        self.of(power).off(power).await
    }
}
