//! What would happen, for people.

use super::table;
use haven_model::{Name, api::Rehearsal};
use std::fmt::Write;

/// Seconds with one digit.
fn seconds(ms: u64) -> String {
    format!("{:.1} s", ms as f64 / 1000.0)
}

/// A rehearsal: who would be where after how long, and who would not; with every step when it is `wide`.
pub fn rehearsal(told: &Rehearsal, wide: bool) -> String {
    let mut text = String::new();
    let name = |host: &Option<Name>| host.as_ref().map(ToString::to_string).unwrap_or_default();
    let (go, stay): (Vec<_>, Vec<_>) = told.vms.iter().partition(|vm| vm.after_ms.is_some());
    if go.is_empty() && stay.is_empty() {
        text.push_str("no VM is concerned\n");
    }
    if !go.is_empty() {
        let row = |vm: &&haven_model::api::RehearsedVm| {
            let after = vm.after_ms.map(seconds).unwrap_or_default();
            vec![vm.vm.to_string(), name(&vm.from), name(&vm.to), after]
        };
        text.push_str(&table(&["vm", "from", "to", "serves after"], go.iter().map(row).collect()));
    }
    if !stay.is_empty() {
        if !go.is_empty() {
            text.push('\n');
        }
        let row = |vm: &&haven_model::api::RehearsedVm| {
            vec![vm.vm.to_string(), name(&vm.from), vm.why.clone()]
        };
        text.push_str(&table(&["vm", "from", "why not"], stay.iter().map(row).collect()));
    }
    if wide {
        let row = |step: &haven_model::api::RehearsedStep| {
            vec![seconds(step.after_ms), step.object.to_string(), step.message.clone()]
        };
        text.push('\n');
        text.push_str(&table(&["after", "object", "what"], told.steps.iter().map(row).collect()));
    }
    let ends = seconds(told.ends_after_ms);
    let _ = writeln!(text, "\nall that would happen has happened after {ends}; {}", told.figures);
    text
}
