//! Seeing: status, events, incidents, explain, audit, version (monitor).

use crate::{
    connect::connect,
    failure::Failure,
    out,
    render::{self, How, Output},
};
use clap::{Args, Subcommand};
use haven_client::Client;
use haven_model::{Event, Incident, ObjectRef};
use std::{
    collections::{BTreeMap, HashSet, VecDeque},
    time::{Duration, Instant},
};

/// How long `events --follow` looks for a daemon before it gives up.
const PATIENCE: Duration = Duration::from_secs(60);
/// So many events are asked for after a break.
const CATCH_UP: usize = 5000;

/// Which incidents.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Incidents {
    #[command(subcommand)]
    command: Option<IncidentsCommand>,
    /// One of them
    number: Option<u64>,
    #[command(flatten)]
    how: How,
    /// The same as -o json
    #[arg(long, hide = true)]
    json: bool,
}

/// Incidents.
#[derive(Debug, Subcommand)]
pub enum IncidentsCommand {
    /// List incidents, a line each
    #[command(after_help = "Examples:\n  haven incidents ls\n  haven incidents ls -o json")]
    Ls(How),
    /// Show an incident with its measured timeline
    #[command(after_help = "Examples:\n  haven incidents show 3\n  haven incidents show 3 -o wide")]
    Show {
        /// Its number
        number: u64,
        #[command(flatten)]
        how: How,
    },
}

/// Commands.
#[derive(Debug, Subcommand)]
pub enum WatchCommand {
    /// The cluster on one screen
    #[command(
        after_help = "Examples:\n  haven status\n  haven status --watch\n  haven status -o json"
    )]
    Status {
        /// Again every second
        #[arg(long)]
        watch: bool,
        #[command(flatten)]
        how: How,
        /// The same as -o json
        #[arg(long, hide = true)]
        json: bool,
    },
    /// What happened
    #[command(
        after_help = "Examples:\n  haven events\n  haven events --follow\n  haven events --follow -o json    # one a line"
    )]
    Events {
        /// Go on as events come, over breaks of the connection
        #[arg(long)]
        follow: bool,
        /// So many of the last
        #[arg(long, default_value_t = 50)]
        limit: usize,
        #[command(flatten)]
        how: How,
    },
    /// Disturbances with their measured timelines
    #[command(
        after_help = "Examples:\n  haven incidents\n  haven incidents ls\n  haven incidents show 3"
    )]
    Incidents(Incidents),
    /// What there is to say of an object: where it runs and why, what it waits for
    #[command(after_help = "Examples:\n  haven explain vm/hello-1\n  haven explain service/hello")]
    Explain {
        /// KIND/NAME
        what: String,
        #[command(flatten)]
        how: How,
    },
    /// Who changed what
    #[command(after_help = "Examples:\n  haven audit --limit 20\n  haven audit -o json")]
    Audit {
        /// So many of the last
        #[arg(long, default_value_t = 50)]
        limit: usize,
        #[command(flatten)]
        how: How,
    },
    /// Versions of this command and of the daemon
    #[command(after_help = "Examples:\n  haven version\n  haven version -o json")]
    Version(How),
}

/// `--json` is the older way to write `-o json`.
fn output(how: How, json: bool) -> Output {
    if json { Output::Json } else { how.output }
}

/// Runs it.
pub async fn run(command: WatchCommand) -> Result<(), Failure> {
    match command {
        WatchCommand::Status { watch, how, json } => status(watch, output(how, json)).await,
        WatchCommand::Events { follow, limit, how } => events(follow, limit, how.output).await,
        WatchCommand::Incidents(asked) => incidents(asked).await,
        WatchCommand::Explain { what, how } => {
            let what: ObjectRef = what.parse()?;
            let lines = connect().await?.explain(&what).await?;
            out::print(&render::value(&lines, how.output, |_| {
                lines.iter().map(|line| format!("{line}\n")).collect()
            }));
            Ok(())
        }
        WatchCommand::Audit { limit, how } => {
            let entries = connect().await?.audit(limit).await?;
            out::print(&render::value(&entries, how.output, |wide| render::audit(&entries, wide)));
            Ok(())
        }
        WatchCommand::Version(how) => {
            version(how.output).await;
            Ok(())
        }
    }
}

