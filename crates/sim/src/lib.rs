//! Whole clusters in one process, in virtual time.
//!
//! ```text
//!   faults ──► net (who reaches whom, which host runs, where the store's leader is)
//!                │
//!   real code:   lease ─ agent ─ manager ─ heartbeat ─ live copy ─ store client     (one set per simulated daemon)
//!                │                                         │
//!   fakes:       VMs, guard, network, balancer, power      └──► in-process etcd
//!                └──────────── every change ────────► judge: the invariants, at that very instant
//! ```
//!
//! What it promises: a seed decides everything, so a failing one reruns exactly; the code that decides is the
//! product's own, and only what touches a machine is replaced; the invariants are checked at every change of what runs
//! and at every transaction, not now and then.
//!
//! Not simulated: the API, etcd's own consensus (its effects are: no leader for an election, no quorum, lost answers),
//! QEMU, HAProxy, the kernel's network. The lab has the real ones.

#[cfg(not(tokio_unstable))]
compile_error!("the flags of .cargo/config.toml are missing; unset RUSTFLAGS, which replaces them");

pub mod cluster;
pub mod failing;
pub mod faults;
pub mod host;
pub mod invariants;
pub mod judge;
pub mod net;
pub mod path;
pub mod promises;
pub mod run;
pub mod scenario;
pub mod shrink;
pub mod snapshots;
pub mod steps;
pub mod storm;
pub mod surroundings;
pub mod wire;

#[cfg(test)]
mod sim_test;
