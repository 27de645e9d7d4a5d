//! Faults that befall a host at one step of a live move, however long the move takes to get there.

use crate::{cluster::Cluster, faults::Fault};
use haven_model::{MigrationPhase, Name};
use serde::{Deserialize, Serialize};
use std::{pin::Pin, sync::Arc, time::Duration};

/// How often it is looked how far the move is.
const LOOK: Duration = Duration::from_micros(500);
/// How long a move may take to get there.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long what heals by itself lasts: less than a lease, so that a move may go on.
const BRIEF: Duration = Duration::from_secs(3);

/// One of the two hosts of a move.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    /// The owner at the beginning.
    Old,
    /// Where it goes.
    New,
}

/// What befalls a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Blow {
    /// Its daemon is killed, and its supervisor starts it again.
    Daemon,
    /// The VM's process there is killed.
    Process,
    /// It loses its power.
    Power,
    /// Nothing in it executes for 3 s.
    Pause,
    /// The wire between the two is cut for 3 s.
    Wire,
    /// The manager's daemon is killed, wherever that is.
    Manager,
    /// A person takes the move back.
    TakeBack,
}

/// Once `by` has said `phase` of a move, `blow` befalls `on`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct AtStep {
    /// Who says it.
    pub by: Side,
    /// What is said.
    pub phase: MigrationPhase,
    /// Whom it befalls.
    pub on: Side,
    /// What.
    pub blow: Blow,
    /// So many milliseconds later.
    pub after: u64,
}

impl AtStep {
    /// Every blow at every step that a move takes when nothing goes wrong, at once and 6 ms later.
    pub fn all() -> impl Iterator<Item = Self> {
        use MigrationPhase::{Copying, Following, HandedOver, Listening, Preparing, Stopped};
        let told = [
            (Side::Old, Preparing),
            (Side::New, Preparing),
            (Side::New, Listening),
            (Side::Old, Copying),
            (Side::Old, Stopped),
            (Side::Old, Following),
            (Side::Old, HandedOver),
        ];
        let on = |blow| [Side::Old, Side::New].map(|side| (side, blow));
        let each = [Blow::Daemon, Blow::Process, Blow::Power, Blow::Pause].map(on).concat();
        // These have no side.
        let both = [Blow::Wire, Blow::Manager, Blow::TakeBack].map(|blow| (Side::Old, blow));
        let blows = [each, both.to_vec()].concat();
        told.into_iter().flat_map(move |(by, phase)| {
            let blows = blows.clone();
            [0, 6].into_iter().flat_map(move |after| {
                let at = move |(on, blow)| Self { by, phase, on, blow, after };
                blows.clone().into_iter().map(at)
            })
        })
    }

    /// Waits for the step of the next move of a VM, and lets it happen. A move that never gets there is left alone.
    ///
    /// Not an `async fn`: what befalls is a fault, and this is one.
    pub fn happen<'a>(
        self,
        cluster: &'a Arc<Cluster>,
        vm: &'a Name,
    ) -> Pin<Box<dyn Future<Output = ()> + Send + 'a>> {
        Box::pin(self.strike(cluster, vm))
    }

    async fn strike(self, cluster: &Arc<Cluster>, vm: &Name) {
        let mut looks = PATIENCE.as_micros() / LOOK.as_micros();
        let (old, new, manager) = loop {
            match self.is_there(cluster, vm) {
                Some(hosts) => break hosts,
                None if looks == 0 => return,
                None => tokio::time::sleep(LOOK).await,
            }
            looks -= 1;
        };
        tokio::time::sleep(Duration::from_millis(self.after)).await;
        let host = match self.on {
            Side::Old => old.clone(),
            Side::New => new.clone(),
        };
        let (fault, end) = match self.blow {
            Blow::Daemon => (Fault::KillDaemon(host), None),
            Blow::Process => (Fault::KillProcess(vm.to_string(), host), None),
            Blow::Power => (Fault::PowerOff(host), None),
            Blow::Pause => (Fault::Pause(host.clone()), Some(Fault::Resume(host))),
            Blow::Wire => (Fault::Cut(old.clone(), new.clone()), Some(Fault::Uncut(old, new))),
            Blow::Manager => (Fault::KillDaemon(manager), None),
            Blow::TakeBack => (Fault::CancelMigration(vm.to_string()), None),
        };
        fault.happen(cluster).await;
        if let Some(end) = end {
            tokio::time::sleep(BRIEF).await;
            end.happen(cluster).await;
        }
    }

    /// The two hosts and the manager's, once a move is at this step.
    fn is_there(self, cluster: &Cluster, vm: &Name) -> Option<(String, String, String)> {
        cluster.shared.judge.read(|facts| {
            let snapshot = &facts.snapshot;
            let placement = snapshot.placements.get(vm)?;
            let (old, new, attempt) = match (&placement.moved_from, &placement.moving_to) {
                (Some(from), _) => (&from.host, &placement.host, from.attempt),
                (None, Some(to)) => (&placement.host, &to.host, placement.revision),
                (None, None) => return None,
            };
            let by = match self.by {
                Side::Old => old,
                Side::New => new,
            };
            let told = snapshot.migration_told(vm, by, attempt)?;
            let manager = snapshot.manager.as_ref()?.holder.to_string();
            (told.phase == self.phase).then(|| (old.to_string(), new.to_string(), manager))
        })
    }
}
