//! What every part of Haven agrees on: names, specs, placements, statuses, the [`Snapshot`] of all of them, and the
//! [`Plan`] the brain returns. No IO, no async, no clock.
//!
//! ```text
//!  people write   Spec       ──► what is wanted
//!  manager writes Placement  ──► who runs it (with an epoch), Lost sessions, incidents, events
//!  agents write   Status     ──► what is seen; and their own Lease
//! ```
//!
//! Every record stands under one key of the store ([`keys`]); [`Snapshot::apply`] is the only place that turns keys
//! into typed records, so an unknown key or field written by a newer daemon does no harm.

pub mod api;
pub mod backup;
pub mod certificate;
pub mod clients;
pub mod cluster;
pub mod drain;
pub mod error;
pub mod event;
pub mod failsafe;
pub mod host;
pub mod image;
pub mod keys;
pub mod load;
pub mod maintenance;
pub mod manifest;
pub mod migration;
pub mod name;
pub mod network;
pub mod object;
pub mod placement;
pub mod plan;
pub mod pool;
pub mod power;
pub mod service;
pub mod snapshot;
#[cfg(test)]
mod snapshot_test;
pub mod tolerant;
pub mod units;
pub mod vm;
pub mod vm_snapshot;
pub mod volume;

pub use backup::TargetSpec;
pub use certificate::CertificateSpec;
pub use clients::DiskClients;
pub use cluster::{AdmissionPolicy, ClusterSpec, LONGEST_LEASE, ManagerRecord, ProofKind, Timers};
pub use drain::{Drain, DrainMove, MoveLimits};
pub use error::ModelError;
pub use event::{Event, Incident, IncidentStep, Severity};
pub use host::{HostSpec, HostStatus, Lease, LostSession};
pub use image::ImageSpec;
pub use load::{HostLoad, Pressure, RebalancePolicy, VmLoad};
pub use maintenance::Maintenance;
pub use migration::{
    Migration, MigrationOptions, MigrationPhase, MigrationStatus, MovedFrom, MovingTo,
};
pub use name::{Name, ObjectRef};
pub use network::{NetworkKind, NetworkSpec};
pub use object::{Kind, Meta, Object};
pub use placement::{FrontendPlacement, NicAddress, Placement};
pub use plan::{Action, Observations, Plan, Planned, Waiting};
pub use pool::{GlusterSpec, NfsSpec, PoolDriverKind, PoolSpec, RbdSpec};
pub use power::{PowerKind, PowerProblem, PowerSpec, PowerState};
pub use service::{ServiceSpec, UpdateStrategy};
pub use snapshot::{Change, Handover, Snapshot, Versioned};
pub use units::Bytes;
pub use vm::{VmPhase, VmSpec, VmStatus};
