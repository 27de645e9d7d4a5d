//! The seam to the place: objects under keys, in a directory or a bucket, with failures in sentences.
//!
//! In a directory every object and its name reach the disk before it counts as written (`with_fsync`): others rely on a
//! chunk as soon as they see it, and a power cut must not leave an empty one. A write goes to `<name>#<number>` first,
//! which listings pass over, and which stays after a crash until a sweep finds it.

use super::{JSON_BYTES, Place, S3Place, apart, says};
use crate::agent::storage::StorageFailure;
use bytes::Bytes;
use futures::StreamExt;
use object_store::{
    Certificate, ClientOptions, Error, ObjectMeta, ObjectStore, ObjectStoreExt, PutMode,
    RetryConfig, aws::AmazonS3Builder, local::LocalFileSystem, path::Path as Key,
    prefix::PrefixStore,
};
use std::{
    fmt, fs,
    io::ErrorKind,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, Ordering},
    },
    time::Duration,
};

/// Nothing here takes longer; a file server that is gone answers never.
const PATIENCE: Duration = Duration::from_secs(120);

/// All that the file system still has to write, also of others.
const SYNC_PATIENCE: Duration = Duration::from_secs(600);

/// An object.
#[derive(Clone, Debug)]
pub(super) struct Object {
    pub key: String,
    pub size: u64,
    /// By the clock of the place, milliseconds since 1970.
    pub at_ms: i64,
}

impl From<ObjectMeta> for Object {
    fn from(meta: ObjectMeta) -> Self {
        let at_ms = meta.last_modified.timestamp_millis();
        Self { key: meta.location.to_string(), size: meta.size, at_ms }
    }
}

/// The place.
#[derive(Clone, Debug)]
pub(super) struct Store {
    objects: Arc<dyn ObjectStore>,
    /// As people know it.
    shown: String,
    directory: Option<PathBuf>,
    found: Arc<AtomicBool>,
    /// Added to the time, for tests.
    pub ahead_ms: Arc<AtomicI64>,
}

impl fmt::Display for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.shown)
    }
}

/// All that an error and what caused it say, and the failure of the file system among it.
fn chain(error: &Error) -> (String, Option<&std::io::Error>) {
    let mut file = None;
    let mut said = String::new();
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(now) = cause {
        let words = now.to_string();
        if !said.contains(&words) {
            said = if said.is_empty() { words } else { format!("{said}: {words}") };
        }
        file = file.or_else(|| now.downcast_ref::<std::io::Error>());
        cause = now.source();
    }
    (said, file)
}

/// What a person can do about a failure of a file system.
fn file_hint(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::StorageFull => "free some space there, or enlarge it",
        ErrorKind::QuotaExceeded => "its quota is used up: raise it",
        ErrorKind::ReadOnlyFilesystem => "its file system is read-only: check why",
        ErrorKind::PermissionDenied => {
            "this host may not do that there: check its owner, its mode and how it is exported"
        }
        ErrorKind::StaleNetworkFileHandle => "mount it again",
        ErrorKind::NotFound | ErrorKind::NotADirectory => "check that it is there and mounted",
        _ => "check its file system",
    }
}

/// What a bucket's server says, in words, and what a person can do about it.
fn bucket_words(said: &str) -> (String, &'static str) {
    let has = |words: &[&str]| words.iter().any(|word| said.contains(word));
    let status = said.split("status code: ").nth(1).map(|rest| rest.chars().take(3).collect());
    let status: String = status.unwrap_or_default();
    if has(&["NoSuchBucket"]) {
        ("there is no such bucket".into(), "make it, or correct its name")
    } else if has(&["RequestTimeTooSkewed"]) {
        ("its clock and that of this host differ too much".into(), "correct the one that is wrong")
    } else if has(&["InvalidAccessKeyId", "SignatureDoesNotMatch"]) {
        ("it does not know these keys".into(), "correct the access key and the secret key")
    } else if status == "403" || status == "401" {
        (
            format!("it refuses with {status}"),
            "check the keys, and that they may list, read, write and delete in the bucket",
        )
    } else if status == "507" || has(&["XMinioStorageFull", "QuotaExceeded"]) {
        ("it is full".into(), "free some space there, or enlarge it")
    } else if status == "429" || status.starts_with('5') {
        (format!("it answers with {status}"), "look at its log, and try again")
    } else if has(&["certificate", "InvalidCertificate", "UnknownIssuer"]) {
        (
            format!("its certificate is not trusted: {}", short(said)),
            "give the authority of its certificate",
        )
    } else if status.is_empty() && has(&["HTTP error", "error sending request", "timed out"]) {
        (
            format!("it does not answer: {}", short(said)),
            "check its address, that it runs, and the network",
        )
    } else {
        (short(said), "check the endpoint, the bucket and the region")
    }
}

