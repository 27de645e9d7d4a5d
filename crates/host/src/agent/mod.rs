//! The agent: the part of the daemon that makes its host match what was committed.
//!
//! ```text
//!             live copy ──┬──► lease.rs       renews, moves the guard's deadline, tells the session
//!                         ├──► networks.rs    bridges, tunnels, taps, firewall
//!                         ├──► vms.rs         one task per VM (vm_task.rs; what to do next: vm_step.rs, pure;
//!                         │                   what a start needs: vm_start.rs; moved live: vm_task/moves.rs, tunnel.rs)
//!                         ├──► volumes.rs     volumes that are nobody's
//!                         ├──► mirrored/      replicas of mirrored volumes, served, opened or compared (while a VM runs:
//!                         │                   vm_task/mirrors.rs)
//!                         ├──► backup/        backups of VMs that are placed here, and what is compared of them
//!                         ├──► frontends.rs   balancer and service addresses
//!                         ├──► load_watch.rs  what the work here takes, for balancing it
//!                         ├──► maintenance.rs the machine restarted or upgraded, when it is its turn
//!                         └──► status.rs      what this host is and what is wrong with it
//! ```
//!
//! What it promises:
//! - It starts a VM only within an open session, on a live copy that is not older than the session, after a
//!   transaction that compared the VM's placement, and with the guard holding the process before it runs.
//! - It refuses an epoch lower than the one it holds, and ends what is not its own.
//! - Every part takes the whole wanted state from the live copy each time; a signal only wakes it.
//! - The daemon may die at any moment: the VMs run on under the guard, and the next daemon adopts them.
//!
//! Rejected: one loop for all VMs (a slow stop of one would delay the start of another), and remembering wanted
//! state in files (the store has it).

pub mod backup;
pub mod clients;
pub mod disk_keys;
pub mod failsafe;
pub mod frontends;
pub mod hang_watch;
mod health_watch;
pub mod images;
pub mod lease;
mod load_watch;
mod maintenance;
pub mod mirrored;
pub mod networks;
mod own_record;
pub mod remains;
mod room_watch;
mod shares;
pub mod status;
pub mod storage;
pub mod timers;
pub mod tunnel;
mod uplink_watch;
pub mod vm_start;
pub mod vm_step;
pub mod vm_task;
pub mod vms;
pub mod volumes;
pub mod wanted;

#[cfg(test)]
mod agent_test;
#[cfg(test)]
mod backup_test;
#[cfg(test)]
mod ceph_snapshots_test;
#[cfg(test)]
mod clients_test;
#[cfg(test)]
mod clones_test;
#[cfg(test)]
mod disk_keys_test;
#[cfg(test)]
mod fixture;
#[cfg(test)]
mod hot_disks_test;
#[cfg(test)]
mod lease_test;
#[cfg(test)]
mod mirrored_test;
#[cfg(test)]
mod snapshots_test;
#[cfg(test)]
mod vm_step_test;
#[cfg(test)]
mod wanted_test;

use crate::{
    balance::driver::BalanceDriver,
    health::Prober,
    heartbeat::Heard,
    machine::Machine,
    monitor::Meter,
    network::{address::AddressDriver, driver::NetworkDriver, uplink::UplinkDriver},
    storage::mirrored::{driver::ReplicaDriver, kept::KeptCopies, pieces::Pieces},
    vm::driver::VmDriver,
};
use haven_model::{Event, Name, ObjectRef, Severity, Snapshot, keys};
use haven_store::{
    clock::Clock,
    raw::{EtcdStore, Op},
    seal::ClusterKey,
};
use lease::Session;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, PoisonError},
};
use storage::Storage;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;
pub use uplink_watch::CutOff;

/// What a host knows of itself when its daemon starts.
#[derive(Clone, Debug, Default)]
pub struct HostFacts {
    /// Logical CPUs.
    pub cpus: u32,
    /// Installed memory, bytes.
    pub memory_bytes: u64,
    /// Whether guests run under KVM.
    pub kvm: bool,
    /// QEMU's version.
    pub qemu: String,
    /// Changes at every boot.
    pub boot_id: String,
    /// Haven's version.
    pub version: String,
    /// What is wrong already, one sentence each.
    pub problems: Vec<String>,
}

