//! Where the replicas of mirrored volumes are, and where a VM may run for their sake.
//!
//! All mirrored disks of a VM are on the same hosts, so that there is always one where it can run. The plan chooses the
//! hosts, once when a disk is new and again when a replica's host has been lost for long; which replicas count is its owner's
//! to say (docs/decisions/0022-mirrored-volumes.md).

use super::copies;
use crate::{
    HostState,
    tolerance::admission::size,
    work::{Work, vm_ref},
};
use haven_model::{
    Action, Name, PoolDriverKind, PoolSpec, Snapshot, Versioned, VmPhase, VmSpec,
    host::{ENCRYPTS, MIRRORS},
    object::Stored,
    vm::DiskSpec,
    volume::{FirstContent, ReplicaState, Volume, VolumeRef},
};
use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
};

/// Hosts with the same value of this label fail together.
const ZONE: &str = "zone";

/// The mirrored disks of a VM, with their pools.
pub(crate) fn mirrored<'a>(
    snapshot: &'a Snapshot,
    vm: &'a VmSpec,
) -> impl Iterator<Item = (&'a DiskSpec, &'a PoolSpec)> {
    vm.disks.iter().filter_map(|disk| {
        let pool = &snapshot.pools.get(&disk.pool)?.spec;
        (pool.driver == PoolDriverKind::Mirrored).then_some((disk, pool))
    })
}

/// Whether a VM has any.
pub(crate) fn is_mirrored(snapshot: &Snapshot, vm: &VmSpec) -> bool {
    mirrored(snapshot, vm).next().is_some()
}

pub(super) fn volume_of(vm: &Name, disk: &DiskSpec) -> VolumeRef {
    VolumeRef { vm: vm.clone(), disk: disk.name.clone() }
}

/// The record of a disk; nothing when there is none of this VM.
pub(super) fn record<'a>(
    snapshot: &'a Snapshot,
    vm: &Stored<VmSpec>,
    disk: &DiskSpec,
) -> Option<&'a Versioned<Volume>> {
    let record = snapshot.volumes.get(&volume_of(&vm.meta.name, disk))?;
    (record.vm_uid == vm.meta.uid).then_some(record)
}

/// The disk for whose sake a VM may not run on a host: what its guest was told to be written may not be there.
#[must_use]
pub fn lacks<'a>(
    snapshot: &'a Snapshot,
    vm: &'a Stored<VmSpec>,
    host: &Name,
) -> Option<&'a DiskSpec> {
    // Also for that of one that is detached: it could not be attached there.
    mirrored(snapshot, &vm.spec)
        .map(|(disk, _)| disk)
        .find(|disk| record(snapshot, vm, disk).is_some_and(|volume| !volume.counts(host)))
}

/// Why a VM that runs is not moved for now: its process copies what a replica lacks, and the next one would begin anew.
#[must_use]
pub(crate) fn returns(snapshot: &Snapshot, vm: &Stored<VmSpec>) -> Option<String> {
    let told = snapshot.told_of(&vm.meta.name)?;
    mirrored(snapshot, &vm.spec).filter(|_| told.phase == VmPhase::Running).find_map(|(disk, _)| {
        let volume = record(snapshot, vm, disk)?;
        let mut replicas = volume.replicas.iter();
        let (host, _) = replicas.find(|(_, state)| **state == ReplicaState::Returning)?;
        let name = &disk.name;
        Some(format!("the replica of its disk `{name}` on {host} is brought up to date first"))
    })
}

/// Chooses hosts for disks that are new, and others for replicas whose hosts are gone.
pub(crate) fn plan(work: &mut Work<'_>) {
    let snapshot = work.snapshot;
    for (name, vm) in snapshot.vms.iter().filter(|(_, vm)| !vm.meta.deleting) {
        if vm.spec.disks.is_empty() {
            continue;
        }
        // Those of a VM that has no host yet are chosen together with it.
        let placed = snapshot.placements.get(name).map(|placement| placement.host.clone());
        if let Some(host) = placed.filter(|host| is_there(work, host)) {
            place(work, vm, &host);
        }
        rebuild(work, vm);
    }
}

