//! `haven host reboot`, `upgrade` and `maintenance`: hosts are worked on, one after another.

use super::reference;
use crate::{
    connect::connect,
    failure::Failure,
    out,
    render::{self, How},
};
use clap::Args;
use haven_client::{Client, ClientError};
use haven_model::{
    api::{MaintenanceAsked, MaintenanceView},
    maintenance::Work,
    object::Kind,
};
use std::time::{Duration, Instant};

/// Between two looks.
const PAUSE: Duration = Duration::from_millis(500);

/// Work on hosts.
#[derive(Debug, Args)]
pub struct Worked {
    /// The hosts, in the order in which they have their turn
    #[arg(required_unless_present = "rolling", conflicts_with = "rolling")]
    hosts: Vec<String>,
    /// All hosts, one after another; the one that manages the cluster comes last
    #[arg(long)]
    rolling: bool,
    /// Ask for it, and do not wait for its end
    #[arg(long)]
    no_wait: bool,
    /// How long to wait for it, seconds
    #[arg(long, default_value_t = 7200)]
    timeout: u64,
}

/// How it stands.
#[derive(Debug, Args)]
pub struct Looked {
    /// Let it go on after it has stopped; what failed is tried again
    #[arg(long, conflicts_with = "end")]
    resume: bool,
    /// Let no further host have its turn
    #[arg(long)]
    end: bool,
    #[command(flatten)]
    how: How,
}

/// Asks for it.
pub async fn begin(work: Work, wanted: Worked) -> Result<(), Failure> {
    let mut hosts = Vec::new();
    for host in &wanted.hosts {
        hosts.push(reference(Kind::Host, host)?.name);
    }
    let client = connect().await?;
    let begun = client.maintain(&MaintenanceAsked { work, hosts }).await?;
    let Some(of) = begun.maintenance else { return Ok(()) };
    let names: Vec<&str> = of.hosts.iter().map(|turn| turn.host.as_str()).collect();
    out::line(format_args!("{work} of {}, one after another", names.join(", ")));
    if wanted.no_wait {
        out::line("`haven host maintenance` tells how it stands");
        return Ok(());
    }
    let follow = follow(&client, &of.id, Duration::from_secs(wanted.timeout));
    tokio::select! {
        ended = follow => ended,
        _ = tokio::signal::ctrl_c() => {
            out::line("it goes on; `haven host maintenance` tells how it stands, and `--end` ends it");
            Err(Failure::quiet(130))
        }
    }
}

/// Shows it, lets it go on, or ends it.
pub async fn look(wanted: Looked) -> Result<(), Failure> {
    let client = connect().await?;
    let view = if wanted.resume {
        client.resume_maintenance().await?
    } else if wanted.end {
        client.end_maintenance().await?
    } else {
        client.maintenance().await?
    };
    out::print(&render::value(&view, wanted.how.output, |_| render::maintenance(&view)));
    Ok(())
}

async fn follow(client: &Client, id: &str, patience: Duration) -> Result<(), Failure> {
    let begin = Instant::now();
    let mut said = String::new();
    loop {
        // The host that answers may be the one that restarts.
        let view = match client.maintenance().await {
            Ok(view) => view,
            Err(error) if may_pass(&error) && begin.elapsed() < patience => {
                tokio::time::sleep(PAUSE).await;
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        if let Some(ended) = ended(&view, id, begin.elapsed()) {
            return ended;
        }
        if let Some(now) = view.now.as_ref().map(|now| now.trim_start_matches("waiting: "))
            && *now != said
        {
            out::line(now);
            now.clone_into(&mut said);
        }
        if begin.elapsed() > patience {
            return Err(Failure::failed(
                format!("it is not over after {} s", begin.elapsed().as_secs()),
                "it goes on; `haven host maintenance` tells how it stands, and `--end` ends it",
            ));
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Whether an error is one of a host that restarts, and not of what was asked.
fn may_pass(error: &ClientError) -> bool {
    !matches!(error, ClientError::Refused(body) if body.status < 500)
}

fn ended(view: &MaintenanceView, id: &str, took: Duration) -> Option<Result<(), Failure>> {
    let of = view.maintenance.as_ref().filter(|of| of.id == id);
    let Some(of) = of else {
        return Some(Err(Failure::failed(
            "somebody else asked for other work on hosts",
            "`haven host maintenance` tells how that stands",
        )));
    };
    if let Some(why) = of.stopped.as_ref().filter(|_| of.ended_ms.is_some()) {
        return Some(Err(Failure::failed(
            format!("the {} was ended: {why}", of.work),
            "`haven host maintenance` tells how far it was",
        )));
    }
    if let Some(why) = &of.stopped {
        return Some(Err(Failure::failed(
            format!("the {} stopped: {why}", of.work),
            "no further host is touched; `haven host maintenance --resume` goes on, `--end` ends it",
        )));
    }
    of.ended_ms?;
    let (hosts, seconds) = (of.hosts.len(), took.as_secs_f64());
    let word = if hosts == 1 { "host is" } else { "hosts are" };
    out::line(format_args!("the {} is over: {hosts} {word} done ({seconds:.1} s in all)", of.work));
    Some(Ok(()))
}
