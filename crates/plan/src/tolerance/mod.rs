//! Tolerance: which hosts live, which are proven lost, and what becomes of their VMs; and whether there is room for
//! them.

pub mod admission;
#[cfg(test)]
mod admission_test;
pub mod admit;
pub mod drain;
pub mod failing;
#[cfg(test)]
mod failing_test;
pub mod hosts;
pub mod maintenance;
#[cfg(test)]
mod maintenance_test;
pub mod migration;
pub mod order;
#[cfg(test)]
mod order_test;
pub mod rebalance;
#[cfg(test)]
mod rebalance_test;
pub mod recovery;
pub mod removal;
pub(crate) mod uplink;
#[cfg(test)]
mod uplink_test;