/// Everything the parts of an agent share.
pub struct AgentParts {
    /// This host.
    pub me: Name,
    /// The store.
    pub store: EtcdStore,
    /// The live copy.
    pub live: watch::Receiver<Arc<Snapshot>>,
    /// What the heartbeats say.
    pub heard: Heard,
    /// This host's session.
    pub session: watch::Receiver<Option<Session>>,
    /// Runs VMs.
    pub vms: Arc<dyn VmDriver>,
    /// Makes networks.
    pub network: Arc<dyn NetworkDriver>,
    /// Looks at what leads out of this host.
    pub uplinks: Arc<dyn UplinkDriver>,
    /// What is cut off here from the world.
    pub cut_off: CutOff,
    /// Holds service addresses.
    pub address: Arc<dyn AddressDriver>,
    /// Balances.
    pub balance: Arc<dyn BalanceDriver>,
    /// Under which secrets are sealed; nothing where it cannot be derived.
    pub secrets: Option<ClusterKey>,
    /// Keeps volumes, images and seeds.
    pub storage: Arc<dyn Storage>,
    /// Serves replicas of this host.
    pub replicas: Arc<dyn ReplicaDriver>,
    /// Keeps copies of them as they were.
    pub kept: Arc<dyn KeptCopies>,
    /// Tells what pieces of replicas hold.
    pub pieces: Arc<dyn Pieces>,
    /// Leads to other hosts' processes that take guests.
    pub tunnel: Arc<dyn tunnel::Tunnel>,
    /// Restarts and upgrades the machine.
    pub machine: Arc<dyn Machine>,
    /// Measures what the work here takes.
    pub meter: Arc<dyn Meter>,
    /// Asks guests for their health.
    pub prober: Arc<dyn Prober>,
    /// What this host is; nothing until it is known. No VM is started and no status is written before.
    pub facts: watch::Receiver<Option<HostFacts>>,
    /// This daemon's clock.
    pub clock: Clock,
    /// Wall clock, milliseconds since 1970, for what people read.
    pub wall_ms: Arc<dyn Fn() -> i64 + Send + Sync>,
    /// What is wrong now, by part.
    pub problems: Arc<Problems>,
    /// The store's member here.
    pub store_member: watch::Receiver<StoreMember>,
}

/// The store's member on this host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoreMember {
    /// Its id, if there is one that votes.
    pub id: Option<u64>,
    /// It does not answer, or the one that was here before did not.
    pub silent: bool,
}

/// What is wrong now, by part; a change wakes the status.
#[derive(Default)]
pub struct Problems {
    now: Mutex<BTreeMap<String, String>>,
    changed: Notify,
}

impl Problems {
    /// Says what is wrong with a part, or that nothing is; whether that is news.
    pub fn set(&self, part: &str, what: Option<String>) -> bool {
        let mut now = self.now.lock().unwrap_or_else(PoisonError::into_inner);
        let differs = now.get(part) != what.as_ref();
        if differs {
            match what {
                Some(what) => now.insert(part.to_owned(), what),
                None => now.remove(part),
            };
            self.changed.notify_one();
        }
        differs
    }

    /// All of them.
    #[must_use]
    pub fn list(&self) -> Vec<String> {
        let now = self.now.lock().unwrap_or_else(PoisonError::into_inner);
        now.iter().map(|(part, what)| format!("{part}: {what}")).collect()
    }
}

/// An error with all its sources, in one sentence.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        text.push_str(": ");
        text.push_str(&inner.to_string());
        source = inner.source();
    }
    text
}

impl AgentParts {
    /// Notes that a part of this host fails; logged once until it changes.
    pub fn problem(&self, part: &str, error: &dyn std::error::Error) {
        let text = chain(error);
        if self.problems.set(part, Some(text.clone())) {
            tracing::error!(part, "{text}");
        }
    }

    /// Notes that a part works.
    pub fn solved(&self, part: &str) {
        if self.problems.set(part, None) {
            tracing::info!(part, "works again");
        }
    }

    /// The operation that writes an event of this agent.
    #[must_use]
    pub fn event(&self, object: &ObjectRef, severity: Severity, message: String) -> Op {
        let at_ms = (self.wall_ms)();
        let number = self.clock.now().0 % 1_000_000_000;
        let event = Event {
            id: format!("{at_ms:014}-{}-{number:09}", self.me),
            at_ms,
            object: object.clone(),
            severity,
            message,
            by: format!("agent on {}", self.me),
        };
        let value = serde_json::to_vec(&event).expect("an event is plain data");
        Op::Put(keys::event(&event.id), value.into())
    }

    /// The session, if it is open and the live copy is not older than it.
    #[must_use]
    pub fn current_session(&self) -> Option<Session> {
        let session = (*self.session.borrow())?;
        (self.live.borrow().revision >= session.since_revision).then_some(session)
    }
}

/// Runs all parts until `cancel`; the lease is run by the caller, beside it.
pub async fn run(parts: Arc<AgentParts>, cancel: CancellationToken) {
    let (applied, networks) = watch::channel(networks::Networks::default());
    let (left, leftovers) = watch::channel(BTreeSet::new());
    tokio::join!(
        networks::run(Arc::clone(&parts), applied, cancel.clone()),
        vms::run(Arc::clone(&parts), networks, leftovers, cancel.clone()),
        volumes::run(Arc::clone(&parts), left, cancel.clone()),
        mirrored::serve::run(Arc::clone(&parts), cancel.clone()),
        mirrored::check::run(Arc::clone(&parts), cancel.clone()),
        mirrored::copies::run(Arc::clone(&parts), cancel.clone()),
        clients::shut::run(Arc::clone(&parts), cancel.clone()),
        backup::verify::run(Arc::clone(&parts), cancel.clone()),
        frontends::run(Arc::clone(&parts), cancel.clone()),
        images::run(Arc::clone(&parts), cancel.clone()),
        uplink_watch::run(Arc::clone(&parts), cancel.clone()),
        load_watch::run(Arc::clone(&parts), cancel.clone()),
        room_watch::run(Arc::clone(&parts), cancel.clone()),
        maintenance::run(Arc::clone(&parts), cancel.clone()),
        status::run(Arc::clone(&parts), cancel.clone()),
    );
}
