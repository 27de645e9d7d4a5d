//! Secrets at rest: sealed under a key that every host can derive and that never stands in the store.
//!
//! ```text
//!   the authority's private key ── HKDF-SHA256, fixed info ──► the cluster's key
//!   plain text ── AES-256-GCM, random nonce, the object's reference beside it ──► sealed:v1:BASE64
//! ```
//!
//! Who reads the store, or a backup of it, reads no secret. Who writes to it can neither make a sealed text nor put
//! that of one object in the place of another's: the reference is authenticated along with it.
//!
//! Rejected: a key of its own that is handed out at the join (one more secret to lose, and a host that has the
//! authority's key can admit itself anyway), and sealing for each host (a new host could open nothing that is there).

use crate::pki::{Authority, PkiDir, PkiError};
use aws_lc_rs::{
    aead::{AES_256_GCM, Aad, NONCE_LEN, Nonce, RandomizedNonceKey},
    hkdf::{HKDF_SHA256, Prk, Salt},
};
use base64::{Engine, engine::general_purpose::STANDARD};
use haven_model::{Name, ObjectRef, object::Kind};
use rustls_pki_types::{PrivateKeyDer, pem::PemObject};
use std::{fmt, sync::Arc};

/// How every sealed text begins.
const SEALED: &str = "sealed:";
/// The version that this Haven writes, and the only one that it opens.
const VERSION: &str = "v1";
/// What the derived key is for. Another info is another key, so it never changes.
const INFO: &[u8] = b"haven secrets at rest v1";

/// What can go wrong with sealed secrets.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SealError {
    /// This host has no key of the authority, so it has none of the cluster either.
    #[error(
        "this host cannot read the cluster authority's key, from which the key of secrets is made"
    )]
    NoAuthority(#[source] PkiError),
    /// The authority's key is no key.
    #[error("the cluster authority's key is damaged: copy `ca.key` from another host")]
    DamagedAuthority,
    /// The machine's cryptography does not work.
    #[error("the secret of {object} cannot be sealed on this machine")]
    Seal {
        /// Whose secret.
        object: ObjectRef,
    },
    /// The machine gives no random numbers.
    #[error("this machine gives no random numbers, so no key can be made")]
    NoRandom,
    /// The text was never sealed.
    #[error("what stands for the secret of {object} is not sealed; give the secret again")]
    NotSealed {
        /// Whose secret.
        object: ObjectRef,
    },
    /// A newer Haven sealed it.
    #[error("the secret of {object} was sealed by a newer Haven (`{version}`): update this host")]
    Version {
        /// Whose secret.
        object: ObjectRef,
        /// Its version.
        version: String,
    },
    /// Altered, or sealed for another object, or by another cluster.
    #[error(
        "the secret of {object} does not open: it was altered, or sealed for another object or by another cluster; give it again"
    )]
    Refused {
        /// Whose secret.
        object: ObjectRef,
    },
}

/// A secret in plain text. Nothing prints it by accident.
#[derive(Clone, PartialEq, Eq)]
pub struct Plain(String);

impl Plain {
    /// Wraps a secret.
    #[must_use]
    pub fn new(text: String) -> Self {
        Self(text)
    }
    /// The secret itself.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Plain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Plain(…)")
    }
}

/// Which disk a key is of. A later VM of the same name has another uid.
#[derive(Clone, Copy, Debug)]
pub struct DiskKeyOf<'a> {
    /// Its VM.
    pub vm: &'a Name,
    /// The uid of that.
    pub vm_uid: &'a str,
    /// Its name in the VM.
    pub disk: &'a Name,
}

impl DiskKeyOf<'_> {
    fn object(&self) -> ObjectRef {
        ObjectRef::new(Kind::Vm, self.vm.clone())
    }

    /// No name and no uid holds a NUL, so that no two disks have the same, and no object has it.
    fn beside(&self) -> String {
        format!("disk key\0{}\0{}", self.vm_uid, self.disk)
    }
}

/// A new random key for a disk: 32 bytes in hexadecimal.
///
/// # Errors
/// [`SealError::NoRandom`] when the machine gives no random numbers.
pub fn new_disk_key() -> Result<Plain, SealError> {
    let mut bytes = [0; 32];
    aws_lc_rs::rand::fill(&mut bytes).map_err(|_| SealError::NoRandom)?;
    Ok(Plain(bytes.iter().map(|byte| format!("{byte:02x}")).collect()))
}

/// Whether a text looks like one that [`ClusterKey::seal`] made.
#[must_use]
pub fn is_sealed(text: &str) -> bool {
    text.starts_with(SEALED)
}

/// The key under which this cluster's secrets are sealed, and others that are made from the same. Cheap to clone.
#[derive(Clone)]
pub struct ClusterKey {
    seals: Arc<RandomizedNonceKey>,
    extracted: Arc<Prk>,
}

impl fmt::Debug for ClusterKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClusterKey(…)")
    }
}

