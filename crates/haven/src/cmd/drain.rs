//! `haven host drain` and `haven host undrain`: ask for it, and show how it comes on.

use super::reference;
use crate::{connect::connect, failure::Failure, out, render};
use clap::Args;
use haven_client::Client;
use haven_model::{Name, api::DrainView, object::Kind};
use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

/// Between two looks.
const PAUSE: Duration = Duration::from_millis(300);
/// So long nothing moves and the same things block: then waiting is of no use.
const STUCK: Duration = Duration::from_secs(20);

/// A drain.
#[derive(Debug, Args)]
pub struct Draining {
    /// The host's name
    name: String,
    /// Show how it comes on, and end with 0 once nothing runs there, or with 1 and what blocks
    #[arg(long)]
    wait: bool,
    /// How long to wait for it, seconds
    #[arg(long, default_value_t = 600)]
    timeout: u64,
}

/// The end of a drain.
#[derive(Debug, Args)]
pub struct Undraining {
    /// The host's name
    name: String,
    /// Move back live what the drain moved and what is still where it put it
    #[arg(long)]
    bring_back: bool,
    /// Show how it comes on, and end with 0 once all of it is back
    #[arg(long, requires = "bring_back")]
    wait: bool,
    /// How long to wait for it, seconds
    #[arg(long, default_value_t = 600)]
    timeout: u64,
}

/// Asks for it.
pub async fn drain(wanted: Draining) -> Result<(), Failure> {
    let host = reference(Kind::Host, &wanted.name)?.name;
    let client = connect().await?;
    let view = client.drain(host.as_str()).await?;
    out::line(format_args!("{host} takes nothing new, and what runs there leaves"));
    if let Some(why) = &view.quorum {
        out::line(format_args!("beware: {why}"));
    }
    if !wanted.wait {
        out::line(format_args!("`haven host show {host}` tells how it stands"));
        return Ok(());
    }
    let follow = follow(&client, &host, Duration::from_secs(wanted.timeout), Until::Empty);
    let said = format!("the drain of {host} stands; `haven host undrain {host}` ends it");
    unless_interrupted(follow, &said).await
}

/// Ends it.
pub async fn undrain(wanted: Undraining) -> Result<(), Failure> {
    let host = reference(Kind::Host, &wanted.name)?.name;
    let client = connect().await?;
    client.undrain(host.as_str(), wanted.bring_back).await?;
    if !wanted.bring_back {
        out::line(format_args!("{host} takes VMs again"));
        return Ok(());
    }
    out::line(format_args!("{host} takes VMs again, and what the drain had moved comes back"));
    if !wanted.wait {
        return Ok(());
    }
    let follow = follow(&client, &host, Duration::from_secs(wanted.timeout), Until::Back);
    let said = format!("it goes on; `haven host undrain {host}` leaves the others where they are");
    unless_interrupted(follow, &said).await
}

/// Waits for it; whoever breaks that off is told that it goes on.
async fn unless_interrupted(
    follow: impl Future<Output = Result<(), Failure>>,
    said: &str,
) -> Result<(), Failure> {
    tokio::select! {
        ended = follow => ended,
        _ = tokio::signal::ctrl_c() => {
            out::line(said);
            Err(Failure::quiet(130))
        }
    }
}

/// What is waited for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Until {
    /// Nothing runs there any more.
    Empty,
    /// All that can come back is back.
    Back,
}

async fn follow(
    client: &Client,
    host: &Name,
    patience: Duration,
    until: Until,
) -> Result<(), Failure> {
    let begin = Instant::now();
    let mut said = BTreeSet::new();
    let mut same: Option<(Instant, DrainView)> = None;
    loop {
        let view = client.drained(host.as_str()).await?;
        if is_over(&view, host, until)? {
            let seconds = begin.elapsed().as_secs_f64();
            out::line(format_args!("{} ({seconds:.1} s in all)", render::drained(&view, host)));
            return Ok(());
        }
        for line in render::drain_lines(&view) {
            if said.insert(line.clone()) {
                out::line(line);
            }
        }
        match &same {
            Some((_, last)) if *last == view => {}
            _ => same = Some((Instant::now(), view.clone())),
        }
        let since = same.as_ref().map_or(begin, |(since, _)| *since);
        let stuck = render::is_stuck(&view) && since.elapsed() > STUCK;
        if stuck || begin.elapsed() > patience {
            let what = match until {
                Until::Empty => format!("{host} is not drained"),
                Until::Back => format!("not all is back on {host}"),
            };
            let seconds = begin.elapsed().as_secs();
            let blocks = render::drain_blocks(&view);
            let hint =
                format!("it stands and goes on by itself; `haven host undrain {host}` ends it");
            return Err(Failure::failed(format!("{what} after {seconds} s{blocks}"), hint));
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Whether what is waited for is so.
fn is_over(view: &DrainView, host: &Name, until: Until) -> Result<bool, Failure> {
    let stands = view.drain.as_ref().is_some_and(|drain| !drain.bringing_back);
    match until {
        Until::Empty if stands => Ok(view.state == "drained"),
        Until::Empty => Err(Failure::failed(
            format!("somebody ended the drain of {host} meanwhile"),
            format!("ask for it again with `haven host drain {host}`"),
        )),
        Until::Back if stands => Err(Failure::failed(
            format!("somebody drains {host} anew"),
            format!("`haven host show {host}` tells how it stands"),
        )),
        Until::Back => Ok(view.drain.is_none()),
    }
}
