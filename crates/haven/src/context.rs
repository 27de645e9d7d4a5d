//! Saved clusters: where each is, by which authority it is known, and where the token lies.
//!
//! They stand in `$XDG_CONFIG_HOME/haven/contexts.yaml` (else `~/.config/haven`), readable by their owner alone.

use crate::failure::Failure;
use haven_client::{Client, Pin};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    io::Write,
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::{Path, PathBuf},
};

/// The name for the daemon or the lab of this machine.
pub const LOCAL: &str = "local";
/// The API's port when none is given.
pub const PORT: u16 = crate::daemon::API_PORT;

/// One saved cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Saved {
    /// `HOST:PORT` of any host of it.
    pub address: String,
    /// SHA-256 of its authority's certificate, lower-case hexadecimal.
    pub fingerprint: String,
    /// The file that holds the token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_file: Option<PathBuf>,
}

/// All saved clusters.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Contexts {
    /// The one that commands speak to when nothing else is said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub current: Option<String>,
    /// By name.
    pub clusters: BTreeMap<String, Saved>,
}

/// Where they stand.
///
/// # Errors
/// When there is neither `XDG_CONFIG_HOME` nor `HOME`.
pub fn directory() -> Option<PathBuf> {
    let path = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let base = path("XDG_CONFIG_HOME").or_else(|| Some(path("HOME")?.join(".config")))?;
    Some(base.join("haven"))
}

/// A fingerprint as people may write it: with colons, in either case.
pub fn fingerprint(text: &str) -> Result<String, Failure> {
    let plain: String = text.trim().chars().filter(|c| *c != ':').collect();
    if plain.len() == 64 && plain.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Ok(plain.to_ascii_lowercase());
    }
    Err(Failure::bad(
        format!("`{text}` is not a fingerprint: it has 64 hexadecimal digits"),
        "on a host of the cluster: openssl x509 -in /var/lib/haven/pki/ca.crt -noout -fingerprint -sha256",
    ))
}

/// Writes a file that only its owner can read, whole or not at all.
pub fn write_private(path: &Path, text: &str) -> Result<(), Failure> {
    let failed = |error: std::io::Error| {
        Failure::failed(
            format!("{} cannot be written: {error}", path.display()),
            "check the directory's owner and free space",
        )
    };
    let directory = path.parent().unwrap_or(Path::new("."));
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(failed)?;
    // A named temporary file has mode 0600 from its first moment.
    let mut file = tempfile::NamedTempFile::new_in(directory).map_err(failed)?;
    file.write_all(text.as_bytes()).map_err(failed)?;
    file.persist(path).map_err(|error| failed(error.error))?;
    Ok(())
}

impl Contexts {
    /// Those of a directory; none when there is no file.
    pub fn load(directory: &Path) -> Result<Self, Failure> {
        let path = directory.join("contexts.yaml");
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Ok(Self::default());
            }
            Err(error) => {
                let message = format!("{} cannot be read: {error}", path.display());
                return Err(Failure::bad(message, "check its owner; it must be yours"));
            }
        };
        serde_saphyr::from_str(&text).map_err(|error| {
            let said = error.to_string();
            let first = said.lines().next().unwrap_or_default();
            Failure::bad(
                format!("{} cannot be read: {first}", path.display()),
                "mend it, or remove it and save your clusters again with `haven context add`",
            )
        })
    }

    /// Writes them.
    pub fn save(&self, directory: &Path) -> Result<(), Failure> {
        let text = serde_saphyr::to_string(self).map_err(|error| {
            Failure::failed(format!("the contexts cannot be written: {error}"), "")
        })?;
        write_private(&directory.join("contexts.yaml"), &text)
    }

    /// A saved cluster.
    pub fn get(&self, name: &str) -> Result<&Saved, Failure> {
        self.clusters.get(name).ok_or_else(|| {
            let mut names: Vec<&str> = self.clusters.keys().map(String::as_str).collect();
            names.push(LOCAL);
            Failure::missing(
                format!("there is no saved cluster `{name}`"),
                format!("there are: {}; save one with `haven context add`", names.join(", ")),
            )
        })
    }
}

impl Saved {
    /// A client of it.
    pub fn client(&self) -> Result<Client, Failure> {
        let token = self.token_file.as_deref().map(token).transpose()?;
        Ok(Client::remote(self.address.clone(), &Pin(self.fingerprint.clone()), token))
    }
}

/// The token in a file, which nobody else may read.
pub fn token(path: &Path) -> Result<String, Failure> {
    let shown = path.display();
    let unreadable = |error: std::io::Error| {
        let hint =
            "make a token with `haven token create` on a host of the cluster and save it there";
        Failure::bad(format!("the token file {shown} cannot be read: {error}"), hint)
    };
    let mode = std::fs::metadata(path).map_err(unreadable)?.mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(Failure::bad(
            format!("the token file {shown} has mode {mode:o}: others can read it"),
            format!("chmod 600 {shown}"),
        ));
    }
    let text = std::fs::read_to_string(path).map_err(unreadable)?.trim().to_owned();
    if text.is_empty() {
        return Err(Failure::bad(
            format!("the token file {shown} is empty"),
            "put the token in it",
        ));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::{Contexts, Saved, fingerprint, token, write_private};
    use std::os::unix::fs::PermissionsExt;

    fn mode(path: &std::path::Path) -> u32 {
        std::fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn contexts_are_private_and_come_back_as_they_were() {
        let home = tempfile::tempdir().unwrap();
        let directory = home.path().join("a/haven");
        assert_eq!(Contexts::load(&directory).unwrap(), Contexts::default());
        let mut contexts = Contexts { current: Some("prod".into()), ..Contexts::default() };
        let saved = Saved {
            address: "10.0.0.1:7443".into(),
            fingerprint: "ab".repeat(32),
            token_file: Some("/home/x/prod.token".into()),
        };
        contexts.clusters.insert("prod".into(), saved);
        contexts.save(&directory).unwrap();
        assert_eq!(Contexts::load(&directory).unwrap(), contexts);
        assert_eq!(mode(&directory.join("contexts.yaml")), 0o600);
        assert_eq!(mode(&directory), 0o700);
        let unknown = contexts.get("tset").unwrap_err().to_string();
        assert!(unknown.contains("there are: prod, local"), "{unknown}");
    }

    #[test]
    fn a_broken_file_is_named() {
        let home = tempfile::tempdir().unwrap();
        std::fs::write(home.path().join("contexts.yaml"), "clusters: 7\n").unwrap();
        let said = Contexts::load(home.path()).unwrap_err();
        assert_eq!(said.code, 2);
        assert!(said.to_string().contains("contexts.yaml cannot be read"), "{said}");
    }

    #[test]
    fn a_token_that_others_can_read_is_refused() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("t");
        write_private(&path, "ci.secret\n").unwrap();
        assert_eq!(token(&path).unwrap(), "ci.secret");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        assert!(token(&path).unwrap_err().to_string().contains("chmod 600"));
    }

    #[test]
    fn fingerprints_as_openssl_prints_them() {
        let plain = "ab".repeat(32);
        let colons = ["AB"; 32].join(":");
        assert_eq!(fingerprint(&colons).unwrap(), plain);
        assert!(fingerprint("abc").is_err());
    }
}
