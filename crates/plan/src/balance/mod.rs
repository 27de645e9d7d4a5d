//! Balance: the members of services and the holders of their addresses.

pub mod frontends;
pub mod services;
