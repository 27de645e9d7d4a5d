//! The simulator's own promises: a seed reruns exactly, and a broken guard is found.

use crate::{cluster::Broken, run, scenario};
use std::path::Path;

#[test]
fn a_seed_reruns_exactly() {
    for seed in [1, 7] {
        let (first, second) = (run::seed(seed, None).unwrap(), run::seed(seed, None).unwrap());
        assert!(first.steps > 100, "{} steps", first.steps);
        for (a, b) in first.transcript.iter().zip(&second.transcript) {
            assert_eq!(a, b, "seed {seed}");
        }
        assert_eq!(first, second);
    }
}

#[test]
fn some_seeds_break_nothing() {
    for seed in 0..20 {
        let verdict = run::seed(seed, None).unwrap();
        assert!(
            verdict.violations.is_empty(),
            "seed {seed}: {:?}\n{}",
            verdict.violations,
            verdict.transcript.join("\n")
        );
    }
}

/// How many of these seeds break an invariant, with something broken on purpose.
fn found(broken: Broken, seeds: std::ops::Range<u64>, invariant: &str) -> usize {
    seeds
        .filter(|seed| {
            let verdict = run::seed(*seed, Some(broken)).unwrap();
            verdict.violations.iter().any(|what| what.starts_with(invariant))
        })
        .count()
}

#[test]
fn deadlines_that_come_too_late_are_found() {
    let found = found(Broken::Deadlines, 0..40, "");
    assert!(found >= 3, "found in {found} of 40 seeds");
}

/// The same scenario that holds with records that state their own time.
#[test]
fn records_judged_by_the_timers_of_the_moment_are_found() {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/scenarios/timers-shortened.yaml");
    let scenario = scenario::read(Path::new(file)).unwrap();
    let broken = (0..scenario.seeds).filter(|seed| {
        let verdict = run::scenario(&scenario, *seed, Some(Broken::Timers)).unwrap();
        verdict.violations.iter().any(|what| what.starts_with("proof"))
    });
    assert!(broken.count() > 0);
}

/// How many seeds of a scenario break an invariant, with something broken on purpose.
fn found_in(file: &str, broken: Broken) -> bool {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("scenarios").join(file);
    let scenario = scenario::read(&path).unwrap();
    let breaks = |seed: &u64| {
        let verdict = run::scenario(&scenario, *seed, Some(broken)).unwrap();
        let safety = |what: &String| {
            ["one runner", "proof", "disks"].iter().any(|name| what.starts_with(name))
        };
        verdict.violations.iter().any(safety)
    };
    // None of a thousand seeds may be needed to the end; how many are is a matter of chance.
    let first = (0..1000).find(breaks);
    println!("{broken:?} is found by seed {first:?} of {file}");
    first.is_some()
}

#[test]
fn hosts_that_take_silence_for_a_promise_are_found() {
    assert!(found_in("host-cut-off.yaml", Broken::Silence));
}

#[test]
fn daemons_that_forget_their_promises_are_found() {
    assert!(found_in("store-frozen-for-long.yaml", Broken::Promises));
}

#[test]
fn a_guest_that_writes_to_the_disk_that_it_left_is_found() {
    assert!(found_in("disk-goes-along.yaml", Broken::Disks));
}

/// Each breaks one rule on which it rests that nothing runs twice. None of a thousand seeds may be needed to the end.
#[test]
fn whatever_breaks_a_rule_is_found() {
    for broken in [Broken::Deadlines, Broken::Switchover, Broken::Power, Broken::Comparisons] {
        let breaks = |seed: &u64| !run::seed(*seed, Some(broken)).unwrap().violations.is_empty();
        let first = (0..1000).find(breaks);
        println!("{broken:?} is found by seed {first:?}");
        assert!(first.is_some(), "{broken:?} is not found");
    }
}

#[test]
fn guards_that_leave_addresses_where_they_are_are_found() {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/scenarios/daemon-hangs.yaml");
    let scenario = scenario::read(Path::new(file)).unwrap();
    let verdict = run::scenario(&scenario, 0, Some(Broken::Addresses)).unwrap();
    let answers = |what: &String| what.contains("was closed while it answers for 10.88.0.100");
    assert!(verdict.violations.iter().any(answers), "{:?}", verdict.violations);
}

#[test]
fn every_scenario_holds() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("scenarios");
    let mut count = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let scenario = scenario::read(&path).unwrap();
        for seed in 0..scenario.seeds {
            let verdict = run::scenario(&scenario, seed, None).unwrap();
            assert!(
                verdict.violations.is_empty(),
                "{} seed {seed}: {:?}\n{}",
                path.display(),
                verdict.violations,
                verdict.transcript.join("\n")
            );
        }
        count += 1;
    }
    assert!(count >= 8, "{count} scenarios");
}
