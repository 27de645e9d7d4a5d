//! Whether a management controller's certificate is the one that is expected. Most are self-signed, so a fingerprint
//! does; one that is not trusted is told with its fingerprint, to be compared with what the controller itself shows.

use haven_model::{PowerSpec, power::plain_fingerprint};
use rustls::{
    ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject},
};
use sha2::{Digest, Sha256};
use std::sync::{Arc, Mutex, PoisonError};

/// The fingerprint of the certificate that came, once one came.
pub type Came = Arc<Mutex<Option<String>>>;

#[derive(Debug)]
enum Rule {
    /// Signed by one of these, for the name that was asked.
    Authority(Arc<WebPkiServerVerifier>),
    /// With this fingerprint.
    Fingerprint(String),
    /// Any.
    Any,
}

#[derive(Debug)]
struct Verifier {
    rule: Rule,
    provider: Arc<CryptoProvider>,
    came: Came,
}

fn fingerprint(certificate: &CertificateDer<'_>) -> String {
    Sha256::digest(certificate).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn rule(power: &PowerSpec, provider: &Arc<CryptoProvider>) -> Result<Rule, String> {
    if let Some(text) = &power.fingerprint {
        let plain = plain_fingerprint(text).ok_or("`fingerprint` is no SHA-256 in hexadecimal")?;
        return Ok(Rule::Fingerprint(plain));
    }
    if let Some(pem) = &power.ca {
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(pem.as_bytes()) {
            let added = certificate.map_err(|error| error.to_string());
            let added = added.and_then(|one| roots.add(one).map_err(|error| error.to_string()));
            added
                .map_err(|error| format!("`ca` holds no certificate that can be read: {error}"))?;
        }
        let builder =
            WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(provider));
        let verifier = builder.build().map_err(|_| "`ca` holds no certificate")?;
        return Ok(Rule::Authority(verifier));
    }
    if power.insecure {
        return Ok(Rule::Any);
    }
    Err("has no `fingerprint`, `ca` or `insecure` in its host's spec, so its certificate cannot be verified".into())
}

/// TLS towards the controller of this spec; and where the fingerprint of what comes is put.
///
/// # Errors
/// What the spec lacks, to be read after the controller's address.
pub fn config(power: &PowerSpec) -> Result<(ClientConfig, Came), String> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let came = Came::default();
    let rule = rule(power, &provider)?;
    let verifier = Verifier { rule, provider: Arc::clone(&provider), came: Arc::clone(&came) };
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| format!("cannot be reached over TLS from here: {error}"))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    Ok((config, came))
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let it = fingerprint(end_entity);
        *self.came.lock().unwrap_or_else(PoisonError::into_inner) = Some(it.clone());
        match &self.rule {
            Rule::Any => Ok(ServerCertVerified::assertion()),
            Rule::Fingerprint(wanted) if *wanted == it => Ok(ServerCertVerified::assertion()),
            Rule::Fingerprint(_) => Err(Error::General("it is another certificate".into())),
            Rule::Authority(inner) => {
                inner.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
            }
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
