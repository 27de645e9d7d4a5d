//! Events and incidents: what happened, in words, with times.

use crate::name::{Name, ObjectRef};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How much an event matters.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Good to know.
    Info,
    /// Something is at risk.
    Warning,
    /// Something is down.
    Error,
}

/// One thing that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Event {
    /// Sorts by time: UUID version 7.
    pub id: String,
    /// Wall clock, milliseconds since 1970.
    pub at_ms: i64,
    /// What it is about.
    pub object: ObjectRef,
    /// How much it matters.
    pub severity: Severity,
    /// What happened and why, a sentence.
    pub message: String,
    /// Who did it: `manager on host1`, `agent on host2`, `user admin`.
    pub by: String,
}

/// One step of an incident.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct IncidentStep {
    /// Wall clock, milliseconds since 1970.
    pub at_ms: i64,
    /// `failed`, `noticed`, `proof`, `placed`, `started`, `ready`, `closed`.
    pub phase: String,
    /// What it is about.
    pub object: ObjectRef,
    /// In words.
    pub message: String,
}

/// A disturbance with its measured timeline.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Incident {
    /// Counts from 1.
    pub number: u64,
    /// What it is about, a sentence.
    pub title: String,
    /// The host that was lost, or on which a VM kept failing.
    pub host: Name,
    /// The session of it that was lost, or in which the VM kept failing.
    pub session: u64,
    /// The VM that kept failing, when it is about one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<Name>,
    /// The VMs that it ran then, still to be recovered.
    pub waiting_for: Vec<Name>,
    /// What happened, in order of time.
    pub steps: Vec<IncidentStep>,
    /// When all of it was over, wall clock, milliseconds since 1970.
    pub closed_ms: Option<i64>,
}

/// Who changed what: one line of the audit log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AuditEntry {
    /// Sorts by time: UUID version 7.
    pub id: String,
    /// Wall clock, milliseconds since 1970.
    pub at_ms: i64,
    /// Whose token.
    pub who: String,
    /// From where: an address, or `local`.
    pub from: String,
    /// Method and path.
    pub what: String,
    /// `ok` or the problem.
    pub outcome: String,
}
