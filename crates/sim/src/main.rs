//! `haven-sim`: runs seeds or scenarios and says what was broken.

use anyhow::Context;
use clap::Parser;
use haven_sim::{
    cluster::Broken,
    run::{self, Verdict},
    scenario::{self, Scenario},
    shrink, storm,
};
use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

/// Whole clusters in virtual time, under random faults, with the invariants checked at every step
#[derive(Parser)]
#[command(
    after_help = "Examples:\n  haven-sim --seeds 1000\n  haven-sim --seeds 1 --first-seed 42 --transcript\n  haven-sim --scenario crates/sim/scenarios"
)]
struct Options {
    /// How many seeds
    #[arg(long, default_value_t = 100)]
    seeds: u64,
    /// The first of them
    #[arg(long, default_value_t = 0)]
    first_seed: u64,
    /// Run a scenario file, or all of a folder, instead of random seeds
    #[arg(long)]
    scenario: Option<PathBuf>,
    /// Break a part on purpose, to see that it is found
    #[arg(long = "break", value_enum)]
    broken: Option<Broken>,
    /// Do not look for fewer faults that break the same invariant
    #[arg(long)]
    whole: bool,
    /// Print the transcript also when nothing is broken
    #[arg(long)]
    transcript: bool,
}

#[derive(Default)]
struct Tally {
    runs: u64,
    steps: u64,
    failed: Vec<Verdict>,
}

fn main() -> anyhow::Result<ExitCode> {
    if std::env::var_os("RUST_LOG").is_some() {
        let filter = tracing_subscriber::EnvFilter::from_default_env();
        tracing_subscriber::fmt().with_env_filter(filter).without_time().init();
    }
    let options = Options::parse();
    let tally = match &options.scenario {
        Some(path) => scenarios(path, &options)?,
        None => seeds(&options)?,
    };
    println!(
        "{} seeds run, {} steps checked, {} violations",
        tally.runs,
        tally.steps,
        tally.failed.iter().map(|verdict| verdict.violations.len()).sum::<usize>()
    );
    Ok(if tally.failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Runs on all cores; each seed alone on one thread, so that it is the same run wherever it runs.
fn seeds(options: &Options) -> anyhow::Result<Tally> {
    let next = AtomicU64::new(options.first_seed);
    let end = options.first_seed + options.seeds;
    let (tally, stop) = (Mutex::new(Tally::default()), AtomicBool::new(false));
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|_| {
                scope.spawn(|| -> anyhow::Result<()> {
                    loop {
                        let seed = next.fetch_add(1, Ordering::Relaxed);
                        if seed >= end || stop.load(Ordering::Relaxed) {
                            return Ok(());
                        }
                        let verdict = run::seed(seed, options.broken)?;
                        let mut tally = tally.lock().unwrap_or_else(PoisonError::into_inner);
                        let rerun = format!(
                            "cargo run --release -p haven-sim -- --seeds 1 --first-seed {seed}"
                        );
                        count(&mut tally, &storm::of(seed), verdict, options, &rerun)?;
                        if tally.failed.len() >= 5 {
                            stop.store(true, Ordering::Relaxed);
                        }
                    }
                })
            })
            .collect();
        for worker in workers {
            worker
                .join()
                .map_err(|_| anyhow::anyhow!("a seed panicked; the message is above"))??;
        }
        anyhow::Ok(())
    })?;
    tally.into_inner().context("a seed panicked")
}

fn scenarios(path: &Path, options: &Options) -> anyhow::Result<Tally> {
    let mut files = Vec::new();
    if path.is_dir() {
        for entry in std::fs::read_dir(path)? {
            files.push(entry?.path());
        }
        files.retain(|file| file.extension().is_some_and(|e| e == "yaml"));
        files.sort();
    } else {
        files.push(path.to_owned());
    }
    let mut tally = Tally::default();
    for file in files {
        let scenario = scenario::read(&file)?;
        let before = tally.failed.len();
        for seed in options.first_seed..options.first_seed + scenario.seeds {
            let verdict = run::scenario(&scenario, seed, options.broken)
                .with_context(|| format!("{} cannot be played", file.display()))?;
            let rerun = format!(
                "cargo run --release -p haven-sim -- --scenario {} --first-seed {seed}",
                file.display()
            );
            count(&mut tally, &scenario, verdict, options, &rerun)?;
        }
        let how = if tally.failed.len() == before { "holds" } else { "BROKEN" };
        println!("{how}  {}: {}", file.display(), scenario.about);
    }
    Ok(tally)
}

fn count(
    tally: &mut Tally,
    scenario: &Scenario,
    verdict: Verdict,
    options: &Options,
    rerun: &str,
) -> anyhow::Result<()> {
    tally.runs += 1;
    tally.steps += verdict.steps;
    let failed = !verdict.violations.is_empty();
    if failed || options.transcript {
        println!("--- seed {}", verdict.seed);
        verdict.transcript.iter().for_each(|line| println!("{line}"));
    }
    if !failed {
        return Ok(());
    }
    verdict.violations.iter().for_each(|what| println!("seed {}: {what}", verdict.seed));
    println!("again: {rerun}");
    if !options.whole {
        let shrunk = shrink::shrink(scenario, &verdict, options.broken)?;
        let (was, is) = (scenario.events.len(), shrunk.scenario.events.len());
        println!(
            "seed {} shrunk from {was} faults to {is}, in {} runs:",
            verdict.seed, shrunk.tried
        );
        for event in &shrunk.scenario.events {
            println!("  {:7.3} s  {:?}", event.at, event.fault);
        }
        shrunk.verdict.violations.iter().for_each(|what| println!("  {what}"));
        println!("as a scenario, to be played with --scenario FILE --first-seed {}:", verdict.seed);
        println!("{}", serde_json::to_string(&shrunk.scenario)?);
    }
    tally.failed.push(verdict);
    Ok(())
}
