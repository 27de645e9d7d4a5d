//! `haven --help`: commands under the pillar that they belong to.
//!
//! The words of each command stand once, at the command; a test holds that each has its place here.

use clap::Command;
use std::fmt::Write;

/// Headings with their commands.
pub const PILLARS: [(&str, &[&str]); 9] = [
    (
        "Cluster",
        &["init", "join", "witness", "token", "context", "version", "completions", "man", "daemon"],
    ),
    ("Manifests", &["apply", "diff", "get", "edit", "delete"]),
    ("Compute", &["vm"]),
    ("Balance", &["service", "certificate"]),
    ("Storage", &["image", "pool", "volume", "backup"]),
    ("Network", &["network"]),
    ("Tolerance", &["host", "rebalance", "rehearse"]),
    ("Monitor", &["status", "events", "incidents", "explain", "audit"]),
    ("Lab", &["lab"]),
];

/// The command line with its help in groups.
pub fn grouped(command: Command) -> Command {
    let mut text = String::new();
    for (pillar, names) in PILLARS {
        let _ = writeln!(text, "{pillar}:");
        for name in names {
            let about = command.find_subcommand(name).and_then(Command::get_about);
            let about = about.map(ToString::to_string).unwrap_or_default();
            let _ = writeln!(text, "  {name:<12} {about}");
        }
        text.push('\n');
    }
    let template = format!(
        "{{about-with-newline}}\n{{usage-heading}} {{usage}}\n\n{text}Options:\n{{options}}{{after-help}}"
    );
    command.help_template(template)
}
