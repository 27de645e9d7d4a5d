//! Snapshots of VMs, as a table.

use super::{table, time};
use haven_model::{
    api::SnapshotView,
    vm_snapshot::{BY_SCHEDULE, SnapshotDisk, VmSnapshot},
};

/// Which hosts have a copy of a mirrored disk.
fn on(disk: &SnapshotDisk) -> String {
    let hosts: Vec<&str> = disk.copies.iter().map(|host| host.as_str()).collect();
    if hosts.is_empty() { String::new() } else { format!(" on {}", hosts.join(", ")) }
}

/// Who asked for it, and what for if it goes by itself.
fn by(of: &VmSnapshot) -> String {
    match &of.made_for {
        _ if of.scheduled => BY_SCHEDULE.to_owned(),
        Some(made) => format!("{}, for {made}", of.by),
        None => of.by.clone(),
    }
}

/// Those of a VM.
pub fn snapshots(all: &[SnapshotView]) -> String {
    let row = |view: &SnapshotView| {
        let of = &view.snapshot;
        let disks: Vec<String> = of
            .disks
            .iter()
            .map(|disk| format!("{} ({}{})", disk.name, disk.size, on(disk)))
            .collect();
        let why = view.waiting.clone().unwrap_or_else(|| of.message.clone());
        let state = match (why.as_str(), of.reverted_ms) {
            ("", Some(at)) if !of.is_due() => format!("{}, reverted to {}", of.state, time(at)),
            ("", _) => of.state.to_string(),
            (why, _) => format!("{}: {why}", of.state),
        };
        vec![
            view.name.to_string(),
            time(of.of_ms.unwrap_or(of.at_ms)),
            of.moment.map(|moment| moment.to_string()).unwrap_or_default(),
            disks.join(", "),
            by(of),
            state,
        ]
    };
    table(&["snapshot", "of", "guest", "disks", "by", "state"], all.iter().map(row).collect())
}
