//! The lab: a real cluster on one machine, made of namespaces.
//!
//! Built so far: what runs as PID 1 inside a lab host.

pub mod host_init;
