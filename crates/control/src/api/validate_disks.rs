//! Whether the disks of a VM can be as they are asked for.

use super::validate::{After, Say};
use haven_model::{
    Name, PoolDriverKind, VmSpec,
    host::{BACKUPS, ENCRYPTS, PLUGS},
    vm::{DiskSpec, SLOTS},
    volume::VolumeRef,
};
use haven_plan::tolerance::migration::speaks_less;
use std::collections::BTreeSet;

/// The least that a disk may be limited to, bytes per second: one request of a guest may be as large.
const LEAST_BANDWIDTH: u64 = 1 << 20;

/// What is encrypted at once, bytes.
const SECTOR: u64 = 512;

/// Says everything that is wrong.
pub(super) fn disks(after: &After<'_>, spec: &VmSpec, name: &Name, say: &mut Say<'_>) {
    let mut disks = BTreeSet::new();
    for disk in &spec.disks {
        if !disks.insert(&disk.name) {
            say(
                ("name", &disk.name),
                format!("the disk `{}` is given twice", disk.name),
                "each disk has a name of its own",
            );
        }
        if disk.size.0 == 0 {
            say(
                ("size", &""),
                format!("the disk `{}` has no size", disk.name),
                "write for example `size: 10GiB`",
            );
        }
        limits(disk, say);
        bare(after, disk, say);
        changed(after, name, disk, say);
        encrypted(after, name, disk, say);
        port(after, name, disk, say);
        name_is_free(after, name, disk, say);
    }
    let mut ports = BTreeSet::new();
    for (disk, slot) in spec.disks.iter().filter_map(|disk| Some((disk, disk.slot?))) {
        if !ports.insert(slot) {
            say(
                ("slot", &slot),
                format!("the port {slot} is given to two disks, one of them `{}`", disk.name),
                "leave `slot` out, and a free one is chosen",
            );
        }
    }
    left_out(after, spec, name, say);
}

/// What disks in pools that keep nothing but what is written cannot do yet.
fn bare(after: &After<'_>, disk: &DiskSpec, say: &mut Say<'_>) {
    let of = after.pool(&disk.pool).and_then(|pool| super::pools::bare(pool.driver));
    if let Some((backup, (of, _))) = disk.backup.as_ref().zip(of) {
        say(
            ("backup", backup),
            format!(
                "the disk `{}` is made from a backup, and the pool `{}` of {of} does not take that yet",
                disk.name, disk.pool
            ),
            "restore it into another pool (`haven backup restore … --pool`)",
        );
    }
}

/// What of a disk is about its being encrypted.
fn encrypted(after: &After<'_>, vm: &Name, disk: &DiskSpec, say: &mut Say<'_>) {
    let old = before(after, vm, &disk.name);
    if let Some(old) = old.filter(|old| old.encrypted != disk.encrypted) {
        let is = if old.encrypted { "encrypted" } else { "not encrypted" };
        return say(
            ("encrypted", &disk.encrypted),
            format!("the disk `{}` of {vm} was made {is}, and stays so", disk.name),
            "attach another disk that is as you want it, and copy within the guest; or back the VM up and restore it with that changed",
        );
    }
    let source = disk.copy_of.as_deref().and_then(|of| {
        let vm = after.snapshot.vms.get(&of.vm).filter(|vm| vm.meta.uid == of.vm_uid)?;
        vm.spec.disks.iter().find(|disk| disk.name == of.disk)
    });
    if let Some(source) = source.filter(|source| source.encrypted != disk.encrypted) {
        say(
            ("encrypted", &disk.encrypted),
            format!(
                "the disk `{}` is made from one that is {}, and is as that",
                disk.name,
                if source.encrypted { "encrypted" } else { "not encrypted" }
            ),
            "write it as it is in the source",
        );
    }
    if disk.encrypted && !disk.size.0.is_multiple_of(SECTOR) {
        say(
            ("size", &disk.size),
            format!(
                "the disk `{}` is to be encrypted, which is done in sectors of 512 bytes",
                disk.name
            ),
            "make its size a multiple of that",
        );
    }
    if !disk.encrypted || old.is_some() {
        return;
    }
    let of = match after.pool(&disk.pool).map(|pool| pool.driver) {
        Some(PoolDriverKind::Rbd) => Some((
            "a Ceph cluster",
            "put it into a pool of another kind, or encrypt the disks of the OSDs (`ceph-volume … --dmcrypt`)",
        )),
        Some(PoolDriverKind::Nfs) => {
            Some(("an NFS server", "put it into a pool of another kind, or encrypt on the server"))
        }
        _ => None,
    };
    if let Some((of, hint)) = of {
        say(
            ("encrypted", &true),
            format!(
                "the disk `{}` is to be encrypted, and the pool `{}` of {of} does not take that yet",
                disk.name, disk.pool
            ),
            hint,
        );
    }
    if let Some(older) = speaks_less(after.snapshot, ENCRYPTS) {
        say(
            ("encrypted", &true),
            format!(
                "{older} has not said that it can encrypt disks: it runs an older Haven, or has not come up yet"
            ),
            "wait until all hosts are up and upgraded",
        );
    }
}

