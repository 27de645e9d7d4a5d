//! Mirrored volumes on this host: opened by the owner of their VM ([`open`]), served to it by the others ([`serve`]), compared
//! when somebody asks for it ([`check`]), kept as they were ([`copies`]). What an owner does while its VM runs is its task's (`vm_task/mirrors.rs`).

pub mod check;
pub mod copies;
pub mod open;
pub mod serve;

use super::{
    AgentParts,
    disk_keys::{self, Missing},
    storage::{StorageFailure, VolumeName},
};
use crate::storage::mirrored::{driver::Base, kept::KeptOf};
use haven_model::{
    Name, PoolSpec, Snapshot, keys,
    volume::{ReplicaIs, Volume, VolumeRef},
};
use haven_store::{
    raw::{Compare, Op, StoreError},
    seal::Plain,
};
use std::path::Path;

/// What a volume's file, its process and its key are named after.
#[must_use]
pub fn name(of: &VolumeRef, volume: &Volume) -> VolumeName {
    VolumeName { vm: of.vm.clone(), disk: of.disk.clone(), vm_uid: volume.vm_uid.clone() }
}

/// The key of a volume that is encrypted; made as long as nobody has opened that.
pub(super) async fn key(
    parts: &AgentParts,
    of: &VolumeRef,
    volume: &Volume,
) -> Result<Option<Plain>, StorageFailure> {
    let live = parts.live.borrow().clone();
    let vm = live.vms.get(&of.vm).filter(|vm| vm.meta.uid == volume.vm_uid);
    let spec = vm.and_then(|vm| vm.spec.disks.iter().find(|disk| disk.name == of.disk));
    // To a guest the head of such a disk, in clear, is an empty disk.
    if spec.is_some_and(|disk| disk.encrypted != volume.encrypted) {
        let (vm, disk) = (&of.vm, &of.disk);
        let what = format!(
            "the record of the disk `{disk}` of {vm} and its VM do not say the same of whether it is encrypted, so it is not opened; an older Haven may have written one of them: `haven get vm/{vm} -o yaml` and `haven volume show {vm}.{disk}` tell"
        );
        return Err(StorageFailure { what });
    }
    if !volume.encrypted {
        return Ok(None);
    }
    let source = volume.cloned.as_deref();
    let source = source.map(|from| {
        let VolumeRef { vm, disk } = &from.volume;
        disk_keys::source(vm, disk, &from.vm_uid)
    });
    let missing = match &source {
        _ if volume.run > 0 => Missing::Refused,
        Some(source) => Missing::Of(source),
        None => Missing::New,
    };
    disk_keys::key(parts, &name(of, volume), missing).await.map(Some)
}

/// Its pool.
pub(super) fn pool(snapshot: &Snapshot, volume: &Volume) -> Option<PoolSpec> {
    snapshot.pools.get(&volume.pool).map(|pool| pool.spec.clone())
}

/// What this host puts in the place of its replica before that is opened, if it was not open since.
pub(super) fn base(me: &Name, volume: &Volume, name: &VolumeName, replica: &Path) -> Option<Base> {
    let based = volume.based(me)?;
    let (replica, volume) = (replica.to_owned(), name.clone());
    let kept = KeptOf { replica, volume, copy: based.copy.clone() };
    Some(Base { run: based.run, kept })
}

/// What the owner's writing of a volume's record rests on: the record that was read, the placement that makes this host the
/// owner, and that its session was not closed.
pub struct Owner {
    /// The epoch of the placement. Other things of that may change while a volume is opened: where its guest came from, say.
    pub epoch: u64,
    /// The session.
    pub session: u64,
}

impl Owner {
    /// Writes a volume's record over the one in `live`; the store's revision of it, or nothing when something has changed.
    ///
    /// # Errors
    /// When the store does not answer. It may have been written all the same.
    pub async fn write(
        &self,
        parts: &AgentParts,
        live: &Snapshot,
        of: &VolumeRef,
        record: &Volume,
    ) -> Result<Option<i64>, StoreError> {
        let Some((compare, put)) = self.over(parts, live, of, record) else { return Ok(None) };
        let outcome = parts.store.txn(compare, vec![put]).await?;
        Ok(outcome.succeeded.then_some(outcome.revision))
    }

    /// What is compared when it is written, and the writing; nothing when it is not this host's to write.
    #[must_use]
    pub fn over(
        &self,
        parts: &AgentParts,
        live: &Snapshot,
        of: &VolumeRef,
        record: &Volume,
    ) -> Option<(Vec<Compare>, Op)> {
        let read = live.volumes.get(of)?;
        // Of one that was shut its owner can only begin another run.
        if read.shut && record.run <= read.run {
            return None;
        }
        let placed = live.placements.get(&of.vm);
        let placed = placed.filter(|p| p.host == parts.me && p.epoch == self.epoch)?;
        let open = parts.current_session().is_some_and(|now| now.number == self.session);
        // Who closes a session says so there.
        let lost = live.lost.get(&parts.me);
        if !open || lost.is_some_and(|lost| lost.session >= self.session) {
            return None;
        }
        let key = keys::lost(&parts.me);
        let compare = vec![
            Compare::ModRevision(keys::volume(of), read.revision),
            Compare::ModRevision(keys::placement(&of.vm), placed.revision),
            match lost {
                Some(lost) => Compare::ModRevision(key, lost.revision),
                None => Compare::Absent(key),
            },
        ];
        let value = serde_json::to_vec(record).expect("a record is plain data");
        Some((compare, Op::Put(keys::volume(of), value.into())))
    }
}

/// A replica that is served to a run, as its host tells it.
pub(super) fn served(
    snapshot: &Snapshot,
    of: &VolumeRef,
    host: &Name,
    run: u64,
) -> Option<crate::vm::mirrors::ReplicaAt> {
    let Some(ReplicaIs::Served { run: now, port, instance, boot }) =
        snapshot.replica_told(of, host)
    else {
        return None;
    };
    let address = snapshot.hosts.get(host)?.spec.address;
    (*now == run).then(|| crate::vm::mirrors::ReplicaAt {
        host: host.clone(),
        address: address.into(),
        port: *port,
        instance: instance.clone(),
        boot: boot.clone(),
    })
}
