//! Planned work: a host is emptied, and what it ran comes back if asked (docs/decisions/0012-planned-work.md).
//!
//! ```text
//!  a person ─► drains/<host> ─► the plan moves what is there, a few at a time ─► drained
//!                    │ ended, bring back ─► the plan moves it back ─► the record goes
//!                    └ ended ─► the record goes
//! ```
//!
//! What a drain moved stands in the VMs' own [`crate::Migration`] records, which name the drain.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Somebody wants a host to be empty. It stands until somebody ends it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Drain {
    /// Tells it from every other one.
    pub id: String,
    /// Who asked.
    pub by: String,
    /// When, wall clock, milliseconds since 1970.
    pub at_ms: i64,
    /// When nothing ran there any more for the first time, wall clock, milliseconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drained_ms: Option<i64>,
    /// It was ended, and what it moved comes back; the record goes once that is done.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub bringing_back: bool,
}

/// Part of a migration: the drain that it is of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DrainMove {
    /// The [`Drain`].
    pub drain: String,
    /// So many tries failed before this one.
    #[serde(default)]
    pub failed: u32,
    /// It brings back what the drain had moved.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub back: bool,
}

/// How many VMs may be moved at once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub struct MoveLimits {
    /// From and to one host.
    pub per_host: u32,
    /// In the whole cluster.
    pub cluster: u32,
}

impl Default for MoveLimits {
    fn default() -> Self {
        Self { per_host: 2, cluster: 8 }
    }
}
