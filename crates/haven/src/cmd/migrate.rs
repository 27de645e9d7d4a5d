//! `haven vm migrate`: asks for a move, and shows how it comes on.

use super::reference;
use crate::{connect::connect, failure::Failure, out};
use clap::Args;
use haven_client::Client;
use haven_model::{
    Bytes, MigrationOptions, MigrationPhase, Name,
    api::{MigrationAsked, MigrationView},
    migration::Progress,
    object::Kind,
    units::Millis,
};
use indicatif::{ProgressBar, ProgressStyle};
use std::time::{Duration, Instant};

/// Between two looks.
const PAUSE: Duration = Duration::from_millis(200);

/// A move.
#[derive(Debug, Args)]
pub struct Move {
    /// The VM's name
    name: String,
    /// Where to; chosen by Haven when it is not given
    #[arg(long)]
    to: Option<String>,
    /// How long the guest may stand still for the last of its memory, milliseconds
    #[arg(long)]
    downtime: Option<u64>,
    /// Let it go over once all of its memory was sent once, and the rest follow: for a guest that writes faster than
    /// the network carries. Until all has come, the loss of either host costs it a restart
    #[arg(long)]
    postcopy: bool,
    /// Take the move back that is under way
    #[arg(long, conflicts_with_all = ["to", "downtime", "postcopy"])]
    cancel: bool,
    /// Ask for it, and do not wait for its end
    #[arg(long)]
    no_wait: bool,
    /// How long to wait for it, seconds
    #[arg(long, default_value_t = 600)]
    timeout: u64,
}

/// Runs it.
pub async fn run(wanted: Move) -> Result<(), Failure> {
    let vm = reference(Kind::Vm, &wanted.name)?.name;
    let client = connect().await?;
    if wanted.cancel {
        client.cancel_migration(vm.as_str()).await?;
        out::line(format_args!("the move of {vm} is taken back"));
        return Ok(());
    }
    let asked = MigrationAsked {
        to: wanted.to.as_deref().map(Name::new).transpose()?,
        options: MigrationOptions {
            downtime: wanted.downtime.map(Millis),
            postcopy: wanted.postcopy,
        },
    };
    let begun = client.migrate(vm.as_str(), &asked).await?;
    let Some(migration) = begun.migration.filter(|_| !wanted.no_wait) else {
        out::line(format_args!("{vm} is to move; `haven vm show {vm}` tells how it stands"));
        return Ok(());
    };
    follow(&client, &vm, &migration.id, Duration::from_secs(wanted.timeout)).await
}

/// Shows how a move comes on, until it has ended.
pub(super) async fn follow(
    client: &Client,
    vm: &Name,
    id: &str,
    patience: Duration,
) -> Result<(), Failure> {
    let begin = Instant::now();
    let bar = bar();
    let mut said = String::new();
    loop {
        let view = client.migration(vm.as_str()).await?;
        match view.migration.as_ref().filter(|migration| migration.id == id) {
            // The daemon that answers may not have seen it yet.
            None if begin.elapsed() < Duration::from_secs(5) => {}
            None => {
                return Err(Failure::failed(
                    format!("{vm}: somebody else asked for another move"),
                    "`haven vm show` tells how it stands",
                ));
            }
            Some(migration) => {
                if let Some(outcome) = &migration.outcome {
                    bar.finish_and_clear();
                    return ended(&outcome.message, outcome.moved, vm, begin.elapsed());
                }
            }
        }
        show(&bar, &view, &mut said);
        if begin.elapsed() > patience {
            bar.finish_and_clear();
            let seconds = patience.as_secs();
            return Err(Failure::failed(
                format!("{vm} has not moved after {seconds} s: {}", at(&view)),
                format!("it goes on; `haven vm migrate {vm} --cancel` takes it back"),
            ));
        }
        tokio::time::sleep(PAUSE).await;
    }
}

fn ended(message: &str, moved: bool, vm: &Name, took: Duration) -> Result<(), Failure> {
    if moved {
        out::line(format_args!("{message} ({:.1} s in all)", took.as_secs_f64()));
        return Ok(());
    }
    Err(Failure::failed(message, format!("`haven explain vm/{vm}` tells how it stands")))
}

