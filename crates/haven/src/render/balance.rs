//! How even the load of hosts is, for people.

use super::table;
use haven_model::{
    RebalancePolicy,
    api::{Balance, HostBalance},
};
use std::fmt::Write;

/// Thousandths as people read them.
fn percent(thousandths: Option<u32>) -> String {
    thousandths.map(|of| format!("{} %", of.saturating_add(5) / 10)).unwrap_or_default()
}

/// The loads of hosts now and after the moves, then the moves with their reasons.
pub fn balance(told: &Balance) -> String {
    let mut text = String::new();
    let row = |host: &HostBalance| {
        let moved = !told.moves.is_empty();
        vec![
            host.host.to_string(),
            host.cpu.map_or_else(|| "not measured".into(), |cpu| percent(Some(cpu))),
            percent(host.cpu_after.filter(|_| moved)),
            percent(host.memory),
            percent(host.memory_after.filter(|_| moved)),
            percent(host.pressure.map(|pressure| pressure.cpu)),
            percent(host.pressure.map(|pressure| pressure.memory)),
        ]
    };
    let columns =
        ["host", "CPU used", "then", "memory used", "then", "waits for CPU", "waits for memory"];
    text.push_str(&table(&columns, told.hosts.iter().map(row).collect()));
    text.push('\n');
    for (number, of) in told.moves.iter().enumerate() {
        let _ = writeln!(text, "{}. {}", number + 1, of.reason);
    }
    let unmeasured = told.hosts.iter().any(|host| host.cpu.is_none());
    if told.policy == RebalancePolicy::Off {
        text.push_str(
            "nothing is measured, because `rebalance` is off; `haven edit cluster` changes that\n",
        );
    } else if told.moves.is_empty() {
        let of = if unmeasured { "among the hosts that are measured " } else { "" };
        let _ = writeln!(text, "{of}no move would help enough to be worth it");
    }
    if let Some(why) = told.held.as_ref().or(told.rests.as_ref()) {
        let _ = writeln!(text, "{why}");
    }
    let _ = writeln!(
        text,
        "{}",
        match told.policy {
            RebalancePolicy::Off => "`rebalance` is off: nothing is moved by itself",
            RebalancePolicy::Advise => "`rebalance` is advise: nothing is moved by itself",
            RebalancePolicy::Auto =>
                "`rebalance` is auto: VMs are moved by themselves, one at a time",
        }
    );
    text
}
