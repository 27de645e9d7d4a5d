//! Pools of Ceph clusters and of filers: checked before they are written, also by asking those, and the key of Ceph's user sealed.
//!
//! A key comes in the clear once and is sealed before anything else happens to it. `sealed` in its place keeps the one that is
//! there, as long as all else stays.

use super::{
    ApiState,
    error::{ApiError, ApiResult},
    validate::Say,
};
use axum::http::StatusCode;
use haven_model::{
    GlusterSpec, Name, NfsSpec, Object, PoolDriverKind, PoolSpec, RbdSpec, Snapshot, VmSpec,
    certificate::SEALED,
    host::{FILERS, RBD},
};
use haven_plan::tolerance::migration::speaks_less;
use haven_store::seal::{Plain, is_sealed};

/// What is wrong with a pool.
pub(super) fn validate(snapshot: &Snapshot, name: &Name, spec: &PoolSpec, say: &mut Say<'_>) {
    let old = snapshot.pools.get(name).map(|old| &old.spec);
    if old.is_some_and(|old| !may_become(old, spec)) {
        say(
            ("name", name),
            "a pool cannot be changed once it is there".into(),
            "make a new pool under another name; of one of Ceph's its monitors, user and key may change, of one on a filer where that is reached",
        );
    }
    let filer = matches!(spec.driver, PoolDriverKind::Nfs | PoolDriverKind::Gluster);
    if filer || spec.nfs.is_some() || spec.gluster.is_some() {
        return on_filer(snapshot, spec, old, say);
    }
    match (&spec.rbd, spec.driver) {
        (Some(rbd), PoolDriverKind::Rbd) => of_ceph(snapshot, spec, rbd, old, say),
        (None, PoolDriverKind::Rbd) => say(
            ("driver", &"rbd"),
            "it does not say where the Ceph cluster is".into(),
            "write `rbd:` with `monitors`, `user`, `key` and `pool`",
        ),
        (Some(_), _) => say(
            ("rbd", &""),
            "`rbd` belongs to pools of Ceph clusters".into(),
            "write `driver: rbd`, or leave `rbd` out",
        ),
        (None, _) if !spec.path.starts_with('/') => say(
            ("path", &spec.path),
            format!("`path` is `{}`, which is not absolute", spec.path),
            "begin it with `/`",
        ),
        (None, _) => {}
    }
}

/// Of a pool of Ceph's or of a filer only the way to it changes. Of one on a filer it is the mark that tells it from all others.
fn may_become(old: &PoolSpec, new: &PoolSpec) -> bool {
    if let (Some(of), Some(now)) = (&old.rbd, &new.rbd) {
        let rest = |spec: &PoolSpec| PoolSpec { rbd: None, ..spec.clone() };
        return of.place() == now.place() && rest(old) == rest(new);
    }
    let rest = |spec: &PoolSpec| PoolSpec { nfs: None, gluster: None, ..spec.clone() };
    let moved = old.nfs.is_some() == new.nfs.is_some()
        && match (&old.gluster, &new.gluster) {
            (Some(of), Some(now)) => of.volume == now.volume && of.directory == now.directory,
            (of, now) => of.is_none() && now.is_none(),
        };
    moved && rest(old) == rest(new)
}

/// Whether this can be the address or the name of a server.
fn is_server(text: &str) -> bool {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"-.".contains(&byte);
    !text.is_empty() && text.len() <= 253 && !text.starts_with(['-', '.']) && text.bytes().all(fits)
}

/// Whether this can be a directory of a filer: what QEMU and mount programs take without a second thought.
fn is_directory(text: &str) -> bool {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"-_./@+".contains(&byte);
    text.len() > 1
        && text.len() <= 512
        && text.starts_with('/')
        && text.bytes().all(fits)
        && text[1..].split('/').all(|part| !part.is_empty() && part != "." && part != "..")
}

