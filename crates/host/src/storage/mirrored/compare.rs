//! Which pieces of replicas really differ, while a guest may be writing to them. Synchronous and pure.
//!
//! A write reaches one replica before the other, so pieces differ for moments. One that differs and stays exactly as it is on both
//! for longer than a write can be under way is not being written: it does differ.

use super::pieces::Hash;
use haven_model::Name;
use haven_store::clock::Mono;
use std::{collections::BTreeMap, time::Duration};

/// Longer than a write is under way: whoever is silent for a second is cut off.
pub const STANDS: Duration = Duration::from_millis(2_500);

/// A piece that differs somewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Seen {
    mine: Hash,
    others: BTreeMap<Name, Hash>,
    since: Mono,
}

/// A piece that does differ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Differing {
    /// Its number.
    pub piece: u64,
    /// Where.
    pub on: Vec<Name>,
    /// There are two others at least, and all of them are the same.
    pub alone: bool,
}

/// Pieces that are being compared.
#[derive(Debug, Default)]
pub struct Comparison {
    open: BTreeMap<u64, Seen>,
}

impl Comparison {
    /// A look at pieces from number `from` on, on this host and on others; those that have come out as different.
    pub fn look(
        &mut self,
        now: Mono,
        from: u64,
        mine: &[Hash],
        others: &BTreeMap<Name, Vec<Hash>>,
    ) -> Vec<Differing> {
        let mut found = Vec::new();
        for (number, mine) in (from..).zip(mine) {
            let at = usize::try_from(number - from).unwrap_or(usize::MAX);
            let there: BTreeMap<Name, Hash> = others
                .iter()
                .filter_map(|(host, all)| Some((host.clone(), *all.get(at)?)))
                .collect();
            if there.values().all(|other| other == mine) {
                self.open.remove(&number);
                continue;
            }
            let seen = Seen { mine: *mine, others: there, since: now };
            let before = self.open.get(&number);
            let Some(stood) = before.filter(|b| (b.mine, &b.others) == (seen.mine, &seen.others))
            else {
                self.open.insert(number, seen);
                continue;
            };
            if now.since(stood.since) < STANDS {
                continue;
            }
            self.open.remove(&number);
            let mut all = seen.others.values();
            let first = all.next();
            let on = seen.others.iter().filter(|(_, other)| *other != mine);
            found.push(Differing {
                piece: number,
                on: on.map(|(host, _)| host.clone()).collect(),
                alone: seen.others.len() > 1
                    && first != Some(mine)
                    && all.all(|other| Some(other) == first),
            });
        }
        found
    }

    /// Whether something is yet to be looked at.
    #[must_use]
    pub fn is_open(&self) -> bool {
        !self.open.is_empty()
    }

    /// What is left changes all the time, so it is written everywhere all the time.
    pub fn leave(&mut self) {
        self.open.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::{Comparison, Differing, STANDS};
    use haven_model::Name;
    use haven_store::clock::Mono;
    use std::{collections::BTreeMap, time::Duration};

    fn name(text: &str) -> Name {
        Name::new(text).unwrap()
    }

    fn others(all: &[(&str, [u8; 2])]) -> BTreeMap<Name, Vec<[u8; 32]>> {
        let of = |two: &[u8; 2]| two.iter().map(|byte| [*byte; 32]).collect();
        all.iter().map(|(host, two)| (name(host), of(two))).collect()
    }

    const BEGIN: Mono = Mono(1_000_000_000);

    fn after(ms: u64) -> Mono {
        BEGIN.plus(Duration::from_millis(ms))
    }

    #[test]
    fn what_differs_for_a_moment_does_not_differ() {
        let mut comparison = Comparison::default();
        let mine = [[1; 32], [2; 32]];
        let behind = others(&[("host2", [1, 1])]);
        assert!(comparison.look(BEGIN, 8, &mine, &behind).is_empty());
        assert!(comparison.is_open());
        // It is written again and again, and never stands.
        for second in 1..9 {
            let mine = [[1; 32], [2 + second; 32]];
            let found = comparison.look(after(u64::from(second) * 1_000), 8, &mine, &behind);
            assert!(found.is_empty(), "{found:?}");
        }
        let same = others(&[("host2", [1, 9])]);
        assert!(comparison.look(after(9_000), 8, &[[1; 32], [9; 32]], &same).is_empty());
        assert!(!comparison.is_open());
    }

    #[test]
    fn what_stands_and_differs_is_told_with_its_hosts() {
        let stands = u64::try_from(STANDS.as_millis()).unwrap();
        let mut comparison = Comparison::default();
        let mine = [[1; 32], [2; 32]];
        let there = others(&[("host2", [1, 3]), ("host3", [1, 2])]);
        assert!(comparison.look(BEGIN, 8, &mine, &there).is_empty());
        assert!(comparison.look(after(stands - 1), 8, &mine, &there).is_empty());
        let found = comparison.look(after(stands), 8, &mine, &there);
        assert_eq!(found, [Differing { piece: 9, on: vec![name("host2")], alone: false }]);
        assert!(!comparison.is_open());
    }

    #[test]
    fn one_that_differs_from_two_that_are_the_same_is_the_odd_one() {
        let mut comparison = Comparison::default();
        let mine = [[1; 32], [2; 32]];
        let there = others(&[("host2", [1, 3]), ("host3", [1, 3])]);
        comparison.look(BEGIN, 0, &mine, &there);
        let found = comparison.look(after(5_000), 0, &mine, &there);
        assert_eq!(found.len(), 1);
        assert!(found[0].alone && found[0].on.len() == 2, "{found:?}");
        // Three that all differ say nothing of each other.
        let there = others(&[("host2", [1, 3]), ("host3", [1, 4])]);
        comparison.look(BEGIN, 0, &mine, &there);
        assert!(!comparison.look(after(5_000), 0, &mine, &there)[0].alone);
    }
}
