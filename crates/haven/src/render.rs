//! What commands print. Pure, so that it is tested without a cluster.

use clap::ValueEnum;
use comfy_table::{Table, presets};
use haven_model::{
    Incident,
    api::{Item, Overview},
};
use serde::Serialize;
use std::fmt::Write;

/// How a list is printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people.
    #[default]
    Table,
    /// With more columns.
    Wide,
    /// For programs.
    Json,
    /// For `apply`.
    Yaml,
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

/// Any value for programs.
pub fn json<T: Serialize>(value: &T) -> String {
    format!("{}\n", serde_json::to_string_pretty(value).unwrap_or_default())
}

/// A list of objects.
pub fn items(items: &[Item], output: Output) -> String {
    match output {
        Output::Json => json(&items),
        Output::Yaml => {
            let documents: Vec<String> =
                items.iter().map(|i| haven_model::manifest::to_yaml(&i.object)).collect();
            documents.join("---\n")
        }
        Output::Table | Output::Wide => {
            let mut head = vec!["name", "state", "host"];
            let wide = |item: &Item| output == Output::Wide || item.columns.len() <= 2;
            let columns: std::collections::BTreeSet<&str> = items
                .iter()
                .filter(|i| wide(i))
                .flat_map(|i| i.columns.keys().map(String::as_str))
                .collect();
            head.extend(columns.iter());
            let rows = items.iter().map(|item| {
                let host = item.host.as_ref().map(ToString::to_string).unwrap_or_default();
                let mut row = vec![item.object.meta().name.to_string(), item.state.clone(), host];
                row.extend(
                    columns.iter().map(|c| item.columns.get(*c).cloned().unwrap_or_default()),
                );
                row
            });
            table(&head, rows.collect())
        }
    }
}

fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes >> 20)
}

/// The cluster on one screen.
pub fn overview(of: &Overview) -> String {
    let mut text = format!("cluster {}: {}\n\n", of.cluster, of.headline);
    let hosts = of.hosts.iter().map(|h| {
        vec![
            h.name.clone(),
            h.state.clone(),
            h.vms.to_string(),
            format!("{} of {}", mib(h.memory_used), mib(h.memory)),
            h.roles.join(", "),
        ]
    });
    text.push_str(&table(&["host", "state", "vms", "memory", "roles"], hosts.collect()));
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
        "\nvoters {}/{}   VMs {}/{}   hosts that can be lost now: {}",
        of.voters.0, of.voters.1, of.vms.0, of.vms.1, of.survivable
    );
    for (title, list) in [("down", &of.down), ("at risk", &of.risks), ("incidents", &of.incidents)]
    {
        if !list.is_empty() {
            let _ = writeln!(text, "\n{title}:");
            list.iter().for_each(|line| {
                let _ = writeln!(text, "  {line}");
            });
        }
    }
    text
}

/// An incident's timeline, in milliseconds after the failure.
pub fn incident(of: &Incident) -> String {
    let begin = of.steps.iter().map(|s| s.at_ms).min().unwrap_or(0);
    let mut text = format!("incident {}: {}\n", of.number, of.title);
    for step in &of.steps {
        let _ =
            writeln!(text, "  +{:>6} ms  {:<8} {}", step.at_ms - begin, step.phase, step.message);
    }
    if of.closed_ms.is_none() {
        let _ = writeln!(
            text,
            "  still open; waiting for {}",
            of.waiting_for.iter().map(|n| n.as_str()).collect::<Vec<_>>().join(", ")
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::{incident, overview};
    use haven_model::{
        Incident, IncidentStep, Name,
        api::{HostLine, Overview, ServiceLine},
    };

    #[test]
    fn status_of_a_cluster_with_a_lost_host() {
        let host = |name: &str, state: &str| HostLine {
            name: name.into(),
            address: "10.0.0.1".into(),
            state: state.into(),
            vms: 2,
            memory_used: 400 << 20,
            memory: 1536 << 20,
            roles: vec!["voter".into()],
        };
        let text = overview(&Overview {
            cluster: "lab".into(),
            headline: "host2 is lost (lease-expired)".into(),
            hosts: vec![host("host1", "online"), host("host2", "lost (lease-expired)")],
            services: vec![ServiceLine {
                name: "hello".into(),
                ready: 2,
                wanted: 3,
                address: "10.88.0.100:80".into(),
                holder: "host1".into(),
            }],
            voters: (2, 3),
            vms: (2, 3),
            down: vec!["host2 is lost (lease-expired)".into()],
            risks: vec![],
            survivable: 0,
            incidents: vec!["incident 1: host2 was lost with 1 VMs".into()],
        });
        insta::assert_snapshot!(text);
    }

    #[test]
    fn the_timeline_of_an_incident() {
        let step = |at_ms, phase: &str, message: &str| IncidentStep {
            at_ms,
            phase: phase.into(),
            object: "host/host2".parse().unwrap(),
            message: message.into(),
        };
        let text = incident(&Incident {
            number: 3,
            title: "host2 was lost with 1 VMs".into(),
            host: Name::new("host2").unwrap(),
            session: 1,
            waiting_for: vec![Name::new("hello-1").unwrap()],
            steps: vec![
                step(1000, "failed", "host2 renewed its lease for the last time"),
                step(6010, "proof", "host2 is proven lost"),
            ],
            closed_ms: None,
        });
        insta::assert_snapshot!(text);
    }
}
