//! Whether a service can be updated as it asks to be.

use super::validate::Say;
use haven_model::{
    Name, ServiceSpec, Snapshot, UpdateStrategy,
    service::{CanarySpec, UpdateSpec},
};
use std::collections::BTreeSet;

/// Says everything that is wrong.
pub(super) fn update(snapshot: &Snapshot, spec: &ServiceSpec, say: &mut Say<'_>) {
    let update = &spec.update;
    let replaces = update.strategy != UpdateStrategy::BlueGreen;
    if replaces && update.max_surge == 0 && update.max_unavailable == 0 {
        say(
            ("maxUnavailable", &0),
            "maxSurge and maxUnavailable are both 0, so no update could ever happen".into(),
            "set one of them to 1",
        );
    }
    fields(update, say);
    if update.strategy == UpdateStrategy::Canary {
        canary(spec, &update.canary.clone().unwrap_or_default(), say);
    }
    apart(snapshot, spec, say);
}

/// What is given belongs to the strategy.
fn fields(update: &UpdateSpec, say: &mut Say<'_>) {
    let given = [
        ("canary", update.canary.is_some(), UpdateStrategy::Canary),
        ("promote", update.promote.is_some(), UpdateStrategy::BlueGreen),
        ("keepOld", update.keep_old.is_some(), UpdateStrategy::BlueGreen),
    ];
    for (field, is_given, of) in given {
        if is_given && update.strategy != of {
            let (of, is) = (of.as_str(), update.strategy.as_str());
            say(
                (field, &""),
                format!("`{field}` belongs to the strategy {of}, and this one is {is}"),
                &format!("write `strategy: {of}`, or remove `{field}`"),
            );
        }
    }
}

fn canary(spec: &ServiceSpec, canary: &CanarySpec, say: &mut Say<'_>) {
    let (members, weight, replicas) = (canary.members, canary.weight, spec.replicas);
    if !(1..=99).contains(&weight) {
        say(
            ("weight", &weight),
            format!("new members cannot get {weight} % of the traffic beside old ones"),
            "write 1 to 99; all traffic at once is `strategy: blue-green`",
        );
    }
    if members == 0 {
        say(("members", &0), "a canary needs a member".into(), "write `members: 1`");
    } else if replicas > 0 && members > replicas {
        say(
            ("members", &members),
            format!("{members} new members are more than the {replicas} that are wanted"),
            "write fewer; all new members at once are `strategy: blue-green`",
        );
    }
}

/// New members that must stand apart from the old ones have where to stand.
fn apart(snapshot: &Snapshot, spec: &ServiceSpec, say: &mut Say<'_>) {
    let rolling = spec.update.strategy == UpdateStrategy::Rolling;
    if rolling || !spec.spread.required || spec.replicas == 0 || snapshot.hosts.is_empty() {
        return;
    }
    let by = &spec.spread.by;
    let place = |(name, host): (&Name, &haven_model::Versioned<_>)| {
        let host: &haven_model::object::Stored<haven_model::HostSpec> = host;
        host.meta.labels.get(by).map_or_else(|| format!("host {name}"), Clone::clone)
    };
    let run_vms = snapshot.hosts.iter().filter(|(_, host)| !host.spec.witness);
    let places: BTreeSet<String> = run_vms.map(place).collect();
    let most = match spec.update.strategy {
        UpdateStrategy::Canary => {
            let canary = spec.update.canary.clone().unwrap_or_default();
            spec.replicas.saturating_add(canary.members)
        }
        _ => spec.update.most_members(spec.replicas),
    };
    if places.len() < most as usize {
        say(
            ("required", &true),
            format!(
                "no new member could stand beside the old ones: they are {most} together, each needs a {by} of its own, and there are {}",
                places.len()
            ),
            "leave `required` out, want fewer members, or write `strategy: rolling`",
        );
    }
}
