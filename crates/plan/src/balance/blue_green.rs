//! Blue-green: all new members beside the old ones, then all traffic to them at once. The old ones stay for a while
//! without traffic, so that going back is the same single step.

use super::rollout::{Old, Rollout, Stage, counted};
use haven_model::{service::Promote, units::Millis};

/// How long the old members stay after the switch.
const KEEP_OLD: Millis = Millis(30_000);

pub(super) fn stage(rollout: &Rollout<'_>) -> Stage {
    let update = &rollout.service.spec.update;
    let wanted = rollout.wanted();
    let ready = rollout.current().filter(|m| m.ready).count();
    let automatic = update.promote.unwrap_or_default() == Promote::Automatic;
    let let_in = rollout.is_let_in();
    // Back to members that were good: enough of them, or as many as are ready of those that have the traffic now.
    let serving = rollout.old().filter(|m| m.ready && !m.idle).count();
    let getting = serving + rollout.current().filter(|m| m.ready && !m.idle).count();
    let few = getting < rollout.floor() && ready >= serving;
    let back =
        rollout.is_released(&rollout.template) && ready > 0 && (ready >= rollout.floor() || few);
    let enough = ready >= wanted || back;
    let switched = match rollout.share() {
        Some(percent) => percent == 100,
        None => rollout.is_released(&rollout.template),
    };
    // When none of them is left, the old ones are better than none.
    let stays = switched && rollout.current().any(|m| m.serves);
    if stays || enough && (automatic || let_in) {
        return after(rollout, switched);
    }
    let new = counted(wanted, "new member");
    let goes_on = if automatic || let_in {
        "they get it at once when all are ready".to_owned()
    } else if enough {
        format!("`haven service promote {}` gives it to the new ones", rollout.name)
    } else {
        "a person promotes when all are ready".to_owned()
    };
    Stage {
        new: wanted,
        share: Some(0),
        old: Old::Held,
        release: false,
        promotable: enough,
        until_ms: None,
        step: format!(
            "blue-green: {ready} of {new} ready; the old ones get all traffic; {goes_on}"
        ),
    }
}

/// The traffic goes, or is to go, to the new members.
fn after(rollout: &Rollout<'_>, switched: bool) -> Stage {
    let keep = rollout.service.spec.update.keep_old.unwrap_or(KEEP_OLD);
    let since = rollout.current().filter_map(|m| m.released_ms).min();
    let until = since.map(|since| since.saturating_add_unsigned(keep.0));
    let over = switched && until.is_some_and(|until| rollout.now_ms >= until);
    let old = counted(rollout.old().count(), "old member");
    let step = if over {
        format!("blue-green: the new members have all traffic; {old} to go")
    } else {
        format!("blue-green: the new members have all traffic; {old} kept for {keep} to go back to")
    };
    Stage {
        new: rollout.wanted(),
        share: Some(100),
        old: if over { Old::Replaced } else { Old::Kept },
        release: switched || rollout.frontend.is_none(),
        promotable: false,
        until_ms: until.filter(|_| !over),
        step,
    }
}
