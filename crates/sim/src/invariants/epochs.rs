//! Epochs only grow, and nothing is started but by the owner under its epoch.

use super::Invariant;
use crate::judge::{Facts, Step};
use haven_model::Handover;

pub(super) struct Epochs;

impl Invariant for Epochs {
    fn check(&mut self, facts: &Facts, step: &Step<'_>) -> Result<(), String> {
        match step {
            Step::Started { host, vm, epoch } => {
                let placement = facts.snapshot.placements.get(*vm);
                let owns = placement.is_some_and(|p| p.host.as_str() == *host && p.epoch == *epoch);
                // A copy that broke at its end runs on by itself: its host ends it, and the new owner waits for that.
                let broke = placement.is_some_and(|p| {
                    p.epoch == *epoch + 1
                        && p.moved_from.as_ref().is_some_and(|from| {
                            from.host.as_str() == *host
                                && facts.snapshot.handover(&crate::cluster::name(vm), from)
                                    == Handover::Pending
                        })
                });
                // Whose it is cannot be read since it began to start.
                let unread = format!("placement/vm/{vm}");
                if owns || broke || facts.snapshot.unreadable.contains_key(&unread) {
                    return Ok(());
                }
                let owner = placement.map(|p| format!("{} under {}", p.host, p.epoch));
                Err(format!(
                    "epochs: {host} started {vm} under {epoch}, and its owner is {}",
                    owner.unwrap_or_else(|| "nobody".into())
                ))
            }
            Step::Transaction(before) => {
                for (vm, placement) in &facts.snapshot.placements {
                    let Some(old) = before.placements.get(vm) else { continue };
                    let grew = placement.epoch > old.epoch;
                    if placement.epoch < old.epoch || (old.host != placement.host && !grew) {
                        return Err(format!(
                            "epochs: {vm} went from epoch {} to {}",
                            old.epoch, placement.epoch
                        ));
                    }
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }
}
