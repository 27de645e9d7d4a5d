//! Canary: a few new members beside the old ones get a part of the traffic. Once they have all been ready for long
//! enough, or a person promotes, the rest is replaced as a rolling update.
//!
//! Until then the old ones stay as many as are wanted. New members that are not ready get nothing.

use super::rollout::{Old, Rollout, Stage, counted};

pub(super) fn stage(rollout: &Rollout<'_>) -> Stage {
    let spec = rollout.service.spec.update.canary.clone().unwrap_or_default();
    let first = (spec.members as usize).min(rollout.wanted());
    let ready = rollout.current().filter(|m| m.ready).count();
    let new = counted(first, "new member");
    let begun = rollout.share().is_some_and(|percent| percent > 0);
    let mut stage = Stage {
        new: first,
        share: Some(0),
        old: Old::Held,
        release: false,
        promotable: ready >= first,
        until_ms: None,
        step: format!("canary: {ready} of {new} ready; the old ones get all traffic"),
    };
    // One that fails its check for a moment keeps its share; the balancer's own checks take it out meanwhile.
    if ready < first && !(begun && rollout.current().any(|m| m.serves)) {
        return stage;
    }
    stage.share = Some(spec.weight);
    let gets = match rollout.frontend {
        Some(_) => format!("{new} with {} % of the traffic", spec.weight),
        None => format!("{new} beside the old ones"),
    };
    let goes_on = match spec.hold {
        Some(hold) => format!("the rest follows when they have been ready for {hold}"),
        None => format!("`haven service promote {}` replaces the rest", rollout.name),
    };
    stage.step = format!("canary: {gets}, {ready} of them ready; {goes_on}");
    let given = rollout.share().is_none_or(|percent| percent == spec.weight);
    if let Some(hold) = spec.hold.filter(|_| ready >= first && given) {
        let since = rollout.current().filter_map(|m| m.ready_since_ms).max();
        let until = since.unwrap_or(rollout.now_ms).saturating_add_unsigned(hold.0);
        stage.release = rollout.now_ms >= until;
        stage.until_ms = Some(until);
    }
    stage
}
