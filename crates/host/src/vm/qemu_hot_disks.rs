//! Disks that come, go and grow while their guest runs, with QEMU (docs/decisions/0025-hot-disks.md).
//!
//! ```text
//!   plug:    its nodes ─► the launch record ─► the device, which the guest sees
//!   unplug:  the guest is asked ─► the device is gone ─► its nodes are closed ─► the launch record
//! ```
//!
//! A disk that is in the record is counted as one that the guest has: its replicas are seen to, and a move takes it along. One that
//! is not has nodes at most that nobody writes to; they are removed when it is tried again.
//!
//! Ports are at fixed addresses behind all else, so that no other device moves when a disk comes. QEMU's own way of telling a
//! guest (ACPI) takes 0.1 s; that of the ports themselves 6 s.

use super::{
    commands,
    driver::{DiskLaunch, VmError, VmLaunch},
    hot_disks::{Has, HasDisk, HotDisks, LetGo},
    launch::system,
    qemu::QemuDriver,
    qemu_disks::device,
    qemu_mirrors,
    qemu_parking::is_parked,
    qmp::{DEADLINE, QmpError},
    record,
};
use crate::{
    agent::storage::FilerLaunch,
    storage::{mirrored::daemon::USER, nfs, rbd},
};
use async_trait::async_trait;
use haven_model::vm::SLOTS;
use serde_json::{Value, json};
use std::{collections::BTreeSet, path::Path, time::Duration};
use tokio::sync::broadcast;

/// The addresses of ports: eight at each.
const AT: u8 = 0x1d;
/// How long what is closed may be in use by a device that is gone.
const CLOSES: Duration = Duration::from_secs(1);
/// Between two looks.
const LOOK: Duration = Duration::from_millis(10);

/// The name of a port.
pub(super) fn port(slot: u8) -> String {
    format!("hp{slot}")
}

/// The port of the seed: behind those of disks, so that it is the last in the order in which a guest finds them, and no disk has
/// another name for its sake. A machine that began without a disk in the first port keeps its seed where it was, and so all of its
/// network cards.
pub(super) fn seed_port(launch: &VmLaunch) -> Option<String> {
    let first = launch.disks.iter().any(|disk| disk.slot == Some(0));
    (launch.ports && first).then(|| port(SLOTS))
}

/// The arguments for all ports.
pub(super) fn ports(add: &mut dyn FnMut(&str, String)) {
    for slot in 0..=SLOTS {
        let (at, of) = (AT + slot / 8, slot % 8);
        let several = if of == 0 { ",multifunction=on" } else { "" };
        let (id, number) = (port(slot), slot + 1);
        add(
            "-device",
            format!(
                "pcie-root-port,id={id},bus=pcie.0,addr={at:#x}.{of},chassis={number},slot={number}{several}"
            ),
        );
    }
}

/// The node of a disk that has no replicas.
pub(super) fn node(place: usize, disk: &DiskLaunch) -> Value {
    if let Some(of) = &disk.rbd {
        return rbd::node::node(&format!("d{place}"), of, &format!("k{place}"));
    }
    if let Some(FilerLaunch::Nfs(of)) = disk.filer.as_deref() {
        return nfs::node::node(&format!("d{place}"), of);
    }
    let mut node = json!({
        "driver": disk.format, "node-name": format!("d{place}"), "read-only": disk.read_only, "discard": "unmap",
        "file": { "driver": "file", "filename": disk.path, "aio": "threads" },
    });
    if disk.luks.is_some() && !disk.decrypted_above() {
        node["encrypt"] = json!({ "format": "luks", "key-secret": secret(place) });
    }
    node
}

/// What the key of an encrypted disk is called.
pub(super) fn secret(place: usize) -> String {
    format!("s{place}")
}

/// The object by which QEMU reads it.
pub(super) fn key_of(place: usize, file: &Path) -> Value {
    json!({ "qom-type": "secret", "id": secret(place), "file": file })
}

