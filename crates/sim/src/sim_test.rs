//! The simulator's own promises: a seed reruns exactly, and a broken guard is found.

use crate::run;

#[test]
fn a_seed_reruns_exactly() {
    for seed in [1, 7] {
        let (first, second) = (run::seed(seed).unwrap(), run::seed(seed).unwrap());
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
        let verdict = run::seed(seed).unwrap();
        assert!(
            verdict.violations.is_empty(),
            "seed {seed}: {:?}\n{}",
            verdict.violations,
            verdict.transcript.join("\n")
        );
    }
}
