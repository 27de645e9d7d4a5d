//! One task per VM: this part makes and ends those tasks, and nothing else.

use super::{AgentParts, networks::Networks, vm_task, wanted};
use crate::vm::driver::{GuestState, RunningVm, VmError};
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

/// Runs until `cancel`. VMs that run already (left by an earlier daemon) are adopted first.
pub async fn run(
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

/// What a daemon before this one left: strays and VMs that it never let run are ended, the others are told.
async fn left_over(parts: &AgentParts) -> Result<Vec<RunningVm>, VmError> {
    for stray in parts.vms.strays().await? {
        tracing::warn!(
            vm = stray.vm,
            pid = stray.pid,
            "a VM's process that nothing names is ended"
        );
        parts.vms.end_stray(&stray).await?;
    }
    let list = parts.vms.list().await?;
    for vm in &list {
        if matches!(parts.vms.state(&vm.vm).await, Ok(GuestState::NotStarted)) {
            tracing::warn!(vm = vm.vm, pid = vm.pid, "it was started and never let run: ended");
            parts.vms.kill(&vm.vm).await?;
        }
    }
    parts.vms.list().await
}

/// What runs already; asked until the driver answers, since a VM that is overlooked could be started twice.
async fn adopt(parts: &AgentParts, cancel: &CancellationToken) -> BTreeSet<Name> {
    loop {
        match left_over(parts).await {
            Ok(list) => {
                parts.solved("vms");
                return list.into_iter().filter_map(|vm| Name::new(vm.vm).ok()).collect();
            }
            Err(error) => parts.problem("vms", &error),
        }
        tokio::select! {
            biased;
            () = cancel.cancelled() => return BTreeSet::new(),
            () = parts.clock.sleep(Duration::from_secs(1)) => {}
        }
    }
}