/// Chooses hosts for the disks of a VM that have none, beside `owner`, which is to run it.
pub(crate) fn place(work: &mut Work<'_>, vm: &Stored<VmSpec>, owner: &Name) {
    let snapshot = work.snapshot;
    let of_others = mirrored(snapshot, &vm.spec).find_map(|(disk, _)| record(snapshot, vm, disk));
    for (disk, pool) in mirrored(snapshot, &vm.spec) {
        if record(snapshot, vm, disk).is_some() {
            continue;
        }
        let source = match copies::source(snapshot, disk, owner) {
            Ok(source) => source,
            Err(why) => return work.wait(vm_ref(&vm.meta.name), why),
        };
        let has_copy: BTreeSet<Name> =
            source.iter().flat_map(|(_, hosts)| hosts.iter().cloned()).collect();
        let mut hosts: Vec<Name> = vec![owner.clone()];
        hosts.extend(of_others.iter().flat_map(|other| other.replicas.keys()).cloned());
        let mut seen = BTreeSet::new();
        hosts.retain(|host| seen.insert(host.clone()));
        hosts.truncate(pool.copies());
        while hosts.len() < pool.copies() {
            let next = choose(work, disk, &hosts, &has_copy);
            let Some(next) = next else { break };
            hosts.push(next);
        }
        if hosts.len() < pool.copies() {
            let why = format!(
                "waiting: the disk `{}` is to be on {} hosts, and the cluster has {}; let a host join, or make a pool with fewer replicas",
                disk.name,
                pool.copies(),
                hosts.len()
            );
            return work.wait(vm_ref(&vm.meta.name), why);
        }
        let Some(first) = first_content(snapshot, disk) else {
            let why = format!(
                "waiting: the image of its disk `{}` is not there; import it with `haven image import`",
                disk.name
            );
            return work.wait(vm_ref(&vm.meta.name), why);
        };
        let reference = volume_of(&vm.meta.name, disk);
        let mut record =
            Volume::new(vm.meta.uid.clone(), disk.pool.clone(), disk.size, hosts.iter().cloned());
        record.first = first;
        record.encrypted = disk.encrypted;
        record.restored = disk.backup.clone().map(Box::new);
        // What is away now makes its replica when it is back, and who has nothing to make it from is copied to.
        let lacks = |host: &&Name| source.is_some() && !has_copy.contains(*host);
        let away = |host: &&Name| *host != owner && !is_there(work, host);
        record = record.without(hosts.iter().filter(|host| away(host) || lacks(host)));
        record.cloned = source.map(|(from, _)| Box::new(from));
        let expected_revision = snapshot.volumes.get(&reference).map_or(0, |old| old.revision);
        let names = hosts.iter().map(Name::as_str).collect::<Vec<_>>().join(" and ");
        let reason = format!("the disk `{}` of {} is on {names}", disk.name, vm.meta.name);
        let action =
            Action::PutVolume { volume: reference, record: Box::new(record), expected_revision };
        work.act(vm_ref(&vm.meta.name), reason, action);
    }
}

/// What a disk holds at first; nothing when its image is not there.
fn first_content(snapshot: &Snapshot, disk: &DiskSpec) -> Option<Option<FirstContent>> {
    let Some(image) = disk.image.as_ref().filter(|_| disk.backup.is_none()) else {
        return Some(None);
    };
    let image = snapshot.images.get(image)?;
    let file = image.spec.disk.clone()?;
    let format = image.spec.format.clone().unwrap_or_else(|| "raw".into());
    Some(Some(FirstContent { file, format }))
}

fn is_there(work: &Work<'_>, host: &Name) -> bool {
    work.states.get(host).is_some_and(|state| state.well())
}

/// The best host for one more replica beside those on `others`; one of `rather` before all others that can take it.
fn choose(
    work: &Work<'_>,
    disk: &DiskSpec,
    others: &[Name],
    rather: &BTreeSet<Name>,
) -> Option<Name> {
    let snapshot = work.snapshot;
    let (pool, bytes) = (&disk.pool, disk.size.0);
    // An older Haven would not know what is wanted of it, or would lay an encrypted disk down in clear.
    let needs = if disk.encrypted { ENCRYPTS } else { MIRRORS };
    let zone = |host: &Name| {
        let labels = snapshot.hosts.get(host).map(|host| &host.meta.labels);
        labels.and_then(|labels| labels.get(ZONE)).cloned()
    };
    let zones: BTreeSet<Option<String>> = others.iter().map(zone).collect();
    let mut replicas: BTreeMap<&Name, usize> = BTreeMap::new();
    for host in snapshot.volumes.values().flat_map(|volume| volume.replicas.keys()) {
        *replicas.entry(host).or_default() += 1;
    }
    let may = |host: &&Name| {
        let object = &snapshot.hosts[*host];
        let knows = snapshot.host_status.get(*host).is_some_and(|told| told.speaks >= needs);
        !others.contains(host) && !object.spec.witness && !object.meta.deleting && knows
    };
    work.states
        .keys()
        .filter(may)
        .max_by_key(|host| {
            let room = snapshot.rooms.get(*host).and_then(|rooms| rooms.pools.get(pool));
            let usable = work.states[*host].usable();
            // A pool that is nearly full takes nothing that another one can take.
            let fits =
                room.is_none_or(|room| room.free.0 > bytes && room.full() < super::NEARLY_FULL);
            let apart = zone(host).is_none_or(|zone| !zones.contains(&Some(zone)));
            let free = room.map_or(0, |room| 100 - room.full().min(100));
            let few = Reverse(replicas.get(host).copied().unwrap_or(0));
            (usable, fits, rather.contains(*host), apart, few, free, Reverse((*host).clone()))
        })
        .cloned()
}

