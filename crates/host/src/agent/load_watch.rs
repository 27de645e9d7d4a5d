//! Measures what the work on this host takes, over the time that the cluster's spec names, and tells it for balancing.
//!
//! A tenth of that time passes between two looks. What differs from what was told by no more than measuring does is not
//! told again, and what was told long ago is.

use super::{AgentParts, own_record::OwnRecord};
use crate::{
    monitor::{Stalled, Used},
    vm::driver::RunningVm,
};
use haven_model::{Bytes, HostLoad, Name, Pressure, RebalancePolicy, VmLoad, keys, units::Millis};
use haven_store::{clock::Mono, raw::Op};
use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Duration,
};
use tokio_util::sync::CancellationToken;

/// So many looks in the time over which is measured.
const LOOKS: u32 = 10;
/// Told again after so many of these times at the latest; after six it counts as old (`tolerance/rebalance.rs`).
const TOLD_AGAIN: u32 = 4;

/// One look.
struct Look {
    at: Mono,
    stalled: Option<Stalled>,
    /// By VM, with the number of its process.
    used: BTreeMap<String, (i32, Used)>,
}

/// Measures until `cancel`.
pub async fn run(parts: Arc<AgentParts>, cancel: CancellationToken) {
    let mut looks: VecDeque<Look> = VecDeque::new();
    let mut written: Option<(Mono, HostLoad)> = None;
    let mut told = OwnRecord::default();
    let mut live = parts.live.clone();
    while !cancel.is_cancelled() {
        let (policy, window) = asked(&live.borrow_and_update());
        let pause = window / LOOKS;
        if policy == RebalancePolicy::Off {
            looks.clear();
        } else if let Some(look) = look(&parts).await {
            let now = look.at;
            looks.push_back(look);
            // The oldest is as long ago as is asked for, or a little more.
            while looks.get(1).is_some_and(|second| now.since(second.at) >= window) {
                looks.pop_front();
            }
            tell(&parts, &looks, window, &mut told, &mut written).await;
        }
        let mut news = live.clone();
        let other = async {
            while news.changed().await.is_ok() {
                if asked(&news.borrow_and_update()) != (policy, window) {
                    return;
                }
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            biased;
            () = cancel.cancelled() => return,
            () = other => looks.clear(),
            () = parts.clock.sleep(pause) => {}
        }
    }
}

fn asked(snapshot: &haven_model::Snapshot) -> (RebalancePolicy, Duration) {
    let spec = snapshot.cluster_spec();
    (spec.rebalance, Duration::from_millis(spec.rebalance_window.0))
}

async fn look(parts: &AgentParts) -> Option<Look> {
    let vms = match parts.vms.list().await {
        Ok(vms) => vms,
        Err(error) => {
            tracing::debug!(error = super::chain(&error), "the load of VMs is not measured");
            return None;
        }
    };
    let used = |vm: RunningVm| match parts.meter.used(&vm) {
        Ok(used) => used.map(|used| (vm.vm, (vm.pid, used))),
        Err(error) => {
            tracing::debug!(%error, vm = vm.vm, "its load is not measured");
            None
        }
    };
    let used = vms.into_iter().filter_map(used).collect();
    Some(Look { at: parts.clock.now(), stalled: parts.meter.stalled(), used })
}

/// What the looks come to; nothing before the second.
fn load(looks: &VecDeque<Look>) -> Option<HostLoad> {
    let (first, last) = (looks.front()?, looks.back()?);
    let passed = last.at.since(first.at);
    if passed.is_zero() {
        return None;
    }
    let pressure = first.stalled.zip(last.stalled).map(|(before, now)| Pressure {
        cpu: thousandths(now.cpu.saturating_sub(before.cpu), passed),
        memory: thousandths(now.memory.saturating_sub(before.memory), passed),
    });
    let vms = last.used.iter().filter_map(|(vm, (pid, now))| {
        let earlier = looks.iter().find_map(|look| {
            let (was, used) = look.used.get(vm)?;
            (was == pid).then_some((look.at, used))
        });
        let (at, before) = earlier.filter(|(at, _)| *at != last.at)?;
        let over = last.at.since(at);
        let cpu = thousandths(now.cpu.saturating_sub(before.cpu), over);
        let load = VmLoad { cpu, memory: Bytes(now.memory), over: rounded(over) };
        Some((Name::new(vm).ok()?, load))
    });
    Some(HostLoad { over: rounded(passed), pressure, vms: vms.collect(), ..HostLoad::default() })
}

fn thousandths(part: Duration, of: Duration) -> u32 {
    u32::try_from(part.as_micros() * 1000 / of.as_micros().max(1)).unwrap_or(u32::MAX)
}

/// Whole seconds: what a timer is late by is no news.
fn rounded(time: Duration) -> Millis {
    Millis(time.as_secs() * 1000)
}

async fn tell(
    parts: &AgentParts,
    looks: &VecDeque<Look>,
    window: Duration,
    told: &mut OwnRecord,
    written: &mut Option<(Mono, HostLoad)>,
) {
    let (Some(session), Some(mut load)) = (parts.current_session(), load(looks)) else { return };
    load.session = session.number;
    load.at_ms = (parts.wall_ms)();
    let full = |over: Millis| over.0 >= u64::try_from(window.as_millis()).unwrap_or(u64::MAX);
    if full(load.over) {
        load.over = Millis(window.as_millis() as u64);
    }
    for vm in load.vms.values_mut().filter(|vm| full(vm.over)) {
        vm.over = load.over;
    }
    let live = Arc::clone(&parts.live.borrow());
    let there = live.loads.get(&parts.me).map(|load| load.revision);
    let now = parts.clock.now();
    let stands = written
        .as_ref()
        .is_some_and(|(at, before)| !load.differs(before) && now.since(*at) < window * TOLD_AGAIN);
    if stands && !told.overwritten(&live, there) {
        return;
    }
    let key = keys::host_load(&parts.me);
    let value = serde_json::to_vec(&load).expect("a load is plain data");
    let compare = told.compare(&live, key.clone(), there).into_iter().collect();
    match parts.store.txn(compare, vec![Op::Put(key, value.into())]).await {
        Ok(outcome) if outcome.succeeded => {
            told.written(outcome.revision);
            *written = Some((now, load));
        }
        // One of before was carried out after all; the next look tells.
        Ok(_) => {}
        Err(error) => tracing::debug!(%error, "the load of this host could not be written"),
    }
}

#[cfg(test)]
mod tests {
    use super::{Look, load};
    use crate::monitor::{Stalled, Used};
    use haven_model::{Bytes, Pressure, VmLoad, units::Millis};
    use haven_store::clock::Mono;
    use std::{collections::VecDeque, time::Duration};

    fn look(at_s: u64, stalled_ms: u64, used: &[(&str, i32, u64)]) -> Look {
        let stalled = Stalled { cpu: Duration::from_millis(stalled_ms), memory: Duration::ZERO };
        let used = used.iter().map(|(vm, pid, cpu_ms)| {
            let cpu = Duration::from_millis(*cpu_ms);
            ((*vm).to_owned(), (*pid, Used { cpu, memory: 5 << 20 }))
        });
        let at = Mono(0).plus(Duration::from_secs(at_s));
        Look { at, stalled: Some(stalled), used: used.collect() }
    }

    #[test]
    fn it_is_measured_from_the_oldest_look_of_the_same_process() {
        let mut looks = VecDeque::new();
        looks.push_back(look(100, 1000, &[("old", 1, 0), ("again", 2, 9_000), ("gone", 3, 5)]));
        assert_eq!(load(&looks), None, "one look measures nothing");
        looks.push_back(look(110, 1500, &[("old", 1, 9_000), ("again", 4, 50)]));
        looks.push_back(look(120, 3000, &[("old", 1, 30_000), ("again", 4, 550), ("new", 5, 9)]));
        let load = load(&looks).unwrap();
        assert_eq!(load.over, Millis(20_000));
        assert_eq!(load.pressure, Some(Pressure { cpu: 100, memory: 0 }));
        let vm = |cpu: u32, over: u64| VmLoad { cpu, memory: Bytes::mib(5), over: Millis(over) };
        let told: Vec<_> = load.vms.iter().map(|(vm, load)| (vm.as_str(), *load)).collect();
        assert_eq!(told, [("again", vm(50, 10_000)), ("old", vm(1500, 20_000))]);
    }
}
