//! Passwords of power controllers that a version before the drivers left in the clear: the manager seals them when
//! there is nothing else to do.

use super::commit::Author;
use haven_model::{Name, Object, ObjectRef, Snapshot, keys, object::Kind};
use haven_store::{
    raw::{Compare, EtcdStore, Op, StoreError},
    seal::{ClusterKey, Plain, is_sealed},
};

/// Seals the first one that stands in the clear: the revision of the write, if there was one to seal and nobody was
/// quicker. The generation stays, since what is wanted has not changed.
///
/// # Errors
/// When the store does not answer.
pub async fn seal_one(
    store: &EtcdStore,
    secrets: &ClusterKey,
    snapshot: &Snapshot,
    author: &Author,
) -> Result<Option<i64>, StoreError> {
    let clear = |host: &Name| {
        let power = snapshot.hosts[host].spec.power.as_ref();
        power.is_some_and(|power| !power.password.is_empty() && !is_sealed(&power.password))
    };
    let Some(host) = snapshot.hosts.keys().find(|host| clear(host)) else { return Ok(None) };
    let reference = ObjectRef::new(Kind::Host, host.clone());
    let Some((Object::Host(mut object), revision)) = snapshot.object(&reference) else {
        return Ok(None);
    };
    let Some(power) = &mut object.spec.power else { return Ok(None) };
    match secrets.seal(&reference, &Plain::new(std::mem::take(&mut power.password))) {
        Ok(sealed) => power.password = sealed,
        Err(error) => {
            tracing::error!(
                error = &error as &dyn std::error::Error,
                "a password stays in the clear"
            );
            return Ok(None);
        }
    }
    let key = keys::object(&reference);
    let compares = vec![
        Compare::ModRevision(keys::MANAGER.into(), author.record_revision),
        Compare::ModRevision(key.clone(), revision),
    ];
    let ops = vec![Op::Put(key, Object::Host(object).to_store().into())];
    let outcome = store.txn(compares, ops).await?;
    if outcome.succeeded {
        tracing::info!(%host, "the password of its power controller was in the clear and is sealed now");
    }
    Ok(outcome.succeeded.then_some(outcome.revision))
}
