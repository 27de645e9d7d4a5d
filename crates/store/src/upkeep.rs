//! What the store needs now and then so that it does not fill up: old revisions are forgotten, and their room is given
//! back on one member after another.

use crate::raw::{EtcdStore, StoreError};

/// Does it when it is due.
#[derive(Clone, Copy, Debug)]
pub struct Upkeep {
    kept: i64,
    fragmented: i64,
    forgotten: i64,
}

impl Upkeep {
    /// Keeps so many revisions readable behind the newest, and gives a member's room back when more than so many bytes
    /// of its file, and more than half of it, are unused.
    #[must_use]
    pub fn new(kept: i64, fragmented: i64) -> Self {
        Self { kept, fragmented, forgotten: 0 }
    }

    /// Forgets what is too old at this revision, once that is a tenth more than what is kept. True when it was due.
    ///
    /// # Errors
    /// [`StoreError::Refused`] when it is forgotten already or a member cannot give its room back,
    /// [`StoreError::Unknown`] when nobody answers in time.
    pub async fn run(&mut self, store: &EtcdStore, revision: i64) -> Result<bool, StoreError> {
        let until = revision - self.kept;
        if until <= self.forgotten + self.kept / 10 {
            return Ok(false);
        }
        store.compact(until).await?;
        self.forgotten = until;
        // What is in use is counted late: room that is not given back now is so the next time.
        store.defragment_each(Some(self.fragmented)).await?;
        Ok(true)
    }
}
