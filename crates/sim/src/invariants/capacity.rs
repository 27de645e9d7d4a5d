//! Capacity: no host that gains a VM is promised more memory than it has.

use super::Invariant;
use crate::judge::{Facts, Step};
use haven_model::Placement;
use std::collections::BTreeMap;

pub(super) struct Capacity;

impl Invariant for Capacity {
    fn check(&mut self, facts: &Facts, step: &Step<'_>) -> Result<(), String> {
        let Step::Transaction(before) = step else { return Ok(()) };
        let snapshot = &facts.snapshot;
        let mut promised: BTreeMap<&str, u64> = BTreeMap::new();
        for (vm, placement) in &snapshot.placements {
            let memory = snapshot.vms.get(vm).map_or(0, |vm| vm.spec.memory.0);
            *promised.entry(placement.host.as_str()).or_default() += memory;
            if let Some(to) = &placement.moving_to {
                *promised.entry(to.host.as_str()).or_default() += memory;
            }
        }
        for (vm, placement) in &snapshot.placements {
            let on = |p: &Placement| p.moving_to.as_ref().map_or(&p.host, |to| &to.host).clone();
            let host = &on(placement);
            if before.placements.get(vm).is_some_and(|old| on(old) == *host || old.host == *host) {
                continue;
            }
            let has = snapshot.host_status.get(host).map_or(0, |status| status.memory.0);
            let kept = snapshot.hosts.get(host).map_or(0, |host| host.spec.reserved_memory.0);
            let used = promised.get(host.as_str()).copied().unwrap_or(0);
            if used + kept > has {
                return Err(format!(
                    "capacity: {host} is promised {used} of {has} bytes, {kept} kept"
                ));
            }
        }
        Ok(())
    }
}
