//! Work on hosts that ends what runs there: hosts are restarted or upgraded, one after another
//! (docs/decisions/0020-rolling-work.md).
//!
//! ```text
//!  a person ─► maintenance {hosts, each with its phase}
//!     waiting ─► draining ─► working ─► settling ─► returning ─► done ─► the next host
//!                 (a drain)   (its agent)  (is it well?) (undrain)
//! ```
//!
//! There is one record, and one host at a time has a phase between waiting and done. At the first doubt the plan writes why it
//! stopped, and nothing more happens until a person lets it go on or ends it.

use crate::name::Name;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::fmt;

/// What is done to each host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Work {
    /// It is restarted.
    Reboot,
    /// Haven is upgraded there.
    Upgrade,
}

impl Work {
    /// One word, as commands and files are called.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Work::Reboot => "reboot",
            Work::Upgrade => "upgrade",
        }
    }
}

impl fmt::Display for Work {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// How far one host is.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// It is not its turn yet.
    Waiting,
    /// What runs there leaves.
    Draining,
    /// It is empty, and its agent works.
    Working,
    /// The work is done; it must be well for a while.
    Settling,
    /// It takes VMs again, and what had left comes back.
    Returning,
    /// All of it is over.
    Done,
}

/// One host of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Turn {
    /// Which host.
    pub host: Name,
    /// How far it is.
    pub phase: Phase,
    /// Since when, wall clock, milliseconds since 1970.
    pub since_ms: i64,
    /// Before the work: what tells this boot of it from the next.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub boot_id: String,
    /// Before the work: Haven's version there.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub version: String,
    /// What was wrong there before the work: it need not be better afterwards.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<String>,
    /// It ran a member of the store before the work.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub voted: bool,
}

/// Somebody wants hosts to be worked on. It stays, with its end, until the next one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Maintenance {
    /// Tells it from every other one.
    pub id: String,
    /// What is done.
    pub work: Work,
    /// Who asked.
    pub by: String,
    /// When, wall clock, milliseconds since 1970.
    pub at_ms: i64,
    /// In this order.
    pub hosts: Vec<Turn>,
    /// Why it stopped, a sentence: a person decides how it goes on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stopped: Option<String>,
    /// When it was over, wall clock, milliseconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_ms: Option<i64>,
}

impl Maintenance {
    /// The host whose turn it is; none when it is over.
    #[must_use]
    pub fn turn(&self) -> Option<&Turn> {
        let open = self.hosts.iter().find(|turn| turn.phase != Phase::Done);
        open.filter(|_| self.ended_ms.is_none())
    }

    /// The id of the drain that empties a host for it: another one for each, so that what left one host does not come
    /// back to another.
    #[must_use]
    pub fn drain_id(&self, host: &Name) -> String {
        format!("{}/{host}", self.id)
    }

    /// Whether a host is being worked on now, so that its silence is no surprise.
    #[must_use]
    pub fn works_on(&self, host: &Name) -> bool {
        let turn = self.turn().filter(|turn| turn.host == *host);
        turn.is_some_and(|turn| turn.phase == Phase::Working) && self.stopped.is_none()
    }
}

/// How far the agent of a host is with its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum WorkState {
    /// It has begun, or is about to.
    Begun,
    /// It is done.
    Done,
    /// It did not work; the message says why.
    Failed,
}

/// What the agent of a host says of its work.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct WorkStatus {
    /// Of which [`Maintenance`].
    pub maintenance: String,
    /// How far it is.
    pub state: WorkState,
    /// In words, when there is something to say.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
}
