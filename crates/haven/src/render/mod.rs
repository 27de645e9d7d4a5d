//! What commands print. Pure, so that it is tested without a cluster.

mod backups;
mod balance;
mod drain;
mod maintenance;
mod monitor;
mod objects;
mod rehearsal;
mod vm_snapshots;
mod volumes;

#[cfg(test)]
mod render_test;

pub use backups::{backup_files, backup_status, backups};
pub use balance::balance;
pub use drain::{drain_blocks, drain_lines, drained, is_stuck};
pub use maintenance::maintenance;
pub use monitor::{audit, event, event_head, incident, incidents, overview, time};
pub use objects::{items, shown};
pub use rehearsal::rehearsal;
pub use vm_snapshots::snapshots;
pub use volumes::{volume, volumes};

use clap::{Args, ValueEnum};
use comfy_table::{Table, presets};
use serde::Serialize;

/// How something is printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people
    #[default]
    Table,
    /// For people, with everything there is
    Wide,
    /// For programs
    Json,
    /// For programs; objects as `apply` reads them
    Yaml,
}

/// The flag that every command has that lists or shows.
#[derive(Clone, Copy, Debug, Args)]
pub struct How {
    /// How it is printed
    #[arg(short, long, value_enum, default_value_t)]
    pub output: Output,
}

/// A table without borders.
pub fn table(head: &[&str], rows: Vec<Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header(head.iter().map(|h| h.to_uppercase()));
    for row in rows {
        table.add_row(row);
    }
    let text = table.to_string();
    text.lines().map(|line| format!("{}\n", line.trim())).collect()
}

/// Words and what they are, one a line.
pub fn fields(of: &[(&str, String)]) -> String {
    let said = || of.iter().filter(|(_, value)| !value.is_empty());
    let width = said().map(|(word, _)| word.len()).max().unwrap_or(0);
    said().map(|(word, value)| format!("{word:<width$}  {value}\n")).collect()
}

/// Any value for programs.
pub fn json<T: Serialize + ?Sized>(value: &T) -> String {
    format!("{}\n", serde_json::to_string_pretty(value).unwrap_or_default())
}

/// Any value for programs and people.
pub fn yaml<T: Serialize + ?Sized>(value: &T) -> String {
    let text = serde_saphyr::to_string(&value).unwrap_or_default();
    if text.ends_with('\n') { text } else { format!("{text}\n") }
}

/// A value as `-o` asks; `text` makes the table, wide or not.
pub fn value<T: Serialize + ?Sized>(
    value: &T,
    output: Output,
    text: impl FnOnce(bool) -> String,
) -> String {
    match output {
        Output::Json => json(value),
        Output::Yaml => yaml(value),
        Output::Table | Output::Wide => text(output == Output::Wide),
    }
}
