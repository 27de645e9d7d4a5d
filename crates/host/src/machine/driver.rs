//! The seam: what the agent asks of its machine.

use async_trait::async_trait;
use haven_model::maintenance::Work;
use std::io;

/// How a piece of work stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing is known of it: it never began, or the machine was restarted since.
    Unknown,
    /// It is not over.
    Runs,
    /// It is over, and went well.
    Done,
    /// It is over, and did not; why, a sentence.
    Failed(String),
}

/// Works on the machine.
#[async_trait]
pub trait Machine: Send + Sync {
    /// Begins. The work goes on when the daemon ends, since an upgrade ends it.
    ///
    /// # Errors
    /// When it could not begin.
    async fn begin(&self, work: Work, id: &str) -> io::Result<()>;
    /// How it stands, also when an earlier daemon began it.
    async fn outcome(&self, id: &str) -> Outcome;
}
