//! `haven-guard`: the guard of a host, which systemd runs beside `haven daemon`.
//!
//! A program of its own because every page of it is locked in memory
//! (`docs/decisions/0010-guard-is-its-own-program.md`). It has no runtime and takes no memory after its start.

use haven_host::guard::process::{GuardOptions, run};
use std::process::ExitCode;

const HELP: &str = "\
The guard of a host of Haven: ends this host's VMs and takes its service addresses away when its lease is not renewed.

systemd runs it (haven-guard.service); it takes no arguments.

Environment:
  HAVEN_RUN_DIR   where its socket and its state stand, a tmpfs [default: /run/haven]
  HAVEN_WATCHDOG  the watchdog device to feed, /dev/watchdog say [default: none]
";

fn main() -> ExitCode {
    if let Some(argument) = std::env::args().nth(1) {
        return match argument.as_str() {
            "-h" | "--help" => say(HELP),
            "-V" | "--version" => say(concat!("haven-guard ", env!("CARGO_PKG_VERSION"), "\n")),
            other => {
                eprintln!("error: `{other}` is not known\n  hint: the guard takes no arguments");
                ExitCode::from(2)
            }
        };
    }
    tracing_subscriber::fmt().with_ansi(false).with_writer(std::io::stderr).init();
    let run_dir = std::env::var_os("HAVEN_RUN_DIR").unwrap_or_else(|| "/run/haven".into());
    let watchdog = std::env::var_os("HAVEN_WATCHDOG").map(Into::into);
    match run(&GuardOptions { run_dir: run_dir.into(), watchdog }) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn say(text: &str) -> ExitCode {
    use std::io::Write;
    let _ = std::io::stdout().write_all(text.as_bytes());
    ExitCode::SUCCESS
}