impl ClusterKey {
    /// Derives it (RFC 5869) from the authority's key.
    ///
    /// # Errors
    /// [`SealError::DamagedAuthority`] when that is no private key.
    pub fn derive(authority: &Authority) -> Result<Self, SealError> {
        let damaged = |_| SealError::DamagedAuthority;
        // Its content, not its text: how a file breaks its lines is no part of a key.
        let key = PrivateKeyDer::from_pem_slice(authority.key.as_bytes())
            .map_err(|_| SealError::DamagedAuthority)?;
        let extracted = Salt::new(HKDF_SHA256, &[]).extract(key.secret_der());
        let info = [INFO];
        let expanded = extracted.expand(&info, HKDF_SHA256).map_err(damaged)?;
        let mut bytes = [0; 32];
        expanded.fill(&mut bytes).map_err(damaged)?;
        let key = RandomizedNonceKey::new(&AES_256_GCM, &bytes).map_err(damaged)?;
        Ok(Self { seals: Arc::new(key), extracted: Arc::new(extracted) })
    }

    /// Derives it on a host of the cluster.
    ///
    /// # Errors
    /// [`SealError::NoAuthority`] when the authority's key is not there, [`SealError::DamagedAuthority`] when it is no
    /// key.
    pub fn of_host(pki: &PkiDir) -> Result<Self, SealError> {
        Self::derive(&pki.load_authority().map_err(SealError::NoAuthority)?)
    }

    /// The key of the process that has a volume open in one run of it: 32 bytes in hexadecimal, the same on every host.
    ///
    /// # Errors
    /// [`SealError::DamagedAuthority`] when nothing can be made from the authority's key.
    pub fn volume_key(&self, volume: &str, run: u64) -> Result<Plain, SealError> {
        let damaged = |_| SealError::DamagedAuthority;
        // No name holds a NUL, so that no two of them make the same.
        let info = format!("haven volume key v1\0{volume}\0{run}");
        let info = [info.as_bytes()];
        let expanded = self.extracted.expand(&info, HKDF_SHA256).map_err(damaged)?;
        let mut bytes = [0; 32];
        expanded.fill(&mut bytes).map_err(damaged)?;
        Ok(Plain(bytes.iter().map(|byte| format!("{byte:02x}")).collect()))
    }

    /// Seals the key of an encrypted disk, for this disk of this VM and no other.
    ///
    /// # Errors
    /// As [`ClusterKey::seal`]; the object is the VM.
    pub fn seal_disk(&self, of: &DiskKeyOf<'_>, plain: &Plain) -> Result<String, SealError> {
        self.seal_with(&of.object(), &of.beside(), plain)
    }

    /// Opens what [`ClusterKey::seal_disk`] made for this disk.
    ///
    /// # Errors
    /// As [`ClusterKey::open`]; the object is the VM.
    pub fn open_disk(&self, of: &DiskKeyOf<'_>, sealed: &str) -> Result<Plain, SealError> {
        self.open_with(&of.object(), &of.beside(), sealed)
    }

    /// Seals a secret of an object: `sealed:v1:` and base64 of nonce, cipher text and tag.
    ///
    /// # Errors
    /// [`SealError::Seal`] when the machine's cryptography does not work.
    pub fn seal(&self, object: &ObjectRef, plain: &Plain) -> Result<String, SealError> {
        self.seal_with(object, &object.to_string(), plain)
    }

    fn seal_with(
        &self,
        object: &ObjectRef,
        beside: &str,
        plain: &Plain,
    ) -> Result<String, SealError> {
        let failed = |_| SealError::Seal { object: object.clone() };
        let mut cipher = plain.0.as_bytes().to_vec();
        let aad = Aad::from(beside.as_bytes());
        let nonce = self.seals.seal_in_place_append_tag(aad, &mut cipher).map_err(failed)?;
        let mut whole = nonce.as_ref().to_vec();
        whole.append(&mut cipher);
        Ok(format!("{SEALED}{VERSION}:{}", STANDARD.encode(whole)))
    }

    /// Opens what [`ClusterKey::seal`] made for this object.
    ///
    /// # Errors
    /// [`SealError::NotSealed`], [`SealError::Version`] or [`SealError::Refused`].
    pub fn open(&self, object: &ObjectRef, sealed: &str) -> Result<Plain, SealError> {
        self.open_with(object, &object.to_string(), sealed)
    }

    fn open_with(
        &self,
        object: &ObjectRef,
        beside: &str,
        sealed: &str,
    ) -> Result<Plain, SealError> {
        let of = || object.clone();
        let not_sealed = || SealError::NotSealed { object: of() };
        let refused = || SealError::Refused { object: of() };
        let rest = sealed.strip_prefix(SEALED).ok_or_else(not_sealed)?;
        let (version, text) = rest.split_once(':').ok_or_else(not_sealed)?;
        if version != VERSION {
            return Err(SealError::Version { object: of(), version: version.to_owned() });
        }
        let mut whole = STANDARD.decode(text.trim()).map_err(|_| refused())?;
        let (nonce, cipher) = whole.split_at_mut_checked(NONCE_LEN).ok_or_else(refused)?;
        let nonce = Nonce::try_assume_unique_for_key(nonce).map_err(|_| refused())?;
        let aad = Aad::from(beside.as_bytes());
        let opened = self.seals.open_in_place(nonce, aad, cipher).map_err(|_| refused())?;
        let text = String::from_utf8(opened.to_vec()).map_err(|_| refused())?;
        Ok(Plain(text))
    }
}
