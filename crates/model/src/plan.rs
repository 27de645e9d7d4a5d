//! The plan: what the brain decided, as a value that can be printed, checked and committed.

use crate::{
    backup::BackupRun,
    clients::DiskClients,
    cluster::ProofKind,
    drain::Drain,
    event::Incident,
    host::LostSession,
    maintenance::Maintenance,
    migration::Migration,
    name::{Name, ObjectRef},
    object::Object,
    placement::{FrontendPlacement, Placement},
    vm::Wait,
    vm_snapshot::VmSnapshot,
    volume::{Volume, VolumeRef},
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
    /// For how many milliseconds this daemon may close no session of a host for its lease's sake: it promised so, or
    /// cannot know yet whether others did (docs/decisions/0015-failsafe.md).
    pub promised: BTreeMap<Name, u64>,
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
    /// Ask the host's power controller whether the host is off, and if it says so make sure of it. A host that has power
    /// keeps it. Changes nothing in the store.
    ReadPower {
        /// Which host.
        host: Name,
        /// Its session when asked.
        session: u64,
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
    /// Give a VM that keeps failing on its host, which lives, to another one. Commits only while its host has said
    /// nothing since it said that no process of it is there: whoever starts one says so first.
    TryElsewhere {
        /// Which VM.
        vm: Name,
        /// The new record.
        placement: Placement,
        /// The revision of the record it replaces.
        expected_revision: i64,
        /// The revision of what its host said.
        told: i64,
    },
    /// A step of a migration.
    MoveVm {
        /// Which VM.
        vm: Name,
        /// The new record.
        placement: Placement,
        /// The revision of the record it replaces.
        expected_revision: i64,
        /// Which step.
        step: MoveStep,
        /// The migration that begins or has ended with it: the record and the revision of the one it replaces.
        record: Option<(Box<Migration>, i64)>,
    },
    /// Write a live migration that ended before it began.
    PutMigration {
        /// Which VM.
        vm: Name,
        /// The whole record.
        migration: Box<Migration>,
        /// The revision of the record it replaces; 0 when there is none.
        expected_revision: i64,
    },
    /// Write a drain: the host is empty by now, or all that it had moved is back and the record goes.
    PutDrain {
        /// Of which host.
        host: Name,
        /// The whole record; none takes it away.
        drain: Option<Drain>,
        /// The revision of the record.
        expected_revision: i64,
    },
    /// Write how far the work on hosts is.
    PutMaintenance {
        /// The whole record.
        maintenance: Box<Maintenance>,
        /// The revision of the record it replaces.
        expected_revision: i64,
    },
    /// Forget the owner of a VM that does not run and shall not.
    ReleaseVm {
        /// Which VM.
        vm: Name,
        /// The revision of the placement.
        expected_revision: i64,
    },
    /// Note that a VM waits for what it starts after, or that it does so no more.
    PutWait {
        /// Which VM.
        vm: Name,
        /// Since when; nothing when it waits no more.
        wait: Option<Wait>,
        /// The revision of the record it replaces; 0 when there is none.
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
    /// Choose on which hosts the replicas of a mirrored volume are.
    PutVolume {
        /// Which volume.
        volume: VolumeRef,
        /// The whole record.
        record: Box<Volume>,
        /// The revision of the record it replaces; 0 when there is none.
        expected_revision: i64,
    },
    /// Have the disks of a VM in `rbd` pools shut to what has them open.
    PutClients {
        /// Which VM.
        vm: Name,
        /// The whole record.
        record: Box<DiskClients>,
        /// The revision of the record it replaces.
        expected_revision: i64,
    },
    /// Have a VM backed up.
    PutBackup {
        /// Which VM.
        vm: Name,
        /// The whole record.
        run: Box<BackupRun>,
        /// The revision of the record it replaces; 0 when there is none.
        expected_revision: i64,
    },
    /// Have a snapshot of a VM taken or removed.
    PutVmSnapshot {
        /// Of which VM.
        vm: Name,
        /// What the snapshot is called.
        name: Name,
        /// The whole record.
        record: Box<VmSnapshot>,
        /// The revision of the record it replaces; 0 when there is none.
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

/// What a step of a live migration does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", tag = "is")]
pub enum MoveStep {
    /// Another host shall make ready.
    Begin,
    /// It shall not after all; the owner goes on.
    TakeBack,
    /// The other host is the owner from here on. Commits only while neither side has said anything since.
    Commit {
        /// The revision of what the owner said, which has stopped its copy.
        source_told: i64,
        /// The revision of what the other host said, which listens.
        target_told: i64,
    },
    /// The copy of the owner before can run no more.
    Settle,
    /// It is not moved live: the owner has stopped it, and the other host is the owner from here on. Commits only while
    /// the owner before has said nothing since.
    Restart {
        /// The owner before.
        from: Name,
        /// The revision of what it said.
        told: i64,
    },
}

/// The evidence under which a VM is taken from a lost host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct TakenFrom {
    /// The lost host.
    pub host: Name,
    /// The revision of its closed renewal record. Of no meaning where the proof is `storage-fenced`: that one's is open, and the
    /// records of the VM's volumes are compared.
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
