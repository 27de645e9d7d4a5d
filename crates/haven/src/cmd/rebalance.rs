//! `haven rebalance`: how even the load of hosts is, and the moves that make it more so.

use super::migrate::follow;
use crate::{
    connect::connect,
    failure::Failure,
    out,
    render::{self, How},
};
use clap::Args;
use std::time::Duration;

/// Moves for balance.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  haven rebalance --dry-run\n  haven rebalance --dry-run -o json\n  haven rebalance"
)]
pub struct Rebalance {
    /// Only show the loads and the moves that would help
    #[arg(long)]
    dry_run: bool,
    /// Ask for the moves, and do not wait for their ends
    #[arg(long, conflicts_with = "dry_run")]
    no_wait: bool,
    /// How long to wait for each move, seconds
    #[arg(long, default_value_t = 600)]
    timeout: u64,
    #[command(flatten)]
    how: How,
}

/// Runs it.
pub async fn run(asked: Rebalance) -> Result<(), Failure> {
    let client = connect().await?;
    if asked.dry_run {
        let told = client.balance().await?;
        out::print(&render::value(&told, asked.how.output, |_| render::balance(&told)));
        return Ok(());
    }
    let told = client.rebalance().await?;
    out::print(&render::value(&told, asked.how.output, |_| render::balance(&told)));
    if asked.no_wait {
        return Ok(());
    }
    for of in &told.moves {
        let begun = client.migration(of.vm.as_str()).await?;
        if let Some(migration) = begun.migration {
            let patience = Duration::from_secs(asked.timeout);
            follow(&client, &of.vm, &migration.id, patience).await?;
        }
    }
    Ok(())
}