/// What decrypts a disk of which nothing beneath knows that it is encrypted; `on`: what that stands on.
pub(super) fn decrypts(place: usize, on: &str) -> Value {
    json!({
        "driver": "luks", "node-name": format!("e{place}"), "key-secret": secret(place), "file": on,
        "discard": "unmap",
    })
}

/// Whether a node belongs to the disk at a place: letters, the number, and for replicas more behind a dot.
fn is_of(node: &str, place: usize) -> bool {
    let rest = node.trim_start_matches(|c: char| c.is_ascii_lowercase());
    let number = rest.split('.').next().unwrap_or_default();
    rest.len() < node.len() && number == place.to_string()
}

/// In which order nodes are removed: each before those that it stands on.
fn order(node: &str) -> usize {
    let kind = node.trim_end_matches(|c: char| !c.is_ascii_lowercase());
    let kind: &str = kind.split(|c: char| !c.is_ascii_lowercase()).next().unwrap_or_default();
    ["bs", "bc", "bt", "e", "d", "w", "p", "a"]
        .iter()
        .position(|one| *one == kind)
        .unwrap_or(usize::MAX)
}

impl QemuDriver {
    /// The names of the devices that its guest has.
    async fn devices(&self, vm: &str) -> Result<BTreeSet<String>, VmError> {
        let path = json!({ "path": "/machine/peripheral" });
        let all = self.tell(vm, &commands::BENEATH, path).await?;
        let names = all.as_array().into_iter().flatten();
        Ok(names.filter_map(|one| Some(one["name"].as_str()?.to_owned())).collect())
    }

    /// Removes what is there of a disk that the guest does not have; `parked`: but for what stands in for it.
    pub(super) async fn close(&self, vm: &str, place: usize, parked: bool) -> Result<(), VmError> {
        let all = self.tell(vm, &commands::NODES, json!({ "flat": true })).await?;
        let names = all.as_array().into_iter().flatten();
        let names = names.filter_map(|node| node["node-name"].as_str());
        let stays = |node: &str| parked && is_parked(node, place);
        let its = names.filter(|node| is_of(node, place) && !stays(node));
        let mut its: Vec<&str> = its.collect();
        its.sort_by_key(|node| order(node));
        let until = tokio::time::Instant::now() + CLOSES;
        for node in its {
            loop {
                let gone = json!({ "node-name": node });
                match self.tell(vm, &commands::REMOVE_NODE, gone).await {
                    // A device that is gone already may keep its disk for a moment.
                    Err(VmError::Qmp { source: QmpError::Refused { .. }, .. })
                        if tokio::time::Instant::now() < until =>
                    {
                        tokio::time::sleep(LOOK).await;
                    }
                    Err(error) => return Err(error),
                    Ok(_) => break,
                }
            }
        }
        // Only one that is encrypted has the one, and one with replicas, or in Ceph, the other.
        self.try_tell(vm, &commands::REMOVE_OBJECT, json!({ "id": secret(place) })).await?;
        self.try_tell(vm, &commands::REMOVE_OBJECT, json!({ "id": format!("k{place}") })).await
    }

    pub(super) async fn open(
        &self,
        vm: &str,
        place: usize,
        disk: &DiskLaunch,
    ) -> Result<(), VmError> {
        if let Some(file) = &disk.luks {
            self.tell(vm, &commands::ADD_OBJECT, key_of(place, file)).await?;
        }
        if let Some(of) = &disk.rbd {
            let secret = rbd::node::secret(&format!("k{place}"), of);
            self.tell(vm, &commands::ADD_OBJECT, secret).await?;
        }
        let Some(mirror) = &disk.mirror else {
            self.tell(vm, &commands::ADD_NODE, node(place, disk)).await?;
            if disk.decrypted_above() {
                let above = decrypts(place, &format!("d{place}"));
                self.tell(vm, &commands::ADD_NODE, above).await?;
            }
            return Ok(());
        };
        let key = json!({
            "qom-type": "tls-creds-psk", "id": format!("k{place}"), "endpoint": "client",
            "username": USER, "dir": mirror.keys,
        });
        // A guest that has powered off is asked whether all replicas have all that it wrote.
        self.tell(vm, &commands::SET_ACTION, json!({ "shutdown": "pause" })).await?;
        self.tell(vm, &commands::ADD_OBJECT, key).await?;
        for at in &mirror.others {
            qemu_mirrors::meet(at).await?;
        }
        for node in qemu_mirrors::nodes(place, disk, mirror) {
            self.tell(vm, &commands::ADD_NODE, node).await?;
        }
        Ok(())
    }

