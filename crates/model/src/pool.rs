//! Pools: where volumes live.

use crate::{name::Name, units::Bytes, volume::FEWEST_REPLICAS};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, fmt};

/// Which engine keeps the volumes of a pool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum PoolDriverKind {
    /// A directory of each host for itself: a disk dies with its host.
    #[default]
    Local,
    /// One directory mounted on every host: a disk outlives a host as long as its filer does.
    Shared,
    /// A directory of each host: every disk is on several hosts at once, and outlives each of them.
    Mirrored,
    /// A pool of a Ceph cluster: a disk outlives every host as long as that cluster does.
    Rbd,
    /// A directory of an NFS server, which QEMU reaches by itself: a disk outlives every host as long as that server does.
    Nfs,
    /// A Gluster volume, which each host mounts by itself: a disk outlives every host as long as that volume does.
    Gluster,
}

/// What is wanted of a pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PoolSpec {
    /// The engine.
    pub driver: PoolDriverKind,
    /// The directory on every host; nothing for a pool of Ceph's or of a filer.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub path: String,
    /// On how many hosts each disk of a mirrored pool is: 2 or 3; 2 unless it is said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replicas: Option<u32>,
    /// Where a pool of Ceph's is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rbd: Option<RbdSpec>,
    /// Where a pool of an NFS server's is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nfs: Option<NfsSpec>,
    /// Where a pool in a Gluster volume is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gluster: Option<GlusterSpec>,
}

/// A directory of an NFS server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct NfsSpec {
    /// Its address or name.
    pub server: String,
    /// The directory there, as it is exported or below that.
    pub path: String,
    /// What the directory says that it is. Noted when the pool is made; whatever else is said of it later, it stays this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mark: Option<String>,
}

/// A Gluster volume, or a directory in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct GlusterSpec {
    /// Addresses or names of its servers; one that answers is enough.
    pub servers: Vec<String>,
    /// The volume's name.
    pub volume: String,
    /// The directory in it; the volume's root when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub directory: Option<String>,
    /// What the directory says that it is. Noted when the pool is made; whatever else is said of it later, it stays this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mark: Option<String>,
}

/// A pool of a Ceph cluster.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct RbdSpec {
    /// Addresses of its monitors, `HOST` or `HOST:PORT`; one that answers is enough.
    pub monitors: Vec<String>,
    /// The user there, without `client.`.
    pub user: String,
    /// Its key, as `ceph auth get-key client.USER` prints it. It stands sealed in the store, and `sealed` is all that is ever shown
    /// of it; written so, the one that is there is kept.
    pub key: String,
    /// The pool's name there.
    pub pool: String,
    /// The namespace in it; the nameless one when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// Which cluster it is, as that says itself. Noted when the pool is made; whatever else is said of it later, it stays this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fsid: Option<String>,
}

impl RbdSpec {
    /// The pool, with its namespace if it has one.
    #[must_use]
    pub fn place(&self) -> String {
        match &self.namespace {
            Some(namespace) => format!("{}/{namespace}", self.pool),
            None => self.pool.clone(),
        }
    }

    /// Whether two differ in nothing but the key. Only then the key that is there may go where the new one says.
    #[must_use]
    pub fn same_place(&self, other: &Self) -> bool {
        let without = |spec: &Self| Self { key: String::new(), ..spec.clone() };
        without(self) == without(other)
    }
}

/// The key may stand in the clear until it is sealed.
impl fmt::Debug for RbdSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("RbdSpec");
        shown.field("monitors", &self.monitors).field("user", &self.user);
        shown.field("pool", &self.pool).field("namespace", &self.namespace).finish_non_exhaustive()
    }
}

impl PoolSpec {
    /// A pool of this kind in this directory, with what is usual.
    #[must_use]
    pub fn new(driver: PoolDriverKind, path: impl Into<String>) -> Self {
        Self { driver, path: path.into(), replicas: None, rbd: None, nfs: None, gluster: None }
    }

    /// What its directory on a filer says that it is, once that is known.
    #[must_use]
    pub fn mark(&self) -> Option<&str> {
        let nfs = self.nfs.as_ref().and_then(|nfs| nfs.mark.as_deref());
        nfs.or_else(|| self.gluster.as_ref()?.mark.as_deref())
    }

