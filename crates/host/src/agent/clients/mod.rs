//! Who has the disks of VMs in pools of Ceph clusters open: written before a process is begun, noted once it is there (what a VM's
//! task does then is in `vm_task/clients.rs`), shut out when its host is not heard ([`shut`]).

pub mod shut;

use super::AgentParts;
use haven_model::{Name, Placement, Versioned, clients::DiskClients, keys};
use haven_store::raw::{Compare, Op, StoreError};
use std::time::Duration;

/// So often the record may have been changed by others at the same time.
const TRIES: u32 = 5;
/// The pause before the next try.
const AGAIN: Duration = Duration::from_millis(100);

/// Why a process may not be begun.
#[derive(Debug, thiserror::Error)]
pub enum NotBegun {
    /// The store does not answer.
    #[error("who has its disks open cannot be written")]
    Store(#[from] StoreError),
    /// The record cannot be read.
    #[error("the record {0} cannot be read by this host's version of Haven; update this host")]
    Unreadable(String),
    /// It is another host's by now, or the record changes all the time.
    #[error("its owner has just changed")]
    Owner,
}

/// Writes that this host begins to open disks of a VM in Ceph, before it does; what stood there before. Whoever would shut them
/// knows from then on that it does not know all clients.
///
/// # Errors
/// When it may not begin.
pub async fn begin(
    parts: &AgentParts,
    vm: &Name,
    vm_uid: &str,
    epoch: u64,
) -> Result<DiskClients, NotBegun> {
    let key = keys::clients(vm);
    for _ in 0..TRIES {
        let there = parts.store.get(&key).await?;
        let before = match &there {
            None => DiskClients::default(),
            Some(kv) => {
                serde_json::from_slice(&kv.value).map_err(|_| NotBegun::Unreadable(key.clone()))?
            }
        };
        let placed = parts.live.borrow().placements.get(vm).cloned();
        // What was begun for an owner of before may not begin any more.
        let placed = placed.filter(|placed| placed.epoch == epoch).ok_or(NotBegun::Owner)?;
        let record = before.begun_by(vm_uid, &parts.me);
        let over = there.as_ref().map_or(0, |kv| kv.mod_revision);
        if put(parts, vm, over, &placed, &record).await?.is_some() {
            let of_it = before.vm_uid == vm_uid;
            return Ok(if of_it { before } else { DiskClients::default() });
        }
        parts.clock.sleep(AGAIN).await;
    }
    Err(NotBegun::Owner)
}

/// Writes the record over the one of this revision and over the placement; the store's revision of it, or nothing when one of them
/// has changed.
///
/// # Errors
/// When the store does not answer. It may have been written all the same.
pub async fn put(
    parts: &AgentParts,
    vm: &Name,
    over: i64,
    placed: &Versioned<Placement>,
    record: &DiskClients,
) -> Result<Option<i64>, StoreError> {
    let key = keys::clients(vm);
    let compare = vec![
        match over {
            0 => Compare::Absent(key.clone()),
            revision => Compare::ModRevision(key.clone(), revision),
        },
        Compare::ModRevision(keys::placement(vm), placed.revision),
    ];
    let value = serde_json::to_vec(record).expect("a record is plain data");
    let outcome = parts.store.txn(compare, vec![Op::Put(key, value.into())]).await?;
    Ok(outcome.succeeded.then_some(outcome.revision))
}
