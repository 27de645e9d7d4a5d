//! The seam: what is asked of whatever serves replicas.

use super::kept::KeptOf;
use crate::{agent::storage::StorageFailure, vm::qmp::QmpError};
use async_trait::async_trait;
use haven_store::seal::Plain;
use std::{
    collections::BTreeSet,
    io,
    net::IpAddr,
    path::{Path, PathBuf},
};

/// A replica that is to be served.
#[derive(Clone, Debug)]
pub struct ReplicaWanted {
    /// Unique in the cluster.
    pub volume: String,
    /// The file.
    pub path: PathBuf,
    /// Its unix user, whom the process runs as.
    pub owner_uid: u32,
    /// To which run of the volume.
    pub run: u64,
    /// How large it is in that run, bytes; never less than before.
    pub size_bytes: u64,
    /// The key of that run, 32 bytes in hexadecimal.
    pub key: Plain,
    /// This host's address in the cluster's network.
    pub address: IpAddr,
    /// What it holds from a run on.
    pub base: Option<Base>,
}

/// What a replica holds from a run on, whatever it held before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Base {
    /// One that may still be served to an earlier run than this one has the copy put in its place first.
    pub run: u64,
    /// The copy.
    pub kept: KeptOf,
}

/// A replica that is served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Served {
    /// To which run.
    pub run: u64,
    /// At which port.
    pub port: u16,
    /// Changes when its process is another one, which knows nothing of what the one before had written last.
    pub instance: String,
    /// Changes when its file is another one, which holds nothing of what the one before did.
    pub file: String,
}

/// The name under which a volume is served. It is another one once the process is: whoever was connected does not come back
/// without being told to, for what was not flushed may be lost by then.
#[must_use]
pub fn export(volume: &str, run: u64, instance: &str) -> String {
    format!("{volume}-r{run}-{instance}")
}

/// Why a replica is not served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReplicaError {
    /// That run is over.
    #[error(
        "the volume {volume} is not served to run {run}: run {lowest} has begun, and who still writes in an earlier one is shut out"
    )]
    Over {
        /// Which volume.
        volume: String,
        /// What was asked for.
        run: u64,
        /// The lowest that may be served.
        lowest: u64,
    },
    /// There is no such program.
    #[error("qemu-storage-daemon is not installed; install the package qemu-utils")]
    NoProgram,
    /// The process ended, or did not begin.
    #[error("the storage daemon of {volume} does not run: {said}")]
    Died {
        /// Which volume.
        volume: String,
        /// Its last words.
        said: String,
    },
    /// What it is to hold again cannot be put in its place.
    #[error("the replica of {volume} cannot be made what it was in its snapshot: {failure}")]
    NotBack {
        /// Which volume.
        volume: String,
        /// Why not.
        failure: StorageFailure,
    },
    /// The process refused, or did not answer.
    #[error("the storage daemon of {volume} does not do what it is told")]
    Qmp {
        /// Which volume.
        volume: String,
        /// What happened.
        #[source]
        source: QmpError,
    },
    /// The machine refused something.
    #[error("{what}")]
    System {
        /// What was tried.
        what: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// Serves replicas of this host.
#[async_trait]
pub trait ReplicaDriver: Send + Sync {
    /// Serves a replica. When it returns without an error, nobody of an earlier run writes to it: their connections have ended,
    /// and none is taken any more. Fine when it is served so already.
    ///
    /// # Errors
    /// As the variants of [`ReplicaError`] tell.
    async fn serve(&self, wanted: &ReplicaWanted) -> Result<Served, ReplicaError>;
    /// Serves it to nobody, now or in any run before this one: it is the owner's own. When it returns without an error the file
    /// can be opened.
    ///
    /// # Errors
    /// As [`ReplicaDriver::serve`].
    async fn own(
        &self,
        volume: &str,
        path: &Path,
        run: u64,
        base: Option<&Base>,
    ) -> Result<(), ReplicaError>;
    /// The lowest run that a replica may be served to: it was open in that run or in the one before.
    ///
    /// # Errors
    /// When its disk does not tell.
    async fn lowest(&self, volume: &str, path: &Path) -> io::Result<u64>;
    /// How a replica is served; nothing when it is not, or its process has ended.
    async fn served(&self, volume: &str) -> Option<Served>;
    /// The volumes that have a process, also those that an earlier daemon left.
    async fn known(&self) -> BTreeSet<String>;
    /// Ends its process, and with it all connections. Fine when there is none.
    ///
    /// # Errors
    /// When the process does not end.
    async fn end(&self, volume: &str) -> Result<(), ReplicaError>;
}
