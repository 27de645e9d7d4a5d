//! Replicas as they stand, and copies of them as they were.

use super::{BLOCKS, MirroredDisks, Replica, State};
use std::collections::BTreeMap;

/// A volume was made to hold what a copy does.
pub(super) struct Undone {
    /// From this run on.
    run: u64,
    holds: BTreeMap<u64, u64>,
    /// The last write before that.
    last: u64,
}

/// A copy: when it was made, and what it holds, eight bytes of each block.
pub(super) type Copy = (i64, Vec<u8>);

fn to_bytes(blocks: &BTreeMap<u64, u64>) -> Vec<u8> {
    let id = |block| blocks.get(&block).copied().unwrap_or(0).to_be_bytes();
    (0..BLOCKS).flat_map(id).collect()
}

fn to_blocks(bytes: &[u8]) -> BTreeMap<u64, u64> {
    let (ids, _) = bytes.as_chunks::<8>();
    (0..).zip(ids).map(|(block, id)| (block, u64::from_be_bytes(*id))).collect()
}

impl State {
    /// From this run on it holds this: all that was acknowledged since is undone, once.
    fn undo(&mut self, volume: &str, run: u64, blocks: &BTreeMap<u64, u64>) {
        if self.undone.get(volume).is_none_or(|undone| undone.run != run) {
            let undone = Undone { run, holds: blocks.clone(), last: self.ids };
            self.undone.insert(volume.to_owned(), undone);
            self.told.insert(volume.to_owned(), blocks.clone());
        }
    }

    /// What a replica holds once it is opened.
    pub(super) fn holds(&self, host: &str, volume: &str) -> Option<&BTreeMap<u64, u64>> {
        let here = self.replicas.get(&(host.to_owned(), volume.to_owned()))?;
        match self.undone.get(volume) {
            Some(undone) if here.lowest < undone.run => Some(&undone.holds),
            _ => Some(&here.blocks),
        }
    }

    /// A write in these blocks that was undone.
    pub(super) fn undone_in(&self, volume: &str, blocks: &BTreeMap<u64, u64>) -> Option<u64> {
        let undone = self.undone.get(volume)?;
        let mut odd = blocks.iter().filter(|(block, id)| {
            **id <= undone.last && undone.holds.get(block).copied().unwrap_or(0) != **id
        });
        odd.next().map(|(_, id)| *id)
    }
}

impl MirroredDisks {
    /// The store says that a volume holds from a run on what a copy does.
    pub fn set_based(&self, volume: &str, copy: &str, run: u64) {
        let mut state = self.state();
        let mut all = state.kept.iter().filter(|((_, of, kept), _)| of == volume && kept == copy);
        let Some(blocks) = all.next().map(|(_, (_, content))| to_blocks(content)) else { return };
        drop(all);
        state.undo(volume, run, &blocks);
    }

    /// Makes a replica, if it is not there.
    pub fn make(&self, host: &str, volume: &str) {
        let mut state = self.state();
        state.ids += 1;
        let file = state.ids;
        let key = (host.to_owned(), volume.to_owned());
        state.replicas.entry(key).or_insert_with(|| Replica { file, ..Replica::default() });
    }

    /// Which one it is.
    pub(crate) fn file(&self, host: &str, volume: &str) -> u64 {
        self.state().replica(host, volume).file
    }

    /// The lowest run that it may be served to.
    pub(crate) fn lowest(&self, host: &str, volume: &str) -> u64 {
        self.state().replica(host, volume).lowest
    }

    /// Whether a host has one.
    #[must_use]
    pub fn is_there(&self, host: &str, volume: &str) -> bool {
        self.state().replicas.contains_key(&(host.to_owned(), volume.to_owned()))
    }

    /// It is removed.
    pub fn remove(&self, host: &str, volume: &str) {
        self.state().replicas.remove(&(host.to_owned(), volume.to_owned()));
    }

    /// Copies a replica that nobody has open.
    pub(crate) fn keep(&self, host: &str, volume: &str, snapshot: &str, at_ms: i64) {
        let content = to_bytes(&self.state().replica(host, volume).blocks);
        self.put_kept(host, volume, snapshot, at_ms, content);
    }

    /// A host has this copy.
    pub(crate) fn put_kept(
        &self,
        host: &str,
        volume: &str,
        snapshot: &str,
        at_ms: i64,
        content: Vec<u8>,
    ) {
        let key = (host.to_owned(), volume.to_owned(), snapshot.to_owned());
        self.state().kept.insert(key, (at_ms, content));
    }

    /// What a copy holds.
    #[must_use]
    pub fn kept(&self, host: &str, volume: &str, snapshot: &str) -> Option<Vec<u8>> {
        let key = (host.to_owned(), volume.to_owned(), snapshot.to_owned());
        self.state().kept.get(&key).map(|(_, content)| content.clone())
    }

    /// A host has it no more.
    pub fn forget_kept(&self, host: &str, volume: &str, snapshot: &str) {
        let key = (host.to_owned(), volume.to_owned(), snapshot.to_owned());
        self.state().kept.remove(&key);
    }

    /// All copies of a host: of which volume and snapshot, when they were made, how large they are.
    #[must_use]
    pub fn all_kept(&self, host: &str) -> Vec<(String, String, i64, u64)> {
        let state = self.state();
        let all = state.kept.iter().filter(|((on, ..), _)| on == host);
        all.map(|((_, volume, snapshot), (at, content))| {
            (volume.clone(), snapshot.clone(), *at, content.len() as u64)
        })
        .collect()
    }

    /// Puts a copy in the place of its replica, if that was open in no run from `run` on.
    pub(crate) fn put_back(
        &self,
        host: &str,
        volume: &str,
        snapshot: &str,
        run: u64,
    ) -> Result<(), String> {
        let mut state = self.state();
        if state.replica(host, volume).lowest >= run {
            return Ok(());
        }
        let key = (host.to_owned(), volume.to_owned(), snapshot.to_owned());
        let kept = state.kept.get(&key).map(|(_, content)| to_blocks(content));
        let blocks = kept.ok_or_else(|| format!("{host} has no copy of {volume}"))?;
        state.ids += 1;
        state.undo(volume, run, &blocks);
        let file = state.ids;
        let replica = state.replica(host, volume);
        (replica.blocks, replica.file, replica.serves) = (blocks, file, None);
        Ok(())
    }

    /// What the disks of a process hold, by name.
    pub(crate) fn seen_by(&self, host: &str, vm: &str) -> Vec<(String, Vec<u8>)> {
        let state = self.state();
        let process = state.processes.get(&(host.to_owned(), vm.to_owned()));
        let open = process.into_iter().flat_map(|(_, disks)| disks).filter(|disk| !disk.shut);
        let volumes = open.map(|disk| disk.volume.clone()).filter_map(|volume| {
            let name = volume.split('.').nth(1)?.to_owned();
            let replica = state.replicas.get(&(host.to_owned(), volume))?;
            Some((name, to_bytes(&replica.blocks)))
        });
        volumes.collect()
    }
}
