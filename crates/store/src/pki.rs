//! The cluster's certificates: its own authority, one certificate per host, and the TLS settings made from them.
//!
//! Everything between hosts is mutual TLS under this authority. A person's client pins the authority by its
//! fingerprint, which stands in the join token and in the context file.

use crate::{certificate::Chain, file, raw::Identity};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use rustls::{
    ClientConfig, RootCertStore, ServerConfig, SignatureScheme,
    client::ResolvesClientCert,
    server::{ClientHello, ResolvesServerCert, WebPkiClientVerifier},
    sign::CertifiedKey,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use sha2::{Digest, Sha256};
use std::{
    net::IpAddr,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

/// What can go wrong with certificates.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PkiError {
    /// A certificate could not be made or read.
    #[error("a certificate could not be made")]
    Make(#[from] rcgen::Error),
    /// TLS does not accept what was given.
    #[error("TLS does not accept the cluster's certificates")]
    Tls(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// A file could not be read or written.
    #[error(
        "`{path}` could not be read or written; is this host part of a cluster (`haven init`, `haven join`)?"
    )]
    File {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
}

fn tls<E: std::error::Error + Send + Sync + 'static>(error: E) -> PkiError {
    PkiError::Tls(Box::new(error))
}

/// How long a host's certificate is good for: 825 days.
pub const HOST_LIFE: Duration = Duration::from_secs(825 * 86_400);
/// How long the authority is good for: 20 years.
const CA_LIFE: Duration = Duration::from_secs(3650 * 2 * 86_400);

/// The cluster's authority: its certificate and its key, PEM.
#[derive(Clone)]
pub struct Authority {
    /// Its certificate.
    pub certificate: String,
    /// Its key. Every host has it.
    pub key: String,
}

fn validity(params: &mut CertificateParams, life: Duration) {
    let now = std::time::SystemTime::now();
    // A little in the past, for hosts whose clocks run behind.
    params.not_before = (now - Duration::from_secs(3600)).into();
    params.not_after = (now + life).into();
}

impl Authority {
    /// Makes a new one.
    ///
    /// # Errors
    /// [`PkiError::Make`] when the machine cannot make keys.
    pub fn create(cluster: &str) -> Result<Self, PkiError> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, format!("Haven cluster {cluster}"));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        validity(&mut params, CA_LIFE);
        let key = KeyPair::generate()?;
        let certificate = params.self_signed(&key)?;
        Ok(Self { certificate: certificate.pem(), key: key.serialize_pem() })
    }

    /// Signs a host's request; names and addresses are what the cluster knows of it, not what it asks for.
    ///
    /// # Errors
    /// [`PkiError::Make`] when the request cannot be read.
    pub fn sign(
        &self,
        request: &str,
        host: &str,
        addresses: &[IpAddr],
    ) -> Result<String, PkiError> {
        self.sign_for(request, host, addresses, HOST_LIFE)
    }

    /// As [`Authority::sign`], for another time from now than [`HOST_LIFE`].
    ///
    /// # Errors
    /// [`PkiError::Make`] when the request cannot be read.
    pub fn sign_for(
        &self,
        request: &str,
        host: &str,
        addresses: &[IpAddr],
        life: Duration,
    ) -> Result<String, PkiError> {
        let issuer = Issuer::from_ca_cert_pem(&self.certificate, KeyPair::from_pem(&self.key)?)?;
        let mut request = CertificateSigningRequestParams::from_pem(request)?;
        let mut params =
            CertificateParams::new(vec![host.to_owned(), "haven".into(), "localhost".into()])?;
        params.distinguished_name.push(DnType::CommonName, host);
        params.subject_alt_names.extend(addresses.iter().map(|ip| SanType::IpAddress(*ip)));
        params.subject_alt_names.push(SanType::IpAddress(IpAddr::from([127, 0, 0, 1])));
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        validity(&mut params, life);
        request.params = params;
        Ok(request.signed_by(&issuer)?.pem())
    }
}

/// A fresh key and the request to have it signed: (key, request), PEM.
///
/// # Errors
/// [`PkiError::Make`] when the machine cannot make keys.
pub fn request(host: &str) -> Result<(String, String), PkiError> {
    let key = KeyPair::generate()?;
    Ok((key.serialize_pem(), request_of(&key, host)?))
}