/// In words, what a move is at.
fn at(view: &MigrationView) -> String {
    let phase = |told: &Option<haven_model::MigrationStatus>| told.as_ref().map(|told| told.phase);
    let progress = view.source.as_ref().and_then(|told| told.progress).unwrap_or_default();
    match (phase(&view.source), phase(&view.target)) {
        (Some(MigrationPhase::Copying), _) if progress.disk_total > 0 => {
            "its disks are copied".into()
        }
        (Some(MigrationPhase::Copying), _) => "its memory is copied".into(),
        (Some(MigrationPhase::Stopped | MigrationPhase::HandedOver), _) => {
            "it is handed over".into()
        }
        (Some(MigrationPhase::Following), _) => "it runs there, and its memory follows".into(),
        (_, Some(MigrationPhase::Preparing)) => "the other host makes ready".into(),
        _ => view.waiting.clone().unwrap_or_else(|| "it is about to begin".into()),
    }
}

fn show(bar: &ProgressBar, view: &MigrationView, said: &mut String) {
    let now = at(view);
    if bar.is_hidden() {
        // Not a terminal: a line for each step.
        if now != *said {
            out::line(&now);
            *said = now;
        }
        return;
    }
    let progress = view.source.as_ref().and_then(|told| told.progress);
    match progress.filter(|progress| progress.total + progress.disk_total > 0) {
        Some(progress) if progress.disk_total > 0 => {
            bar.set_length(progress.disk_total);
            bar.set_position(progress.disk_total.saturating_sub(progress.disk_left));
            bar.set_message(format!("{now}: {} left", mib(progress.disk_left)));
        }
        Some(progress) => {
            bar.set_length(progress.total);
            bar.set_position(progress.total.saturating_sub(progress.left));
            bar.set_message(format!("{now}: {}", figures(&progress)));
        }
        None => bar.set_message(now),
    }
}

fn mib(bytes: u64) -> Bytes {
    Bytes::mib(bytes >> 20)
}

/// What is left, how fast it goes, and when it is expected to end.
fn figures(progress: &Progress) -> String {
    let left = mib(progress.left);
    if progress.rate == 0 {
        return format!("{left} left");
    }
    let seconds = progress.left / progress.rate;
    format!(
        "{left} left, {} per second, about {seconds} s, round {}",
        mib(progress.rate),
        progress.rounds.max(1)
    )
}

/// A bar with what it is at behind it.
pub(super) fn bar() -> ProgressBar {
    let bar = ProgressBar::new(0);
    if let Ok(style) = ProgressStyle::with_template("  [{bar:24}] {msg}") {
        bar.set_style(style.progress_chars("=> "));
    }
    bar
}

#[cfg(test)]
mod tests {
    use super::{at, figures};
    use haven_model::{MigrationPhase, MigrationStatus, api::MigrationView, migration::Progress};

    #[test]
    fn a_move_is_told_in_words_and_figures() {
        let told = |phase| {
            let (progress, machine, message) = (None, None, String::new());
            Some(MigrationStatus {
                attempt: 1,
                session: 1,
                phase,
                progress,
                machine,
                ports: false,
                heard: None,
                message,
            })
        };
        let mut view =
            MigrationView { waiting: Some("waiting: no room".into()), ..Default::default() };
        assert_eq!(at(&view), "waiting: no room");
        view.target = told(MigrationPhase::Preparing);
        assert_eq!(at(&view), "the other host makes ready");
        view.source = told(MigrationPhase::Copying);
        assert_eq!(at(&view), "its memory is copied");
        let disks = Progress { disk_total: 8, disk_left: 4, ..Progress::default() };
        view.source.as_mut().unwrap().progress = Some(disks);
        assert_eq!(at(&view), "its disks are copied");
        view.source = told(MigrationPhase::Following);
        assert_eq!(at(&view), "it runs there, and its memory follows");
        view.source = told(MigrationPhase::Stopped);
        assert_eq!(at(&view), "it is handed over");
        let left = 1 << 30;
        let mut progress = Progress { total: 4 << 30, left, ..Progress::default() };
        assert_eq!(figures(&progress), "1GiB left");
        (progress.rate, progress.rounds) = (128 << 20, 2);
        assert_eq!(figures(&progress), "1GiB left, 128MiB per second, about 8 s, round 2");
    }
}
