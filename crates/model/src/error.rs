//! What can be wrong with a value before it ever meets the store.

/// A value that is not allowed, in a sentence for the person who wrote it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// Not a DNS label.
    #[error(
        "`{name}` is not a valid name: use 1 to 40 lower-case letters, digits and `-`, beginning and ending with a letter or digit"
    )]
    BadName {
        /// What was given.
        name: String,
    },
    /// Not `kind/name`.
    #[error("`{text}` does not name an object: write KIND/NAME, for example vm/web-1")]
    BadReference {
        /// What was given.
        text: String,
    },
    /// A kind that does not exist.
    #[error(
        "`{text}` is not a kind: the kinds are Host, Pool, Image, Network, Certificate, VM and Service"
    )]
    BadKind {
        /// What was given.
        text: String,
    },
    /// A size that cannot be read.
    #[error(
        "`{text}` is not a size: write a whole number with a unit, for example 512MiB or 20GiB"
    )]
    BadSize {
        /// What was given.
        text: String,
    },
    /// A time span that cannot be read.
    #[error(
        "`{text}` is not a time span: write a whole number with a unit, for example 500ms, 10s or 5m"
    )]
    BadDuration {
        /// What was given.
        text: String,
    },
    /// The timers of the cluster contradict each other.
    #[error("the cluster's timers are unsafe: {why}")]
    UnsafeTimers {
        /// Which rule of DESIGN.md section 4 is broken.
        why: String,
    },
}
