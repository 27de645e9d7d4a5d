//! A balancer that only remembers, for the simulator.

use super::driver::{BalanceDriver, BalanceError, FrontendWanted, LeftOut};
use async_trait::async_trait;
use std::sync::{Mutex, PoisonError};

/// What was applied last.
#[derive(Default)]
pub struct FakeBalance(pub Mutex<Vec<FrontendWanted>>);

/// Those without a certificate that can be used.
fn left_out(wanted: &[FrontendWanted]) -> LeftOut {
    let why = |frontend: &FrontendWanted| {
        let tls = frontend.tls.as_ref()?;
        let why = tls.identity.as_ref().err()?.clone();
        let what = format!("certificate {}", tls.certificate);
        Some((frontend.service.clone(), BalanceError { what, why }))
    };
    wanted.iter().filter_map(why).collect()
}

#[async_trait]
impl BalanceDriver for FakeBalance {
    async fn apply(&self, wanted: &[FrontendWanted]) -> Result<LeftOut, BalanceError> {
        let left_out = left_out(wanted);
        let served = wanted.iter().filter(|frontend| !left_out.contains_key(&frontend.service));
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = served.cloned().collect();
        Ok(left_out)
    }
}
