//! The lab: a real cluster on one machine, made of namespaces (DESIGN.md section 13).
//!
//! ```text
//!   fabric namespace: bridge 10.88.0.0/24, power API on .254
//!      ├─ veth ── host1 (10.88.0.1): its own net, mount, PID, UTS, IPC namespaces over one Debian tree
//!      ├─ veth ── host2 …
//!      └─ veth ── client (10.88.0.250)
//! ```
//!
//! Killing a host's first process is a power cut; taking its veth off the bridge is a network failure. Nothing is
//! attached to the machine's own network.

pub mod asking;
pub mod command;
pub mod drive;
pub mod host_init;
pub mod lab;
pub mod machine;
pub mod power;
pub mod progress;
pub mod schedule;
pub mod scribes;
pub mod up;
pub mod watchdog;
