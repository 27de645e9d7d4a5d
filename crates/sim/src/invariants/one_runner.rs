//! One runner: at no instant do two hosts execute the same VM.
//!
//! A host that was paused executes nothing. Where hosts have no watchdog, the copy on a host that just woke may
//! overlap until its guard acts (DESIGN.md section 4: within 50 ms).

use super::Invariant;
use crate::{
    judge::{Facts, Step},
    net::Power,
};
use std::{collections::BTreeMap, time::Duration};
use tokio::time::Instant;

/// How long a copy whose disks are shut may go on (DESIGN.md section 4: 30 s alone).
const GRACE: Duration = Duration::from_secs(30);

pub(super) struct OneRunner {
    grace: Duration,
    /// Overlaps that the grace covers so far: VM, and when it began.
    overlaps: BTreeMap<String, Duration>,
}

impl OneRunner {
    pub(super) fn new(grace: Duration) -> Self {
        Self { grace, overlaps: BTreeMap::new() }
    }

    fn of_vm(&mut self, facts: &Facts, vm: &str) -> Result<(), String> {
        let hosts = facts.executing(vm);
        let began = self.overlaps.get(vm).copied();
        if hosts.len() < 2 {
            self.overlaps.remove(vm);
            return match began {
                Some(began) if facts.now - began > self.grace => {
                    Err(format!("one runner: {vm} ran twice for {:?}", facts.now - began))
                }
                _ => Ok(()),
            };
        }
        let woken = hosts
            .iter()
            .any(|host| facts.woke.get(*host).is_some_and(|woke| woke.elapsed() <= self.grace));
        if self.grace.is_zero() || !woken {
            return Err(format!("one runner: {vm} runs on {}", hosts.join(" and ")));
        }
        self.overlaps.entry(vm.to_owned()).or_insert(facts.now);
        Ok(())
    }
}

/// A copy that can write nothing ends within its time, on a host that has not just woken.
fn fenced(facts: &Facts) -> Result<(), String> {
    let on = |host: &str| facts.power.get(host) == Some(&Power::On);
    let awake = |host: &str| facts.woke.get(host).is_none_or(|woke| woke.elapsed() > GRACE);
    let late = |since: &Instant| since.elapsed() > GRACE;
    let mut fenced = facts.fenced.iter();
    match fenced.find(|((host, _), since)| on(host) && awake(host) && late(since)) {
        Some(((host, vm), since)) => Err(format!(
            "one runner: {vm} still runs on {host}, {:?} after its disks were shut",
            since.elapsed()
        )),
        None => Ok(()),
    }
}

impl Invariant for OneRunner {
    fn check(&mut self, facts: &Facts, step: &Step<'_>) -> Result<(), String> {
        fenced(facts)?;
        match step {
            Step::Started { vm, .. } | Step::Ended { vm, .. } => self.of_vm(facts, vm),
            Step::Power { host } => {
                let of_host = facts.running.keys().filter(|(on, _)| on == host);
                let vms: Vec<String> = of_host.map(|(_, vm)| vm.clone()).collect();
                vms.iter().try_for_each(|vm| self.of_vm(facts, vm))
            }
            Step::Transaction(_) => Ok(()),
        }
    }

    fn at_end(&self, facts: &Facts) -> Result<(), String> {
        let on = |host: &String| facts.power.get(host) == Some(&Power::On);
        if let Some((host, vm)) = facts.fenced.keys().find(|(host, _)| on(host)) {
            return Err(format!(
                "one runner: {vm} still runs on {host}, to which its disks are shut"
            ));
        }
        match self.overlaps.keys().next() {
            Some(vm) => Err(format!("one runner: {vm} runs twice at the end")),
            None => Ok(()),
        }
    }
}
