//! The keys and values of the in-process etcd: every version of every key since the last compaction.
//!
//! Pure. It answers as etcd's v3 API documents it: one revision per transaction, create revision and version kept
//! per key, reads and watches of the past up to the compaction.

use etcd_client::proto::{PbEvent, PbKeyValue};
use std::collections::BTreeMap;

#[derive(Clone, Debug)]
struct Version {
    mod_revision: i64,
    create_revision: i64,
    version: i64,
    /// Absent when this version is the key's deletion.
    value: Option<Vec<u8>>,
}

/// What etcd refuses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    Compacted,
    Future,
    DuplicateKey,
}

/// A range of keys as etcd writes it: an empty end is one key, `\0` is everything from the key on.
#[derive(Clone, Debug)]
pub(super) struct Keys {
    pub(super) key: Vec<u8>,
    pub(super) end: Vec<u8>,
}

impl Keys {
    pub(super) fn contain(&self, key: &[u8]) -> bool {
        if self.end.is_empty() {
            return key == self.key;
        }
        key >= self.key.as_slice() && (self.end == [0] || key < self.end.as_slice())
    }
}

/// One event with the revision at which it happened.
pub(super) type Happened = (i64, PbEvent);

#[derive(Debug, Default)]
pub(super) struct Store {
    pub(super) revision: i64,
    pub(super) compacted: i64,
    keys: BTreeMap<Vec<u8>, Vec<Version>>,
    log: Vec<Happened>,
    /// Keys written in the transaction under way.
    touched: Vec<Vec<u8>>,
}

impl Store {
    pub(super) fn new() -> Self {
        // An empty etcd stands at revision 1.
        Self { revision: 1, ..Self::default() }
    }

    /// The pairs of a range at a revision (0: now), in order of keys.
    pub(super) fn range(&self, keys: &Keys, revision: i64) -> Result<Vec<PbKeyValue>, Refusal> {
        let at = if revision <= 0 { self.revision } else { revision };
        if at > self.revision {
            return Err(Refusal::Future);
        }
        if revision > 0 && at < self.compacted {
            return Err(Refusal::Compacted);
        }
        let from = keys.key.clone();
        let found = self.keys.range(from..).take_while(|(key, _)| {
            if keys.end.is_empty() { **key == keys.key } else { keys.contain(key) }
        });
        Ok(found
            .filter_map(|(key, versions)| {
                let version = versions.iter().rev().find(|v| v.mod_revision <= at)?;
                Some(pair(key, version, version.value.as_ref()?))
            })
            .collect())
    }

    /// The newest version of a key, if it exists.
    pub(super) fn get(&self, key: &[u8]) -> Option<PbKeyValue> {
        let version = self.keys.get(key)?.last()?;
        Some(pair(key, version, version.value.as_ref()?))
    }

    /// Begins a transaction; its writes share the next revision.
    pub(super) fn begin(&mut self) {
        self.touched.clear();
    }

    /// Ends it: the revision counts on if anything was written.
    pub(super) fn end(&mut self) -> Vec<Happened> {
        if self.touched.is_empty() {
            return Vec::new();
        }
        self.revision += 1;
        let from = self.log.partition_point(|(revision, _)| *revision < self.revision);
        self.log[from..].to_vec()
    }

    fn touch(&mut self, key: &[u8]) -> Result<(), Refusal> {
        if self.touched.iter().any(|touched| touched == key) {
            return Err(Refusal::DuplicateKey);
        }
        self.touched.push(key.to_vec());
        Ok(())
    }

    pub(super) fn put(&mut self, key: &[u8], value: Vec<u8>) -> Result<(), Refusal> {
        self.touch(key)?;
        let mod_revision = self.revision + 1;
        let versions = self.keys.entry(key.to_vec()).or_default();
        let (create_revision, version) = match versions.last() {
            Some(last) if last.value.is_some() => (last.create_revision, last.version + 1),
            _ => (mod_revision, 1),
        };
        let written = Version { mod_revision, create_revision, version, value: Some(value) };
        let kv = pair(key, &written, written.value.as_deref().unwrap_or_default());
        versions.push(written);
        self.log.push((mod_revision, PbEvent { r#type: 0, kv: Some(kv), prev_kv: None }));
        Ok(())
    }

    /// Deletes a range; what it held.
    pub(super) fn delete(&mut self, keys: &Keys) -> Result<Vec<PbKeyValue>, Refusal> {
        let gone: Vec<PbKeyValue> = self
            .keys
            .range(keys.key.clone()..)
            .take_while(|(key, _)| keys.contain(key))
            .filter_map(|(key, versions)| {
                let version = versions.last()?;
                Some(pair(key, version, version.value.as_ref()?))
            })
            .collect();
        let mod_revision = self.revision + 1;
        for kv in &gone {
            self.touch(&kv.key)?;
            let deleted = Version { mod_revision, create_revision: 0, version: 0, value: None };
            if let Some(versions) = self.keys.get_mut(&kv.key) {
                versions.push(deleted);
            }
            let kv = PbKeyValue { key: kv.key.clone(), mod_revision, ..PbKeyValue::default() };
            self.log.push((mod_revision, PbEvent { r#type: 1, kv: Some(kv), prev_kv: None }));
        }
        Ok(gone)
    }

    /// Forgets what was before `revision`.
    pub(super) fn compact(&mut self, revision: i64) -> Result<(), Refusal> {
        if revision <= self.compacted {
            return Err(Refusal::Compacted);
        }
        if revision > self.revision {
            return Err(Refusal::Future);
        }
        self.compacted = revision;
        self.log.retain(|(at, _)| *at >= revision);
        self.keys.retain(|_, versions| {
            let last = versions.iter().rposition(|v| v.mod_revision <= revision).unwrap_or(0);
            versions.drain(..last);
            !(versions.len() == 1 && versions[0].value.is_none())
        });
        Ok(())
    }

    /// Everything of a range that happened from `revision` on.
    pub(super) fn since(&self, keys: &Keys, revision: i64) -> Result<Vec<Happened>, Refusal> {
        if revision > 0 && revision < self.compacted {
            return Err(Refusal::Compacted);
        }
        let from = self.log.partition_point(|(at, _)| *at < revision);
        let wanted =
            |(_, event): &&Happened| event.kv.as_ref().is_some_and(|kv| keys.contain(&kv.key));
        Ok(self.log[from..].iter().filter(wanted).cloned().collect())
    }
}

/// The events of a range among those of one transaction.
pub(super) fn of_range(happened: &[Happened], keys: &Keys) -> Vec<PbEvent> {
    let events = happened.iter().map(|(_, event)| event);
    events.filter(|e| e.kv.as_ref().is_some_and(|kv| keys.contain(&kv.key))).cloned().collect()
}

fn pair(key: &[u8], version: &Version, value: &[u8]) -> PbKeyValue {
    PbKeyValue {
        key: key.to_vec(),
        create_revision: version.create_revision,
        mod_revision: version.mod_revision,
        version: version.version,
        value: value.to_vec(),
        lease: 0,
    }
}
