//! Automation: `tidy` checks the laws of the tree, `drill` runs the main job on a lab and judges it.

mod drill;
mod tidy;

use clap::Parser;

#[derive(Parser)]
enum Task {
    /// Check the laws of the tree
    Tidy,
    /// Make a lab (or use the one that is up), run the example, cut a host's power, judge what happens
    Drill,
}

fn main() -> anyhow::Result<()> {
    match Task::parse() {
        Task::Tidy => tidy::run(),
        Task::Drill => drill::run(),
    }
}