/// The end of a long chain tells the most.
fn short(said: &str) -> String {
    let said = said.split_whitespace().collect::<Vec<_>>().join(" ");
    let from = said.len().saturating_sub(300);
    let from = (from..said.len()).find(|at| said.is_char_boundary(*at)).unwrap_or(0);
    said[from..].to_owned()
}

fn bucket(place: &S3Place) -> Result<Arc<dyn ObjectStore>, StorageFailure> {
    let endpoint = place.endpoint.trim_end_matches('/');
    let plain = endpoint.starts_with("http://");
    let mut options = ClientOptions::new()
        .with_connect_timeout(Duration::from_secs(5))
        .with_timeout(Duration::from_secs(60))
        .with_allow_http(plain);
    if !plain && !endpoint.starts_with("https://") {
        return Err(says(format!(
            "`{endpoint}` is no endpoint: write https://HOST[:PORT] or http://HOST[:PORT]"
        )));
    }
    if let Some(pem) = &place.ca {
        let wrong = |why: String| says(format!("the authority given for {endpoint} {why}"));
        let all = Certificate::from_pem_bundle(pem.as_bytes())
            .map_err(|error| wrong(format!("is no certificate in PEM: {error}")))?;
        if all.is_empty() {
            return Err(wrong("has no certificate in PEM".into()));
        }
        options = all.into_iter().fold(options, ClientOptions::with_root_certificate);
    }
    let retry = RetryConfig {
        max_retries: 3,
        retry_timeout: Duration::from_secs(20),
        ..RetryConfig::default()
    };
    let store = AmazonS3Builder::new()
        .with_client_options(options)
        .with_endpoint(endpoint)
        .with_bucket_name(&place.bucket)
        .with_region(&place.region)
        .with_access_key_id(&place.access_key)
        .with_secret_access_key(&place.secret_key)
        .with_virtual_hosted_style_request(false)
        .with_disable_bulk_delete(true)
        .with_retry(retry)
        .build()
        .map_err(|error| says(format!("the bucket {} cannot be used: {error}", place.bucket)))?;
    let Some(prefix) = place.prefix.as_deref().map(|prefix| prefix.trim_matches('/')) else {
        return Ok(Arc::new(store));
    };
    let prefix = Key::parse(prefix)
        .map_err(|error| says(format!("`{prefix}` cannot be a prefix of objects: {error}")))?;
    Ok(Arc::new(PrefixStore::new(store, prefix)))
}

impl Store {
    pub fn open(place: &Place) -> Result<Self, StorageFailure> {
        let (objects, shown, directory): (Arc<dyn ObjectStore>, _, _) = match place {
            Place::Directory(path) => {
                // From the root, so that opening needs no look at it.
                let prefix = Key::from_absolute_path(path).map_err(|error| {
                    says(format!("{} cannot be a directory of backups: {error}", path.display()))
                })?;
                let files = LocalFileSystem::new().with_fsync(true).with_automatic_cleanup(true);
                let objects = Arc::new(PrefixStore::new(files, prefix));
                (objects, path.display().to_string(), Some(path.clone()))
            }
            Place::S3(place) => {
                let parts = [Some(&place.endpoint), Some(&place.bucket), place.prefix.as_ref()];
                let parts = parts.into_iter().flatten().map(|part| part.trim_matches('/'));
                (bucket(place)?, parts.collect::<Vec<_>>().join("/"), None)
            }
        };
        let (found, ahead_ms) = <(Arc<AtomicBool>, Arc<AtomicI64>)>::default();
        Ok(Self { objects, shown, directory, found, ahead_ms })
    }

    /// As people know it.
    pub fn shown(&self, key: &str) -> String {
        format!("{}/{key}", self.shown)
    }

    pub fn directory(&self) -> Option<&Path> {
        self.directory.as_deref()
    }

    /// Remembers that it is a place of backups.
    pub fn found(&self) {
        self.found.store(true, Ordering::Relaxed);
    }

    /// Whether it still is: a directory may have been unmounted.
    pub fn is_found(&self) -> bool {
        self.directory.is_none() && self.found.load(Ordering::Relaxed)
    }

    fn told(&self, doing: &str, key: &str, error: &Error) -> StorageFailure {
        let shown = self.shown(key);
        let (said, file) = chain(error);
        if self.directory.is_some() {
            let hint = file_hint(file.map_or(ErrorKind::Other, std::io::Error::kind));
            let said = file.map_or(said, ToString::to_string);
            return says(format!("{shown} cannot be {doing} ({said}): {hint}"));
        }
        let (words, hint) = bucket_words(&said);
        says(format!("{shown} cannot be {doing} ({words}): {hint}"))
    }