fn on_filer(snapshot: &Snapshot, spec: &PoolSpec, old: Option<&PoolSpec>, say: &mut Say<'_>) {
    match (spec.driver, &spec.nfs, &spec.gluster, &spec.rbd) {
        (PoolDriverKind::Nfs, Some(nfs), None, None) => of_nfs(nfs, say),
        (PoolDriverKind::Gluster, None, Some(gluster), None) => of_gluster(gluster, say),
        (PoolDriverKind::Nfs, ..) => {
            let message = "it does not say which NFS server it is of, and nothing else".into();
            say(("driver", &"nfs"), message, "write `nfs:` with `server` and `path`");
        }
        (PoolDriverKind::Gluster, ..) => {
            let message = "it does not say which Gluster volume it is of, and nothing else".into();
            say(("driver", &"gluster"), message, "write `gluster:` with `servers` and `volume`");
        }
        (_, nfs, ..) => {
            let key = if nfs.is_some() { "nfs" } else { "gluster" };
            let message = format!("`{key}` belongs to pools with `driver: {key}`");
            say((key, &""), message, "write that driver, or leave it out");
        }
    }
    if !spec.path.is_empty() {
        let message =
            format!("`path` is `{}`, and a pool of a filer has no directory on hosts", spec.path);
        say(("path", &spec.path), message, "leave it out, or indent it below `nfs:`");
    }
    if let Some(host) = speaks_less(snapshot, FILERS).filter(|_| old.is_none()) {
        let message = format!(
            "{host} has not said that it knows pools of filers: it runs an older Haven, or has not come up yet"
        );
        say(("driver", &""), message, "wait until all hosts are up and upgraded");
    }
}

fn of_nfs(nfs: &NfsSpec, say: &mut Say<'_>) {
    if !is_server(&nfs.server) {
        let message = format!("`server` is `{}`, which is no address and no name", nfs.server);
        say(("server", &nfs.server), message, "write it like 10.0.0.9 or filer.example.org");
    }
    if !is_directory(&nfs.path) {
        let message = format!("`path` is `{}`, which is no directory of a server", nfs.path);
        let hint =
            "write it as the server exports it, like /srv/vms, with letters, digits and `-_.@+`";
        say(("path", &nfs.path), message, hint);
    }
}

fn of_gluster(gluster: &GlusterSpec, say: &mut Say<'_>) {
    if gluster.servers.is_empty() {
        let hint = "write the addresses of its servers; one that answers is enough";
        say(("servers", &""), "`servers` names none".into(), hint);
    }
    if let Some(wrong) = gluster.servers.iter().find(|server| !is_server(server)) {
        let message = format!("`{wrong}` in `servers` is no address and no name");
        say(("servers", wrong), message, "write each like 10.0.0.9 or filer1.example.org");
    }
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
    let volume = &gluster.volume;
    if volume.is_empty() || volume.starts_with('-') || !volume.bytes().all(fits) {
        let message = format!("`volume` is `{volume}`, which is no name of a Gluster volume");
        say(("volume", volume), message, "`gluster volume list` there tells them");
    }
    if let Some(directory) = gluster.directory.as_deref().filter(|text| !is_directory(text)) {
        let message = format!("`directory` is `{directory}`, which is no directory of a volume");
        say(("directory", &directory), message, "write it like /vms, or leave it out");
    }
}

fn of_ceph(
    snapshot: &Snapshot,
    spec: &PoolSpec,
    rbd: &RbdSpec,
    old: Option<&PoolSpec>,
    say: &mut Say<'_>,
) {
    if !spec.path.is_empty() {
        let message = format!("`path` is `{}`, and a pool of Ceph's has no directory", spec.path);
        say(("path", &spec.path), message, "leave it out");
    }
    for (key, text) in [("user", &rbd.user), ("key", &rbd.key), ("pool", &rbd.pool)] {
        if text.is_empty() {
            say(
                (key, &""),
                format!("`{key}` is empty"),
                "whoever runs that cluster gives it to you",
            );
        }
    }
    if let Some(host) = speaks_less(snapshot, RBD).filter(|_| old.is_none()) {
        let message = format!(
            "{host} has not said that it knows pools of Ceph clusters: it runs an older Haven, or has not come up yet"
        );
        say(("driver", &"rbd"), message, "wait until all hosts are up and upgraded");
    }
}

/// Whose the disks are of a pool that keeps nothing but what their guests wrote: no snapshots, no backups, no clones. With it how a
/// person copies one.
pub(super) fn bare(driver: PoolDriverKind) -> Option<(&'static str, &'static str)> {
    match driver {
        PoolDriverKind::Rbd => {
            Some(("a Ceph cluster", "`rbd export` there copies a disk of a VM that is stopped"))
        }
        PoolDriverKind::Nfs => {
            Some(("an NFS server", "copy its file there while the VM is stopped"))
        }
        PoolDriverKind::Local
        | PoolDriverKind::Shared
        | PoolDriverKind::Mirrored
        | PoolDriverKind::Gluster => None,
    }
}

