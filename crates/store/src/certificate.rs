//! Certificates that people bring: what they say of themselves, and whether chain and key fit together.
//!
//! Nothing here asks who signed them: a service may use the certificate of a public authority, of a company's own, or
//! one that signed itself.

use crate::{pki::provider, seal::Plain};
use base64::{Engine, engine::general_purpose::STANDARD};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use sha2::{Digest, Sha256};
use std::net::IpAddr;
use x509_parser::{
    certificate::X509Certificate,
    extensions::{GeneralName, ParsedExtension},
    prelude::FromDer,
    x509::X509Name,
};

/// What can be wrong with a chain or its key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CertificateError {
    /// A private key stands where everybody may read.
    #[error("the chain holds a private key, which everybody who may look could read")]
    KeyInChain,
    /// Not one certificate.
    #[error("the chain holds no certificate")]
    NoCertificate,
    /// One of them cannot be read.
    #[error("certificate {number} of the chain cannot be read: {why}")]
    Unreadable {
        /// Which one, from 1.
        number: usize,
        /// Why.
        why: String,
    },
    /// One is not signed by the next.
    #[error(
        "the chain is not in order: certificate {number} (`{subject}`) is signed by `{issuer}`, and the next is `{next}`"
    )]
    Order {
        /// Which one, from 1.
        number: usize,
        /// Whose it is.
        subject: String,
        /// Who signed it.
        issuer: String,
        /// Whose the next one is.
        next: String,
    },
    /// There is no private key.
    #[error("there is no private key that can be read")]
    NoKey,
    /// It has a passphrase.
    #[error("the private key has a passphrase, and nobody could enter it")]
    Passphrase,
    /// It is too weak or of a kind that is not known.
    #[error("the private key cannot be used: {why}")]
    UnusableKey {
        /// Why.
        why: String,
    },
    /// It is another certificate's.
    #[error(
        "the private key does not belong to the first certificate of the chain, that of `{subject}`"
    )]
    OtherKey {
        /// Whose that one is.
        subject: String,
    },
}

/// What a certificate says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Whose it is: the common name, or all of the name where there is none.
    pub subject: String,
    /// The names and addresses that it is good for.
    pub names: Vec<String>,
    /// Who signed it.
    pub issuer: String,
    /// When it begins, milliseconds since 1970.
    pub begins_ms: i64,
    /// When it ends, milliseconds since 1970.
    pub ends_ms: i64,
}

/// Certificates, the leaf first, each signed by the next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    certificates: Vec<CertificateDer<'static>>,
    facts: Facts,
}

fn words(name: &X509Name<'_>) -> String {
    let common = name.iter_common_name().next().and_then(|name| name.as_str().ok());
    common.map_or_else(|| name.to_string(), str::to_owned)
}

fn read(number: usize, der: &[u8]) -> Result<X509Certificate<'_>, CertificateError> {
    let unreadable = |why: String| CertificateError::Unreadable { number, why };
    match X509Certificate::from_der(der) {
        Ok(([], certificate)) => Ok(certificate),
        Ok(_) => Err(unreadable("something follows behind its end".into())),
        Err(error) => Err(unreadable(error.to_string())),
    }
}

fn names(of: &X509Certificate<'_>) -> Vec<String> {
    let address = |bytes: &[u8]| match *bytes {
        [a, b, c, d] => Some(IpAddr::from([a, b, c, d]).to_string()),
        _ => <[u8; 16]>::try_from(bytes).ok().map(|bytes| IpAddr::from(bytes).to_string()),
    };
    let names = of.extensions().iter().filter_map(|extension| match extension.parsed_extension() {
        ParsedExtension::SubjectAlternativeName(names) => Some(&names.general_names),
        _ => None,
    });
    names
        .flatten()
        .filter_map(|name| match name {
            GeneralName::DNSName(name) => Some((*name).to_owned()),
            GeneralName::IPAddress(bytes) => address(bytes),
            _ => None,
        })
        .collect()
}

