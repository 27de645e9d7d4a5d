//! A balancer that only remembers, for the simulator.

use super::driver::{BalanceDriver, BalanceError, FrontendWanted};
use async_trait::async_trait;
use std::sync::{Mutex, PoisonError};

/// What was applied last.
#[derive(Default)]
pub struct FakeBalance(pub Mutex<Vec<FrontendWanted>>);

#[async_trait]
impl BalanceDriver for FakeBalance {
    async fn apply(&self, wanted: &[FrontendWanted]) -> Result<(), BalanceError> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = wanted.to_vec();
        Ok(())
    }
}
