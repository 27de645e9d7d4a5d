//! Where a host keeps things.

use std::path::PathBuf;

/// The three directories of a host.
#[derive(Clone, Debug)]
pub struct Paths {
    /// Survives a reboot: `/var/lib/haven`.
    pub state: PathBuf,
    /// Does not: `/run/haven`.
    pub run: PathBuf,
    /// `/var/log/haven`.
    pub log: PathBuf,
}

impl Paths {
    /// As the environment says, or the defaults.
    #[must_use]
    pub fn from_env() -> Self {
        let path = |name: &str, default: &str| {
            PathBuf::from(std::env::var(name).unwrap_or_else(|_| default.into()))
        };
        Self {
            state: path("HAVEN_STATE_DIR", "/var/lib/haven"),
            run: path("HAVEN_RUN_DIR", "/run/haven"),
            log: path("HAVEN_LOG_DIR", "/var/log/haven"),
        }
    }
}
