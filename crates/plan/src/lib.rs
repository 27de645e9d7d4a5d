//! The brain: from a snapshot and what its observer saw to a plan. Pure: no clock, no IO, no randomness.
//!
//! ```text
//!   snapshot + observations ──► host states (tolerance/hosts)
//!                                    │
//!        storage/replicas   ◄────────┤
//!        storage/shutting   ◄────────┤
//!        storage/backups    ◄────────┤
//!        tolerance/recovery ◄────────┤────► balance/services ─► members wanted
//!        tolerance/failing ◄─────────┤          │
//!        tolerance/migration ◄───────┤          │
//!        tolerance/uplink    ◄───────┤          │
//!        tolerance/maintenance ◄─────┤          │
//!        tolerance/drain     ◄───────┤          │
//!        tolerance/rebalance ◄───────┤          │
//!        balance/frontends  ◄────────┤          │
//!        monitor/incidents  ◄────────┘          ▼
//!                                   placement (filters, scores, addresses) ◄── tolerance/admission, asked by the API
//! ```
//!
//! What it promises: the same inputs give the same plan; every action carries its reason, and everything wanted that
//! cannot be done now stands in `waiting` with its reason; no VM is taken from a host without a proof. The plan is
//! made anew after every commit, so it never remembers anything: all state is in the store.
//!
//! Rejected: an optimizer over all placements (it would move what runs well, and nobody could explain it).

pub mod balance;
pub mod check;
pub mod explain;
pub mod monitor;
pub mod placement;
pub mod rehearse;
pub mod storage;
pub mod testing;
pub mod tolerance;
mod wishes;
mod work;

#[cfg(test)]
mod drain_test;
#[cfg(test)]
mod migration_test;
#[cfg(test)]
mod plan_test;
#[cfg(test)]
mod property_test;
#[cfg(test)]
mod rehearse_test;
#[cfg(test)]
mod rollouts_test;
#[cfg(test)]
mod wishes_test;

pub use check::{check, sound};
pub use explain::explain;
use haven_model::{Observations, Plan, Snapshot};
pub use rehearse::{Event, rehearse};
pub use tolerance::{
    admission::{Losses, losses},
    admit::admit,
    hosts::{HostState, host_states},
    rebalance::{advice, balance},
};
use work::Work;

/// Decides everything that is to be done now.
#[must_use]
pub fn plan(snapshot: &Snapshot, seen: &Observations) -> Plan {
    let mut work = Work::new(snapshot, seen);
    tolerance::hosts::fence(&mut work);
    monitor::incidents::follow(&mut work);
    balance::services::plan(&mut work);
    storage::replicas::plan(&mut work);
    storage::shutting::plan(&mut work);
    storage::backups::plan(&mut work);
    storage::copies::plan(&mut work);
    storage::schedules::plan(&mut work);
    tolerance::recovery::plan(&mut work);
    tolerance::failing::plan(&mut work);
    tolerance::migration::plan(&mut work);
    tolerance::uplink::plan(&mut work);
    tolerance::maintenance::plan(&mut work);
    tolerance::drain::plan(&mut work);
    balance::frontends::plan(&mut work);
    tolerance::removal::plan(&mut work);
    // The last, since it waits for all else.
    tolerance::rebalance::plan(&mut work);
    work.finish()
}
