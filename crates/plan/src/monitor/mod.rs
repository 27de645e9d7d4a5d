//! Monitor: incidents.

pub mod incidents;