    /// Nothing when the object is not there.
    async fn patiently<T>(
        &self,
        doing: &str,
        key: &str,
        work: impl Future<Output = Result<T, Error>>,
    ) -> Result<Option<T>, StorageFailure> {
        match self.bounded(doing, key, PATIENCE, work).await? {
            Ok(done) => Ok(Some(done)),
            Err(error @ Error::NotFound { .. }) if chain(&error).0.contains("NoSuchBucket") => {
                Err(self.told(doing, key, &error))
            }
            Err(Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(self.told(doing, key, &error)),
        }
    }

    async fn bounded<T>(
        &self,
        doing: &str,
        key: &str,
        patience: Duration,
        work: impl Future<Output = T>,
    ) -> Result<T, StorageFailure> {
        tokio::time::timeout(patience, work).await.map_err(|_| {
            says(format!(
                "{} was not {doing} within {} s: check that its server answers, and the network",
                self.shown(key),
                patience.as_secs()
            ))
        })
    }

    /// The content, nothing when it is not there. What is larger is damaged.
    pub async fn get(&self, key: &str, most: u64) -> Result<Option<Bytes>, StorageFailure> {
        let at = Key::from(key);
        let work = async {
            let found = self.objects.get(&at).await?;
            let size = found.meta.size;
            if size > most { Ok(Err(size)) } else { found.bytes().await.map(Ok) }
        };
        match self.patiently("read", key, work).await? {
            Some(Err(size)) => Err(says(format!(
                "{} is damaged (it has {size} bytes, {most} are the most): restore it from elsewhere, or remove what needs it",
                self.shown(key)
            ))),
            Some(Ok(content)) => Ok(Some(content)),
            None => Ok(None),
        }
    }

    /// Nothing when it is not there.
    pub async fn head(&self, key: &str) -> Result<Option<Object>, StorageFailure> {
        let at = Key::from(key);
        let found = self.patiently("read", key, self.objects.head(&at)).await?;
        Ok(found.map(Object::from))
    }

    fn away(&self, doing: &str, key: &str) -> StorageFailure {
        says(format!(
            "{} cannot be {doing} (it is not found): check that it is there and mounted",
            self.shown(key)
        ))
    }

    /// Writes it, also over another.
    pub async fn put(&self, key: &str, content: Bytes) -> Result<(), StorageFailure> {
        let at = Key::from(key);
        let first = self.objects.put(&at, content.clone().into());
        match self.bounded("written", key, PATIENCE, first).await? {
            Ok(_) => return Ok(()),
            // Another host removed the folder, which was empty, while this one made it.
            Err(error) if chain(&error).1.is_some_and(|e| e.kind() == ErrorKind::NotFound) => {}
            Err(error) => return Err(self.told("written", key, &error)),
        }
        let put = self.patiently("written", key, self.objects.put(&at, content.into())).await?;
        put.map(|_| ()).ok_or_else(|| self.away("written", key))
    }

    /// Writes it unless it is there, and tells whether it did. Where only a plain write is understood, one that is
    /// written at the same instant may be lost.
    pub async fn put_new(&self, key: &str, content: Bytes) -> Result<bool, StorageFailure> {
        if self.head(key).await?.is_some() {
            return Ok(false);
        }
        let at = Key::from(key);
        let put = self.objects.put_opts(&at, content.clone().into(), PutMode::Create.into());
        match self.bounded("written", key, PATIENCE, put).await? {
            Ok(_) => Ok(true),
            // It may be there by a first try of which the answer was lost.
            Err(Error::AlreadyExists { .. }) => {
                let most = JSON_BYTES.max(content.len() as u64);
                Ok(self.get(key, most).await?.is_some_and(|there| there == content))
            }
            Err(error) if self.lacks_create(&error) => {
                self.put(key, content).await?;
                Ok(true)
            }
            Err(error) => Err(self.told("written", key, &error)),
        }
    }

    /// Some servers do not know how to write only what is not there, and some file systems have no hard links.
    fn lacks_create(&self, error: &Error) -> bool {
        let (said, file) = chain(error);
        if self.directory.is_some() {
            let links = [ErrorKind::Unsupported, ErrorKind::PermissionDenied];
            return file.is_some_and(|file| links.contains(&file.kind()));
        }
        let refused = ["status code: 501", "status code: 400", "status code: 405"];
        matches!(error, Error::NotImplemented { .. })
            || refused.iter().any(|one| said.contains(one))
    }

    /// Fine when it is not there.
    pub async fn delete(&self, key: &str) -> Result<(), StorageFailure> {
        let at = Key::from(key);
        self.patiently("removed", key, self.objects.delete(&at)).await.map(|_| ())
    }

    /// Moves it over another. Tells whether it was there.
    pub async fn rename(&self, from: &str, to: &str) -> Result<bool, StorageFailure> {
        let (at, new) = (Key::from(from), Key::from(to));
        let moved = self.patiently("moved", from, self.objects.rename(&at, &new)).await?;
        Ok(moved.is_some())
    }

    /// Calls for every object under it.
    pub async fn each(
        &self,
        under: &str,
        mut call: impl FnMut(Object),
    ) -> Result<(), StorageFailure> {
        let at = Key::from(under);
        let mut all = self.objects.list(Some(&at));
        while let Some(next) = self.bounded("listed", under, PATIENCE, all.next()).await? {
            match next {
                Ok(meta) => call(meta.into()),
                // Removed meanwhile.
                Err(Error::NotFound { .. }) if self.directory.is_some() => {}
                Err(error) => return Err(self.told("listed", under, &error)),
            }
        }
        Ok(())
    }

    /// The keys of the folders in it, the last first.
    pub async fn folders(&self, under: &str) -> Result<Vec<String>, StorageFailure> {
        let at = Key::from(under);
        let work = self.objects.list_with_delimiter(Some(&at));
        let found = self.patiently("listed", under, work).await?;
        let found = found.map(|found| found.common_prefixes).unwrap_or_default();
        let mut keys: Vec<String> = found.iter().map(ToString::to_string).collect();
        keys.sort_unstable_by(|one, other| other.cmp(one));
        Ok(keys)
    }

    /// Something else than this that is there, if anything is. Of a bucket, under its prefix.
    pub async fn other(&self, than: &str) -> Result<Option<String>, StorageFailure> {
        let Some(directory) = self.directory.clone() else {
            let mut all = self.objects.list(None);
            let next = self.bounded("listed", "", PATIENCE, all.next()).await?;
            let next = next.transpose().map_err(|error| self.told("listed", "", &error))?;
            return Ok(next.map(|meta| meta.location.to_string()));
        };
        let than = than.to_owned();
        let looked = self.bounded("read", "", PATIENCE, apart(move || stranger(&directory, &than)));
        looked.await?.map_err(|error| {
            let hint = match error.kind() {
                ErrorKind::NotFound => "make it, or mount it",
                kind => file_hint(kind),
            };
            says(format!("{self} cannot hold backups ({error}): {hint}"))
        })
    }

    /// Everything written so far survives a power cut: also the names of folders that other writers made.
    pub async fn sync(&self) -> Result<(), StorageFailure> {
        let Some(directory) = self.directory.clone() else { return Ok(()) };
        let work = apart(move || {
            nix::unistd::syncfs(fs::File::open(directory)?).map_err(std::io::Error::from)
        });
        let done = self.bounded("written to its disk", "", SYNC_PATIENCE, work).await?;
        done.map_err(|error| {
            let hint = file_hint(error.kind());
            says(format!("{self} cannot be written to its disk ({error}): {hint}"))
        })
    }

    /// What time it is there, milliseconds since 1970.
    pub async fn clock(&self) -> Result<i64, StorageFailure> {
        const CLOCK: &str = "haven-clock";
        self.put(CLOCK, Bytes::from_static(b"to learn what time it is here\n")).await?;
        let written = self.head(CLOCK).await?.ok_or_else(|| self.away("read", CLOCK))?;
        Ok(written.at_ms + self.ahead_ms.load(Ordering::Relaxed))
    }
}

/// What stands in a directory besides this, if anything does.
fn stranger(directory: &Path, than: &str) -> std::io::Result<Option<String>> {
    for entry in fs::read_dir(directory)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        let unfinished = name.strip_prefix(than).is_some_and(|rest| rest.starts_with('#'));
        if name != "lost+found" && name != than && !unfinished {
            return Ok(Some(name));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_of_files() {
        let store = Store::open(&Place::Directory("/srv/backups".into())).unwrap();
        for (code, words) in [
            (nix::libc::ENOSPC, "free some space there"),
            (nix::libc::EDQUOT, "quota"),
            (nix::libc::EROFS, "read-only"),
            (nix::libc::ESTALE, "mount it again"),
        ] {
            let source = Box::new(std::io::Error::from_raw_os_error(code));
            let error = Error::Generic { store: "LocalFileSystem", source };
            let failure = store.told("written", "chunks/aa/1", &error).what;
            assert!(
                failure.starts_with("/srv/backups/chunks/aa/1 cannot be written ("),
                "{failure}"
            );
            assert!(failure.contains(words), "{failure}");
        }
    }
}
