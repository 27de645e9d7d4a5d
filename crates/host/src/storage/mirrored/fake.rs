//! Replicas that are records, for the simulator and for tests.

use super::driver::{ReplicaDriver, ReplicaError, ReplicaWanted, Served};
use async_trait::async_trait;
use std::{collections::BTreeSet, path::Path};

/// Serves nothing.
pub struct NoReplicas;

#[async_trait]
impl ReplicaDriver for NoReplicas {
    async fn serve(&self, _wanted: &ReplicaWanted) -> Result<Served, ReplicaError> {
        Err(ReplicaError::NoProgram)
    }
    async fn own(&self, _volume: &str, _path: &Path, _run: u64) -> Result<(), ReplicaError> {
        Ok(())
    }
    async fn served(&self, _volume: &str) -> Option<Served> {
        None
    }
    async fn known(&self) -> BTreeSet<String> {
        BTreeSet::new()
    }
    async fn end(&self, _volume: &str) -> Result<(), ReplicaError> {
        Ok(())
    }
}
