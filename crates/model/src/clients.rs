//! Who has the disks of a VM in `rbd` pools open, so that they can be shut to it (docs/decisions/0026-rbd.md).
//!
//! ```text
//!   a process is begun: its host is among `begins` ─► its clients are noted: `open` ─► another process is begun …
//!                                      the host is not heard: `shut` is asked of another one ─► that has done it
//! ```
//!
//! All clients that a process may write by are noted, or its host is among those that begin.

use crate::name::Name;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// The record of a VM. Written by whoever begins a process of it, by the plan, and by the host that shuts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct DiskClients {
    /// The uid of the VM: a later one of the same name has other disks.
    pub vm_uid: String,
    /// Hosts that begin to open disks: by which clients is not noted yet.
    #[serde(skip_serializing_if = "BTreeSet::is_empty")]
    pub begins: BTreeSet<Name>,
    /// What is open, or was and may not have been closed.
    pub open: Vec<OpenDisk>,
    /// Its disks are to be shut to all of those, or are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shut: Option<ShutDisks>,
}

/// A disk that a process has open.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct OpenDisk {
    /// Which disk.
    pub disk: Name,
    /// Its pool.
    pub pool: Name,
    /// The host of the process.
    pub host: Name,
    /// By which client of Ceph's, like `10.0.0.4:0/3977297452`.
    pub client: String,
}

/// That disks are to be shut.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ShutDisks {
    /// The host that does it.
    pub by: Name,
    /// It has: none of the clients can write any more, whoever opens the disks from now on.
    #[serde(default)]
    pub done: bool,
}

impl DiskClients {
    /// The record once `host` has begun to open disks: nothing is shut any more.
    #[must_use]
    pub fn begun_by(&self, vm_uid: &str, host: &Name) -> Self {
        let mut now = if self.vm_uid == vm_uid {
            self.clone()
        } else {
            Self { vm_uid: vm_uid.into(), ..Self::default() }
        };
        now.begins.insert(host.clone());
        now.shut = None;
        now
    }

    /// The record once it is noted by which clients `host` has disks open.
    #[must_use]
    pub fn noted_by(&self, host: &Name, open: Vec<OpenDisk>) -> Self {
        let mut now = self.clone();
        now.begins.remove(host);
        now.open.retain(|one| one.host != *host);
        now.open.extend(open);
        now
    }

    /// The same when nobody else has any open any more.
    #[must_use]
    pub fn alone(&self, host: &Name) -> Self {
        let mut now = self.clone();
        now.begins.retain(|one| one == host);
        now.open.retain(|one| one.host == *host);
        now
    }

    /// The record by which one of them is asked to shut the disks.
    #[must_use]
    pub fn shut_by(&self, host: Name) -> Self {
        Self { shut: Some(ShutDisks { by: host, done: false }), ..self.clone() }
    }

    /// Whether it has been done.
    #[must_use]
    pub fn is_shut(&self) -> bool {
        self.shut.as_ref().is_some_and(|shut| shut.done)
    }

    /// Whether the clients of all that a host has open of a disk are known.
    #[must_use]
    pub fn knows(&self, disk: &Name, host: &Name) -> bool {
        self.begins.is_empty() && self.open.iter().any(|one| one.disk == *disk && one.host == *host)
    }
}

#[cfg(test)]
mod tests {
    use super::{DiskClients, OpenDisk};
    use crate::Name;

    fn name(text: &str) -> Name {
        Name::new(text).unwrap()
    }

    fn open(host: &str) -> OpenDisk {
        let client = "10.0.0.1:0/7".into();
        OpenDisk { disk: name("data"), pool: name("ceph"), host: name(host), client }
    }

    #[test]
    fn what_a_host_has_open_is_known_once_it_is_noted() {
        let (one, two, data) = (name("host1"), name("host2"), name("data"));
        let record = DiskClients::default().begun_by("u", &one);
        assert!(!record.knows(&data, &one));
        let record = record.noted_by(&one, vec![open("host1")]);
        assert!(record.knows(&data, &one) && !record.knows(&data, &two));
        let moving = record.shut_by(two.clone()).begun_by("u", &two);
        assert!(moving.shut.is_none() && !moving.knows(&data, &one), "another one has begun");
        assert_eq!(moving.open, record.open);
        let moved = moving.noted_by(&two, vec![open("host2")]);
        assert!(moved.knows(&data, &one) && moved.knows(&data, &two));
        assert!(!moved.alone(&two).knows(&data, &one));
        assert!(moved.begun_by("v", &two).open.is_empty(), "another VM of the name");
    }
}
