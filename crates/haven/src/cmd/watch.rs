//! Seeing: status, events, incidents, explain, audit, version (monitor).

use crate::{connect::connect, failure::Failure, render};
use clap::Subcommand;
use haven_model::{Event, ObjectRef};
use std::time::Duration;

/// Commands.
#[derive(Debug, Subcommand)]
pub enum WatchCommand {
    /// The cluster on one screen
    #[command(after_help = "Examples:\n  haven status\n  haven status --watch")]
    Status {
        /// Again every second
        #[arg(long)]
        watch: bool,
        /// For programs
        #[arg(long)]
        json: bool,
    },
    /// What happened
    #[command(after_help = "Examples:\n  haven events\n  haven events --follow")]
    Events {
        /// Go on as events come
        #[arg(long)]
        follow: bool,
        /// So many of the last
        #[arg(long, default_value_t = 50)]
        limit: usize,
    },
    /// Disturbances with their measured timelines
    #[command(after_help = "Examples:\n  haven incidents\n  haven incidents 3")]
    Incidents {
        /// One of them
        number: Option<u64>,
        /// For programs
        #[arg(long)]
        json: bool,
    },
    /// What there is to say of an object: where it runs and why, what it waits for
    #[command(after_help = "Examples:\n  haven explain vm/hello-1\n  haven explain service/hello")]
    Explain {
        /// KIND/NAME
        what: String,
    },
    /// Who changed what
    #[command(after_help = "Examples:\n  haven audit --limit 20")]
    Audit {
        /// So many of the last
        #[arg(long, default_value_t = 50)]
        limit: usize,
    },
    /// Versions of this command and of the daemon
    #[command(after_help = "Examples:\n  haven version")]
    Version,
}

fn time(at_ms: i64) -> String {
    jiff::Timestamp::from_millisecond(at_ms).map(|t| format!("{t:.3}")).unwrap_or_default()
}

fn print_event(event: &Event) {
    println!(
        "{}  {:<20} {}  ({})",
        time(event.at_ms),
        event.object.to_string(),
        event.message,
        event.by
    );
}

/// Runs it.
pub async fn run(command: WatchCommand) -> Result<(), Failure> {
    match command {
        WatchCommand::Status { watch, json } => loop {
            let overview = connect().await?.status().await?;
            let text = if json { render::json(&overview) } else { render::overview(&overview) };
            if !watch {
                print!("{text}");
                return Ok(());
            }
            print!("\x1b[2J\x1b[H{text}");
            tokio::time::sleep(Duration::from_secs(1)).await;
        },
        WatchCommand::Events { follow, limit } => {
            let client = connect().await?;
            client.events(limit).await?.iter().for_each(print_event);
            if follow {
                client.follow(|event| print_event(&event)).await?;
            }
        }
        WatchCommand::Incidents { number, json } => {
            let all = connect().await?.incidents().await?;
            let chosen: Vec<_> =
                all.into_iter().filter(|i| number.is_none_or(|n| i.number == n)).collect();
            if let (Some(number), true) = (number, chosen.is_empty()) {
                return Err(Failure::missing(format!("there is no incident {number}")));
            }
            if json {
                print!("{}", render::json(&chosen));
            } else {
                chosen.iter().for_each(|incident| print!("{}", render::incident(incident)));
            }
        }
        WatchCommand::Explain { what } => {
            let bad = |e: haven_model::ModelError| Failure::bad(e.to_string(), "");
            let what: ObjectRef = what.parse().map_err(bad)?;
            connect().await?.explain(&what).await?.iter().for_each(|line| println!("{line}"));
        }
        WatchCommand::Audit { limit } => {
            for entry in connect().await?.audit(limit).await? {
                println!(
                    "{}  {} ({})  {}  {}",
                    time(entry.at_ms),
                    entry.who,
                    entry.from,
                    entry.what,
                    entry.outcome
                );
            }
        }
        WatchCommand::Version => {
            println!("haven {}", env!("CARGO_PKG_VERSION"));
            match connect().await {
                Ok(client) => println!("daemon {}", client.version().await?),
                Err(_) => println!("daemon: none reached"),
            }
        }
    }
    Ok(())
}