/// Gives stale replicas whose hosts have been gone for long to other hosts.
fn rebuild(work: &mut Work<'_>, vm: &Stored<VmSpec>) {
    let snapshot = work.snapshot;
    // All disks of a VM are to be on the same hosts.
    let mut rather: BTreeSet<Name> = mirrored(snapshot, &vm.spec)
        .filter_map(|(disk, _)| record(snapshot, vm, disk))
        .flat_map(|volume| volume.replicas.keys().cloned())
        .collect();
    for (disk, pool) in mirrored(snapshot, &vm.spec) {
        let Some(volume) = record(snapshot, vm, disk) else { continue };
        let gone: Vec<Name> = volume
            .replicas
            .iter()
            .filter(|(_, state)| **state != ReplicaState::Counted)
            .filter(|(host, _)| is_gone(work, host))
            .map(|(host, _)| host.clone())
            .collect();
        let missing = pool.copies().saturating_sub(volume.replicas.len());
        if gone.is_empty() && missing == 0 {
            continue;
        }
        let mut record = (*volume.value).clone();
        let mut hosts: Vec<Name> = record.replicas.keys().cloned().collect();
        let mut news = Vec::new();
        let places = gone.into_iter().map(Some).chain(std::iter::repeat_n(None, missing));
        for old in places {
            let next = choose(work, disk, &hosts, &rather);
            let Some(next) = next.filter(|host| work.states[host].usable()) else { break };
            if let Some(old) = &old {
                record.replicas.remove(old);
            }
            record.replicas.insert(next.clone(), ReplicaState::Stale);
            rather.insert(next.clone());
            news.push(match old {
                Some(old) => format!("{next} in place of {old}, which is gone"),
                None => next.to_string(),
            });
            hosts.push(next);
        }
        if news.is_empty() {
            continue;
        }
        let reason = format!(
            "the disk `{}` of {} gets a replica on {}",
            disk.name,
            vm.meta.name,
            news.join(" and on ")
        );
        let action = Action::PutVolume {
            volume: volume_of(&vm.meta.name, disk),
            record: Box::new(record),
            expected_revision: volume.revision,
        };
        work.act(vm_ref(&vm.meta.name), reason, action);
    }
}

/// Whether a host will hardly come back: it is no part of the cluster any more, or has been lost for long.
fn is_gone(work: &mut Work<'_>, host: &Name) -> bool {
    let snapshot = work.snapshot;
    match work.states.get(host) {
        None => true,
        Some(HostState::Lost(_)) => {
            let after = snapshot.cluster_spec().rebuild_after.0;
            let Some(lost) = snapshot.lost.get(host) else { return false };
            let passed = work.passed_ms(lost.at_ms).unwrap_or(0);
            if passed < after {
                work.wake(after - passed);
            }
            passed >= after
        }
        Some(_) => false,
    }
}

/// Disks that are on fewer hosts than they should be.
pub(super) fn risks(snapshot: &Snapshot) -> Vec<String> {
    let mut risks = Vec::new();
    for (reference, volume) in &snapshot.volumes {
        let Some(pool) = snapshot.pools.get(&volume.pool) else { continue };
        let counted: Vec<&str> = volume.counted().map(Name::as_str).collect();
        if counted.len() >= pool.spec.copies() {
            continue;
        }
        let others: Vec<&str> = volume
            .replicas
            .iter()
            .filter(|(_, state)| **state != ReplicaState::Counted)
            .map(|(host, _)| host.as_str())
            .collect();
        let lacks = match others.as_slice() {
            [] => "no other host has it".to_owned(),
            [one] => format!("{one} lacks what was written since"),
            more => format!("{} lack what was written since", more.join(" and ")),
        };
        risks.push(format!(
            "disk {} of {} ({}): all of it is on {} alone, and {lacks}; that is made up for by itself once the host is there",
            reference.disk,
            reference.vm,
            size(volume.size.0),
            counted.join(" and "),
        ));
    }
    risks
}

/// What the mirrored volumes of a pool may take on a host.
pub(super) fn promised(snapshot: &Snapshot, pool: &Name, host: Option<&Name>) -> u64 {
    let here = |volume: &Volume| match host {
        None => volume.replicas.len() as u64,
        Some(host) => u64::from(volume.replicas.contains_key(host)),
    };
    let volumes = snapshot.volumes.values().filter(|volume| volume.pool == *pool);
    volumes.map(|volume| volume.size.0 * here(volume)).sum()
}
