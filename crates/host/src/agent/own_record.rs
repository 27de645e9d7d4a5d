//! Records that this host alone writes: its status, that of its VMs, what it says of a move.
//!
//! A write that was given up on may be carried out much later, when a store that was stuck goes on: over a newer one, if
//! nothing is compared. So each write compares the record as it was known before, and of two that compare the same only
//! one is done. What an unreadable record says is lost anyhow, so it is written over.

use haven_model::{Snapshot, keys};
use haven_store::raw::Compare;

/// What is known of one such record.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct OwnRecord {
    /// The store's revision of the last write that was acknowledged.
    written: i64,
}

impl OwnRecord {
    /// What the next write of `key` compares; `record` is its revision in `live`, if it is there.
    pub fn compare(self, live: &Snapshot, key: String, record: Option<i64>) -> Option<Compare> {
        let path = key.strip_prefix(keys::ROOT).unwrap_or_default();
        if live.unreadable.contains_key(path) {
            return None;
        }
        let known = if live.revision >= self.written { record.unwrap_or(0) } else { self.written };
        Some(if known == 0 { Compare::Absent(key) } else { Compare::ModRevision(key, known) })
    }

    /// Whether something else stands there by now than what was written last.
    pub fn overwritten(self, live: &Snapshot, record: Option<i64>) -> bool {
        live.revision >= self.written && record != Some(self.written)
    }

    /// A write was acknowledged at `revision`.
    pub fn written(&mut self, revision: i64) {
        self.written = revision;
    }
}

#[cfg(test)]
mod tests {
    use super::OwnRecord;
    use haven_model::Snapshot;
    use haven_store::raw::Compare;

    fn compared(own: OwnRecord, live: i64, record: Option<i64>) -> Option<i64> {
        let live = Snapshot { revision: live, ..Snapshot::default() };
        match own.compare(&live, "/haven/status/vm/db".into(), record) {
            Some(Compare::ModRevision(_, revision)) => Some(revision),
            Some(Compare::Absent(_)) => Some(0),
            _ => None,
        }
    }

    #[test]
    fn a_write_compares_what_was_known_last() {
        let mut own = OwnRecord::default();
        assert_eq!(compared(own, 10, None), Some(0), "nothing is there");
        assert_eq!(compared(own, 10, Some(7)), Some(7), "what somebody before left");
        own.written(12);
        assert_eq!(compared(own, 11, Some(7)), Some(12), "the copy does not show it yet");
        assert_eq!(compared(own, 12, Some(12)), Some(12));
        assert_eq!(compared(own, 15, Some(14)), Some(14), "one of before was done late");
        assert_eq!(compared(own, 15, None), Some(0), "the manager removed it");
    }

    #[test]
    fn an_unreadable_record_is_written_over() {
        let mut live = Snapshot { revision: 10, ..Snapshot::default() };
        live.unreadable.insert("status/vm/db".into(), 9);
        let own = OwnRecord::default();
        assert!(own.compare(&live, "/haven/status/vm/db".into(), None).is_none());
    }
}
