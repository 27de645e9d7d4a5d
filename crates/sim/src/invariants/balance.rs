//! Balance: moves that only make loads even come one at a time, with time to measure between them, none of a VM that was
//! moved so a while ago, and none while VMs are still to be recovered.

use super::Invariant;
use crate::judge::{Facts, Step};
use haven_model::{Name, Snapshot};
use std::{collections::BTreeMap, time::Duration};

/// A plan may be so much older than its commit.
const OLD: Duration = Duration::from_secs(3);
/// A VM that was moved stays for so many times that over which is measured.
const STAYS: u32 = 12;

#[derive(Default)]
pub(super) struct Balance {
    /// When each VM was moved so, as long as it is there and nobody else has moved it since.
    moved: BTreeMap<Name, Duration>,
}

impl Invariant for Balance {
    fn check(&mut self, facts: &Facts, step: &Step<'_>) -> Result<(), String> {
        let Step::Transaction(before) = step else { return Ok(()) };
        let window = facts.snapshot.cluster_spec().rebalance_window.duration();
        let stands = |vm: &Name| facts.snapshot.migrations.get(vm).is_some_and(|m| m.balances);
        self.moved.retain(|vm, _| stands(vm));
        for (vm, migration) in facts.snapshot.migrations.iter().filter(|(_, m)| m.balances) {
            let old = before.migrations.get(vm);
            if old.is_some_and(|old| old.revision == migration.revision) {
                continue;
            }
            if migration.outcome.is_some() {
                self.moved.insert(vm.clone(), facts.now);
                continue;
            }
            let soon = |at: Option<&Duration>, rest: Duration| {
                at.is_some_and(|at| facts.now + OLD < *at + rest)
            };
            if soon(self.moved.values().max(), window) {
                return Err(format!("balance: {vm} moves right after another move for balance"));
            }
            if soon(self.moved.get(vm), window * STAYS) {
                return Err(format!("balance: {vm} was moved for balance a moment ago"));
            }
            if let Some(why) = busy(before, vm) {
                return Err(format!("balance: {vm} moves for balance while {why}"));
            }
        }
        Ok(())
    }
}

/// What matters more.
fn busy(snapshot: &Snapshot, but: &Name) -> Option<String> {
    let others = || snapshot.placements.iter().filter(|(vm, _)| *vm != but);
    let moves = others().find(|(_, p)| p.moving_to.is_some() || p.moved_from.is_some());
    if let Some((vm, _)) = moves.filter(|(vm, _)| {
        snapshot.migrations.get(*vm).is_some_and(|m| m.balances && m.outcome.is_none())
    }) {
        return Some(format!("{vm} does"));
    }
    let lost = others().find(|(_, p)| snapshot.leases.get(&p.host).is_some_and(|l| l.closed));
    lost.map(|(vm, p)| format!("{vm} is to be recovered from {}", p.host))
}
