//! Disks that come, go and grow while their guest runs (docs/decisions/0025-hot-disks.md).
//!
//! ```text
//!   the spec names a disk that the process lacks ─► it is made ready, beside all else ─► plugged in ─► told (`startedWith`)
//!   the spec has it detached                     ─► its guest lets it go ─► closed, told
//!   the spec has it larger                       ─► grown, told
//!   the same, and it has replicas                ─► parked, its guest stands ─► made ready anew ─► put back, told
//! ```
//!
//! What cannot be done to a process that runs stays as it is until the next start, and `haven vm ls` says so.

use super::{VmTask, disks::AGAIN};
use crate::{
    agent::{
        chain,
        mirrored::served,
        vm_start::{Preparation, StartFailure},
    },
    vm::{
        driver::DiskLaunch,
        hot_disks::{Has, HasDisk, LetGo},
    },
};
use haven_model::{
    Bytes, Name, Snapshot, VmSpec,
    vm::{DISKS, DiskSpec},
    volume::VolumeRef,
};
use haven_store::clock::Mono;
use std::{collections::BTreeSet, sync::Arc, time::Duration};
use tokio::{sync::watch, task::JoinHandle};

/// How often a disk that is made ready is looked at.
const READIES: Duration = Duration::from_millis(50);
/// After so long people are told what is waited for.
const SLOW: Duration = Duration::from_secs(3);
/// How long a guest that stands is waited for when it is to end.
const STANDS: Duration = Duration::from_secs(5);
/// How long a guest is waited for that was asked to let a disk go; one that runs does so within 0.1 s.
const LETS_GO: Duration = Duration::from_millis(400);
/// When a guest that keeps a disk is asked again, and what failed is tried again.
const PAUSE: Duration = Duration::from_secs(2);

/// What a task remembers of the disks that its process has.
#[derive(Default)]
pub(super) struct Hot {
    /// [`haven_model::VmStatus::ports`].
    pub ports: bool,
    /// [`haven_model::VmStatus::disks_change`].
    pub changes: bool,
    /// What the process has was looked at by this daemon.
    known: bool,
    /// Since when its guest stands, as one of its disks is parked, or may be.
    stands: Option<Mono>,
    /// The volume that was closed when its disk was parked, and the hosts that have all that was written: that is to be written.
    closed: Option<(VolumeRef, BTreeSet<Name>)>,
    plugging: Option<Plugging>,
    /// The disk that its guest was asked for and has not let go. It may do so at any time, whatever is wanted by then.
    asked: Option<String>,
    /// What people are told while something is not as it is wanted.
    pub note: String,
    /// Nothing is tried before.
    not_before: Option<Mono>,
}

/// A disk that is made ready.
struct Plugging {
    disk: DiskSpec,
    since: Mono,
    step: watch::Receiver<String>,
    made: JoinHandle<Result<DiskLaunch, StartFailure>>,
}

impl Drop for Plugging {
    fn drop(&mut self) {
        self.made.abort();
    }
}

impl Hot {
    /// Another process begins, with what is wanted of it now.
    pub fn begins(&mut self, ports: bool) {
        *self = Self { ports, known: true, ..Self::default() };
    }

    /// What the process has may have changed by itself.
    pub fn look_again(&mut self) {
        (self.known, self.not_before) = (false, None);
    }

    /// No disk is made ready any more, and nothing of that goes on when this returns: whoever is next makes the same.
    pub async fn makes_nothing_ready(&mut self) {
        if let Some(mut plugging) = self.plugging.take() {
            plugging.made.abort();
            let _ = (&mut plugging.made).await;
        }
    }

    /// A disk is being made ready.
    pub fn is_busy(&self) -> bool {
        self.plugging.is_some() || self.stands()
    }

    /// Its guest stands for its disk's sake, or may do so.
    pub fn stands(&self) -> bool {
        self.stands.is_some()
    }
}

