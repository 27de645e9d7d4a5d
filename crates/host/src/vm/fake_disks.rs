//! Disks that only one host has, as records: which hosts have the volume of a VM, and which of them have all that its
//! guest has written. A judge outside sees when a guest runs on one that has not.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Mutex, MutexGuard, PoisonError},
};

/// What the path of such a volume begins with.
pub const LOCAL: &str = "local/";

#[derive(Default)]
struct State {
    /// Host to the volumes that it has.
    volumes: BTreeMap<String, BTreeSet<String>>,
    /// Volume to the hosts on which it holds all that was written; empty as long as nothing was.
    whole: BTreeMap<String, BTreeSet<String>>,
    /// The volumes of a process: (host, VM).
    opened: BTreeMap<(String, String), Vec<String>>,
    /// Whose disks a process writes to instead of its host's: (host, VM) to that host.
    exchanged: BTreeMap<(String, String), String>,
    /// What went wrong, in words.
    lost: Vec<String>,
}

/// The disks of all hosts.
#[derive(Default)]
pub struct LocalDisks(Mutex<State>);

impl LocalDisks {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A host has this volume from now on: an empty one, if it had none.
    pub fn make(&self, host: &str, volume: &str) {
        self.state().volumes.entry(host.to_owned()).or_default().insert(volume.to_owned());
    }

    /// It has it no more.
    pub fn remove(&self, host: &str, volume: &str) {
        let mut state = self.state();
        if let Some(here) = state.volumes.get_mut(host) {
            here.remove(volume);
        }
        if let Some(whole) = state.whole.get_mut(volume) {
            whole.remove(host);
        }
    }

    /// The volumes of a host.
    #[must_use]
    pub fn on(&self, host: &str) -> Vec<String> {
        self.state().volumes.get(host).into_iter().flatten().cloned().collect()
    }

    /// What guests were given disks that lack what they wrote.
    #[must_use]
    pub fn lost(&self) -> Vec<String> {
        self.state().lost.clone()
    }

    /// A process has opened these files.
    pub(super) fn opened<'a>(&self, host: &str, vm: &str, paths: impl Iterator<Item = &'a str>) {
        let local = paths.filter_map(|path| path.strip_prefix(LOCAL)).map(str::to_owned).collect();
        let mut state = self.state();
        let process = (host.to_owned(), vm.to_owned());
        state.exchanged.remove(&process);
        state.opened.insert(process, local);
    }

    /// A process that runs has opened this file, too.
    pub(super) fn plugged(&self, host: &str, vm: &str, path: Option<&str>) {
        let Some(volume) = path.and_then(|path| path.strip_prefix(LOCAL)) else { return };
        let process = (host.to_owned(), vm.to_owned());
        self.state().opened.entry(process).or_default().push(volume.to_owned());
        self.executes(host, vm);
    }

    /// It has closed this file.
    pub(super) fn unplugged(&self, host: &str, vm: &str, path: Option<&str>) {
        let Some(volume) = path.and_then(|path| path.strip_prefix(LOCAL)) else { return };
        if let Some(opened) = self.state().opened.get_mut(&(host.to_owned(), vm.to_owned())) {
            opened.retain(|one| one != volume);
        }
    }

    /// Its guest executes, and writes.
    pub(super) fn executes(&self, host: &str, vm: &str) {
        let mut state = self.state();
        let key = (host.to_owned(), vm.to_owned());
        let at = state.exchanged.get(&key).cloned().unwrap_or_else(|| host.to_owned());
        for volume in state.opened.get(&key).cloned().unwrap_or_default() {
            let there = state.volumes.get(&at).is_some_and(|here| here.contains(&volume));
            let whole = state.whole.get(&volume).is_none_or(|whole| whole.contains(&at));
            if !there || !whole {
                let lost = format!("{vm} runs on {host}, whose {volume} lacks what it has written");
                state.lost.push(lost);
            }
            state.whole.insert(volume, BTreeSet::from([at.clone()]));
        }
    }

    /// A process writes to the disks of another host from now on.
    pub(super) fn exchange(&self, from: &str, to: &str, vm: &str) {
        self.state().exchanged.insert((from.to_owned(), vm.to_owned()), to.to_owned());
    }

    /// All that a stopped guest has written is on another host too.
    pub(super) fn copied(&self, from: &str, to: &str, vm: &str) {
        let mut state = self.state();
        for volume in
            state.opened.get(&(from.to_owned(), vm.to_owned())).cloned().unwrap_or_default()
        {
            let there = state.volumes.get(to).is_some_and(|here| here.contains(&volume));
            let whole = state.whole.get(&volume).is_none_or(|whole| whole.contains(from));
            if there && whole {
                state.whole.entry(volume).or_default().insert(to.to_owned());
            }
        }
    }
}