/// The first disk of a VM in such a pool, with that pool and its words.
pub(super) fn bare_disk<'a>(
    snapshot: &Snapshot,
    spec: &'a VmSpec,
) -> Option<(&'a Name, &'a Name, (&'static str, &'static str))> {
    spec.disks.iter().find_map(|disk| {
        let words = bare(snapshot.pools.get(&disk.pool)?.spec.driver)?;
        Some((&disk.name, &disk.pool, words))
    })
}

/// Seals the key of a pool of Ceph's, or keeps the sealed one of `old`.
///
/// # Errors
/// 422 when there is none to keep; 503 on a host that has no key to seal it under.
pub(super) fn seal(state: &ApiState, object: &mut Object, old: Option<&Object>) -> ApiResult<()> {
    let reference = object.reference();
    let Object::Pool(new) = object else { return Ok(()) };
    let was = match old {
        Some(Object::Pool(old)) => old.spec.mark().map(ToOwned::to_owned),
        _ => None,
    };
    new.spec.set_mark(was);
    let Some(new) = &mut new.spec.rbd else { return Ok(()) };
    let old = match old {
        Some(Object::Pool(old)) => old.spec.rbd.as_ref(),
        _ => None,
    };
    new.fsid = old.and_then(|old| old.fsid.clone());
    if new.key.trim() == SEALED || is_sealed(&new.key) {
        let refused = |detail: String| {
            ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, detail, "give the key itself")
        };
        new.key = match old {
            Some(old) if old.same_place(new) => old.key.clone(),
            Some(_) => {
                let detail = format!(
                    "`key` is `{SEALED}`, and the cluster or the user is another one than that of {reference}"
                );
                return Err(refused(detail));
            }
            None => {
                return Err(refused(format!("`key` is `{SEALED}`, and {reference} has none yet")));
            }
        };
        return Ok(());
    }
    let unable = |why: String| {
        let hint = "the log of this host's daemon says more; another host can do it";
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, why, hint)
    };
    let missing = || unable("this host has no key under which secrets are sealed".into());
    let secrets = state.secrets.as_ref().ok_or_else(missing)?;
    let plain = Plain::new(new.key.trim().to_owned());
    let same = old.map(|old| old.key.as_str()).filter(|old| {
        secrets.open(&reference, old).is_ok_and(|there| there.expose() == plain.expose())
    });
    new.key = match same {
        Some(old) => old.to_owned(),
        None => secrets.seal(&reference, &plain).map_err(|error| unable(error.to_string()))?,
    };
    Ok(())
}

/// Asks the Ceph cluster or the filer of a pool that is new or is reached in another way, from this host; the key is sealed by now. It
/// must be the one that it was: in another one each disk would be made anew, and nobody be shut out. Nothing is written to a filer if
/// it is `only_asked`.
///
/// # Errors
/// 422 with the first thing that is wrong.
pub(super) async fn check(
    state: &ApiState,
    object: &mut Object,
    old: Option<&Object>,
    only_asked: bool,
) -> ApiResult<()> {
    if old.is_some_and(|old| old.same_spec(object)) {
        return Ok(());
    }
    let Object::Pool(pool) = object else { return Ok(()) };
    let refused = |why: String| {
        let hint = format!("asked by {}; nothing was changed", state.me);
        ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, why, hint)
    };
    if pool.spec.nfs.is_some() || pool.spec.gluster.is_some() {
        // One that is reached in another way must be there already.
        let looks = only_asked || pool.spec.mark().is_some();
        let is = state.local.check_filer(&pool.spec, looks).await.map_err(refused)?;
        if pool.spec.mark().is_some_and(|was| was != is) {
            let place = pool.spec.place();
            return Err(refused(format!(
                "{place} is another directory than the one that the pool is in; make a new pool under another name"
            )));
        }
        let now = state.current().await?;
        let mut others = now.pools.iter().filter(|(name, _)| **name != pool.meta.name);
        if let Some((other, _)) = others.find(|(_, one)| one.spec.mark() == Some(&*is)) {
            let place = pool.spec.place();
            return Err(refused(format!("{place} is the pool `{other}` already; use that one")));
        }
        pool.spec.set_mark(Some(is));
        return Ok(());
    }
    let Some(rbd) = &mut pool.spec.rbd else { return Ok(()) };
    let is = state.local.check_ceph(&pool.meta.name, rbd).await.map_err(refused)?;
    match &rbd.fsid {
        Some(was) if *was != is => Err(refused(format!(
            "these monitors are of the Ceph cluster {is}, and the pool is in {was}; make a new pool under another name"
        ))),
        _ => {
            rbd.fsid = Some(is);
            Ok(())
        }
    }
}
