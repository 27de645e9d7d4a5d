//! Scenario files: hosts, VMs, timed faults, and what is expected, in words that a person can read.

use crate::faults::Fault;
use anyhow::{Context, bail};
use haven_model::{ClusterSpec, ProofKind, RebalancePolicy};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// One scenario.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Scenario {
    /// What it shows, in a sentence.
    pub about: String,
    /// How many hosts.
    pub hosts: u8,
    /// The last of them is a witness: it votes, and runs nothing.
    #[serde(default)]
    pub witness: bool,
    /// Hosts are reset by a watchdog when they are paused.
    #[serde(default = "yes")]
    pub watchdog: bool,
    /// Hosts have a power controller.
    #[serde(default = "yes")]
    pub power_control: bool,
    /// Clocks run unevenly by up to so many percent, slower or faster.
    #[serde(default = "one_percent")]
    pub clock_skew_percent: f64,
    /// What becomes of loads that are uneven, measured over 10 s.
    #[serde(default = "off")]
    pub rebalance: RebalancePolicy,
    /// Which proofs suffice.
    #[serde(default = "usual")]
    pub fencing: Vec<ProofKind>,
    /// What is applied at the beginning, as a manifest.
    pub manifest: String,
    /// How many seeds it runs with.
    #[serde(default = "one")]
    pub seeds: u64,
    /// What happens when.
    pub events: Vec<Event>,
    /// How long it runs after the beginning, seconds.
    pub lasts: u64,
    /// Whether everything is mended before the end. Otherwise the end is judged as it is.
    #[serde(default)]
    pub mend: bool,
    /// After all was mended this host is drained, and gets back what it had.
    #[serde(default)]
    pub empties: Option<String>,
    /// What must be so at the end, beside the invariants.
    #[serde(default)]
    pub expect: Expect,
}

/// What happens at one time.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Event {
    /// Seconds after everything ran.
    pub at: f64,
    /// What.
    #[serde(rename = "do")]
    pub fault: Fault,
}

/// What must be so at the end.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Expect {
    /// All that is wanted runs.
    #[serde(default)]
    pub converged: bool,
    /// So many VMs execute.
    pub running: Option<usize>,
    /// These VMs execute, whatever others do.
    #[serde(default)]
    pub runs: Vec<String>,
    /// These hosts were restarted after the beginning, by plan.
    #[serde(default)]
    pub restarted: Vec<String>,
    /// A VM executes on each of these hosts.
    #[serde(default)]
    pub uses: Vec<String>,
    /// No VM was started after the first fault: what happened disturbed none.
    #[serde(default)]
    pub undisturbed: bool,
    /// Guests may have moved, and none was started anew.
    #[serde(default)]
    pub none_rebooted: bool,
    /// So many replicas of each mirrored disk counted all the time.
    pub counted: Option<usize>,
    /// Nothing is left on this host.
    pub drained: Option<String>,
    /// A VM that had to be recovered ran again within so many seconds of the first fault.
    pub recovered_within: Option<f64>,
}

fn yes() -> bool {
    true
}

fn off() -> RebalancePolicy {
    RebalancePolicy::Off
}

fn usual() -> Vec<ProofKind> {
    ClusterSpec::default().fencing
}

fn one() -> u64 {
    1
}

fn one_percent() -> f64 {
    1.0
}

/// Reads one.
///
/// # Errors
/// With file, line and column.
pub fn read(path: &Path) -> anyhow::Result<Scenario> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("{} cannot be read", path.display()))?;
    let scenario: Scenario = serde_saphyr::from_str(&text)
        .with_context(|| format!("{} is not a scenario", path.display()))?;
    if !(1..=9).contains(&scenario.hosts) {
        bail!("{}: a scenario has 1 to 9 hosts", path.display());
    }
    for event in &scenario.events {
        for host in event.fault.hosts() {
            let number = host.strip_prefix("host").and_then(|n| n.parse::<u8>().ok());
            if number.is_none_or(|n| n == 0 || n > scenario.hosts) {
                bail!("{}: there is no `{host}`", path.display());
            }
        }
    }
    Ok(scenario)
}
