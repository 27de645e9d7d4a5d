//! Mirrored volumes: on which hosts their replicas are, and which of them count (docs/decisions/0022-mirrored-volumes.md).

use crate::{name::Name, units::Bytes};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// How a replica stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ReplicaState {
    /// It has every write that the guest saw acknowledged, and what was flushed is on its disk.
    Counted,
    /// It may lack some, or have some that the others lack.
    Stale,
}

/// A volume's record. Who may write it is not in it: that is the host on which its VM is placed, under the epoch of that
/// placement.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Volume {
    /// As the guest sees it.
    pub size: Bytes,
    /// By host.
    pub replicas: BTreeMap<Name, ReplicaState>,
    /// Counts the processes that had it open; each has a number of its own, under which replicas are served to it and to no
    /// earlier one. The epoch of the placement would not do: a VM that is started anew on its host keeps that.
    pub run: u64,
    /// The counted replicas are the same, byte for byte, and nobody writes. Otherwise they may differ in what was under way.
    pub clean: bool,
}

impl Volume {
    /// The hosts whose replicas count.
    pub fn counted(&self) -> impl Iterator<Item = &Name> {
        let counted = self.replicas.iter().filter(|(_, state)| **state == ReplicaState::Counted);
        counted.map(|(host, _)| host)
    }

    /// Whether a host's replica counts.
    #[must_use]
    pub fn counts(&self, host: &Name) -> bool {
        self.replicas.get(host) == Some(&ReplicaState::Counted)
    }

    /// The record with these replicas counted no more.
    #[must_use]
    pub fn without<'a>(&self, hosts: impl IntoIterator<Item = &'a Name>) -> Self {
        let mut volume = self.clone();
        for host in hosts {
            if let Some(state) = volume.replicas.get_mut(host) {
                *state = ReplicaState::Stale;
            }
        }
        volume
    }
}
