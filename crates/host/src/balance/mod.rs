//! The balancer of this host: one HAProxy, configured from the store (DESIGN.md section 9).
//!
//! What it promises: members come, go, drain and fall out through HAProxy's runtime API without a reload; only a
//! structural change reloads it, and that hands the listening sockets over. It survives the daemon and is adopted. Where
//! TLS ends here, a certificate lies opened on a tmpfs and nowhere else; one that cannot be used harms no other frontend.
//!
//! Rejected: a balancer in Rust (a well-kept engine beats our own code), and one process per frontend.

pub mod certificates;
pub mod driver;
pub mod fake;
pub mod haproxy;
#[cfg(test)]
mod haproxy_test;