async fn status(watch: bool, output: Output) -> Result<(), Failure> {
    let people = matches!(output, Output::Table | Output::Wide);
    loop {
        let text = match look(output).await {
            Ok(text) => text,
            // A screen that is watched goes on when the host it asked is the one that died.
            Err(failure) if watch && people => failure.to_string(),
            Err(failure) => return Err(failure),
        };
        let clear = if watch && people { "\x1b[2J\x1b[H" } else { "" };
        out::print(&format!("{clear}{text}"));
        if !watch {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

async fn look(output: Output) -> Result<String, Failure> {
    let overview = connect().await?.status().await?;
    Ok(render::value(&overview, output, |wide| render::overview(&overview, wide)))
}

async fn version(output: Output) {
    let daemon = match connect().await {
        Ok(client) => client.version().await.map_err(Failure::from),
        Err(failure) => Err(failure),
    };
    let daemon = daemon.unwrap_or_else(|_| "none reached".into());
    let both =
        BTreeMap::from([("haven", env!("CARGO_PKG_VERSION").to_owned()), ("daemon", daemon)]);
    out::print(&render::value(&both, output, |_| {
        format!("haven {}\ndaemon {}\n", both["haven"], both["daemon"])
    }));
}

async fn incidents(asked: Incidents) -> Result<(), Failure> {
    let all = connect().await?.incidents().await?;
    let (number, output) = match asked.command {
        Some(IncidentsCommand::Ls(how)) => {
            let text = |wide| render::incidents(&all, wide);
            out::print(&render::value(&all, how.output, text));
            return Ok(());
        }
        Some(IncidentsCommand::Show { number, how }) => {
            let one = find(&all, number)?;
            let text = |wide| render::incident(one, wide);
            out::print(&render::value(one, how.output, text));
            return Ok(());
        }
        None => (asked.number, output(asked.how, asked.json)),
    };
    let chosen = match number {
        Some(number) => std::slice::from_ref(find(&all, number)?),
        None => &all[..],
    };
    out::print(&render::value(chosen, output, |wide| {
        chosen.iter().map(|one| render::incident(one, wide)).collect()
    }));
    Ok(())
}

fn find(all: &[Incident], number: u64) -> Result<&Incident, Failure> {
    all.iter().find(|incident| incident.number == number).ok_or_else(|| {
        let hint = match all.last() {
            None => "there was none yet".into(),
            Some(last) => format!("the last is {}; `haven incidents ls` lists them", last.number),
        };
        Failure::missing(format!("there is no incident {number}"), hint)
    })
}

/// Which events were printed, so that none comes twice and none is missed over a break.
#[derive(Default)]
struct Printed {
    ids: HashSet<String>,
    order: VecDeque<String>,
    /// Older ones than the first that was printed are not asked for.
    first: Option<String>,
}

impl Printed {
    /// Whether this one is new; notes it.
    fn take(&mut self, event: &Event) -> bool {
        if self.first.as_ref().is_some_and(|first| event.id < *first)
            || !self.ids.insert(event.id.clone())
        {
            return false;
        }
        self.first.get_or_insert_with(|| event.id.clone());
        self.order.push_back(event.id.clone());
        if self.order.len() > 2 * CATCH_UP
            && let Some(oldest) = self.order.pop_front()
        {
            self.ids.remove(&oldest);
            // What is forgotten must not come again.
            self.first = self.order.front().cloned();
        }
        true
    }
}

async fn events(follow: bool, limit: usize, output: Output) -> Result<(), Failure> {
    if !follow {
        let events = connect().await?.events(limit).await?;
        out::print(&render::value(&events, output, |wide| {
            let lines: String = events.iter().map(|e| render::event(e, wide)).collect();
            render::event_head(wide) + &lines
        }));
        return Ok(());
    }
    if matches!(output, Output::Table | Output::Wide) {
        out::print(&render::event_head(output == Output::Wide));
    }
    let mut printed = Printed::default();
    let (mut limit, mut since) = (limit, None);
    loop {
        let heard = since;
        let failure = match connect().await {
            Ok(client) => listen(&client, limit, &mut printed, output, &mut since).await,
            Err(failure) => failure,
        };
        // A refusal stays one, and so does a cluster that was never there. One that is gone may come back.
        let lost = failure.code == 5 && since.is_some_and(|last| last.elapsed() < PATIENCE);
        if !lost {
            return Err(failure);
        }
        if heard != since {
            eprintln!("{}  connecting again", failure.to_string().replace("error: ", "broken: "));
        }
        // Once something was printed, all that came since is asked for.
        limit = if printed.first.is_some() { CATCH_UP } else { limit };
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

/// Prints what came until now and what comes, until the connection ends. `since` is when it
/// was last heard.
async fn listen(
    client: &Client,
    limit: usize,
    printed: &mut Printed,
    output: Output,
    since: &mut Option<Instant>,
) -> Failure {
    // The stream is opened first, so that nothing falls between it and what came before.
    let mut stream = match client.follow(None).await {
        Ok(stream) => stream,
        Err(error) => return error.into(),
    };
    let before = match client.events(limit).await {
        Ok(events) => events,
        Err(error) => return error.into(),
    };
    *since = Some(Instant::now());
    before.iter().filter(|event| printed.take(event)).for_each(|event| print(event, output));
    loop {
        match stream.next().await {
            Ok(event) if printed.take(&event) => print(&event, output),
            Ok(_) => {}
            Err(error) => {
                *since = Some(Instant::now());
                return error.into();
            }
        }
    }
}

fn print(event: &Event, output: Output) {
    out::print(&match output {
        Output::Json => format!("{}\n", serde_json::to_string(event).unwrap_or_default()),
        Output::Yaml => format!("---\n{}", render::yaml(event)),
        Output::Table | Output::Wide => render::event(event, output == Output::Wide),
    });
}

#[cfg(test)]
mod tests {
    use super::Printed;
    use haven_model::{Event, event::Severity};

    fn event(id: &str) -> Event {
        Event {
            id: id.into(),
            at_ms: 0,
            object: "vm/a".parse().unwrap(),
            severity: Severity::Info,
            message: String::new(),
            by: String::new(),
        }
    }

    #[test]
    fn over_a_break_no_event_comes_twice_and_none_is_missed() {
        let mut printed = Printed::default();
        assert!(printed.take(&event("3")));
        assert!(printed.take(&event("5")));
        // After the break all of the last are asked for: the older stay away, the new come, one with a slow clock too.
        let again: Vec<bool> =
            ["1", "2", "3", "4", "5", "6"].iter().map(|id| printed.take(&event(id))).collect();
        assert_eq!(again, [false, false, false, true, false, true]);
    }
}
