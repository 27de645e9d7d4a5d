//! The machine itself: it is restarted, and its software upgraded, when the cluster says that it is this host's turn.

pub mod command;
pub mod driver;

pub use driver::{Machine, Outcome};
