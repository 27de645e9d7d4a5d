//! The hands of a host: everything that makes one machine match what the cluster committed.
//!
//! Each folder is one kind of thing a host does, and inside each the files have the same names: `mod.rs` says
//! what it promises, `driver.rs` is the seam, one file per engine does it for real, `fake.rs` stands in for it in
//! the simulator. [`agent`] is what ties them together.

pub mod agent;
pub mod balance;
pub mod fence;
pub mod guard;
pub mod health;
pub mod heartbeat;
pub mod machine;
pub mod monitor;
pub mod network;
pub mod storage;
pub mod vm;
