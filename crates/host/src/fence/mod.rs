//! Fencing by power: switching a lost host off from outside, so that its VMs may run elsewhere before its lease has
//! expired.
//!
//! ```text
//!   manager: suspected, silent ──► Drivers ─┬─ redfish      https ──► BMC ──► ForceOff, then read until `Off`
//!                                           └─ fence_agent  stdin ──► fence_… ──► off, then status until it is off
//! ```
//!
//! What it promises: `off` returns well only when the controller itself said afterwards that the host is off. A
//! controller that took the command, or that cannot be read, proves nothing. Every call ends by itself: each request
//! and each run of an agent has a deadline, and what is left of an agent then is killed with all that it started. So a
//! controller that died with its host costs nothing but this proof; the lease goes on to expire beside it.
//!
//! A password goes to a controller whose certificate was verified, by an authority or by its fingerprint, or to one
//! that a person declared `insecure`; and to an agent on its standard input, never on its command line.
//!
//! Rejected: sessions of Redfish (a session that a dead manager leaves behind takes one of the few that a controller
//! has, and Basic is asked for by the standard); following redirections (they could lead a password elsewhere);
//! `GracefulShutdown` (a host that hangs does not shut down); trusting the exit code of an agent's `off` alone.

pub mod driver;
pub mod fence_agent;
pub mod redfish;
mod trust;

pub use driver::{Drivers, PowerDriver};

#[cfg(test)]
mod fence_agent_test;
#[cfg(test)]
mod redfish_test;
