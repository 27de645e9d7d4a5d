//! The reserve holds: when the loss of a host could be made up for, as `haven status` tells it, then all that it ran is
//! given to other hosts soon after it is proven lost.
//!
//! Judged by what comes of it, and only where nothing but power has failed so far: a hung manager or a cut network keeps
//! a promise waiting that memory alone would keep.

use super::Invariant;
use crate::{
    judge::{Facts, Step},
    net::Power,
};
use haven_model::{Name, Observations, Snapshot};
use haven_plan::tolerance::recovery::bound_by;
use std::time::Duration;

/// So soon: a plan and its commits take far less.
const SOON: Duration = Duration::from_secs(3);

struct Promise {
    host: Name,
    vms: Vec<Name>,
    until: Duration,
}

#[derive(Default)]
pub(super) struct Reserve {
    promises: Vec<Promise>,
}

impl Invariant for Reserve {
    fn check(&mut self, facts: &Facts, step: &Step<'_>) -> Result<(), String> {
        let before = match step {
            Step::Transaction(before) if !facts.disturbed => before,
            // One more that is lost, or one that is back, is another story.
            Step::Transaction(_) | Step::Power { .. } => {
                self.promises.clear();
                return Ok(());
            }
            _ => return Ok(()),
        };
        for (host, lease) in &facts.snapshot.leases {
            let closed = lease.closed && before.leases.get(host).is_some_and(|was| !was.closed);
            if closed && could_be_lost(facts, before, host) {
                let vms = before.placements.iter().filter(|(_, p)| p.host == *host);
                // Whose disk only that host has waits for it.
                let bound = |vm: &Name| {
                    let object = before.vms.get(vm);
                    object.is_some_and(|object| bound_by(before, object).is_some())
                };
                let vms = vms.map(|(vm, _)| vm.clone()).filter(|vm| !bound(vm)).collect();
                let until = facts.now + SOON;
                self.promises.push(Promise { host: host.clone(), vms, until });
            }
        }
        let due = self.promises.iter().filter(|promise| facts.now > promise.until);
        for Promise { host, vms, .. } in due {
            let waits = |vm: &&Name| {
                let wanted = facts.snapshot.vms.get(*vm);
                // One that is back and runs it again itself was not lost for long.
                wanted.is_some_and(|vm| vm.spec.running && !vm.meta.deleting)
                    && !facts.snapshot.session_open(host)
                    && facts.snapshot.placements.get(*vm).is_some_and(|p| p.host == *host)
            };
            if let Some(vm) = vms.iter().find(waits) {
                return Err(format!(
                    "reserve: one host could be lost, {host} was, and {vm} has no place elsewhere"
                ));
            }
        }
        Ok(())
    }
}

/// Whether the status said so, and no other host is missing.
fn could_be_lost(facts: &Facts, before: &Snapshot, host: &Name) -> bool {
    let others = facts.power.iter().filter(|(other, _)| other.as_str() != host.as_str());
    let well = |other: &String| facts.snapshot.session_open(&crate::cluster::name(other));
    others.into_iter().all(|(other, power)| *power == Power::On && well(other))
        && haven_plan::losses(before, &Observations::default()).vms > 0
}
