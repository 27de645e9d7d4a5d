//! Snapshots in the disks of a guest that runs, with QEMU: internal ones of `qcow2`.
//!
//! QEMU holds each disk from its own snapshot until that of the last is there (`transaction`). So what a guest was told to be
//! written on one disk before it wrote to another one is in the first's snapshot whenever the other write is in the second's:
//! all show one instant. When one disk fails, none keeps anything (QEMU 11.1.3, 2026-11-30). Disks that Ceph keeps are kept beside
//! that, while the guest's processors stand.

use super::{
    commands,
    driver::VmError,
    guest_agent::Freeze,
    qemu::QemuDriver,
    qemu_views::Asked,
    run_dir,
    snapshots::{Beside, Keeps, Snapshots},
};
use async_trait::async_trait;
use serde_json::{Value, json};
use std::{collections::BTreeMap, io, time::Duration};

/// How long it may take: QEMU does nothing else meanwhile, and a large disk has much to count.
const PATIENCE: Duration = Duration::from_secs(60);

/// Reads one element of the answer to [`commands::NODES`]: its name, and what it keeps.
fn keeps(node: &Value) -> Option<(&str, Keeps)> {
    if node["drv"] != "qcow2" {
        return None;
    }
    let image = &node["image"];
    let each = image["snapshots"].as_array().into_iter().flatten();
    let snapshots = each.filter_map(|of| {
        let (seconds, rest) = (of["date-sec"].as_i64()?, of["date-nsec"].as_i64().unwrap_or(0));
        Some((of["name"].as_str()?.to_owned(), seconds * 1000 + rest / 1_000_000))
    });
    let size = image["virtual-size"].as_u64()?;
    Some((node["node-name"].as_str()?, Keeps { size, snapshots: snapshots.collect() }))
}

impl Asked {
    /// The node of a disk.
    fn node(&self, disk: &str) -> Result<String, VmError> {
        let place = self.launched.launch.placed().find(|(_, of)| of.name == disk);
        place.map(|(place, _)| format!("d{place}")).ok_or_else(|| VmError::System {
            what: format!("{} runs without its disk `{disk}`", self.vm),
            source: io::ErrorKind::NotFound.into(),
        })
    }

    async fn patiently(&self, command: &commands::Command, of: Value) -> Result<Value, VmError> {
        let answer = self.qmp.call(command, of, PATIENCE).await;
        answer.map_err(|source| VmError::Qmp { vm: self.vm.clone(), source })
    }

    /// Has disks keep a snapshot in themselves, all or none.
    pub(super) async fn keep_in(&self, disks: &[String], snapshot: &str) -> Result<(), VmError> {
        let nodes = disks.iter().map(|disk| self.node(disk)).collect::<Result<Vec<_>, _>>()?;
        let take = |node: &String| json!({ "type": "blockdev-snapshot-internal-sync", "data": { "device": node, "name": snapshot } });
        let actions: Vec<Value> = nodes.iter().map(take).collect();
        if actions.is_empty() {
            return Ok(());
        }
        self.patiently(&commands::TRANSACTION, json!({ "actions": actions })).await.map(drop)
    }

    /// All that is done for a snapshot, in one go: whoever waits for it may be gone.
    async fn take(
        &self,
        disks: &[String],
        snapshot: &str,
        beside: Option<Beside>,
    ) -> Result<bool, VmError> {
        let note = self.directory.join(run_dir::FROZEN);
        let frozen = match self.launched.launch.agent {
            true => {
                Freeze::begin(&self.directory.join(run_dir::AGENT_SOCKET), &note, &self.own()).await
            }
            false => None,
        };
        let taken = match beside {
            None => self.keep_in(disks, snapshot).await,
            Some(beside) => {
                let both = async {
                    self.keep_in(disks, snapshot).await?;
                    beside.await.map_err(VmError::Beside)
                };
                self.instant(both).await
            }
        };
        let is_frozen = frozen.is_some();
        if let Some(frozen) = frozen {
            frozen.end().await;
        }
        taken.map(|()| is_frozen)
    }
}

#[async_trait]
impl Snapshots for QemuDriver {
    async fn keeps(&self, vm: &str) -> Result<BTreeMap<String, Keeps>, VmError> {
        let asked = self.asked(vm).await?.ok_or_else(|| VmError::NotHere(vm.into()))?;
        let nodes = asked.tell(&commands::NODES, json!({ "flat": true })).await?;
        let all: BTreeMap<&str, Keeps> =
            nodes.as_array().into_iter().flatten().filter_map(keeps).collect();
        let found = asked.launched.launch.placed().filter_map(|(place, disk)| {
            Some((disk.name.clone(), all.get(format!("d{place}").as_str())?.clone()))
        });
        Ok(found.collect())
    }

    async fn take_snapshot(
        &self,
        vm: &str,
        disks: &[String],
        snapshot: &str,
    ) -> Result<bool, VmError> {
        self.taken(vm, disks, snapshot, None).await
    }

    async fn take_held(
        &self,
        vm: &str,
        disks: &[String],
        snapshot: &str,
        beside: Beside,
    ) -> Result<bool, VmError> {
        self.taken(vm, disks, snapshot, Some(beside)).await
    }

    async fn remove_snapshot(&self, vm: &str, disk: &str, snapshot: &str) -> Result<(), VmError> {
        let asked = self.asked(vm).await?.ok_or_else(|| VmError::NotHere(vm.into()))?;
        let of = json!({ "device": asked.node(disk)?, "name": snapshot });
        asked.patiently(&commands::REMOVE_SNAPSHOT, of).await.map(drop)
    }
}

impl QemuDriver {
    async fn taken(
        &self,
        vm: &str,
        disks: &[String],
        snapshot: &str,
        beside: Option<Beside>,
    ) -> Result<bool, VmError> {
        // Views have the guest's file systems frozen as well.
        let held = self.views(vm).ok_or_else(|| VmError::NotHere(vm.into()))?;
        let held = held.lock_owned().await;
        let asked = self.asked(vm).await?.ok_or_else(|| VmError::NotHere(vm.into()))?;
        let (disks, snapshot) = (disks.to_vec(), snapshot.to_owned());
        // A guest whose file systems stand would stand for ever.
        let taken = tokio::spawn(async move {
            let _held = held;
            asked.take(&disks, &snapshot, beside).await
        });
        taken.await.unwrap_or_else(|error| {
            let what = format!("the snapshot of {vm} was given up");
            Err(VmError::System { what, source: io::Error::other(error) })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::keeps;
    use serde_json::json;

    #[test]
    fn what_qemu_says_of_snapshots_is_read() {
        let node = |drv: &str, image: serde_json::Value| json!({ "node-name": "d0", "drv": drv, "image": image });
        let some = json!({ "virtual-size": 1024, "snapshots": [
            { "id": "1", "name": "haven-a", "date-sec": 7, "date-nsec": 5_000_000 }, { "id": "2" },
        ]});
        let read = node("qcow2", some.clone());
        let (name, of) = keeps(&read).unwrap();
        assert_eq!((name, of.size), ("d0", 1024));
        assert_eq!(of.snapshots.into_iter().collect::<Vec<_>>(), [("haven-a".to_owned(), 7005)]);
        assert!(
            keeps(&node("qcow2", json!({ "virtual-size": 9 }))).unwrap().1.snapshots.is_empty()
        );
        assert_eq!(keeps(&node("raw", some)), None);
    }
}
