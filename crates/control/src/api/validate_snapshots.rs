//! Whether what a VM says of snapshots, and of disks of other VMs that it is made from, can be.

use super::validate::{After, Say};
use haven_model::{
    PoolDriverKind, VmSpec,
    host::{CLONES, RBD_SNAPSHOTS},
    units::Millis,
    vm_snapshot::SnapshotSpec,
};
use haven_plan::tolerance::migration::speaks_less;

/// The shortest time between two snapshots that are whole copies.
const HOURLY: Millis = Millis(3_600_000);
/// The most of those that are kept.
const MOST_COPIES: u32 = 7;

/// What of its disks is made from disks of other VMs.
fn copied(after: &After<'_>, spec: &VmSpec, of_service: bool, say: &mut Say<'_>) {
    for disk in &spec.disks {
        let Some(copy) = &disk.copy_of else { continue };
        if of_service {
            let message = format!(
                "the disk `{}` of members is made from the {copy}, which nothing keeps for those that are made later",
                disk.name
            );
            say(("copyOf", &""), message, "make an image of it, and write `image`");
        }
        if disk.image.is_some() || disk.backup.is_some() {
            let message =
                format!("the disk `{}` is made from the {copy} and from something else", disk.name);
            say(("copyOf", &""), message, "write one of them");
        }
        let driver = after.pool(&disk.pool).map(|pool| pool.driver);
        let driver = driver.filter(|driver| *driver != PoolDriverKind::Rbd);
        if let Some((whose, _)) = driver.and_then(super::pools::bare) {
            let message = format!(
                "the disk `{}` is made from the {copy} and lives in the pool `{}` of {whose}; disks there are not cloned yet",
                disk.name, disk.pool
            );
            say(("pool", &disk.pool), message, "name a pool of another driver");
        }
    }
}

/// Says everything that is wrong; `of_service` for the VMs that a service makes.
pub(super) fn of_vm(after: &After<'_>, spec: &VmSpec, of_service: bool, say: &mut Say<'_>) {
    if let Some(SnapshotSpec { every, keep }) = &spec.snapshot {
        if *every < SnapshotSpec::SHORTEST {
            let message =
                format!("`every` is {every}, which is more often than snapshots are taken");
            say(("every", every), message, "write at least 1m");
        }
        if !(1..=SnapshotSpec::MOST).contains(keep) {
            let message =
                format!("`keep` is {keep}; 1 to {} snapshots are kept", SnapshotSpec::MOST);
            say(("keep", keep), message, "what is to be kept longer belongs into a backup");
        }
        if of_service {
            let message = "members of services have no snapshots".to_owned();
            let hint = "leave `snapshot` out; what must be kept belongs to a VM of its own";
            say(("snapshot", &""), message, hint);
        }
        let of = |disk: &haven_model::vm::DiskSpec| after.pool(&disk.pool).map(|pool| pool.driver);
        let bare = |disk| {
            let driver = of(disk).filter(|driver| *driver != PoolDriverKind::Rbd)?;
            Some((disk, super::pools::bare(driver)?))
        };
        if let Some((disk, (whose, hint))) = spec.disks.iter().find_map(bare) {
            let message = format!(
                "the disk `{}` lives in the pool `{}` of {whose}, and disks there keep no snapshots of Haven's yet",
                disk.name, disk.pool
            );
            say(("snapshot", &""), message, &format!("leave `snapshot` out; {hint}"));
        }
        let drivers = spec.plugged().filter_map(|disk| Some((&disk.name, of(disk)?)));
        if let Some(message) = haven_plan::storage::snapshots::apart(&drivers.collect::<Vec<_>>()) {
            say(
                ("snapshot", &""),
                message,
                "leave `snapshot` out; `haven volume snapshot` keeps one disk",
            );
        }
        let copied = spec.disks.iter().find(|disk| of(disk) == Some(PoolDriverKind::Mirrored));
        if let Some(disk) = copied.filter(|_| *every < HOURLY || *keep > MOST_COPIES) {
            let message = format!(
                "each snapshot of the mirrored disk `{}` is a whole copy on each of its hosts, and `every: {every}, keep: {keep}` would fill its pool",
                disk.name
            );
            let hint = format!(
                "take one each hour at most, and keep at most {MOST_COPIES}; `backup` stores only what has changed"
            );
            say(("snapshot", &""), message, &hint);
        }
    }
    copied(after, spec, of_service, say);
    let uses = spec.snapshot.is_some() || spec.disks.iter().any(|disk| disk.copy_of.is_some());
    let is_in_ceph = |disk: &haven_model::vm::DiskSpec| {
        after.pool(&disk.pool).is_some_and(|pool| pool.driver == PoolDriverKind::Rbd)
    };
    let needs = if spec.disks.iter().any(is_in_ceph) { RBD_SNAPSHOTS } else { CLONES };
    if let Some(host) = speaks_less(after.snapshot, needs).filter(|_| uses) {
        let message = format!(
            "{host} has not said that it knows of that: it runs an older Haven, or has not come up yet"
        );
        say(("snapshot", &""), message, "wait until all hosts are up and upgraded");
    }
}