/// What is to be done next to the disks of a process.
#[derive(Debug, PartialEq, Eq)]
enum Change {
    Nothing,
    In(DiskSpec),
    Out(HasDisk),
    Larger(HasDisk, Bytes),
    /// The guest stands until this parked disk is back, with what is wanted of it.
    Back(HasDisk, DiskSpec),
}

/// How a spec names the disks of a process that has these.
fn named(spec: &VmSpec, has: &[HasDisk]) -> String {
    let mut spec = spec.clone();
    for disk in &mut spec.disks {
        let size = has.iter().find(|one| one.name == disk.name.as_str()).map(|one| one.size_bytes);
        disk.detached = size.is_none();
        disk.size = size.map_or(disk.size, Bytes);
    }
    spec.hardware().remove(DISKS).unwrap_or_default()
}

/// The same after one of them has gone.
fn named_without(spec: &VmSpec, has: &Has, gone: &HasDisk) -> String {
    let left: Vec<HasDisk> = has.disks.iter().filter(|one| *one != gone).cloned().collect();
    named(spec, &left)
}

/// The same after one of them was made larger, or has come.
fn named_with(spec: &VmSpec, has: &Has, disk: &HasDisk) -> String {
    let mut disks = has.disks.clone();
    disks.retain(|one| one.name != disk.name);
    disks.push(disk.clone());
    named(spec, &disks)
}

/// What comes next. What a guest shall not have goes before another one takes its port.
fn next(spec: &VmSpec, has: &Has) -> Change {
    let its = |disk: &DiskSpec| has.disks.iter().find(|one| one.name == disk.name.as_str());
    let parked =
        |disk: &DiskSpec| Some((its(disk).filter(|one| one.parked)?.clone(), disk.clone()));
    if let Some((has, disk)) = spec.disks.iter().find_map(parked) {
        return Change::Back(has, disk);
    }
    let unnamed = |has: &HasDisk| spec.disks.iter().all(|disk| disk.name.as_str() != has.name);
    let mut left = has.disks.iter().filter(|disk| !disk.plugged || disk.ported && unnamed(disk));
    if let Some(left) = left.next() {
        return Change::Out(left.clone());
    }
    // Something else of them was changed as well, which waits for the next start.
    if named(spec, &has.disks) != has.named {
        return Change::Nothing;
    }
    let with_port = || spec.disks.iter().filter(|disk| disk.slot.is_some() && has.ports);
    if let Some(gone) = with_port().filter(|disk| disk.detached).find_map(its) {
        return Change::Out(gone.clone());
    }
    if let Some(new) = with_port().find(|disk| !disk.detached && its(disk).is_none()) {
        return Change::In(new.clone());
    }
    let larger = spec.plugged().find_map(|disk| {
        let has = its(disk).filter(|has| has.size_bytes < disk.size.0)?;
        Some(Change::Larger(has.clone(), disk.size))
    });
    larger.unwrap_or(Change::Nothing)
}

