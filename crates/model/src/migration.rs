//! Live migration: a change of owner while the guest runs (DESIGN.md section 5, docs/decisions/0011-live-migration.md).
//!
//! ```text
//!  a person, a drain ─► migration ─► placement {A, n, movingTo B} ─► B makes ready, A copies and stops
//!                                                                    │ both say so in their migration statuses
//!            placement {B, n+1, movedFrom A} ◄── committed over both ┘
//!            A hands over and says so ─► B lets it run ─► movedFrom is taken out
//! ```
//!
//! An attempt is named by the revision of the placement that began it: no other write has that number, and nothing
//! else writes the placement until the attempt has ended.

use crate::{drain::DrainMove, name::Name, units::Millis};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How a VM is moved.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub struct MigrationOptions {
    /// How long QEMU may keep the guest stopped for the last of its memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub downtime: Option<Millis>,
    /// Its memory follows after it: once all of it was sent once, the guest goes over and fetches from the old host what
    /// it has changed meanwhile. So it moves however fast it writes; but until all has come, the loss of either host
    /// costs it a restart.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub postcopy: bool,
}

/// What QEMU keeps a guest stopped for at most, unless it is asked otherwise.
pub const DOWNTIME: Millis = Millis(50);

impl MigrationOptions {
    /// What is asked for one move, over what its VM says of all of them.
    #[must_use]
    pub fn over(self, usual: &Self) -> Self {
        Self {
            downtime: self.downtime.or(usual.downtime),
            postcopy: self.postcopy || usual.postcopy,
        }
    }

    /// The downtime that counts.
    #[must_use]
    pub fn downtime(&self) -> Millis {
        self.downtime.unwrap_or(DOWNTIME)
    }
}

/// How a migration ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MigrationOutcome {
    /// When, wall clock, milliseconds since 1970.
    pub at_ms: i64,
    /// The guest runs on, elsewhere.
    pub moved: bool,
    /// In words.
    pub message: String,
}

/// Somebody wants a VM to be moved. It stays, with its outcome, until the next one of the same VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Migration {
    /// Tells it from every other one.
    pub id: String,
    /// Where from: it is over once the VM is elsewhere.
    pub from: Name,
    /// Where to; chosen by the plan when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<Name>,
    /// How.
    #[serde(default)]
    pub options: MigrationOptions,
    /// Who asked.
    pub by: String,
    /// When, wall clock, milliseconds since 1970.
    pub at_ms: i64,
    /// The drain that it is of, if it is of one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drain: Option<DrainMove>,
    /// It is to balance the load of hosts.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub balances: bool,
    /// How it ended; absent while it is wanted or under way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outcome: Option<MigrationOutcome>,
}

impl Migration {
    /// The record once it has ended.
    #[must_use]
    pub fn ended(&self, at_ms: i64, moved: bool, message: String) -> Self {
        Self { outcome: Some(MigrationOutcome { at_ms, moved, message }), ..self.clone() }
    }
}

/// Part of a placement: the owner still runs the VM, and another host makes ready to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MovingTo {
    /// The host that makes ready.
    pub host: Name,
    /// The [`Migration`] that this answers.
    pub migration: String,
    /// How.
    #[serde(default)]
    pub options: MigrationOptions,
    /// It is not moved live: the owner stops it and says so, and it starts anew on the other host if it shall run.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub restart: bool,
}

/// Part of a placement: the host that ran the VM before, until it has said that its copy can run no more. The new owner
/// neither lets the copy that it was handed run nor starts another one before that.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MovedFrom {
    /// That host.
    pub host: Name,
    /// Its session then. Once that was closed under a proof, its copy is gone.
    pub session: u64,
    /// The attempt that this was the end of.
    pub attempt: i64,
}

/// How far one side of an attempt is.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum MigrationPhase {
    /// The new host: disks, networks and process are being made.
    Preparing,
    /// The new host: its process waits for the guest. It does not run.
    Listening,
    /// The old host: memory is being copied while the guest runs.
    Copying,
    /// The old host: the guest is stopped, and waits for the change of owner.
    Stopped,
    /// The old host, after the change: its process can run the guest no more, the new host can, and what the guest
    /// needs of its memory is still being sent (post-copy).
    Following,
    /// The old host, after the change: all was handed over, and its process can run the guest no more.
    HandedOver,
    /// The old host: its process is gone, after the change with not all handed over. When it is not moved live, before
    /// the change: nothing of it runs, and it is not started as long as the attempt stands.
    Gone,
    /// Either host, before the change: it did not work out; `message` says why. The old host runs the guest.
    Failed,
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// How far the copy is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Progress {
    /// The guest's memory, bytes.
    pub total: u64,
    /// What is still to be sent of this round, bytes.
    pub left: u64,
    /// Sent so far, bytes; memory that the guest changes is sent again.
    pub sent: u64,
    /// Bytes per second.
    pub rate: u64,
    /// Rounds over the memory so far.
    pub rounds: u64,
    /// Bytes of disks that go along, those that the guest has written since counted again; 0 when none does.
    #[serde(skip_serializing_if = "is_zero")]
    pub disk_total: u64,
    /// Of these, still to be sent.
    #[serde(skip_serializing_if = "is_zero")]
    pub disk_left: u64,
    /// How long QEMU kept the guest stopped, once it has said so.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub downtime: Option<Millis>,
}

/// What one side of an attempt says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MigrationStatus {
    /// The attempt: the revision of the placement that began it.
    pub attempt: i64,
    /// The session of the host that says so.
    pub session: u64,
    /// How far it is.
    pub phase: MigrationPhase,
    /// The old host: how far the copy is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<Progress>,
    /// The old host: the machine type of the running QEMU, so that the new one is the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine: Option<String>,
    /// The old host: that QEMU has ports for disks.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub ports: bool,
    /// The old host: the revision of the `Listening` of the new one, to whose process it sends. A process that came later has
    /// nothing of what was sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub heard: Option<i64>,
    /// In words, when there is something to say.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
}

impl MigrationStatus {
    /// Whether this is of the process that listens by the word of that revision; an older version does not tell.
    #[must_use]
    pub fn sent_to(&self, listening: i64) -> bool {
        self.heard.is_none_or(|heard| heard == listening)
    }
}
