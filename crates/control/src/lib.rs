//! The cluster's will: the [`manager`] that turns snapshots into commits, and the [`api`] through which people speak.

pub mod api;
pub mod manager;