impl VmTask {
    /// Gives the process that runs the disks that are wanted by now.
    pub(super) async fn change_disks(&mut self, snapshot: &Snapshot) {
        let Some(object) = snapshot.vms.get(&self.vm) else { return };
        if self.started_with.is_empty() {
            return;
        }
        let same = self.started_with.get(DISKS) == object.spec.hardware().get(DISKS);
        if same && self.hot.known && !self.hot.stands() {
            return self.as_wanted().await;
        }
        // Whether its guest stands is not known before it was looked at.
        let rests = self.hot.known && !self.hot.stands();
        if let Some(busy) = self.busy(snapshot).filter(|_| rests) {
            self.hot.makes_nothing_ready().await;
            self.hot.changes = self.hot.ports && !same;
            if self.hot.changes {
                self.hot.note = format!("its disks are changed once {busy}");
            }
            return;
        }
        let now = self.parts.clock.now();
        if let Some(at) = self.hot.not_before.filter(|at| *at > now) {
            return self.look_again(Duration::from_nanos(at.0 - now.0));
        }
        let has = match self.parts.vms.has(self.vm.as_str()).await {
            Ok(has) => has,
            Err(error) => {
                let why = format!("its disks cannot be told: {}", chain(&error));
                return self.not_changed(&why, AGAIN);
            }
        };
        (self.hot.known, self.hot.ports) = (true, has.ports);
        let parked = has.disks.iter().find(|disk| disk.parked);
        self.hot.stands = parked.and(self.hot.stands.or(Some(now)));
        if has.named.is_empty() {
            // It was started by an older version.
            return self.as_wanted().await;
        }
        // What an earlier daemon did last it may not have told.
        self.started_with.insert(DISKS.to_owned(), has.named.clone());
        let change = next(&object.spec, &has);
        self.hot.changes = change != Change::Nothing;
        if !self.hot.stands() && self.busy(snapshot).is_some() {
            return self.look_again(Duration::ZERO);
        }
        if let Some(parked) = parked.filter(|_| !matches!(change, Change::Back(..))) {
            let why = format!(
                "its guest stands, for its disk `{}` was being made larger and is not named any more: `haven vm reset {}`",
                parked.name, self.vm
            );
            return self.not_changed(&why, PAUSE);
        }
        match change {
            Change::Nothing => self.as_wanted().await,
            Change::In(disk) => self.plug(snapshot, &object.spec, &has, &disk).await,
            Change::Out(disk) => {
                let named = named_without(&object.spec, &has, &disk);
                self.unplug(&disk, named).await;
            }
            Change::Back(disk, wanted) => {
                self.put_back(snapshot, &object.spec, &has, &disk, &wanted).await;
            }
            Change::Larger(disk, _) if disk.mirrored => self.park(snapshot, &disk).await,
            Change::Larger(disk, size) => {
                let larger = HasDisk { size_bytes: size.0, ..disk.clone() };
                let named = named_with(&object.spec, &has, &larger);
                self.grow(&disk, size, named).await;
            }
        }
    }

    /// They are as they are wanted, or as they stay until the next start.
    async fn as_wanted(&mut self) {
        self.hot.makes_nothing_ready().await;
        (self.hot.not_before, self.hot.changes) = (None, false);
        self.hot.note.clear();
    }

