//! The cluster's certificates: its own authority, one certificate per host, and the TLS settings made from them.
//!
//! Everything between hosts is mutual TLS under this authority. A person's client pins the authority by its
//! fingerprint, which stands in the join token and in the context file.

use crate::{file, raw::Identity};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use rustls::{ClientConfig, RootCertStore, ServerConfig, server::WebPkiClientVerifier};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use sha2::{Digest, Sha256};
use std::{
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
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

/// Days that a host's certificate is good for.
const HOST_DAYS: i64 = 825;
/// Days that the authority is good for.
const CA_DAYS: i64 = 3650 * 2;

/// The cluster's authority: its certificate and its key, PEM.
#[derive(Clone)]
pub struct Authority {
    /// Its certificate.
    pub certificate: String,
    /// Its key. Only voters have it.
    pub key: String,
}

fn validity(params: &mut CertificateParams, days: i64) {
    let now = std::time::SystemTime::now();
    // A little in the past, for hosts whose clocks run behind.
    params.not_before = (now - std::time::Duration::from_secs(3600)).into();
    params.not_after = (now + std::time::Duration::from_secs(days.unsigned_abs() * 86_400)).into();
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
        validity(&mut params, CA_DAYS);
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
        validity(&mut params, HOST_DAYS);
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
    let mut params = CertificateParams::new(vec![host.to_owned()])?;
    params.distinguished_name.push(DnType::CommonName, host);
    let request = params.serialize_request(&key)?.pem()?;
    Ok((key.serialize_pem(), request))
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

/// TLS for the API: hosts are known by their certificate, people come without one (and with a token).
///
/// # Errors
/// [`PkiError::Tls`] when the certificates do not fit together.
pub fn server_config(identity: &Identity) -> Result<ServerConfig, PkiError> {
    let verifier = WebPkiClientVerifier::builder_with_provider(roots(&identity.ca)?, provider())
        .allow_unauthenticated()
        .build()
        .map_err(tls)?;
    let (chain, key) = own(identity)?;
    ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(tls)?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)
        .map_err(tls)
}

/// TLS towards another host of the cluster.
///
/// # Errors
/// [`PkiError::Tls`] when the certificates do not fit together.
pub fn client_config(identity: &Identity) -> Result<ClientConfig, PkiError> {
    let (chain, key) = own(identity)?;
    ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(tls)?
        .with_root_certificates(roots(&identity.ca)?)
        .with_client_auth_cert(chain, key)
        .map_err(tls)
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