impl Chain {
    /// Reads a chain, PEM.
    ///
    /// # Errors
    /// [`CertificateError`] with what is wrong with it.
    pub fn read(text: &str) -> Result<Self, CertificateError> {
        if text.contains("PRIVATE KEY") {
            return Err(CertificateError::KeyInChain);
        }
        let mut certificates: Vec<CertificateDer<'static>> = Vec::new();
        for one in CertificateDer::pem_slice_iter(text.as_bytes()) {
            let number = certificates.len() + 1;
            let unreadable = |error: rustls_pki_types::pem::Error| CertificateError::Unreadable {
                number,
                why: error.to_string(),
            };
            certificates.push(one.map_err(unreadable)?);
        }
        let all: Vec<X509Certificate<'_>> = certificates
            .iter()
            .enumerate()
            .map(|(i, der)| read(i + 1, der))
            .collect::<Result<_, _>>()?;
        let leaf = all.first().ok_or(CertificateError::NoCertificate)?;
        for (i, pair) in all.windows(2).enumerate() {
            if pair[0].issuer().as_raw() != pair[1].subject().as_raw() {
                return Err(CertificateError::Order {
                    number: i + 1,
                    subject: words(pair[0].subject()),
                    issuer: words(pair[0].issuer()),
                    next: words(pair[1].subject()),
                });
            }
        }
        let ms = |time: x509_parser::time::ASN1Time| time.timestamp().saturating_mul(1000);
        let facts = Facts {
            subject: words(leaf.subject()),
            names: names(leaf),
            issuer: words(leaf.issuer()),
            begins_ms: ms(leaf.validity().not_before),
            ends_ms: ms(leaf.validity().not_after),
        };
        drop(all);
        Ok(Self { certificates, facts })
    }

    /// What the leaf says of itself.
    #[must_use]
    pub fn facts(&self) -> &Facts {
        &self.facts
    }

    /// The chain as PEM and nothing else.
    #[must_use]
    pub fn pem(&self) -> String {
        self.certificates.iter().map(|der| pem("CERTIFICATE", der)).collect()
    }

    /// SHA-256 over all of it, lower-case hexadecimal: another chain has another.
    #[must_use]
    pub fn fingerprint(&self) -> String {
        let mut sum = Sha256::new();
        self.certificates.iter().for_each(|der| sum.update(der));
        sum.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// A private key that was read.
#[derive(PartialEq, Eq)]
pub struct Key(PrivateKeyDer<'static>);

impl Key {
    /// Reads a key, PEM: PKCS #8, or as OpenSSL wrote RSA and EC keys before.
    ///
    /// # Errors
    /// [`CertificateError::NoKey`] or [`CertificateError::Passphrase`].
    pub fn read(text: &Plain) -> Result<Self, CertificateError> {
        let text = text.expose();
        // As PKCS #8 says it, and as OpenSSL said it before.
        if text.contains("ENCRYPTED PRIVATE KEY") || text.contains("Proc-Type: 4,ENCRYPTED") {
            return Err(CertificateError::Passphrase);
        }
        let key = PrivateKeyDer::from_pem_slice(text.as_bytes());
        key.map(Self).map_err(|_| CertificateError::NoKey)
    }

    /// Checks that it is the leaf's.
    ///
    /// # Errors
    /// [`CertificateError::UnusableKey`] or [`CertificateError::OtherKey`].
    pub fn belongs_to(&self, chain: &Chain) -> Result<(), CertificateError> {
        let unusable = |why: String| CertificateError::UnusableKey { why };
        let loaded = provider().key_provider.load_private_key(self.0.clone_key());
        let loaded = loaded.map_err(|error| unusable(error.to_string()))?;
        let public = loaded.public_key().ok_or_else(|| unusable("its kind is not known".into()))?;
        let leaf = read(1, &chain.certificates[0])?;
        if leaf.public_key().raw == public.as_ref() {
            return Ok(());
        }
        Err(CertificateError::OtherKey { subject: chain.facts.subject.clone() })
    }

    /// The key as PEM and nothing else.
    #[must_use]
    pub fn pem(&self) -> Plain {
        let label = match &self.0 {
            PrivateKeyDer::Pkcs1(_) => "RSA PRIVATE KEY",
            PrivateKeyDer::Sec1(_) => "EC PRIVATE KEY",
            _ => "PRIVATE KEY",
        };
        Plain::new(pem(label, self.0.secret_der()))
    }
}

fn pem(label: &str, der: &[u8]) -> String {
    let text = STANDARD.encode(der);
    let mut lines = String::new();
    for line in text.as_bytes().chunks(64) {
        lines.push_str(&String::from_utf8_lossy(line));
        lines.push('\n');
    }
    format!("-----BEGIN {label}-----\n{lines}-----END {label}-----\n")
}
