//! The certificates of the frontends as files: chain and key in one, readable by root alone, on the host's tmpfs.
//!
//! A file's name carries the fingerprint of its chain, so that a certificate that is replaced is another file and a
//! change of the configuration; the one that runs keeps its own until it has been replaced. HAProxy refuses its whole
//! configuration for one certificate that it does not take, so each is tried by itself before it is used.

use super::driver::{BalanceError, FrontendWanted, Identity, LeftOut, TlsWanted};
use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    process::Stdio,
};
use tokio::process::Command;

/// Keeps the files.
pub struct Certificates {
    /// HAProxy's own, in which `tls` is made.
    directory: PathBuf,
    /// The files that HAProxy was asked about, and why it refuses those that it does.
    tried: BTreeMap<PathBuf, Result<(), String>>,
}

/// Where the certificate of a frontend lies.
#[must_use]
pub fn file(directory: &Path, tls: &TlsWanted) -> PathBuf {
    let identity = tls.identity.as_ref();
    let fingerprint = identity.map_or("none", |identity| identity.fingerprint.as_str());
    let short = fingerprint.get(..16).unwrap_or(fingerprint);
    directory.join("tls").join(format!("{}-{short}.pem", tls.certificate))
}

impl Certificates {
    /// For the HAProxy whose files stand in `directory`, on a tmpfs.
    #[must_use]
    pub fn new(directory: PathBuf) -> Self {
        Self { directory, tried: BTreeMap::new() }
    }

    /// Has the files of all these frontends there; gives those frontends that can be served, and why the others cannot.
    pub async fn prepare(&mut self, wanted: &[FrontendWanted]) -> (Vec<FrontendWanted>, LeftOut) {
        let (mut served, mut left_out) = (Vec::new(), LeftOut::new());
        for frontend in wanted {
            let ready = match &frontend.tls {
                Some(tls) => self.ready(tls).await,
                None => Ok(()),
            };
            match ready {
                Ok(()) => served.push(frontend.clone()),
                Err(why) => {
                    let certificate = frontend.tls.as_ref().map_or("", |tls| &tls.certificate);
                    let what =
                        format!("it is not served, for want of the certificate {certificate}");
                    left_out.insert(frontend.service.clone(), BalanceError { what, why });
                }
            }
        }
        (served, left_out)
    }

    async fn ready(&mut self, tls: &TlsWanted) -> Result<(), String> {
        let identity = tls.identity.as_ref().map_err(Clone::clone)?;
        let path = file(&self.directory, tls);
        let unwritable =
            |error: io::Error| format!("{} cannot be written: {error}", path.display());
        let fresh = write(&path, identity).map_err(unwritable)?;
        if fresh {
            self.tried.remove(&path);
        }
        if let Some(known) = self.tried.get(&path) {
            return known.clone();
        }
        let verdict = attempt(&self.directory, &path).await?;
        self.tried.insert(path, verdict.clone());
        verdict
    }

    /// Removes what no frontend of these uses.
    pub fn sweep(&mut self, served: &[FrontendWanted]) {
        let used: BTreeSet<PathBuf> = served
            .iter()
            .filter_map(|frontend| Some(file(&self.directory, frontend.tls.as_ref()?)))
            .collect();
        self.tried.retain(|path, _| used.contains(path));
        let Ok(entries) = std::fs::read_dir(self.directory.join("tls")) else { return };
        for path in entries.flatten().map(|entry| entry.path()).filter(|p| !used.contains(p)) {
            if let Err(error) = std::fs::remove_file(&path) {
                tracing::warn!(%error, "{} cannot be removed", path.display());
            }
        }
    }
}

/// Writes the file unless it is there as it should be; whether it did.
fn write(path: &Path, identity: &Identity) -> io::Result<bool> {
    let content = format!("{}{}", identity.chain, identity.key.expose());
    if std::fs::read(path).is_ok_and(|there| there == content.as_bytes()) {
        return Ok(false);
    }
    let directory = path.parent().unwrap_or(Path::new("/"));
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    haven_store::file::write_whole(path, content.as_bytes())?;
    Ok(true)
}

/// Asks HAProxy whether it takes a certificate; why it does not, if so.
async fn attempt(directory: &Path, path: &Path) -> Result<Result<(), String>, String> {
    let trial = directory.join("trial.cfg");
    let text = format!(
        "defaults\n  mode tcp\n  timeout connect 1s\n  timeout client 1s\n  timeout server 1s\n\n\
         frontend trial\n  bind 127.0.0.1:1 ssl crt {}\n",
        path.display()
    );
    std::fs::write(&trial, text)
        .map_err(|error| format!("{} cannot be written: {error}", trial.display()))?;
    let output = Command::new("haproxy")
        .args(["-c", "-f"])
        .arg(&trial)
        .stdin(Stdio::null())
        .output()
        .await
        .map_err(|error| {
            format!("HAProxy cannot be started ({error}); install the package haproxy")
        })?;
    if output.status.success() {
        return Ok(Ok(()));
    }
    let said = super::haproxy::alerts(&output.stderr);
    Ok(Err(format!("HAProxy does not take it: {said}")))
}