    /// Whether no replica of a disk failed that was just closed, by all that QEMU has said.
    pub(super) async fn closed_whole(
        &self,
        vm: &str,
        place: usize,
        said: &mut broadcast::Receiver<Value>,
    ) -> Result<bool, VmError> {
        // What closing them came to has been said once this is answered.
        self.tell(vm, &commands::STATUS, json!({})).await?;
        let failed = self.failed_nodes(vm, |_| {});
        let whole = !failed.iter().any(|node| is_of(node, place)) && none_failed(said, place);
        self.failed_nodes(vm, |failed| failed.retain(|node| !is_of(node, place)));
        Ok(whole)
    }

    fn has_now(&self, vm: &str) -> Result<record::Launched, VmError> {
        let read = record::read(&self.directory(vm));
        let record = read.map_err(system(format!("the launch record of {vm} cannot be read")))?;
        record.ok_or_else(|| VmError::NotHere(vm.into()))
    }

    fn note(&self, vm: &str, change: impl FnOnce(&mut VmLaunch)) -> Result<(), VmError> {
        record::note_disks(&self.directory(vm), change)
            .map_err(system(format!("the launch record of {vm} cannot be written")))
    }
}

/// Whether nothing of what was said is that a replica of the disk failed.
fn none_failed(said: &mut broadcast::Receiver<Value>, place: usize) -> bool {
    let failed = commands::REPLICA_FAILED.name();
    loop {
        match said.try_recv() {
            Ok(event) => {
                let node = event["data"]["node-name"].as_str().unwrap_or_default();
                if event["event"] == failed && is_of(node, place) {
                    return false;
                }
            }
            Err(broadcast::error::TryRecvError::Lagged(_)) => return false,
            Err(_) => return true,
        }
    }
}

#[async_trait]
impl HotDisks for QemuDriver {
    async fn has(&self, vm: &str) -> Result<Has, VmError> {
        let launch = self.has_now(vm)?.launch;
        let devices = self.devices(vm).await?;
        let mut disks = Vec::new();
        for (place, disk) in launch.placed() {
            let plugged = devices.contains(&device(place));
            let parked = plugged && self.is_parked(vm, place, disk).await?;
            disks.push(HasDisk {
                name: disk.name.clone(),
                place,
                size_bytes: disk.size_bytes,
                mirrored: disk.mirror.is_some() || parked,
                parked,
                plugged,
                ported: disk.slot.is_some(),
            });
        }
        Ok(Has { ports: launch.ports, disks, named: launch.disks_as.clone() })
    }

