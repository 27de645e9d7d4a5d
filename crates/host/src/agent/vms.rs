//! One task per VM: this part makes and ends those tasks, and nothing else.

use super::{AgentParts, networks::Networks, vm_task, wanted};
use crate::vm::driver::{Stray, VmError};
use haven_model::Name;
use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    sync::Arc,
    time::Duration,
};
use tokio::{sync::watch, task::JoinHandle};
use tokio_util::sync::CancellationToken;

/// The net under lost wake-ups.
const NET: Duration = Duration::from_secs(10);

/// The pause before the driver is asked again.
const AGAIN: Duration = Duration::from_secs(1);
/// Under which name processes that cannot be ended stand among this host's problems.
const STRAYS: &str = "processes of VMs";

/// Runs until `cancel`. VMs that run already (left by an earlier daemon) are adopted, each by its own task.
pub async fn run(
    parts: Arc<AgentParts>,
    networks: watch::Receiver<Networks>,
    leftovers: watch::Receiver<BTreeSet<Name>>,
    cancel: CancellationToken,
) {
    let tasks = tasks(Arc::clone(&parts), networks, leftovers, cancel.clone());
    tokio::join!(end_strays(&parts, &cancel), tasks);
}

async fn tasks(
    parts: Arc<AgentParts>,
    networks: watch::Receiver<Networks>,
    mut leftovers: watch::Receiver<BTreeSet<Name>>,
    cancel: CancellationToken,
) {
    let mut found = adopt(&parts, &cancel).await;
    let mut live = parts.live.clone();
    let mut tasks: BTreeMap<Name, JoinHandle<()>> = BTreeMap::new();
    while !cancel.is_cancelled() {
        let snapshot = Arc::clone(&live.borrow_and_update());
        tasks.retain(|_, task| !task.is_finished());
        if snapshot.revision > 0 {
            let mut names: BTreeSet<Name> = wanted::my_vms(&snapshot, &parts.me).cloned().collect();
            names.append(&mut found);
            for name in names {
                if let Entry::Vacant(free) = tasks.entry(name.clone()) {
                    let task = vm_task::run(
                        Arc::clone(&parts),
                        name.clone(),
                        networks.clone(),
                        cancel.clone(),
                    );
                    free.insert(tokio::spawn(task));
                }
            }
        }
        tokio::select! {
            biased;
            () = cancel.cancelled() => {}
            _ = live.changed() => {}
            Ok(()) = leftovers.changed() => {
                found.extend(leftovers.borrow_and_update().iter().cloned());
            }
            () = parts.clock.sleep(NET) => {}
        }
    }
    for task in tasks.into_values() {
        task.abort();
    }
}

/// Ends the processes that nothing names, which a daemon left that was killed in the middle of a start. Each is ended
/// by itself and asked for until none is left; the driver starts no VM beside one of its own.
async fn end_strays(parts: &AgentParts, cancel: &CancellationToken) {
    loop {
        match ended(parts).await {
            Ok(()) => return parts.solved(STRAYS),
            Err(error) => parts.problem(STRAYS, &error),
        }
        tokio::select! {
            biased;
            () = cancel.cancelled() => return,
            () = parts.clock.sleep(AGAIN) => {}
        }
    }
}

async fn ended(parts: &AgentParts) -> Result<(), VmError> {
    let strays = parts.vms.strays().await?;
    let end = async |stray: &Stray| {
        tracing::warn!(
            vm = stray.vm,
            pid = stray.pid,
            "a VM's process that nothing names is ended"
        );
        parts.vms.end_stray(stray).await
    };
    futures::future::join_all(strays.iter().map(end)).await.into_iter().collect()
}

/// What runs already; asked until the driver answers.
async fn adopt(parts: &AgentParts, cancel: &CancellationToken) -> BTreeSet<Name> {
    loop {
        match parts.vms.list().await {
            Ok(list) => {
                parts.solved("vms");
                return list.into_iter().filter_map(|vm| Name::new(vm.vm).ok()).collect();
            }
            Err(error) => parts.problem("vms", &error),
        }
        tokio::select! {
            biased;
            () = cancel.cancelled() => return BTreeSet::new(),
            () = parts.clock.sleep(AGAIN) => {}
        }
    }
}