    /// What somebody else does with its disks, so that they must not change now.
    fn busy(&self, snapshot: &Snapshot) -> Option<&'static str> {
        let moves = snapshot.placements.get(&self.vm).is_some_and(|p| p.moving_to.is_some());
        if moves || self.is_sent() || self.following.is_some() || self.incoming.is_some() {
            return Some("its move has ended");
        }
        if self.copying.is_some() {
            return Some("they are kept as they are, for a snapshot");
        }
        (self.backup.is_some() || self.unclosed).then_some("its backup has ended")
    }

    async fn grow(&mut self, disk: &HasDisk, size: Bytes, named: String) {
        match self.parts.vms.grow(self.vm.as_str(), disk.place, size.0, &named).await {
            Ok(()) => self.changed(named),
            Err(error) => {
                let why = chain(&error);
                let why = format!("its disk `{}` cannot be made larger: {why}", disk.name);
                self.not_changed(&why, PAUSE);
            }
        }
    }

    fn changed(&mut self, named: String) {
        self.started_with.insert(DISKS.to_owned(), named);
        self.hot.note.clear();
        self.look_again(Duration::ZERO);
    }

    fn not_changed(&mut self, why: &str, pause: Duration) {
        if self.hot.note != why {
            tracing::warn!(vm = %self.vm, why, "its disks are not as they are wanted");
        }
        why.clone_into(&mut self.hot.note);
        self.hot.not_before = Some(self.parts.clock.now().plus(pause));
        self.look_again(pause);
    }

    /// Whether this is the disk that is being made ready.
    fn is_plugging(&self, disk: &DiskSpec) -> bool {
        self.hot.plugging.as_ref().is_some_and(|plugging| plugging.disk == *disk)
    }

    /// What became of the disk that is being made ready; nothing while it is.
    async fn made_ready(&mut self) -> Option<Result<DiskLaunch, StartFailure>> {
        let mut plugging = self.hot.plugging.take()?;
        if !plugging.made.is_finished() {
            if self.parts.clock.now().since(plugging.since) >= SLOW {
                let step = plugging.step.borrow();
                let stands =
                    if self.hot.stands() { ", and its guest stands meanwhile" } else { "" };
                let name = &plugging.disk.name;
                self.hot.note = format!("its disk `{name}` is made ready{stands}: {}", *step);
            }
            self.hot.plugging = Some(plugging);
            self.look_again(READIES);
            return None;
        }
        match (&mut plugging.made).await {
            Ok(made) => Some(made),
            // It was given up.
            Err(_) => {
                self.look_again(READIES);
                None
            }
        }
    }

    async fn plug(&mut self, snapshot: &Snapshot, spec: &VmSpec, has: &Has, disk: &DiskSpec) {
        if !self.is_plugging(disk) {
            self.hot.makes_nothing_ready().await;
            return self.make_disk_ready(snapshot, disk);
        }
        let launch = match self.made_ready().await {
            Some(Ok(launch)) => launch,
            Some(Err(failure)) => return self.not_plugged(&disk.name, &failure.0),
            None => return,
        };
        let there = HasDisk {
            name: launch.name.clone(),
            place: 0,
            size_bytes: launch.size_bytes,
            mirrored: launch.mirror.is_some(),
            ported: true,
            parked: false,
            plugged: true,
        };
        let named = named_with(spec, has, &there);
        // From here on something may be written.
        let begun = self.mirrors.begun();
        self.mirrors.starts();
        let vm = self.vm.as_str();
        let Err(error) = self.parts.vms.plug(vm, &launch, &named).await else {
            return self.changed(named);
        };
        let now = self.parts.vms.has(vm).await;
        if now.is_ok_and(|now| now.disks.iter().all(|one| one.name != launch.name)) {
            self.mirrors.started_not(begun);
        }
        self.not_plugged(&disk.name, &chain(&error));
    }

    /// Why a mirrored disk is not opened anew now: not all that count have all that was written, or could serve another run at once.
    async fn not_served(&self, snapshot: &Snapshot, place: usize) -> Option<String> {
        if let Some(why) = self.replicas_differ().await {
            return Some(why);
        }
        let (_, of) = self.mirrored().await.into_iter().find(|(at, _)| *at == place)?;
        let volume = snapshot.volumes.get(&of)?;
        let silent = self.parts.heard.silent.borrow().clone();
        let serves = |host: &Name| {
            let told = served(snapshot, &of, host, volume.run).is_some();
            told && snapshot.session_open(host) && !silent.contains(host)
        };
        let mut others = volume.counted().filter(|host| **host != self.parts.me);
        let away = others.find(|host| !serves(host))?;
        Some(format!("{away} is not heard, or does not serve its replica"))
    }

    /// Closes a mirrored disk that is to be larger, under its guest, which stands from now on.
    async fn park(&mut self, snapshot: &Snapshot, disk: &HasDisk) {
        self.hot.makes_nothing_ready().await;
        let name = &disk.name;
        if let Some(why) = self.not_served(snapshot, disk.place).await {
            let why =
                format!("its disk `{name}` is made larger once its replicas are whole: {why}");
            return self.not_changed(&why, PAUSE);
        }
        let open = self.replicas_of(disk.place).await;
        let mut silent = self.parts.heard.silent.clone();
        silent.borrow_and_update();
        // Whatever comes of it: until it was looked at, it may stand, and is let run if nothing is parked.
        (self.hot.stands, self.hot.known) = (Some(self.parts.clock.now()), false);
        self.unclosed = true;
        let parked = tokio::select! {
            parked = self.parts.vms.park(self.vm.as_str(), disk.place) => parked,
            // QEMU may wait for a replica there, and answer nobody until that is cut off.
            Ok(()) = silent.changed() => return self.look_again(Duration::ZERO),
        };
        match parked {
            Ok(whole) => {
                self.unclosed = false;
                self.hot.closed = open.filter(|_| whole);
                self.look_again(Duration::ZERO);
            }
            Err(error) => {
                let why = format!("its disk `{name}` cannot be made larger: {}", chain(&error));
                self.not_changed(&why, AGAIN);
            }
        }
    }

    /// Opens a parked disk as it is wanted by now, and lets its guest run on.
    async fn put_back(
        &mut self,
        snapshot: &Snapshot,
        spec: &VmSpec,
        has: &Has,
        disk: &HasDisk,
        wanted: &DiskSpec,
    ) {
        let vm = self.vm.to_string();
        let failed = |why: &str| {
            format!("its disk `{}` cannot be opened again, and its guest stands: {why}", disk.name)
        };
        let mut silent = self.parts.heard.silent.clone();
        silent.borrow_and_update();
        if !self.is_plugging(wanted) {
            self.hot.makes_nothing_ready().await;
            if let Some((of, with)) = self.hot.closed.clone()
                && !self.close_mirror(&of, &with).await
            {
                return self.look_again(READIES);
            }
            self.hot.closed = None;
            // An earlier attempt, or another daemon, may have left something of it open.
            let closed = tokio::select! {
                closed = self.parts.vms.park(&vm, disk.place) => closed,
                Ok(()) = silent.changed() => return self.look_again(Duration::ZERO),
            };
            if let Err(error) = closed {
                return self.not_changed(&failed(&chain(&error)), AGAIN);
            }
            return self.make_disk_ready(snapshot, wanted);
        }
        let launch = match self.made_ready().await {
            Some(Ok(launch)) => launch,
            Some(Err(failure)) => return self.not_changed(&failed(&failure.0), AGAIN),
            None => return,
        };
        let larger = HasDisk { size_bytes: launch.size_bytes, parked: false, ..disk.clone() };
        let named = named_with(spec, has, &larger);
        // From here on something may be written.
        let begun = self.mirrors.begun();
        self.mirrors.starts();
        self.unclosed = true;
        let back = tokio::select! {
            back = self.parts.vms.unpark(&vm, &launch, &named) => back,
            Ok(()) = silent.changed() => return self.look_again(Duration::ZERO),
        };
        match back {
            Ok(()) => {
                (self.hot.stands, self.unclosed) = (None, false);
                self.changed(named);
            }
            Err(error) => {
                let now = self.parts.vms.has(&vm).await;
                let still =
                    |has: Has| has.disks.iter().any(|one| one.parked && one.name == launch.name);
                if now.is_ok_and(still) {
                    self.mirrors.started_not(begun);
                }
                self.not_changed(&failed(&chain(&error)), AGAIN);
            }
        }
    }

    /// Its guest is to end, and stands, so that it does not hear of that: it gets its disk first. True while that is waited for.
    pub(super) async fn stands_on(&mut self, snapshot: &Snapshot) -> bool {
        let now = self.parts.clock.now();
        if self.hot.stands.is_none_or(|since| now.since(since) >= STANDS) {
            return false;
        }
        self.change_disks(snapshot).await;
        self.hot.stands()
    }

    fn not_plugged(&mut self, disk: &Name, why: &str) {
        self.not_changed(&format!("its disk `{disk}` cannot be attached: {why}"), PAUSE);
    }

    /// Makes a disk ready beside all else that this task does: that may take long, and its other disks need this task.
    fn make_disk_ready(&mut self, snapshot: &Snapshot, disk: &DiskSpec) {
        let Some((object, placement)) = self.last.clone() else { return };
        let Some(session) = self.parts.current_session() else { return };
        let (step, steps) = watch::channel(String::new());
        let (parts, vm) = (Arc::clone(&self.parts), self.vm.clone());
        let (networks, begun) = (self.networks.clone(), self.mirrors.begun());
        let (snapshot, of) = (snapshot.clone(), disk.clone());
        let made = tokio::spawn(async move {
            let preparation = Preparation {
                parts,
                vm,
                snapshot: &snapshot,
                object,
                placement,
                session: session.number,
                kvm: false,
                networks,
                incoming: None,
                begun,
            };
            preparation.disk(&of, &step).await
        });
        let since = self.parts.clock.now();
        self.hot.plugging = Some(Plugging { disk: disk.clone(), since, step: steps, made });
        self.look_again(READIES);
    }

    async fn unplug(&mut self, disk: &HasDisk, named: String) {
        self.hot.makes_nothing_ready().await;
        let open = self.replicas_of(disk.place).await;
        // It is waited for once only: its other disks need this task.
        let first = self.hot.asked.replace(disk.name.clone()).is_none_or(|name| name != disk.name);
        let patience = if first { LETS_GO } else { Duration::ZERO };
        let vm = self.vm.as_str();
        match self.parts.vms.unplug(vm, disk.place, &named, patience).await {
            Ok(LetGo::Yes { whole }) => {
                self.hot.asked = None;
                if let Some((of, with)) = open.filter(|_| whole) {
                    self.close_mirror(&of, &with).await;
                }
                self.changed(named);
            }
            Ok(LetGo::NotYet) => {
                let why = format!(
                    "its guest has not let its disk `{}` go yet; it is asked again until it does. One that is just starting does so once it is up, one that hangs when it is reset",
                    disk.name
                );
                self.not_changed(&why, PAUSE);
            }
            Err(error) => {
                let why = format!("its disk `{}` cannot be detached: {}", disk.name, chain(&error));
                self.not_changed(&why, PAUSE);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Change, named, next};
    use crate::vm::hot_disks::{Has, HasDisk};
    use haven_model::{Bytes, Name, VmSpec, vm::DiskSpec};
    use proptest::prelude::*;

    fn disk(name: &str, slot: Option<u8>) -> DiskSpec {
        let (name, pool) = (Name::new(name).unwrap(), Name::new("fast").unwrap());
        DiskSpec { slot, ..DiskSpec::new(name, Bytes::gib(1), pool) }
    }

    fn spec(disks: Vec<DiskSpec>) -> VmSpec {
        let mut spec: VmSpec = serde_json::from_str(r#"{"memory": "128MiB"}"#).unwrap();
        spec.disks = disks;
        spec
    }

    fn plugged(spec: &VmSpec) -> Vec<HasDisk> {
        let disks = spec.plugged().enumerate();
        let has = disks.map(|(place, disk)| HasDisk {
            name: disk.name.to_string(),
            place,
            size_bytes: disk.size.0,
            mirrored: disk.name.as_str().starts_with('m'),
            ported: disk.slot.is_some(),
            parked: false,
            plugged: true,
        });
        has.collect()
    }

    fn started(spec: &VmSpec) -> Has {
        let disks = plugged(spec);
        Has { ports: true, named: named(spec, &disks), disks }
    }

    #[test]
    fn what_has_no_port_stays_as_it_is() {
        let mut now = spec(vec![disk("root", None), disk("data", Some(0))]);
        let has = started(&now);
        assert_eq!(next(&now, &has), Change::Nothing);
        now.disks[0].detached = true;
        assert_eq!(next(&now, &has), Change::Nothing);
        now.disks[1].detached = true;
        assert_eq!(next(&now, &has), Change::Out(has.disks[1].clone()));
        let old = Has { ports: false, ..has };
        assert_eq!(next(&now, &old), Change::Nothing);
        now.disks[1].detached = false;
        now.disks[0].detached = false;
        now.disks.push(disk("new", Some(1)));
        assert_eq!(next(&now, &old), Change::Nothing);
    }

    #[test]
    fn what_was_left_half_way_is_closed_first() {
        let now = spec(vec![disk("root", Some(0)), disk("data", Some(1))]);
        let mut has = started(&now);
        has.disks[1].plugged = false;
        assert_eq!(next(&now, &has), Change::Out(has.disks[1].clone()));
    }

    #[test]
    fn what_was_removed_goes_whatever_else_has_changed() {
        let mut now = spec(vec![disk("root", None), disk("data", Some(1))]);
        let has = started(&now);
        now.disks.remove(1);
        assert_eq!(next(&now, &has), Change::Out(has.disks[1].clone()));
    }

    #[test]
    fn a_change_of_another_kind_waits_for_the_next_start() {
        let mut now = spec(vec![disk("root", Some(0))]);
        let has = started(&now);
        now.disks[0].image = Some(Name::new("other").unwrap());
        now.disks.push(disk("new", Some(1)));
        assert_eq!(next(&now, &has), Change::Nothing);
    }

    fn any_disks() -> impl Strategy<Value = Vec<DiskSpec>> {
        let one = (prop::bool::ANY, prop::bool::ANY, 1u64..4, prop::bool::ANY);
        prop::collection::vec(one, 0..6).prop_map(|disks| {
            let disks = disks.into_iter().enumerate();
            let disks = disks.map(|(i, (ported, detached, gib, mirrored))| {
                let kind = if mirrored { "m" } else { "d" };
                let slot = ported.then(|| u8::try_from(i).unwrap());
                let with = disk(&format!("{kind}{i}"), slot);
                DiskSpec { detached, size: Bytes::gib(gib), ..with }
            });
            disks.collect()
        })
    }

    proptest! {
        /// Whatever is wanted of whatever a process was started with: each step brings it nearer, it comes to an end, and then
        /// all is as wanted but for what has no port; no guest stands.
        #[test]
        fn steps_come_to_an_end_with_what_is_wanted(before in any_disks(), after in any_disks()) {
            // Disks are there before and after, so that only how they are wanted changes.
            let mut wanted = spec(before);
            let mut has = started(&wanted);
            for disk in &mut wanted.disks {
                if let Some(other) = after.iter().find(|other| other.name == disk.name) {
                    disk.detached = other.detached;
                    disk.size = disk.size.max(other.size);
                }
            }
            for step in 0.. {
                prop_assert!(step < 20, "it goes on for ever");
                match next(&wanted, &has) {
                    Change::Nothing => break,
                    Change::In(disk) => {
                        prop_assert!(disk.slot.is_some());
                        has.disks.push(HasDisk {
                            name: disk.name.to_string(),
                            place: 0,
                            size_bytes: disk.size.0,
                            mirrored: disk.name.as_str().starts_with('m'),
                            ported: true,
                            parked: false,
                            plugged: true,
                        });
                    }
                    Change::Out(disk) => has.disks.retain(|one| one.name != disk.name),
                    Change::Larger(disk, size) => {
                        let mut its = has.disks.iter_mut().filter(|one| one.name == disk.name);
                        let its = its.next().unwrap();
                        if disk.mirrored {
                            its.parked = true;
                        } else {
                            its.size_bytes = size.0;
                        }
                    }
                    Change::Back(disk, wanted) => {
                        let mut its = has.disks.iter_mut().filter(|one| one.name == disk.name);
                        let its = its.next().unwrap();
                        (its.parked, its.size_bytes) = (false, wanted.size.0);
                    }
                }
                has.named = named(&wanted, &has.disks);
            }
            for disk in &wanted.disks {
                let its = has.disks.iter().find(|one| one.name == disk.name.as_str());
                if disk.slot.is_some() {
                    prop_assert_eq!(its.is_none(), disk.detached);
                }
                prop_assert!(its.is_none_or(|its| !its.parked));
                if let Some(its) = its.filter(|_| !disk.detached) {
                    prop_assert_eq!(its.size_bytes, disk.size.0);
                }
            }
        }
    }
}
