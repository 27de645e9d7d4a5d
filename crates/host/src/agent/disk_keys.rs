//! Keys of encrypted disks (docs/decisions/0030-encrypted.md): made by the first host that makes the disk, kept sealed in the store,
//! opened by whoever needs one.
//!
//! ```text
//!   no record, no disk ──► a random key, sealed, over "there is none" and over the VM ──► the disk
//!   no record, a disk  ──► refused: its key is gone, and another one would not open it
//! ```
//!
//! The record comes before the first byte of the disk, so a daemon that dies in between leaves a key that the next one uses.

use super::{
    AgentParts, chain,
    storage::{StorageFailure, VolumeName},
};
use haven_model::{Name, ObjectRef, keys, object::Kind, volume::DiskKey};
use haven_store::{
    raw::{Compare, Op, RawKv},
    seal::{ClusterKey, DiskKeyOf, Plain, new_disk_key},
};

/// What is done when there is no key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Missing<'a> {
    /// The disk is there, or comes from elsewhere: nothing can be done.
    Refused,
    /// The disk is not made yet: it gets a new one.
    New,
    /// The same, and it is made from this one, so it gets the key of that.
    Of(&'a VolumeName),
}

fn says(what: String) -> StorageFailure {
    StorageFailure { what }
}

fn of(name: &VolumeName) -> DiskKeyOf<'_> {
    DiskKeyOf { vm: &name.vm, vm_uid: &name.vm_uid, disk: &name.disk }
}

/// Opens a record; a sentence when it was damaged.
fn open(secrets: &ClusterKey, name: &VolumeName, raw: &RawKv) -> Result<Plain, StorageFailure> {
    let damaged = |why: String| {
        says(format!(
            "the record of the key of the disk `{}` of {} is damaged ({why}), so it cannot be opened; nothing was changed in it. Only an older copy of the store's record {} brings its content back",
            name.disk,
            name.vm,
            keys::disk_key(&name.vm_uid, &name.disk)
        ))
    };
    let record: DiskKey =
        serde_json::from_slice(&raw.value).map_err(|error| damaged(error.to_string()))?;
    secrets.open_disk(&of(name), &record.sealed).map_err(|error| damaged(chain(&error)))
}

async fn read(parts: &AgentParts, name: &VolumeName) -> Result<Option<RawKv>, StorageFailure> {
    let key = keys::disk_key(&name.vm_uid, &name.disk);
    let unanswered = |error: haven_store::raw::StoreError| {
        says(format!("the store does not tell the key of the disk `{}` ({error})", name.disk))
    };
    Ok(parts.store.get_many(&[key]).await.map_err(unanswered)?.pop().flatten())
}

/// The key of an encrypted disk, made if it may be.
///
/// # Errors
/// A sentence: there is none, it is damaged, or the store does not answer.
pub async fn key(
    parts: &AgentParts,
    name: &VolumeName,
    missing: Missing<'_>,
) -> Result<Plain, StorageFailure> {
    let VolumeName { vm, disk, vm_uid } = name;
    let secrets = parts.secrets.as_ref().ok_or_else(|| {
        says(format!("this host cannot derive the cluster's key, so it cannot open the encrypted disk `{disk}`; look at `haven host ls`"))
    })?;
    if let Some(raw) = read(parts, name).await? {
        return open(secrets, name, &raw);
    }
    let plain = match missing {
        Missing::Refused => {
            return Err(says(format!(
                "the key of the encrypted disk `{disk}` of {vm} is not in the store ({}), and without it nothing can read what is on it; nothing was changed in it. Only an older copy of the store's record brings it back",
                keys::disk_key(vm_uid, disk)
            )));
        }
        Missing::New => new_disk_key().map_err(|error| says(chain(&error)))?,
        Missing::Of(source) => {
            let raw = read(parts, source).await?.ok_or_else(|| {
                says(format!(
                    "the key of the disk `{}` of {}, from which the disk `{disk}` is made, is not in the store; delete {vm}, and clone {} again",
                    source.disk, source.vm, source.vm
                ))
            })?;
            open(secrets, source, &raw)?
        }
    };
    let sealed = secrets.seal_disk(&of(name), &plain).map_err(|error| says(chain(&error)))?;
    let record = serde_json::to_vec(&DiskKey { sealed }).expect("a record is plain data");
    let record_key = keys::disk_key(vm_uid, disk);
    // Not once its VM is gone: nobody would remove it any more.
    let object = keys::object(&ObjectRef::new(Kind::Vm, vm.clone()));
    let live = std::sync::Arc::clone(&parts.live.borrow());
    let its = live.vms.get(vm).filter(|object| object.meta.uid == *vm_uid);
    let revision = its.map(|object| object.revision).ok_or_else(|| {
        says(format!("{vm} is not known any more, so its disk `{disk}` gets no key"))
    })?;
    let over = vec![Compare::Absent(record_key.clone()), Compare::ModRevision(object, revision)];
    let put = parts.store.txn(over, vec![Op::Put(record_key, record.into())]).await;
    let put = put.map_err(|error| {
        says(format!("the key of the disk `{disk}` cannot be kept in the store ({error})"))
    })?;
    if put.succeeded {
        tracing::info!(%vm, %disk, "a key was made for its encrypted disk");
        return Ok(plain);
    }
    // Another host may have been first.
    match read(parts, name).await? {
        Some(raw) => open(secrets, name, &raw),
        None => Err(says(format!("{vm} was changed while a key was made for its disk `{disk}`"))),
    }
}

/// The name of the disk that another one is made from.
#[must_use]
pub fn source(vm: &Name, disk: &Name, vm_uid: &str) -> VolumeName {
    VolumeName { vm: vm.clone(), disk: disk.clone(), vm_uid: vm_uid.to_owned() }
}
