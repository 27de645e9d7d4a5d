//! The simulator's own promises: a seed reruns exactly, and a broken guard is found.

use crate::{
    cluster::Broken,
    faults::Fault,
    run,
    scenario::{self, Event, Expect, Scenario},
    shrink,
    steps::{AtStep, Blow},
    storm,
};
use haven_model::{MigrationPhase, RebalancePolicy};
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
    let all = [
        Broken::Deadlines,
        Broken::Switchover,
        Broken::Power,
        Broken::Comparisons,
        Broken::Threshold,
        Broken::Consent,
    ];
    for broken in all {
        let breaks = |seed: &u64| !run::seed(*seed, Some(broken)).unwrap().violations.is_empty();
        let first = (0..1000).find(breaks);
        println!("{broken:?} is found by seed {first:?}");
        assert!(first.is_some(), "{broken:?} is not found");
    }
}

/// A move of a VM with a disk of its own host, or of one without, and what befalls it at one step.
fn broken_move(step: AtStep, vm: &str, first: bool) -> Scenario {
    let vm = vm.to_owned();
    let migrate = if first { Fault::MigrateFirst } else { Fault::Migrate };
    Scenario {
        about: format!("{step:?}"),
        hosts: 4,
        witness: false,
        // One that resets what is paused would make a power cut of it.
        watchdog: step.blow != Blow::Pause,
        power_control: step.blow != Blow::Pause,
        clock_skew_percent: 1.0,
        rebalance: RebalancePolicy::Off,
        fencing: haven_model::ClusterSpec::default().fencing,
        manifest: storm::manifest(1, 2, 3),
        seeds: 1,
        events: vec![
            Event { at: 0.5, fault: Fault::AtStep(vm.clone(), step) },
            Event { at: 1.0, fault: migrate(vm, None) },
        ],
        lasts: 15,
        mend: true,
        empties: None,
        expect: Expect { converged: true, ..Expect::default() },
    }
}

#[test]
fn whatever_breaks_at_whatever_step_of_a_move_one_copy_runs() {
    let (mut runs, mut struck) = (0, 0);
    for (number, step) in (0..).zip(AtStep::all()) {
        for (vm, first) in [("db-1", false), ("db-2", false), ("db-1", true), ("db-2", true)] {
            if step.phase == MigrationPhase::Following && !first {
                continue;
            }
            let verdict = run::scenario(&broken_move(step, vm, first), number, None).unwrap();
            let text = verdict.transcript.join("\n");
            assert!(verdict.violations.is_empty(), "{step:?}: {:?}\n{text}", verdict.violations);
            runs += 1;
            struck += usize::from(text.matches("FAULT").count() > 2);
        }
    }
    println!("{runs} moves, {struck} of them struck at their step");
    assert!(struck * 100 >= runs * 95, "only {struck} of {runs} moves were struck");
}

#[test]
fn a_run_that_breaks_something_is_shrunk_to_the_faults_that_do_it() {
    let breaks = |seed: &u64| {
        let verdict = run::seed(*seed, Some(Broken::Deadlines)).unwrap();
        (!verdict.violations.is_empty()).then_some(verdict)
    };
    let verdict = (0..1000).find_map(|seed| breaks(&seed)).unwrap();
    let whole = storm::of(verdict.seed);
    let shrunk = shrink::shrink(&whole, &verdict, Some(Broken::Deadlines)).unwrap();
    let (was, is) = (whole.events.len(), shrunk.scenario.events.len());
    println!("{was} faults shrunk to {is}, in {} runs: {:?}", shrunk.tried, shrunk.scenario.events);
    assert!((1..was).contains(&is), "{was} faults, {is} of them left");
    // What is printed is a scenario as those in files are, and breaks the same.
    let text = serde_json::to_string(&shrunk.scenario).unwrap();
    let again: Scenario = serde_saphyr::from_str(&text).unwrap();
    assert_eq!(
        run::scenario(&again, verdict.seed, Some(Broken::Deadlines)).unwrap(),
        shrunk.verdict
    );
    // None of what is left can be left out.
    for gone in 0..is {
        let mut fewer = shrunk.scenario.clone();
        fewer.events.remove(gone);
        let rerun = run::scenario(&fewer, verdict.seed, Some(Broken::Deadlines)).unwrap();
        let kind = |what: &String| what.split(':').next().map(str::to_owned);
        let same = |what: &String| kind(what) == verdict.violations.first().and_then(kind);
        assert!(
            !rerun.violations.iter().any(same),
            "{:?} is not needed",
            shrunk.scenario.events[gone]
        );
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
