//! What happened and how the cluster is.

use super::table;
use haven_model::{
    Event, Incident, api::Overview, cluster::MOST_RESERVED_HOSTS, event::AuditEntry,
};
use std::fmt::Write;

/// A time as people read it, UTC.
pub fn time(at_ms: i64) -> String {
    jiff::Timestamp::from_millisecond(at_ms).map(|t| format!("{t:.3}")).unwrap_or_default()
}

fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes >> 20)
}

/// The cluster on one screen.
pub fn overview(of: &Overview, wide: bool) -> String {
    let mut text = format!("cluster {}: {}\n\n", of.cluster, of.headline);
    let mut head = vec!["host", "state", "vms", "memory", "roles"];
    head.extend(wide.then_some("address"));
    let hosts = of.hosts.iter().map(|h| {
        let mut row = vec![
            h.name.clone(),
            h.state.clone(),
            h.vms.to_string(),
            format!("{} of {}", mib(h.memory_used), mib(h.memory)),
            h.roles.join(", "),
        ];
        row.extend(wide.then(|| h.address.clone()));
        row
    });
    text.push_str(&table(&head, hosts.collect()));
    if !of.services.is_empty() {
        text.push('\n');
        let services = of.services.iter().map(|s| {
            vec![
                s.name.clone(),
                format!("{}/{}", s.ready, s.wanted),
                s.address.clone(),
                s.holder.clone(),
            ]
        });
        text.push_str(&table(&["service", "ready", "address", "holder"], services.collect()));
    }
    let _ = writeln!(
        text,
        "\nvoters {}/{}   VMs {}/{}   hosts that can be lost now: {} (VMs: {}, store: {})",
        of.voters.0,
        of.voters.1,
        of.vms.0,
        of.vms.1,
        of.survivable,
        match of.survivable_vms {
            most if most >= MOST_RESERVED_HOSTS as usize => format!("{most} or more"),
            vms => vms.to_string(),
        },
        of.survivable_store
    );
    for (title, list) in [
        ("down", &of.down),
        ("at risk", &of.risks),
        ("advice", &of.advice),
        ("incidents", &of.incidents),
    ] {
        if !list.is_empty() {
            let _ = writeln!(text, "\n{title}:");
            list.iter().for_each(|line| {
                let _ = writeln!(text, "  {line}");
            });
        }
    }
    text
}

/// When an incident began, and how long it took, if it is over.
fn span(of: &Incident) -> (i64, Option<i64>) {
    let begin = of.steps.iter().map(|s| s.at_ms).min().unwrap_or(0);
    (begin, of.closed_ms.map(|end| end - begin))
}

/// A line for each incident.
pub fn incidents(of: &[Incident], wide: bool) -> String {
    let mut head = vec!["number", "began", "took", "title"];
    head.extend(wide.then_some("waiting for"));
    let rows = of.iter().map(|incident| {
        let (begin, took) = span(incident);
        let took = took.map_or("still open".into(), |ms| format!("{ms} ms"));
        let mut row = vec![incident.number.to_string(), time(begin), took, incident.title.clone()];
        row.extend(wide.then(|| names(incident)));
        row
    });
    table(&head, rows.collect())
}

fn names(of: &Incident) -> String {
    of.waiting_for.iter().map(|n| n.as_str()).collect::<Vec<_>>().join(", ")
}

/// An incident's timeline, in milliseconds after the failure; wide with the object of each step.
pub fn incident(of: &Incident, wide: bool) -> String {
    let (begin, took) = span(of);
    let mut text = format!("incident {}: {}\n", of.number, of.title);
    for step in &of.steps {
        let object = if wide { format!("{:<20} ", step.object.to_string()) } else { String::new() };
        let _ = writeln!(
            text,
            "  +{:>6} ms  {:<8} {object}{}",
            step.at_ms - begin,
            step.phase,
            step.message
        );
    }
    let _ = match took {
        None => writeln!(text, "  still open; waiting for {}", names(of)),
        Some(_) if !wide => Ok(()),
        Some(ms) => writeln!(text, "  began {}, over after {ms} ms", time(begin)),
    };
    text
}

/// The head over events.
pub fn event_head(wide: bool) -> String {
    let severity = if wide { "SEVERITY  " } else { "" };
    format!("{:<24}  {severity}{:<20}  WHAT HAPPENED\n", "TIME", "OBJECT")
}

/// An event's line.
pub fn event(of: &Event, wide: bool) -> String {
    let severity = match wide {
        true => format!("{:<8}  ", format!("{:?}", of.severity).to_lowercase()),
        false => String::new(),
    };
    format!(
        "{}  {severity}{:<20}  {}  ({})\n",
        time(of.at_ms),
        of.object.to_string(),
        of.message,
        of.by
    )
}

/// The audit log; wide with the id of each entry.
pub fn audit(of: &[AuditEntry], wide: bool) -> String {
    let mut head = vec!["time", "who", "from", "what", "outcome"];
    head.extend(wide.then_some("id"));
    let rows = of.iter().map(|entry| {
        let mut row = vec![
            time(entry.at_ms),
            entry.who.clone(),
            entry.from.clone(),
            entry.what.clone(),
            entry.outcome.clone(),
        ];
        row.extend(wide.then(|| entry.id.clone()));
        row
    });
    table(&head, rows.collect())
}
