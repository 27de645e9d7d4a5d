//! What the work on this host takes of it. It is only read: nothing here decides or moves anything.

pub mod driver;
pub mod proc;

pub use driver::{Meter, Stalled, Used};
