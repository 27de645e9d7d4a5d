//! Certificates: what a frontend proves itself with when TLS ends at the balancer.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::fmt;

/// What is shown in the place of a secret, and what keeps the secret that is there when it is applied.
pub const SEALED: &str = "sealed";

/// What is wanted of a certificate.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CertificateSpec {
    /// The certificate and those that lead to its authority, PEM, its own first.
    pub chain: String,
    /// Its private key, PEM. It stands sealed in the store, and `sealed` is all that is ever shown of it; written so, the
    /// key that is there is kept.
    pub key: String,
}

/// The key may stand in the clear until it is sealed.
impl fmt::Debug for CertificateSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CertificateSpec").field("chain", &self.chain).finish_non_exhaustive()
    }
}
