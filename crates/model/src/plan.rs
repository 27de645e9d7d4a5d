//! The plan: what the brain decided, as a value that can be printed, checked and committed.

use crate::{
    cluster::ProofKind,
    event::Incident,
    host::LostSession,
    name::{Name, ObjectRef},
    object::Object,
    placement::{FrontendPlacement, Placement},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// How long a renewal record stood unchanged in this observer's eyes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct LeaseAge {
    /// The record that stood unchanged.
    pub revision: i64,
    /// For how long, milliseconds, by the observer's monotonic clock.
    pub unchanged_ms: u64,
    /// Whether a linearizable read begun after it had stood for `T` still found this revision.
    pub confirmed: bool,
}

/// What the observer knows that does not stand in the store. With the snapshot it is all that a plan depends on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Observations {
    /// Wall clock, milliseconds since 1970; for records that people read, never for safety.
    pub now_ms: i64,
    /// Per host.
    pub leases: BTreeMap<Name, LeaseAge>,
    /// Hosts that a majority of their watchers has not heard.
    pub suspected: BTreeSet<Name>,
    /// Hosts whose power was read back as off, with the session they had when the command was sent.
    pub powered_off: BTreeMap<Name, u64>,
}

/// One thing to do.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "do", rename_all = "kebab-case")]
pub enum Action {
    /// Read the host's record linearizably, then plan again. Changes nothing.
    ConfirmLease {
        /// Whose.
        host: Name,
        /// The revision expected.
        revision: i64,
    },
    /// Ask the host's power controller to switch it off and read it back. Changes nothing in the store.
    PowerOff {
        /// Which host.
        host: Name,
        /// Its session when asked.
        session: u64,
    },
    /// Close a lost host's session under a proof. Commits only while its record is still at `lease_revision`.
    CloseSession {
        /// Which host.
        host: Name,
        /// The record that was judged.
        lease_revision: i64,
        /// Goes to `lost/<host>`.
        lost: LostSession,
    },
    /// Give a VM an owner.
    PlaceVm {
        /// Which VM.
        vm: Name,
        /// The new record.
        placement: Placement,
        /// The revision of the record it replaces; 0 when there is none.
        expected_revision: i64,
        /// When the VM is taken from a lost host: that host and the revision of its closed record, which must still
        /// stand when this commits, and the proof.
        taken_from: Option<TakenFrom>,
    },
    /// Forget the owner of a VM that does not run and shall not.
    ReleaseVm {
        /// Which VM.
        vm: Name,
        /// The revision of the placement.
        expected_revision: i64,
    },
    /// Write an object (a service's member: made, changed or marked for deletion).
    PutObject {
        /// The whole object.
        object: Box<Object>,
        /// The revision of the record it replaces; 0 when there is none.
        expected_revision: i64,
    },
    /// Remove an object of which nothing is left.
    RemoveObject {
        /// Which.
        object: ObjectRef,
        /// The revision of its record.
        expected_revision: i64,
    },
    /// Give a service's address a holder.
    PlaceFrontend {
        /// Which service.
        service: Name,
        /// The new record.
        placement: FrontendPlacement,
        /// The revision of the record it replaces; 0 when there is none.
        expected_revision: i64,
    },
    /// Take a service's address away.
    ReleaseFrontend {
        /// Which service.
        service: Name,
        /// The revision of the record.
        expected_revision: i64,
    },
    /// Write an incident.
    PutIncident {
        /// The whole incident.
        incident: Box<Incident>,
        /// The revision of the record it replaces; 0 when there is none.
        expected_revision: i64,
    },
}

/// The evidence under which a VM is taken from a lost host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct TakenFrom {
    /// The lost host.
    pub host: Name,
    /// The revision of its closed renewal record.
    pub lease_revision: i64,
    /// The proof.
    pub proof: ProofKind,
}

/// An action with its reason.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Planned {
    /// What it is about.
    pub object: ObjectRef,
    /// A sentence.
    pub reason: String,
    /// What to do.
    pub action: Action,
}

/// Something that is wanted and cannot be done now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Waiting {
    /// What it is about.
    pub object: ObjectRef,
    /// A sentence: for what it waits.
    pub reason: String,
}

/// What the brain decided.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Plan {
    /// In the order in which they are to be committed.
    pub actions: Vec<Planned>,
    /// What could not be done.
    pub waiting: Vec<Waiting>,
    /// Plan again after so long even if nothing changes, milliseconds.
    pub wake_after_ms: Option<u64>,
}
