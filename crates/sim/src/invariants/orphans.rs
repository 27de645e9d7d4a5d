//! No orphan: nothing runs and nothing is promised that nothing in the store names.

use super::Invariant;
use crate::judge::{Facts, Step};

pub(super) struct Orphans;

impl Invariant for Orphans {
    fn check(&mut self, _facts: &Facts, _step: &Step<'_>) -> Result<(), String> {
        Ok(())
    }

    fn at_end(&self, facts: &Facts) -> Result<(), String> {
        let snapshot = &facts.snapshot;
        for (host, vm) in facts.running.keys() {
            let owner = snapshot.placements.get(vm.as_str()).map(|p| p.host.as_str());
            if owner != Some(host) {
                return Err(format!("orphans: {vm} runs on {host}, and its owner is {owner:?}"));
            }
        }
        for vm in snapshot.placements.keys().chain(snapshot.vm_status.keys()) {
            if !snapshot.vms.contains_key(vm) {
                return Err(format!("orphans: a record of {vm} is left, and there is no such VM"));
            }
        }
        for service in snapshot.frontends.keys() {
            if !snapshot.services.contains_key(service) {
                return Err(format!("orphans: the address of service {service} is still placed"));
            }
        }
        Ok(())
    }
}
