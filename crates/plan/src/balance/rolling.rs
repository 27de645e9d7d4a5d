//! The rolling update: new members come within the surge, and old ones go as they are ready. Every other strategy ends
//! as one.

use super::rollout::{Old, Rollout, Stage};

pub(super) fn stage(rollout: &Rollout<'_>) -> Stage {
    let wanted = rollout.wanted();
    let ready = rollout.current().filter(|m| m.ready).count();
    let step = format!(
        "{ready} of {wanted} members are new and ready, {} old ones are left",
        rollout.old().count()
    );
    Stage {
        new: wanted,
        share: None,
        old: Old::Replaced,
        release: true,
        promotable: false,
        until_ms: None,
        step,
    }
}
