//! Backups, as tables.

use super::{table, time};
use haven_model::{
    Bytes, Name,
    api::{BackupFile, BackupFiles, BackupList, BackupSystem, BackupView},
};

/// In the largest unit that leaves two digits at least.
fn size(bytes: Bytes) -> String {
    match bytes.0 {
        0..0x10_0000 => format!("{} KiB", bytes.0.div_ceil(1 << 10)),
        0x10_0000..0x4000_0000 => format!("{} MiB", bytes.0.div_ceil(1 << 20)),
        more => format!("{:.1} GiB", more as f64 / f64::from(1 << 30)),
    }
}

/// What targets hold.
pub fn backups(lists: &[(Name, BackupList)]) -> String {
    let rows = lists.iter().flat_map(|(target, list)| {
        list.backups.iter().map(move |backup| {
            let sum = |of: fn(&haven_model::backup::BackupDisk) -> u64| {
                size(Bytes(backup.disks.iter().map(of).sum()))
            };
            vec![
                backup.vm.to_string(),
                backup.id.clone(),
                target.to_string(),
                time(backup.at_ms),
                backup.moment.to_string(),
                sum(|disk| disk.used.0),
                sum(|disk| disk.read.0),
                sum(|disk| disk.stored.0),
                backup.by.clone(),
            ]
        })
    });
    let heads = ["vm", "backup", "target", "of", "guest", "used", "read", "stored", "by"];
    table(&heads, rows.collect())
}

/// When VMs are backed up, and how the last backup of each stands.
pub fn backup_status(all: &[BackupView]) -> String {
    let row = |view: &BackupView| {
        let spec = view.spec.as_ref();
        let (mut to, mut begun, mut state) = (String::new(), String::new(), "none yet".to_owned());
        if let Some(run) = &view.run {
            (to, begun) = (run.to.to_string(), time(run.at_ms));
            state = match &run.outcome {
                Some(outcome) if outcome.well => outcome.message.clone(),
                Some(outcome) => format!("failed: {}", outcome.message),
                None if run.total.0 == 0 => "begins".into(),
                None => format!("{} % read", run.done.0 * 100 / run.total.0),
            };
        }
        vec![
            view.vm.to_string(),
            spec.map(|spec| spec.every.to_string()).unwrap_or_default(),
            spec.and_then(|spec| spec.keep).map(|keep| keep.to_string()).unwrap_or_default(),
            to,
            begun,
            state,
        ]
    };
    table(&["vm", "every", "kept", "to", "last", "state"], all.iter().map(row).collect())
}

/// What stands at a place of a backup, or which places there are.
pub fn backup_files(found: &BackupFiles) -> String {
    if !found.systems.is_empty() {
        let row = |of: &BackupSystem| vec![of.at.clone(), size(of.size), of.holds.clone()];
        return table(&["place", "size", "holds"], found.systems.iter().map(row).collect());
    }
    let row = |file: &BackupFile| {
        let name = match &file.leads_to {
            Some(to) => format!("{} -> {to}", file.name),
            None => file.name.clone(),
        };
        vec![
            file.kind.clone(),
            format!("{:04o}", file.mode & 0o7777),
            format!("{}:{}", file.uid, file.gid),
            size(file.size),
            time(file.modified_ms),
            name,
        ]
    };
    table(
        &["kind", "mode", "owner", "size", "changed", "name"],
        found.files.iter().map(row).collect(),
    )
}
