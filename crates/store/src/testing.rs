//! For tests: an authority outside of the cluster that signs the certificates of services.

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, SanType};
use std::time::{Duration, SystemTime};

/// An authority.
pub struct Signer {
    params: CertificateParams,
    key: KeyPair,
    /// Its own certificate, PEM.
    pub certificate: String,
}

/// What it signed.
#[derive(Clone, Debug)]
pub struct Signed {
    /// The certificate, PEM.
    pub leaf: String,
    /// Its key, PEM.
    pub key: String,
}

impl Signer {
    /// Makes one.
    ///
    /// # Panics
    /// When the machine cannot make keys.
    #[must_use]
    pub fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a test makes a key");
        let certificate = params.self_signed(&key).expect("a test makes a certificate").pem();
        Self { params, key, certificate }
    }

    /// Signs a certificate for a name and 127.0.0.1 that ends in so many days, or ended so many days ago.
    ///
    /// # Panics
    /// When the machine cannot make keys.
    #[must_use]
    pub fn sign(&self, name: &str, days: i64) -> Signed {
        let key = KeyPair::generate().expect("a test makes a key");
        self.sign_for(&key, name, days)
    }

    /// Signs another certificate for a key.
    ///
    /// # Panics
    /// When the key is none.
    #[must_use]
    pub fn renew(&self, signed: &Signed, name: &str, days: i64) -> Signed {
        let key = KeyPair::from_pem(&signed.key).expect("a test gives a key");
        self.sign_for(&key, name, days)
    }

    fn sign_for(&self, key: &KeyPair, name: &str, days: i64) -> Signed {
        let mut params =
            CertificateParams::new(vec![name.to_owned()]).expect("a test gives a good name");
        params.distinguished_name.push(DnType::CommonName, name);
        params.subject_alt_names.push(SanType::IpAddress([127, 0, 0, 1].into()));
        let (now, span) = (SystemTime::now(), Duration::from_secs(days.unsigned_abs() * 86_400));
        params.not_before = (now - Duration::from_secs(400 * 86_400)).into();
        // A little more, so that it is so many whole days also when it is looked at.
        let end = if days < 0 { now - span } else { now + span + Duration::from_secs(600) };
        params.not_after = end.into();
        let issuer = Issuer::from_params(&self.params, &self.key);
        let leaf = params.signed_by(key, &issuer).expect("a test makes a certificate").pem();
        Signed { leaf, key: key.serialize_pem() }
    }
}
