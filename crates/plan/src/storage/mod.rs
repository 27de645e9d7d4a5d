//! The storage pillar: what there is to say of pools.
//!
//! Volumes take room only as they are written, so a pool may promise more than it has. Nothing is refused for that; what is
//! promised, used and free is told for each host, and what is about to be full is a risk.

pub mod backups;
pub mod copies;
pub mod replicas;
pub mod schedules;
pub mod shutting;
pub mod snapshots;

use crate::tolerance::admission::size;
use haven_model::{Bytes, Name, PoolDriverKind, PoolSpec, Snapshot, pool::PoolRoom};

/// From so many per cent on a pool is at risk.
pub const NEARLY_FULL: u64 = 85;

/// A pool on one host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Room {
    /// The host that says so.
    pub host: Name,
    /// What it says.
    pub room: PoolRoom,
    /// What its volumes may take in all.
    pub promised: Bytes,
}

/// The room in a pool, as hosts with an open session tell it; of a pool that all hosts share, as the first tells it.
#[must_use]
pub fn rooms(snapshot: &Snapshot, pool: &Name) -> Vec<Room> {
    let Some(spec) = snapshot.pools.get(pool).map(|pool| &pool.spec) else { return Vec::new() };
    let shared = spec.is_shared();
    let told = snapshot.rooms.iter().filter_map(|(host, rooms)| {
        let lease = snapshot.leases.get(host)?;
        let current = !lease.closed && lease.session == rooms.session;
        let room = *rooms.pools.get(pool).filter(|_| current)?;
        let promised = promised(snapshot, pool, (!shared).then_some(host));
        Some(Room { host: host.clone(), room, promised })
    });
    told.take(if shared { 1 } else { usize::MAX }).collect()
}

/// What the volumes of a pool may take, on one host or in all.
fn promised(snapshot: &Snapshot, pool: &Name, host: Option<&Name>) -> Bytes {
    if snapshot.pools.get(pool).is_some_and(|p| p.spec.driver == PoolDriverKind::Mirrored) {
        return Bytes(replicas::promised(snapshot, pool, host));
    }
    let here = |vm: &Name| match host {
        None => true,
        Some(host) => snapshot.placements.get(vm).is_some_and(|placed| placed.host == *host),
    };
    let vms = snapshot.vms.iter().filter(|(vm, _)| here(vm));
    let disks = vms.flat_map(|(_, vm)| vm.spec.disks.iter()).filter(|disk| disk.pool == *pool);
    Bytes(disks.map(|disk| disk.size.0).sum())
}

fn on(spec: &PoolSpec, host: &Name) -> String {
    match spec.driver {
        PoolDriverKind::Local | PoolDriverKind::Mirrored => format!(" on {host}"),
        PoolDriverKind::Shared
        | PoolDriverKind::Rbd
        | PoolDriverKind::Nfs
        | PoolDriverKind::Gluster => String::new(),
    }
}

/// A sentence for each host.
#[must_use]
pub fn in_words(snapshot: &Snapshot, pool: &Name) -> Vec<String> {
    let Some(spec) = snapshot.pools.get(pool).map(|pool| &pool.spec) else { return Vec::new() };
    let words = |of: Room| {
        let Room { host, room, promised } = of;
        let more = if promised > room.total {
            ", more than there is: they take it as they are written"
        } else {
            ""
        };
        format!(
            "{pool}{}: {} of {} are free; its volumes take {} and may take {}{more}",
            on(spec, &host),
            size(room.free.0),
            size(room.total.0),
            size(room.used.0),
            size(promised.0)
        )
    };
    rooms(snapshot, pool).into_iter().map(words).collect()
}

/// The pools that are about to be full.
#[must_use]
pub fn risks(snapshot: &Snapshot) -> Vec<String> {
    let mut risks = Vec::new();
    for (pool, object) in &snapshot.pools {
        for Room { host, room, .. } in rooms(snapshot, pool) {
            if room.full() >= NEARLY_FULL {
                risks.push(format!(
                    "pool {pool}{} is {} % full, {} are free: enlarge it, or remove what is not needed, before its VMs cannot write",
                    on(&object.spec, &host),
                    room.full(),
                    size(room.free.0)
                ));
            }
        }
    }
    risks.extend(replicas::risks(snapshot));
    risks
}

#[cfg(test)]
mod backups_test;
#[cfg(test)]
mod replicas_test;
#[cfg(test)]
mod schedules_test;
#[cfg(test)]
mod shutting_test;
#[cfg(test)]
mod snapshots_test;
#[cfg(test)]
mod storage_test;