    async fn plug(&self, vm: &str, disk: &DiskLaunch, named: &str) -> Result<(), VmError> {
        let mut launch = self.has_now(vm)?.launch;
        let no_port = || VmError::System {
            what: format!("the disk `{}` of {vm} has no port to be plugged into", disk.name),
            source: std::io::ErrorKind::AddrNotAvailable.into(),
        };
        let slot = disk.slot.filter(|_| launch.ports).ok_or_else(no_port)?;
        launch.disks.retain(|one| one.name != disk.name);
        if launch.disks.iter().any(|one| one.slot == Some(slot)) {
            return Err(no_port());
        }
        launch.disks.push(disk.clone());
        let place = launch.places().pop().ok_or_else(no_port)?;
        if self.devices(vm).await?.contains(&device(place)) {
            return Ok(());
        }
        self.close(vm, place, false).await?;
        if let Err(error) = self.open(vm, place, disk).await {
            // What keeps a file or a connection open is in the way of the next attempt, which closes it too.
            if let Err(left) = self.close(vm, place, false).await {
                tracing::warn!(vm, place, why = %left, "what was opened of a disk cannot be closed");
            }
            return Err(error);
        }
        let before = launch.disks_as.clone();
        let (now, disks) = (named.to_owned(), launch.disks);
        // From here on it is the guest's.
        self.note(vm, |launch| (launch.disks, launch.disks_as) = (disks, now))?;
        let mut device = json!({
            "driver": commands::DISK_DEVICE, "id": device(place), "bus": port(slot), "addr": "0x0",
            "drive": disk.drive(place), "serial": disk.name,
        });
        if disk.stops() {
            device["werror"] = "stop".into();
            device["rerror"] = "stop".into();
        }
        match self.tell(vm, &commands::ADD_DEVICE, device).await {
            Err(error @ VmError::Qmp { source: QmpError::Refused { .. }, .. }) => {
                self.close(vm, place, false).await?;
                self.note(vm, |launch| {
                    launch.disks.retain(|one| one.name != disk.name);
                    launch.disks_as = before;
                })?;
                Err(error)
            }
            // If nothing was heard, it is looked at when it is tried again.
            other => other.map(drop),
        }
    }

    async fn unplug(
        &self,
        vm: &str,
        place: usize,
        named: &str,
        patience: Duration,
    ) -> Result<LetGo, VmError> {
        let until = tokio::time::Instant::now() + patience;
        let id = device(place);
        if self.devices(vm).await?.contains(&id) {
            // One that was asked already refuses to be asked again, for a while.
            self.try_tell(vm, &commands::REMOVE_DEVICE, json!({ "id": id })).await?;
        }
        while self.devices(vm).await?.contains(&id) {
            if tokio::time::Instant::now() >= until {
                return Ok(LetGo::NotYet);
            }
            tokio::time::sleep(LOOK).await;
        }
        let mut said = self.qmp(vm, DEADLINE).await?.events();
        self.end_copies(vm, place).await?;
        self.close(vm, place, false).await?;
        let whole = self.closed_whole(vm, place, &mut said).await?;
        self.note(vm, |launch| {
            named.clone_into(&mut launch.disks_as);
            if let Some(at) = launch.at(place) {
                launch.disks.remove(at);
            }
        })?;
        Ok(LetGo::Yes { whole })
    }

    async fn grow(&self, vm: &str, place: usize, size: u64, named: &str) -> Result<(), VmError> {
        let to = json!({ "node-name": format!("d{place}"), "size": size });
        self.tell(vm, &commands::RESIZE, to).await?;
        self.note(vm, |launch| {
            named.clone_into(&mut launch.disks_as);
            if let Some(at) = launch.at(place) {
                launch.disks[at].size_bytes = size;
            }
        })
    }

    async fn park(&self, vm: &str, place: usize) -> Result<bool, VmError> {
        self.park_disk(vm, place).await
    }

    async fn unpark(&self, vm: &str, disk: &DiskLaunch, named: &str) -> Result<(), VmError> {
        self.unpark_disk(vm, disk, named).await
    }
}

#[cfg(test)]
mod tests {
    use super::{is_of, order};

    #[test]
    fn the_nodes_of_one_disk_are_told_from_those_of_another() {
        for node in ["d5", "e5", "l5", "r5.1234abcd.0123456789abcdef0", "a5.1", "n5.1", "bc5"] {
            assert!(is_of(node, 5), "{node}");
            assert!(!is_of(node, 50) && !is_of(node, 1), "{node}");
        }
        for node in ["seed", "d50", "d15", "#block123", "5", "l51"] {
            assert!(!is_of(node, 5), "{node}");
        }
    }

    #[test]
    fn what_stands_on_something_goes_first() {
        let mut nodes = ["n5.1", "l5", "r5.aa.bb", "a5.1", "w5.aa.bb", "d5", "e5"];
        nodes.sort_by_key(|node| order(node));
        assert_eq!(nodes[..4], ["e5", "d5", "w5.aa.bb", "a5.1"]);
    }
}
