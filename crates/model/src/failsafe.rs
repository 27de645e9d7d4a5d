//! What hosts promise each other while the store is stuck (DESIGN.md section 4, docs/decisions/0015-failsafe.md).

use crate::{name::Name, units::Millis};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// A daemon that promises closes no session of the asking host for so long from then on, by its clock.
pub const PROMISE: Millis = Millis(2000);
/// The asker's guard may hold out for so long from when it *sent* the question: less, since clocks run unevenly.
pub const HELD: Millis = Millis(1800);

/// A host that cannot renew asks another host's daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PromiseQuestion {
    /// Who asks.
    pub host: Name,
    /// The session that is not to be closed.
    pub session: u64,
}

/// What that daemon says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PromiseAnswer {
    /// It closes no session of the asker for [`PROMISE`].
    pub promised: bool,
    /// Otherwise why not, in words.
    #[serde(default)]
    pub why: String,
    /// The hosts of the cluster as it knows them: the asker needs an answer from each.
    pub hosts: BTreeSet<Name>,
}
