//! Who manages. Pure decisions over the manager record.
//!
//! A manager's life is its host's renewal record, judged with the short `timers.manager`. Nothing unsafe follows
//! from two daemons that both believe they manage: every commit compares the manager record, so one of them fails.

use haven_model::{ManagerRecord, Name, Snapshot, Versioned};

/// What a daemon does about the manager's lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stand {
    /// It manages, under this record.
    Manage {
        /// Its term.
        term: u64,
        /// The record's revision.
        record_revision: i64,
    },
    /// It takes the lease: a transaction that compares what it saw.
    Take {
        /// The record to write.
        record: ManagerRecord,
        /// Revision of the record it replaces; 0 when there is none.
        replaces: i64,
        /// The holder's renewal record that stood unchanged, if the holder was judged by it.
        unchanged: Option<(Name, i64)>,
    },
    /// Another manages; look again after so many milliseconds at the latest.
    Wait {
        /// Milliseconds.
        again_ms: u64,
    },
}

/// What this daemon knows about itself and the holder.
#[derive(Clone, Debug)]
pub struct Candidate<'a> {
    /// This host.
    pub me: &'a Name,
    /// Its open session, if it has one. Without one it never manages.
    pub session: Option<u64>,
    /// How long and at which revision the holder's renewal record stood unchanged here.
    pub holder_unchanged: Option<(i64, u64)>,
    /// After how many milliseconds a silent manager is replaced.
    pub timeout_ms: u64,
    /// So many milliseconds later than the first in line may this host try, so that not all try at once.
    pub stagger_ms: u64,
}

/// Decides; see [`Stand`].
#[must_use]
pub fn stand(snapshot: &Snapshot, who: &Candidate<'_>) -> Stand {
    let Some(session) = who.session else {
        return Stand::Wait { again_ms: 1000 };
    };
    let take = |term: u64, replaces: i64, unchanged| Stand::Take {
        record: ManagerRecord { term, holder: who.me.clone(), session },
        replaces,
        unchanged,
    };
    let Some(record) = &snapshot.manager else {
        return take(1, 0, None);
    };
    if record.holder == *who.me {
        return mine(record, session, take);
    }
    let gone = snapshot
        .leases
        .get(&record.holder)
        .is_none_or(|lease| lease.closed || lease.session != record.session);
    if gone {
        return take(record.term + 1, record.revision, None);
    }
    match who.holder_unchanged {
        Some((revision, unchanged_ms)) if unchanged_ms >= who.timeout_ms + who.stagger_ms => {
            take(record.term + 1, record.revision, Some((record.holder.clone(), revision)))
        }
        Some((_, unchanged_ms)) => {
            Stand::Wait { again_ms: (who.timeout_ms + who.stagger_ms - unchanged_ms).max(5) }
        }
        None => Stand::Wait { again_ms: who.timeout_ms },
    }
}

fn mine(
    record: &Versioned<ManagerRecord>,
    session: u64,
    take: impl Fn(u64, i64, Option<(Name, i64)>) -> Stand,
) -> Stand {
    if record.session == session {
        Stand::Manage { term: record.term, record_revision: record.revision }
    } else {
        take(record.term + 1, record.revision, None)
    }
}