    /// Notes what its directory on a filer says that it is.
    pub fn set_mark(&mut self, mark: Option<String>) {
        if let Some(nfs) = &mut self.nfs {
            nfs.mark.clone_from(&mark);
        }
        if let Some(gluster) = &mut self.gluster {
            gluster.mark = mark;
        }
    }

    /// Where it is, in words.
    #[must_use]
    pub fn place(&self) -> String {
        match self {
            Self { rbd: Some(rbd), .. } => {
                format!("{} of the Ceph cluster at {}", rbd.place(), rbd.monitors.join(", "))
            }
            Self { nfs: Some(nfs), .. } => format!("{} of the NFS server {}", nfs.path, nfs.server),
            Self { gluster: Some(of), .. } => {
                let directory = of.directory.as_deref().unwrap_or_default();
                let servers = of.servers.join(", ");
                format!("{}{directory} of the Gluster servers {servers}", of.volume)
            }
            Self { path, .. } => path.clone(),
        }
    }

    /// Whether every host sees the same disks, so that a VM finds its own on each.
    #[must_use]
    pub fn is_shared(&self) -> bool {
        match self.driver {
            PoolDriverKind::Local | PoolDriverKind::Mirrored => false,
            PoolDriverKind::Shared
            | PoolDriverKind::Rbd
            | PoolDriverKind::Nfs
            | PoolDriverKind::Gluster => true,
        }
    }

    /// On how many hosts each of its disks is.
    #[must_use]
    pub fn copies(&self) -> usize {
        match self.driver {
            PoolDriverKind::Local
            | PoolDriverKind::Shared
            | PoolDriverKind::Rbd
            | PoolDriverKind::Nfs
            | PoolDriverKind::Gluster => 1,
            PoolDriverKind::Mirrored => self.replicas.unwrap_or(FEWEST_REPLICAS) as usize,
        }
    }
}

/// The room of one pool on one host, as its file system tells.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct PoolRoom {
    /// What is taken and what is free, without what is kept back for root.
    pub total: Bytes,
    /// What may be written yet.
    pub free: Bytes,
    /// What the pool's own files take.
    pub used: Bytes,
}

impl PoolRoom {
    /// How full the file system is, per cent.
    #[must_use]
    pub fn full(&self) -> u64 {
        let taken = self.total.0.saturating_sub(self.free.0);
        (taken.saturating_mul(100)).checked_div(self.total.0).unwrap_or(0)
    }
}

/// The room that a host has in pools.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct HostRooms {
    /// The session of the host that says so.
    pub session: u64,
    /// By pool; one that cannot be looked at, or is not there yet, is not named.
    pub pools: BTreeMap<Name, PoolRoom>,
}

impl HostRooms {
    /// Whether it differs from what was told before by so much that somebody would want to know.
    #[must_use]
    pub fn differs(&self, before: &Self) -> bool {
        // A hundredth of the pool.
        let far = |now: Bytes, before: Bytes, of: Bytes| now.0.abs_diff(before.0) > of.0 / 100;
        self.session != before.session
            || !self.pools.keys().eq(before.pools.keys())
            || self.pools.iter().any(|(pool, now)| {
                let then = &before.pools[pool];
                now.total != then.total
                    || now.full() != then.full()
                    || far(now.free, then.free, now.total)
                    || far(now.used, then.used, now.total)
            })
    }
}

#[cfg(test)]
mod tests {
    use super::{HostRooms, PoolRoom};
    use crate::units::Bytes;

    #[test]
    fn what_nobody_would_want_to_know_is_not_told_again() {
        let rooms = |total, free, used| HostRooms {
            session: 1,
            pools: [(
                "fast".parse().unwrap(),
                PoolRoom { total: Bytes(total), free: Bytes(free), used: Bytes(used) },
            )]
            .into(),
        };
        let before = rooms(10_000, 4_050, 1_000);
        assert!(!rooms(10_000, 4_010, 1_040).differs(&before));
        assert!(rooms(10_000, 4_050, 1_200).differs(&before));
        assert!(rooms(10_000, 3_900, 1_000).differs(&before), "another per cent");
        assert!(rooms(20_000, 14_050, 1_000).differs(&before));
        assert!(HostRooms { session: 2, ..before.clone() }.differs(&before));
        assert!(HostRooms { pools: Default::default(), ..before.clone() }.differs(&before));
        assert_eq!(before.pools["fast"].full(), 59);
        assert_eq!(PoolRoom::default().full(), 0);
    }
}
