//! Pools: where volumes live.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Which engine keeps the volumes of a pool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum PoolDriverKind {
    /// A directory of each host for itself: a disk dies with its host.
    #[default]
    Local,
    /// One directory mounted on every host: a disk outlives a host as long as its filer does.
    Shared,
}

/// What is wanted of a pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PoolSpec {
    /// The engine.
    pub driver: PoolDriverKind,
    /// The directory on every host.
    pub path: String,
}
