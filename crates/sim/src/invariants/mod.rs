//! The invariants of DESIGN.md section 3, as far as they apply so far; one file each.

mod balance;
mod capacity;
mod convergence;
mod epochs;
#[cfg(test)]
mod invariants_test;
mod one_manager;
mod one_runner;
mod order;
mod orphans;
mod proof;
mod reserve;
mod traffic;
mod wishes;

pub(crate) use convergence::{converged, drained};

use crate::judge::{Facts, Step};
use std::time::Duration;

/// Something that always holds.
pub trait Invariant: Send {
    /// Checks right after a step.
    ///
    /// # Errors
    /// What is broken, in words.
    fn check(&mut self, facts: &Facts, step: &Step<'_>) -> Result<(), String>;

    /// Checks when everything is well again and time enough has passed.
    ///
    /// # Errors
    /// What is broken, in words.
    fn at_end(&self, _facts: &Facts) -> Result<(), String> {
        Ok(())
    }
}

/// All of them. `grace`: how long a copy on a host that just woke may overlap.
#[must_use]
pub fn all(grace: Duration) -> Vec<Box<dyn Invariant>> {
    vec![
        Box::new(one_runner::OneRunner::new(grace)),
        Box::new(proof::Proof),
        Box::new(epochs::Epochs),
        Box::new(one_manager::OneManager),
        Box::new(capacity::Capacity),
        Box::new(reserve::Reserve::default()),
        Box::new(wishes::Wishes::default()),
        Box::new(order::Order::default()),
        Box::new(balance::Balance::default()),
        Box::new(convergence::Convergence),
        Box::new(orphans::Orphans),
        Box::new(traffic::Traffic::default()),
    ]
}