fn request_of(key: &KeyPair, host: &str) -> Result<String, PkiError> {
    let mut params = CertificateParams::new(vec![host.to_owned()])?;
    params.distinguished_name.push(DnType::CommonName, host);
    Ok(params.serialize_request(key)?.pem()?)
}

/// Whether a host's certificate is to be renewed: less than a third of its life is left, or it cannot be read.
#[must_use]
pub fn is_due(certificate: &str, now_ms: i64) -> bool {
    Chain::read(certificate).map_or(true, |chain| {
        let facts = chain.facts();
        (facts.ends_ms - now_ms).saturating_mul(3) < facts.ends_ms - facts.begins_ms
    })
}

/// SHA-256 of a certificate, lower-case hexadecimal: what a join token carries.
///
/// # Errors
/// [`PkiError::Tls`] when it is not a certificate.
pub fn fingerprint(certificate: &str) -> Result<String, PkiError> {
    let der = CertificateDer::from_pem_slice(certificate.as_bytes()).map_err(tls)?;
    Ok(Sha256::digest(&der).iter().map(|byte| format!("{byte:02x}")).collect())
}

fn roots(ca: &str) -> Result<Arc<RootCertStore>, PkiError> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(ca.as_bytes()).map_err(tls)?).map_err(tls)?;
    Ok(Arc::new(roots))
}

fn own(
    identity: &Identity,
) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), PkiError> {
    let certificate =
        CertificateDer::from_pem_slice(identity.certificate.as_bytes()).map_err(tls)?;
    let ca = CertificateDer::from_pem_slice(identity.ca.as_bytes()).map_err(tls)?;
    let key = PrivateKeyDer::from_pem_slice(identity.key.as_bytes()).map_err(tls)?;
    // The authority goes along, so that a joining host can check its fingerprint.
    Ok((vec![certificate, ca], key))
}

pub(crate) fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

/// This host's certificate as its connections use it. One that replaces it is used from the next handshake on;
/// connections that there are go on.
#[derive(Clone, Debug)]
pub struct Current {
    ca: String,
    key: Arc<RwLock<Arc<CertifiedKey>>>,
}

fn certified(identity: &Identity) -> Result<Arc<CertifiedKey>, PkiError> {
    let (chain, key) = own(identity)?;
    CertifiedKey::from_der(chain, key, &provider()).map(Arc::new).map_err(tls)
}

impl Current {
    /// Begins with this one.
    ///
    /// # Errors
    /// [`PkiError::Tls`] when certificate and key do not fit together.
    pub fn new(identity: &Identity) -> Result<Self, PkiError> {
        let key = Arc::new(RwLock::new(certified(identity)?));
        Ok(Self { ca: identity.ca.clone(), key })
    }

    /// Uses another from now on.
    ///
    /// # Errors
    /// [`PkiError::Tls`] when certificate and key do not fit together; the one of before stays.
    pub fn replace(&self, identity: &Identity) -> Result<(), PkiError> {
        let new = certified(identity)?;
        *self.key.write().unwrap_or_else(PoisonError::into_inner) = new;
        Ok(())
    }

    /// The authority's certificate, PEM.
    #[must_use]
    pub fn ca(&self) -> &str {
        &self.ca
    }

    fn now(&self) -> Arc<CertifiedKey> {
        Arc::clone(&self.key.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// TLS for the API: hosts are known by their certificate, people come without one (and with a token).
    ///
    /// # Errors
    /// [`PkiError::Tls`] when the authority's certificate cannot be read.
    pub fn server_config(&self) -> Result<ServerConfig, PkiError> {
        let verifier = WebPkiClientVerifier::builder_with_provider(roots(&self.ca)?, provider())
            .allow_unauthenticated()
            .build()
            .map_err(tls)?;
        Ok(ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(tls)?
            .with_client_cert_verifier(verifier)
            .with_cert_resolver(Arc::new(self.clone())))
    }

    /// TLS towards another host of the cluster.
    ///
    /// # Errors
    /// [`PkiError::Tls`] when the authority's certificate cannot be read.
    pub fn client_config(&self) -> Result<ClientConfig, PkiError> {
        Ok(ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(tls)?
            .with_root_certificates(roots(&self.ca)?)
            .with_client_cert_resolver(Arc::new(self.clone())))
    }
}

impl ResolvesServerCert for Current {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.now())
    }
}

