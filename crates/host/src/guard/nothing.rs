//! The guard of a host that runs nothing, a witness: it has nothing to end, and takes nothing under its watch.

use super::{Guard, GuardError, GuardStatus, Registration};
use async_trait::async_trait;
use std::sync::atomic::{AtomicU64, Ordering};

/// Keeps the deadline, as the lease asks for it.
#[derive(Debug, Default)]
pub struct NothingToGuard(AtomicU64);

#[async_trait]
impl Guard for NothingToGuard {
    async fn extend(&self, _session: u64, deadline_ns: u64) -> Result<(), GuardError> {
        self.0.fetch_max(deadline_ns, Ordering::AcqRel);
        Ok(())
    }
    async fn register(&self, start: &Registration<'_>) -> Result<(), GuardError> {
        Err(GuardError::Refused { vm: start.vm.to_owned(), why: "a witness runs no VM" })
    }
    async fn unregister(&self, _vm: &str) -> Result<(), GuardError> {
        Ok(())
    }
    async fn hold(&self, label: &str) -> Result<(), GuardError> {
        Err(GuardError::Refused { vm: label.to_owned(), why: "a witness holds no address" })
    }
    async fn release(&self, _label: &str) -> Result<(), GuardError> {
        Ok(())
    }
    async fn status(&self) -> Result<GuardStatus, GuardError> {
        Ok(GuardStatus { deadline_ns: self.0.load(Ordering::Acquire), live: 0, fired: 0 })
    }
    async fn replace(&self) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn it_keeps_the_furthest_deadline_and_takes_nothing_under_its_watch() {
        let guard = NothingToGuard::default();
        guard.extend(1, 7).await.expect("a deadline");
        guard.extend(1, 5).await.expect("an earlier one");
        assert_eq!(guard.status().await.expect("its state").deadline_ns, 7);
        let start = Registration { vm: "web", pid: 1, session: 1, tap: "hv1n0" };
        let why = guard.register(&start).await.expect_err("a VM");
        assert_eq!(why.to_string(), "the guard refuses to watch over web: a witness runs no VM");
        assert!(guard.hold("eth0:hv1").await.is_err());
    }
}