/// What of a disk is about its port.
fn port(after: &After<'_>, vm: &Name, disk: &DiskSpec, say: &mut Say<'_>) {
    let old = before(after, vm, &disk.name);
    if let Some(slot) = disk.slot.filter(|slot| *slot >= SLOTS) {
        say(
            ("slot", &slot),
            format!("there is no port {slot} for the disk `{}`", disk.name),
            "ports are 0 to 14; leave `slot` out, and a free one is chosen",
        );
    }
    if let Some((slot, old)) = disk.slot.zip(old)
        && old.slot != Some(slot)
    {
        say(
            ("slot", &slot),
            format!("the disk `{}` of {vm} keeps the port that it has", disk.name),
            "leave `slot` out",
        );
    }
    let new_port = disk.slot.is_some() && old.is_none_or(|old| old.slot.is_none());
    let goes = disk.detached && old.is_none_or(|old| !old.detached);
    if (goes || new_port)
        && let Some(older) = speaks_less(after.snapshot, PLUGS)
    {
        say(
            (if disk.detached { "detached" } else { "slot" }, &""),
            format!(
                "{older} has not said that it knows of disks that come and go: it runs an older Haven, or has not come up yet"
            ),
            "wait until all hosts are up and upgraded",
        );
    }
}

fn before<'a>(after: &'a After<'_>, vm: &Name, disk: &Name) -> Option<&'a DiskSpec> {
    let old = after.snapshot.vms.get(vm).filter(|old| !old.meta.deleting)?;
    old.spec.disks.iter().find(|old| old.name == *disk)
}

/// A host that was away may yet remove what it has of a disk of this name.
fn name_is_free(after: &After<'_>, vm: &Name, disk: &DiskSpec, say: &mut Say<'_>) {
    let of = VolumeRef { vm: vm.clone(), disk: disk.name.clone() };
    let is = after.snapshot.vms.get(vm).map(|vm| &vm.meta.uid);
    if after.snapshot.gone.get(&of).is_some_and(|gone| Some(&gone.vm_uid) == is) {
        say(
            ("name", &disk.name),
            format!("{vm} had a disk `{}` that was removed", disk.name),
            "give the new one another name",
        );
    }
}

/// Nothing that was written is lost because a line of a manifest is missing.
fn left_out(after: &After<'_>, spec: &VmSpec, vm: &Name, say: &mut Say<'_>) {
    let Some(old) = after.snapshot.vms.get(vm).filter(|old| !old.meta.deleting) else { return };
    for old in &old.spec.disks {
        if spec.disks.iter().all(|disk| disk.name != old.name) {
            say(
                ("disks", &""),
                format!("the disk `{}` of {vm} is left out, and is not removed by that", old.name),
                &format!(
                    "write it with `detached: true` if its guest shall not see it; `haven volume rm {vm}.{}` removes one that is detached, with all that is on it",
                    old.name
                ),
            );
        }
    }
}

/// A guest that may write nothing at all stands still.
fn limits(disk: &DiskSpec, say: &mut Say<'_>) {
    let limits = disk.limits.unwrap_or_default();
    if limits.iops == Some(0) {
        say(
            ("iops", &0),
            format!("the disk `{}` would take no request at all", disk.name),
            "leave `iops` out for no limit",
        );
    }
    if let Some(bandwidth) = limits.bandwidth.filter(|bandwidth| bandwidth.0 < LEAST_BANDWIDTH) {
        say(
            ("bandwidth", &bandwidth),
            format!("the disk `{}` would stand still for seconds at each request", disk.name),
            "write at least 1MiB, or leave `bandwidth` out for no limit",
        );
    }
}

/// What of a disk that is there can become another. Its guest finds the rest as it was.
fn changed(after: &After<'_>, vm: &Name, disk: &DiskSpec, say: &mut Say<'_>) {
    let Some(old) = before(after, vm, &disk.name) else { return };
    if old.pool != disk.pool {
        return say(
            ("pool", &disk.pool),
            format!(
                "the disk `{}` of {vm} lies in the pool `{}`, and would begin anew, empty",
                disk.name, old.pool
            ),
            "back the VM up and make it again in the other pool: `haven backup restore … --pool`; or give the new disk another name",
        );
    }
    if disk.size < old.size {
        return say(
            ("size", &disk.size),
            format!("the disk `{}` of {vm} is {}, and cannot be made smaller", disk.name, old.size),
            "what its guest wrote at the end would be lost; make a smaller disk under another name, and copy within the guest",
        );
    }
    let pool = after.snapshot.pools.get(&disk.pool);
    let mirrored = pool.is_some_and(|pool| pool.spec.driver == PoolDriverKind::Mirrored);
    let older = speaks_less(after.snapshot, BACKUPS).filter(|_| mirrored && disk.size > old.size);
    if let Some(host) = older {
        say(
            ("size", &disk.size),
            format!(
                "{host} has not said that it can make a mirrored disk larger: it runs an older Haven, or has not come up yet"
            ),
            "wait until all hosts are up and upgraded",
        );
    }
}
