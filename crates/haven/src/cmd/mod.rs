//! The commands, by what they are about.

pub mod cluster;
pub mod host;
pub mod image;
pub mod objects;
pub mod service;
pub mod vm;
pub mod watch;
