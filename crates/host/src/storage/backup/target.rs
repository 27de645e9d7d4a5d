//! Where a target of the cluster's is.

use super::repository::{Place, Repository, S3Place};
use crate::{agent::storage::StorageFailure, storage::says};
use haven_model::{Name, ObjectRef, Snapshot, TargetSpec, object::Kind};
use haven_store::seal::ClusterKey;
use std::{path::PathBuf, sync::Arc};
use tokio::sync::watch;

/// The targets of the cluster, as the live copy has them.
#[derive(Clone)]
pub struct Targets {
    live: watch::Receiver<Arc<Snapshot>>,
    secrets: Option<ClusterKey>,
}

impl Targets {
    /// Puts it together; without `secrets` no bucket can be used.
    #[must_use]
    pub fn new(live: watch::Receiver<Arc<Snapshot>>, secrets: Option<ClusterKey>) -> Self {
        Self { live, secrets }
    }

    /// There are none.
    #[must_use]
    pub fn none() -> Self {
        Self { live: watch::channel(Arc::default()).1, secrets: None }
    }

    /// The repository in one of them.
    ///
    /// # Errors
    /// As [`repository`].
    pub fn repository(&self, target: &Name) -> Result<Repository, StorageFailure> {
        let live = Arc::clone(&self.live.borrow());
        repository(&live, self.secrets.as_ref(), target)
    }
}

/// The repository in a target.
///
/// # Errors
/// When there is no such target, or this host cannot open its key.
pub fn repository(
    snapshot: &Snapshot,
    secrets: Option<&ClusterKey>,
    target: &Name,
) -> Result<Repository, StorageFailure> {
    let Some(object) = snapshot.targets.get(target) else {
        return Err(says(format!(
            "there is no target `{target}`; `haven backup target ls` lists them"
        )));
    };
    Repository::open(&place(&object.spec, secrets, target)?)
}

fn place(
    spec: &TargetSpec,
    secrets: Option<&ClusterKey>,
    target: &Name,
) -> Result<Place, StorageFailure> {
    if let Some(directory) = &spec.directory {
        return Ok(Place::Directory(PathBuf::from(directory)));
    }
    let Some(s3) = &spec.s3 else {
        return Err(says(format!("the target `{target}` does not say where it is; edit it")));
    };
    let secrets = secrets.ok_or_else(|| {
        says(format!("this host cannot derive the cluster's key, so it cannot use the target `{target}`; look at `haven host ls`"))
    })?;
    let key = secrets.open(&ObjectRef::new(Kind::Target, target.clone()), &s3.secret_key);
    let key = key.map_err(|error| {
        says(format!("the key of the target `{target}` cannot be opened ({error}); give it again"))
    })?;
    Ok(Place::S3(S3Place {
        endpoint: s3.endpoint.clone(),
        bucket: s3.bucket.clone(),
        prefix: s3.prefix.clone(),
        region: s3.region.clone(),
        access_key: s3.access_key.clone(),
        secret_key: key.expose().to_owned(),
        ca: s3.ca.clone(),
    }))
}
