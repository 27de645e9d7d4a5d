//! Whether a guest hangs: counts how long it has given no sign of life. Synchronous; what is seen is passed in.

use crate::vm::driver::Signs;
use haven_model::vm::{HangSpec, KEEPS_HANGING, Sign};
use std::time::Duration;

/// A guest that was reset because it hung, and has not answered since, hangs again after so long at the least: it may
/// boot so long.
pub const BOOTS: Duration = Duration::from_secs(300);

/// What is seen at one look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Look {
    /// As its driver tells.
    pub signs: Signs,
    /// Its health check passes.
    pub well: bool,
    /// How long after the look before; no longer than such a pause should be, so that a daemon that was held up itself
    /// blames no guest.
    pub passed: Duration,
}

/// Judges one run of one guest.
#[derive(Clone, Debug, Default)]
pub struct Judge {
    /// It hung in the run before this one.
    again: bool,
    /// Its agent or its check has answered.
    heard: bool,
    quiet: Duration,
    counted: Option<(u64, u64)>,
}

impl Judge {
    /// Of a run whose agent or check has answered already, or not, after a run that hung, or not.
    #[must_use]
    pub fn new(heard: bool, again: bool) -> Self {
        Self { again, heard, ..Self::default() }
    }

    /// Its agent or its check has answered.
    #[must_use]
    pub fn heard(&self) -> bool {
        self.heard
    }

    /// Takes one look; true when the guest hangs.
    pub fn look(&mut self, spec: &HangSpec, look: &Look) -> bool {
        let asked = |sign| spec.signs.contains(&sign);
        let Signs { agent, disk, network } = look.signs;
        let heard = asked(Sign::Agent) && agent || asked(Sign::Check) && look.well;
        let (disk_before, network_before) = self.counted.replace((disk, network)).unzip();
        // Less than before is another machine's count: a sign, too.
        let moved =
            |sign, now: u64, before: Option<u64>| asked(sign) && before.is_some_and(|b| b != now);
        let lives = heard
            || moved(Sign::Disk, disk, disk_before)
            || moved(Sign::Network, network, network_before);
        self.heard |= heard;
        self.quiet = if lives { Duration::ZERO } else { self.quiet + look.passed };
        let after = spec.after.duration();
        match (self.heard, self.again) {
            (true, _) => self.quiet >= after,
            (false, true) => self.quiet >= after.max(BOOTS),
            (false, false) => false,
        }
    }
}

/// A guest that has not hung again for so long is as good as one that never did.
const FORGOTTEN: Duration = Duration::from_secs(3600);

/// How many hangs still count of a guest that runs well, so long after the last one: it is reset before it is ended
/// again.
#[must_use]
pub fn remembered(hung: u32, since: Duration) -> u32 {
    hung.min(if since >= FORGOTTEN { 0 } else { KEEPS_HANGING - 1 })
}

/// What it did not do, for people.
#[must_use]
pub fn words(spec: &HangSpec) -> String {
    let what = spec.signs.iter().map(|sign| match sign {
        Sign::Agent => "its guest agent did not answer",
        Sign::Check => "its health check failed",
        Sign::Disk => "it used no disk",
        Sign::Network => "it sent nothing",
    });
    let what: Vec<&str> = what.collect();
    let all = match what.split_last() {
        Some((last, [])) => (*last).to_owned(),
        Some((last, others)) => format!("{} and {last}", others.join(", ")),
        None => String::new(),
    };
    format!("for {} {all}", spec.after)
}

#[cfg(test)]
mod tests {
    use super::{BOOTS, FORGOTTEN, Judge, Look, remembered, words};
    use crate::vm::driver::Signs;
    use haven_model::{
        units::Millis,
        vm::{HangSpec, Sign},
    };
    use std::time::Duration;

    fn spec(signs: &[Sign]) -> HangSpec {
        HangSpec { after: Millis(60_000), signs: signs.iter().copied().collect() }
    }

    fn look(agent: bool, well: bool, disk: u64, network: u64) -> Look {
        Look { signs: Signs { agent, disk, network }, well, passed: Duration::from_secs(10) }
    }

    /// After how many looks of the same kind it hangs, if within an hour.
    fn hangs(judge: &mut Judge, spec: &HangSpec, one: impl Fn(u64) -> Look) -> Option<u64> {
        (1..=360).find(|i| judge.look(spec, &one(*i)))
    }

    #[test]
    fn a_guest_that_was_heard_and_gives_no_sign_hangs() {
        let all = spec(&[Sign::Agent, Sign::Disk, Sign::Network]);
        let mut judge = Judge::new(false, false);
        assert!(!judge.look(&all, &look(true, false, 5, 5)));
        assert_eq!(hangs(&mut judge, &all, |_| look(false, false, 5, 5)), Some(6));
    }

    #[test]
    fn any_sign_that_is_asked_for_shows_life_and_others_do_not() {
        for (sign, one) in [
            (Sign::Agent, Box::new(|_| look(true, false, 0, 0)) as Box<dyn Fn(u64) -> Look>),
            (Sign::Check, Box::new(|_| look(false, true, 0, 0))),
            (Sign::Disk, Box::new(|i| look(false, false, i, 0))),
            (Sign::Network, Box::new(|i| look(false, false, 0, i))),
        ] {
            let first = look(true, true, 0, 0);
            let with = spec(&[Sign::Agent, Sign::Check, sign]);
            let mut judge = Judge::new(false, false);
            judge.look(&with, &first);
            assert_eq!(hangs(&mut judge, &with, &one), None, "{sign:?}");
            let other = if sign == Sign::Agent { Sign::Check } else { Sign::Agent };
            let without = spec(&[other]);
            let mut judge = Judge::new(false, false);
            judge.look(&without, &first);
            assert_eq!(hangs(&mut judge, &without, &one), Some(6), "{sign:?}");
        }
    }

    #[test]
    fn a_guest_that_was_never_heard_is_left_alone_unless_it_hung_before() {
        let all = spec(&[Sign::Agent, Sign::Disk]);
        assert_eq!(hangs(&mut Judge::new(false, false), &all, |_| look(false, false, 0, 0)), None);
        let looks = BOOTS.as_secs() / 10;
        assert_eq!(
            hangs(&mut Judge::new(false, true), &all, |_| look(false, false, 0, 0)),
            Some(looks)
        );
        assert_eq!(
            hangs(&mut Judge::new(false, true), &all, |i| look(false, false, i, 0)),
            None,
            "it boots"
        );
    }

    #[test]
    fn what_was_heard_of_it_before_counts() {
        let agent = spec(&[Sign::Agent]);
        let mut judge = Judge::new(true, false);
        assert!(judge.heard());
        assert_eq!(hangs(&mut judge, &agent, |_| look(false, false, 0, 0)), Some(6));
    }

    #[test]
    fn what_runs_well_is_forgiven_in_time() {
        let (soon, late) = (FORGOTTEN - Duration::from_secs(1), FORGOTTEN);
        assert_eq!([0, 1, 2, 5].map(|hung| remembered(hung, soon)), [0, 1, 1, 1]);
        assert_eq!([0, 1, 2, 5].map(|hung| remembered(hung, late)), [0; 4]);
    }

    #[test]
    fn words_name_what_was_asked_for() {
        assert_eq!(words(&spec(&[Sign::Check])), "for 1m its health check failed");
        assert_eq!(
            words(&spec(&[Sign::Agent, Sign::Disk, Sign::Network])),
            "for 1m its guest agent did not answer, it used no disk and it sent nothing"
        );
    }
}
