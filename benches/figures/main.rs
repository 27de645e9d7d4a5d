//! The figures that Haven claims, measured from outside on a lab with real parts.
//! `cargo test -p haven --test figures -- NAME [RUNS]`

mod address;
mod answer;
mod backup;
mod create;
mod failover;
mod idle;
mod migrate;
mod mirrored;
mod powered_off;
mod rolling;
mod sample;
mod storage_fenced;

use anyhow::{Result, bail};
use haven_lab::drive::Driver;
use std::path::PathBuf;

/// Runs where nothing else is said; the issue asks for at least ten.
const RUNS: usize = 10;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let runs = args.get(1).and_then(|text| text.parse().ok()).unwrap_or(RUNS);
    let dir = std::env::var("HAVEN_LAB_DIR").unwrap_or_else(|_| "/tmp/haven-figures-lab".into());
    let lab = Driver::new(PathBuf::from(env!("CARGO_BIN_EXE_haven")), PathBuf::from(dir), 3)?;
    let figure: fn(&Driver, usize) -> Result<()> = match args.first().map(String::as_str) {
        Some("failover") => failover::run,
        Some("answer") => answer::run,
        Some("address") => address::run,
        Some("backup") => backup::run,
        Some("create") => create::run,
        Some("rolling") => rolling::run,
        Some("idle") => idle::run,
        Some("migrate") => migrate::run,
        Some("mirrored") => mirrored::run,
        Some("powered-off") => powered_off::run,
        Some("storage-fenced") => storage_fenced::run,
        _ => bail!(
            "which figure? failover, powered-off, storage-fenced, answer, address, create, rolling, idle, migrate, mirrored or backup"
        ),
    };
    lab.haven(&["lab", "down"])?;
    // Only where it is the proof that is measured: it would be the quicker one everywhere.
    let bare =
        (args.first().map(String::as_str) != Some("powered-off")).then_some("--no-power-control");
    lab.haven(&[&["lab", "up"][..], bare.as_slice()].concat())?;
    // Small hosts, of which one is lost on purpose.
    lab.admission(haven_model::AdmissionPolicy::Warn)?;
    println!("{}", machine());
    let result = figure(&lab, runs);
    if let Err(why) = &result {
        println!("{why:#}\n{}", lab.report());
    }
    lab.haven(&["lab", "down"])?;
    result
}

/// What the figures were measured on.
fn machine() -> String {
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpu.lines().find_map(|line| line.strip_prefix("model name\t: ")).unwrap_or("?");
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    format!("machine: {cores} cores of {model}, QEMU without KVM, load {}", load.trim())
}
