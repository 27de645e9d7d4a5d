//! Targets of backups: checked before they are written, the key of a bucket sealed.

use super::{
    ApiState,
    error::{ApiError, ApiResult},
    validate::Say,
};
use axum::http::StatusCode;
use haven_model::{
    Object, Snapshot, TargetSpec, VmSpec,
    backup::{BackupSpec, S3Spec},
    certificate::SEALED,
    host::BACKUPS,
    units::Millis,
};
use haven_plan::tolerance::migration::speaks_less;
use haven_store::seal::{Plain, is_sealed};

/// What is wrong with a target.
pub(super) fn validate(spec: &TargetSpec, say: &mut Say<'_>) {
    match (&spec.directory, &spec.s3) {
        (Some(directory), None) => {
            if !directory.starts_with('/') {
                let message = format!("`directory` is `{directory}`, which is not absolute");
                say(("directory", directory), message, "begin it with `/`");
            }
        }
        (None, Some(s3)) => bucket(s3, say),
        (both, _) => {
            let message = match both {
                Some(_) => "a target is a directory or a bucket, and not both",
                None => "it does not say where backups go",
            };
            say(("name", &""), message.into(), "write either `directory:` or `s3:`");
        }
    }
}

fn bucket(s3: &S3Spec, say: &mut Say<'_>) {
    let rest = s3.endpoint.strip_prefix("https://").or(s3.endpoint.strip_prefix("http://"));
    if rest.is_none_or(|rest| rest.is_empty() || rest.contains('/')) {
        let message = format!("`endpoint` is `{}`, which is no server's address", s3.endpoint);
        say(("endpoint", &s3.endpoint), message, "write `https://HOST` or `https://HOST:PORT`");
    }
    for (key, text) in
        [("bucket", &s3.bucket), ("accessKey", &s3.access_key), ("secretKey", &s3.secret_key)]
    {
        if text.is_empty() {
            say((key, &""), format!("`{key}` is empty"), "the server's owner gives it to you");
        }
    }
    if let Some(prefix) = s3.prefix.as_ref().filter(|text| text.starts_with('/')) {
        say(("prefix", prefix), format!("`prefix` begins with `/`: `{prefix}`"), "leave that out");
    }
}

/// What is wrong with what a VM says of backups.
pub(super) fn of_vm(snapshot: &Snapshot, spec: &VmSpec, say: &mut Say<'_>) {
    if let Some(BackupSpec { every, keep, .. }) = &spec.backup {
        if *every < BackupSpec::SHORTEST {
            let message = format!("`every` is {every}, which is more often than backups are made");
            say(("every", every), message, "write at least 1m");
        }
        if let Some(keep) = keep.filter(|keep| *keep == Millis(0)) {
            let message = "`keep` is no time at all".to_owned();
            say(("keep", &keep), message, "leave it out to keep all, or write for example 7d");
        }
    }
    let bare = super::pools::bare_disk(snapshot, spec);
    if let Some((disk, pool, (of, hint))) = bare.filter(|_| spec.backup.is_some()) {
        let message = format!(
            "the disk `{disk}` is in the pool `{pool}` of {of}, and disks there are not backed up yet"
        );
        say(("backup", &""), message, &format!("leave `backup` out; {hint}"));
    }
    for disk in &spec.disks {
        if let (Some(image), Some(_)) = (&disk.image, &disk.backup) {
            let message =
                format!("the disk `{}` is made from an image and from a backup", disk.name);
            say(("image", image), message, "write one of the two");
        }
    }
    let uses = spec.backup.is_some() || spec.disks.iter().any(|disk| disk.backup.is_some());
    if let Some(host) = speaks_less(snapshot, BACKUPS).filter(|_| uses) {
        let message = format!(
            "{host} has not said that it knows backups: it runs an older Haven, or has not come up yet"
        );
        say(("backup", &""), message, "wait until all hosts are up and upgraded");
    }
}

/// Seals the key of a bucket, or keeps the sealed one of `old`.
///
/// # Errors
/// 422 when there is none to keep; 503 on a host that has no key to seal it under.
pub(super) fn seal(state: &ApiState, object: &mut Object, old: Option<&Object>) -> ApiResult<()> {
    let reference = object.reference();
    let Object::Target(new) = object else { return Ok(()) };
    let Some(new) = &mut new.spec.s3 else { return Ok(()) };
    let old = match old {
        Some(Object::Target(old)) => old.spec.s3.as_ref(),
        _ => None,
    };
    if new.secret_key.trim() == SEALED || is_sealed(&new.secret_key) {
        // Elsewhere it would be shown to whoever listens there.
        let stays =
            |old: &&S3Spec| old.endpoint == new.endpoint && old.access_key == new.access_key;
        let refused = |detail: String| {
            ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, detail, "give the key itself")
        };
        let kept = match (old, old.filter(stays)) {
            (_, Some(kept)) => kept.secret_key.clone(),
            (Some(_), None) => {
                let detail = format!(
                    "`secretKey` is `{SEALED}`, and the server or the id of the key is another one than that of {reference}"
                );
                return Err(refused(detail));
            }
            (None, None) => {
                let detail = format!("`secretKey` is `{SEALED}`, and {reference} has none yet");
                return Err(refused(detail));
            }
        };
        new.secret_key = kept;
        return Ok(());
    }
    let old = old.map(|old| old.secret_key.as_str());
    let unable = |why: String| {
        let hint = "the log of this host's daemon says more; another host can do it";
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, why, hint)
    };
    let missing = || unable("this host has no key under which secrets are sealed".into());
    let secrets = state.secrets.as_ref().ok_or_else(missing)?;
    let same = old.filter(|old| {
        secrets.open(&reference, old).is_ok_and(|plain| plain.expose() == new.secret_key)
    });
    new.secret_key = match same {
        Some(old) => old.to_owned(),
        None => secrets
            .seal(&reference, &Plain::new(new.secret_key.clone()))
            .map_err(|error| unable(error.to_string()))?,
    };
    Ok(())
}
