//! Monitor: incidents.

mod failing;
pub mod incidents;
