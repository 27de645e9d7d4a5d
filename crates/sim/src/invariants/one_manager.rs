//! Terms only grow, each has one holder, and a lost session stays closed.

use super::Invariant;
use crate::judge::{Facts, Step};

pub(super) struct OneManager;

impl Invariant for OneManager {
    fn check(&mut self, facts: &Facts, step: &Step<'_>) -> Result<(), String> {
        let Step::Transaction(before) = step else { return Ok(()) };
        if let (Some(old), Some(new)) = (&before.manager, &facts.snapshot.manager) {
            let same = old.holder == new.holder && old.session == new.session;
            if new.term < old.term || (new.term == old.term && !same) {
                return Err(format!(
                    "one manager: {} in term {} followed {} in term {}",
                    new.holder, new.term, old.holder, old.term
                ));
            }
        }
        for (host, old) in &before.leases {
            let Some(new) = facts.snapshot.leases.get(host) else { continue };
            let reopened = old.closed && !new.closed && new.session <= old.session;
            if new.session < old.session || reopened {
                return Err(format!("one manager: session {} of {host} came back", new.session));
            }
        }
        Ok(())
    }
}