impl ResolvesClientCert for Current {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.now())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// TLS for the API with a certificate that stays.
///
/// # Errors
/// [`PkiError::Tls`] when the certificates do not fit together.
pub fn server_config(identity: &Identity) -> Result<ServerConfig, PkiError> {
    Current::new(identity)?.server_config()
}

/// TLS towards another host of the cluster with a certificate that stays.
///
/// # Errors
/// [`PkiError::Tls`] when the certificates do not fit together.
pub fn client_config(identity: &Identity) -> Result<ClientConfig, PkiError> {
    Current::new(identity)?.client_config()
}

/// Where a host keeps its certificates.
#[derive(Clone, Debug)]
pub struct PkiDir(pub PathBuf);

impl PkiDir {
    /// `ca.crt`.
    #[must_use]
    pub fn ca(&self) -> PathBuf {
        self.0.join("ca.crt")
    }
    /// `ca.key`.
    #[must_use]
    pub fn ca_key(&self) -> PathBuf {
        self.0.join("ca.key")
    }
    /// `host.crt`.
    #[must_use]
    pub fn certificate(&self) -> PathBuf {
        self.0.join("host.crt")
    }
    /// `host.key`.
    #[must_use]
    pub fn key(&self) -> PathBuf {
        self.0.join("host.key")
    }

    /// Reads this host's identity.
    ///
    /// # Errors
    /// [`PkiError::File`] when there is none.
    pub fn load(&self) -> Result<Identity, PkiError> {
        Ok(Identity {
            ca: read(&self.ca())?,
            certificate: read(&self.certificate())?,
            key: read(&self.key())?,
        })
    }

    /// Reads the authority, if this host has its key.
    ///
    /// # Errors
    /// [`PkiError::File`] when there is none.
    pub fn load_authority(&self) -> Result<Authority, PkiError> {
        Ok(Authority { certificate: read(&self.ca())?, key: read(&self.ca_key())? })
    }

    /// Signs a new certificate for this host when [`is_due`] says so; nothing otherwise.
    ///
    /// The key stays, so that one file is replaced, whole, and fits its key at every instant, also over a power cut. A new
    /// key would protect nothing more: who can read the host's can read the authority's beside it.
    ///
    /// # Errors
    /// [`PkiError::File`] when a file cannot be read or written, [`PkiError::Make`] when the key cannot be used.
    pub fn renew(
        &self,
        host: &str,
        address: IpAddr,
        life: Duration,
        now_ms: i64,
    ) -> Result<Option<Identity>, PkiError> {
        let identity = self.load()?;
        if !is_due(&identity.certificate, now_ms) {
            return Ok(None);
        }
        let request = request_of(&KeyPair::from_pem(&identity.key)?, host)?;
        let authority = self.load_authority()?;
        let certificate = authority.sign_for(&request, host, &[address], life)?;
        write(&self.certificate(), &certificate)?;
        Ok(Some(Identity { certificate, ..identity }))
    }

    /// Writes this host's identity, and the authority's key if it is given.
    ///
    /// # Errors
    /// [`PkiError::File`] when the directory is not writable.
    pub fn save(&self, identity: &Identity, authority_key: Option<&str>) -> Result<(), PkiError> {
        std::fs::create_dir_all(&self.0)
            .map_err(|source| PkiError::File { path: self.0.clone(), source })?;
        write(&self.ca(), &identity.ca)?;
        write(&self.certificate(), &identity.certificate)?;
        write(&self.key(), &identity.key)?;
        authority_key.map_or(Ok(()), |key| write(&self.ca_key(), key))
    }
}

fn read(path: &Path) -> Result<String, PkiError> {
    std::fs::read_to_string(path).map_err(|source| PkiError::File { path: path.to_owned(), source })
}

fn write(path: &Path, text: &str) -> Result<(), PkiError> {
    let result = file::write_whole(path, text.as_bytes());
    result.map_err(|source| PkiError::File { path: path.to_owned(), source })
}
