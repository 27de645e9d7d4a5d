//! Hosts that are worked on, for people.

use super::table;
use haven_model::{
    api::MaintenanceView,
    maintenance::{Phase, Turn},
};
use std::fmt::Write;

fn word(phase: Phase) -> &'static str {
    match phase {
        Phase::Waiting => "waits for its turn",
        Phase::Draining => "is being emptied",
        Phase::Working => "is worked on",
        Phase::Settling => "must be well for a while",
        Phase::Returning => "gets back what had left",
        Phase::Done => "done",
    }
}

/// Each host with how far it is, and what it is at.
pub fn maintenance(view: &MaintenanceView) -> String {
    let Some(of) = &view.maintenance else {
        return "no host was ever restarted or upgraded by Haven\n".into();
    };
    let row = |turn: &Turn| vec![turn.host.to_string(), word(turn.phase).to_owned()];
    let mut text = table(&["host", of.work.as_str()], of.hosts.iter().map(row).collect());
    text.push('\n');
    match (&of.stopped, of.ended_ms) {
        (Some(why), Some(_)) => _ = writeln!(text, "it was ended: {why}"),
        (None, Some(_)) => _ = writeln!(text, "it is over; {} had asked for it", of.by),
        (Some(why), None) => {
            _ = writeln!(
                text,
                "it stopped: {why}\n`haven host maintenance --resume` goes on, `--end` ends it"
            );
        }
        (None, None) => {
            let _ = writeln!(text, "{} asked for it", of.by);
            if let Some(now) = &view.now {
                let _ = writeln!(text, "{now}");
            }
        }
    }
    if of.ended_ms.is_some() || of.stopped.is_some() {
        for host in &view.drained {
            let _ = writeln!(
                text,
                "{host} is still drained for it; `haven host undrain {host} --bring-back` ends that"
            );
        }
    }
    text
}
