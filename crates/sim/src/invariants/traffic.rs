//! Traffic: no transaction of an update leaves fewer ready members with traffic than `replicas - maxUnavailable`, when
//! so many were ready before it. What becomes ill or is lost by itself is nobody's decision.

use super::Invariant;
use crate::{
    judge::{Facts, Step},
    net::Power,
};
use haven_model::{
    Name, ServiceSpec, Snapshot, VmSpec,
    object::Stored,
    service::{DRAIN_LABEL, TEMPLATE_LABEL},
};
use std::{collections::BTreeMap, time::Duration};
use tokio::time::Instant;

/// A plan may be older than the last change of a status by so much.
const SETTLED: Duration = Duration::from_secs(3);

#[derive(Default)]
pub(super) struct Traffic {
    /// Per service: how many members were ready, whatever they get, and since when.
    ready: BTreeMap<Name, (usize, Instant)>,
    /// Per host: its renewal record's revision, and since when it stands.
    renewed: BTreeMap<Name, (i64, Instant)>,
}

impl Invariant for Traffic {
    fn check(&mut self, facts: &Facts, step: &Step<'_>) -> Result<(), String> {
        let Step::Transaction(before) = step else { return Ok(()) };
        for (host, lease) in &facts.snapshot.leases {
            let known = self.renewed.get(host).filter(|(was, _)| *was == lease.revision).copied();
            let known = known.unwrap_or((lease.revision, Instant::now()));
            self.renewed.insert(host.clone(), known);
        }
        for (name, service) in &facts.snapshot.services {
            let now = &facts.snapshot;
            let ready = ready_members(now, now, name).count();
            let known = self.ready.get(name).filter(|(was, _)| *was == ready).copied();
            let (_, since) = known.unwrap_or((ready, Instant::now()));
            self.ready.insert(name.clone(), (ready, since));
            let settled = since.elapsed() >= SETTLED;
            let same = before.services.get(name).is_some_and(|old| old.spec == service.spec);
            let floor = floor(service);
            let (had, has) = (getting(before, now, name), getting(now, now, name));
            if settled && same && had.len() >= floor && has.len() < floor {
                // What is taken from a member on a host that is off, or that nobody has heard for a while, is no loss,
                // whatever that host said last. Nor is what a member would get that executes nowhere: one that ended
                // while nothing could be told.
                let late = facts.snapshot.cluster_spec().timers.renew.duration() * 2;
                let at = |vm: &&Name| {
                    let host = &now.placements.get(*vm)?.host;
                    let on = facts.power.get(host.as_str()).is_none_or(|power| *power == Power::On);
                    let heard = self.renewed.get(host).is_none_or(|(_, at)| at.elapsed() < late);
                    (on && heard && !facts.executing(vm.as_str()).is_empty())
                        .then(|| format!("{vm} on {host}"))
                };
                let lost: Vec<String> =
                    had.iter().filter(|vm| !has.contains(*vm)).filter_map(at).collect();
                if lost.is_empty() {
                    continue;
                }
                return Err(format!(
                    "traffic: {} ready members of {name} get traffic, of {}; {floor} must; it is taken from {}",
                    has.len(),
                    had.len(),
                    lost.join(", ")
                ));
            }
        }
        Ok(())
    }
}

fn floor(service: &Stored<ServiceSpec>) -> usize {
    service.spec.replicas.saturating_sub(service.spec.update.max_unavailable) as usize
}

/// Members as one snapshot has them that are ready as another tells: what a lost host takes away is no decision.
fn ready_members<'a>(
    of: &'a Snapshot,
    told: &'a Snapshot,
    service: &'a Name,
) -> impl Iterator<Item = &'a Stored<VmSpec>> {
    let ready = |vm: &Name| told.told_of(vm).is_some_and(|status| status.ready == Some(true));
    of.members(service).filter(move |(vm, _)| ready(vm)).map(|(_, object)| &*object.value)
}

/// Those of them that get traffic.
fn getting<'a>(of: &'a Snapshot, told: &'a Snapshot, service: &'a Name) -> Vec<&'a Name> {
    let frontend = of.frontends.get(service);
    let gets = |member: &&Stored<VmSpec>| {
        let labels = &member.meta.labels;
        let template = labels.get(TEMPLATE_LABEL).map_or("", String::as_str);
        let idle = frontend.is_some_and(|frontend| frontend.gets_nothing(template));
        !member.meta.deleting && !labels.contains_key(DRAIN_LABEL) && !idle
    };
    ready_members(of, told, service).filter(gets).map(|member| &member.meta.name).collect()
}
