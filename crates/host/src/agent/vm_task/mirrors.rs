//! The mirrored disks of a VM that runs: a replica that fails is left out once the store says that it counts no more, and is
//! taken in again when it is back.
//!
//! ```text
//!   a replica fails ─► the guest stops with the write in hand ─► noted from here on ─► it counts no more (the store)
//!                                                                  ─► left out ─► the guest goes on
//!   it is served again ─► gets all that is written ─► is copied what it lacks ─► flushed ─► counts again (the store)
//! ```
//!
//! What comes next is decided in `storage/mirrored/steps.rs`; all that this remembers is in QEMU and in the store, so that
//! the next daemon goes on wherever this one was killed.

use super::VmTask;
use crate::{
    agent::{
        chain,
        mirrored::{
            Owner,
            open::{Begun, Opening, Turn},
            served,
        },
        storage::VolumeName,
        vm_start::StartFailure,
    },
    storage::mirrored::steps::{self, Around, Keep},
    vm::{
        driver::VmError,
        mirrors::{Catching, DiskMirror, Linked, Print},
    },
};
use haven_model::{
    Name, Placement, Severity, Snapshot, VmPhase,
    volume::{Volume, VolumeRef},
};
use haven_store::clock::Mono;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};
use tokio::sync::watch;

/// How often the process is asked while a copy goes on.
const COPIES: Duration = Duration::from_millis(200);
/// How soon one that was ended is seen to.
const AT_ONCE: Duration = Duration::from_millis(10);
/// How soon something that failed is tried again.
const AGAIN: Duration = Duration::from_millis(500);
/// How often a guest may be let run on that was stopped for its disk's sake.
const GOES_ON: Duration = Duration::from_secs(1);
/// How soon a replica that could not be taken in is tried again.
const TAKES_IN: Duration = Duration::from_secs(2);
/// The longest such pause; each is twice as long as the one before.
const TAKES_IN_AT_LEAST: Duration = Duration::from_secs(60);
/// How long the disks of a guest that has come may take to open; then it is started anew.
const ARRIVES: Duration = Duration::from_secs(10);
/// How long a replica that is served may not answer meanwhile; then it is left out.
const DEAF: Duration = Duration::from_secs(2);
/// After so many tries people are told.
const TOLD: u32 = 3;
/// How many steps are done in one turn.
const STEPS: usize = 16;

/// What a task remembers of its mirrored disks.
#[derive(Default)]
pub(super) struct Mirrors {
    /// When the guest was let run on last, and how often since it last ran well.
    went_on: Option<(Mono, u32)>,
    /// A disk broke since this was looked at, or this never was.
    pub broke: bool,
    /// Runs that were begun, and in which no process was started yet.
    begun: Begun,
    /// These could not be taken in, or the copy to them broke: how often, and when they are tried again.
    refused: BTreeMap<Print, (u32, Mono)>,
    /// How far its disks are open for a guest that has come and does not run here yet.
    arrives: Option<Arrives>,
}

/// A guest that has come, and its mirrored disks.
struct Arrives {
    at: Mono,
    open: BTreeSet<VolumeRef>,
    /// Which hosts are waited for, since when.
    waits: BTreeMap<VolumeRef, BTreeMap<Name, Mono>>,
    /// Whose replicas do not answer although they are served, since when.
    deaf: BTreeMap<Name, Mono>,
    begun: Begun,
}

impl Arrives {
    fn at(at: Mono) -> Self {
        let (waits, deaf, begun) = (BTreeMap::new(), BTreeMap::new(), Begun::default());
        Self { at, open: BTreeSet::new(), waits, deaf, begun }
    }
}

impl Mirrors {
    /// Nothing is known yet.
    pub fn new() -> Self {
        Self { broke: true, ..Self::default() }
    }

    /// The runs that were begun for nothing so far.
    pub fn begun(&self) -> Begun {
        Arc::clone(&self.begun)
    }

    /// A process is started in them.
    pub fn starts(&mut self) {
        self.begun = Begun::default();
    }

    /// None was after all.
    pub fn started_not(&mut self, begun: Begun) {
        self.begun = begun;
    }

    /// What came to it is gone.
    pub fn ends(&mut self) {
        self.arrives = None;
    }
}

impl VmTask {
    /// The mirrored disks that its process has open, by their places.
    pub(super) async fn mirrored(&self) -> Vec<(usize, VolumeRef)> {
        let disks = self.parts.vms.mirrored(self.vm.as_str()).await;
        let live = self.parts.live.borrow();
        disks.into_iter().filter_map(|(at, volume)| Some((at, its(&live, &volume)?))).collect()
    }

    /// Sees to the replicas of a VM that runs, and lets one run on that was stopped for a disk's sake.
    pub(super) async fn keep_mirrors(&mut self) {
        let disks = self.mirrored().await;
        // What is silent is cut off everywhere before anything else is asked: an answer may wait for it.
        let silent = self.parts.heard.silent.borrow().clone();
        for host in &silent {
            for (place, _) in &disks {
                if let Err(error) = self.parts.vms.cut(self.vm.as_str(), *place, host).await {
                    tracing::debug!(vm = %self.vm, why = chain(&error), "a silent replica cannot be cut off");
                }
            }
        }
        for (place, of) in disks {
            for _ in 0..STEPS {
                let live = Arc::clone(&self.parts.live.borrow());
                match self.keep_mirror(&live, place, &of).await {
                    Ok(Next::Again) => {}
                    Ok(Next::Rest) => break,
                    Ok(Next::End) => return self.shut_out(&of).await,
                    // It is closed for a moment.
                    Err(VmError::NotHere(_)) if self.hot.stands() => {
                        self.look_again(AGAIN);
                        break;
                    }
                    Err(error) => {
                        let why = chain(&error);
                        tracing::warn!(vm = %self.vm, disk = %of.disk, why, "its replicas cannot be seen to");
                        self.look_again(AGAIN);
                        break;
                    }
                }
            }
        }
        if self.mirrors.broke {
            self.see_whether_it_stands().await;
        }
        if self.running.is_some() {
            self.keep_clients().await;
        }
    }

    /// Its process has ended. If all replicas have all that was written, the next one opens them as they are.
    pub(super) async fn close_mirrors(&mut self, epoch: u64) {
        let live = Arc::clone(&self.parts.live.borrow());
        for volume in self.parts.vms.ended_whole(self.vm.as_str(), epoch) {
            let Some(of) = its(&live, &volume) else { continue };
            let Some(volume) = live.volumes.get(&of).map(|volume| Arc::clone(&volume.value)) else {
                continue;
            };
            // It had all open that count: nothing is acknowledged without them.
            let with = volume.counted().filter(|host| **host != self.parts.me).cloned().collect();
            if let Some(record) = steps::closed(&volume, &self.parts.me, &with)
                && !self.put(&live, &of, &record).await
            {
                tracing::warn!(vm = %self.vm, disk = %of.disk, "that its replicas are the same could not be written");
            }
        }
    }

    /// The volume at a place, and the hosts whose replicas its process has open and that have not failed.
    pub(super) async fn replicas_of(&self, place: usize) -> Option<(VolumeRef, BTreeSet<Name>)> {
        let (_, of) = self.mirrored().await.into_iter().find(|(at, _)| *at == place)?;
        let live = Arc::clone(&self.parts.live.borrow());
        let volume = live.volumes.get(&of)?;
        let hosts = hosts_of(&live, volume);
        let disk = self.parts.vms.mirror(self.vm.as_str(), place, &hosts).await.ok()?;
        let well = disk.linked.into_iter().filter(|(_, linked)| !linked.broken && !disk.stopped);
        Some((of, well.map(|(host, _)| host).collect()))
    }

    /// Its process has closed a volume, and all of `with` have what was written. If those are all that count, the next one opens
    /// them as they are. False when that could not be written.
    pub(super) async fn close_mirror(&mut self, of: &VolumeRef, with: &BTreeSet<Name>) -> bool {
        let live = Arc::clone(&self.parts.live.borrow());
        let Some(volume) = live.volumes.get(of) else { return true };
        // One that is brought up to the others does not count, and lacks what is yet to come.
        let with = with.iter().filter(|host| volume.counts(host)).cloned().collect();
        if let Some(record) = steps::closed(volume, &self.parts.me, &with)
            && !self.put(&live, of, &record).await
        {
            tracing::warn!(vm = %self.vm, disk = %of.disk, "that its replicas are the same could not be written");
            return false;
        }
        true
    }

    /// Why its guest may not go over to another host as its mirrored disks are, if so.
    pub(super) async fn replicas_differ(&self) -> Option<String> {
        for (place, of) in self.mirrored().await {
            let live = Arc::clone(&self.parts.live.borrow());
            let Some(volume) = live.volumes.get(&of) else { continue };
            let hosts = hosts_of(&live, volume);
            let why = match self.parts.vms.mirror(self.vm.as_str(), place, &hosts).await {
                Ok(disk) => {
                    let around = self.around(&live, &of, volume, &hosts);
                    steps::unlike(volume, &self.parts.me, &disk, &around)
                }
                Err(error) => Some(format!("its replicas cannot be told ({})", chain(&error))),
            };
            if let Some(why) = why {
                return Some(format!("of its disk `{}`: {why}", of.disk));
            }
        }
        None
    }

    /// Its guest is handed over: its replicas here are closed, so that they can be served to its new host.
    pub(super) async fn let_disks_go(&self) {
        if let Err(error) = self.parts.vms.let_go(self.vm.as_str()).await {
            tracing::warn!(vm = %self.vm, why = chain(&error), "its replicas here stay open, so its new host goes on without them");
        }
    }

    /// Opens the mirrored disks of a guest that has come and that stands still; true when all are open.
    pub(super) async fn open_arrived(&mut self) -> Result<bool, StartFailure> {
        let disks = self.mirrored().await;
        // Of one whose record cannot be read nobody knows whether it is open.
        let has = self.parts.vms.mirrored(self.vm.as_str()).await.len();
        let Some((_, placement)) = self.last.clone() else { return Ok(has == 0) };
        let Some(session) = self.parts.current_session() else { return Ok(has == 0) };
        let now = self.parts.clock.now();
        let since = self.mirrors.arrives.get_or_insert_with(|| Arrives::at(now)).at;
        let mut all = disks.len() == has;
        if !all && now.since(since) >= ARRIVES {
            let why = "the record of one of its disks cannot be read by this host's version of Haven; update this host";
            return Err(StartFailure(why.into()));
        }
        // Each takes its next step, so that they wait for others at the same time.
        for (place, of) in disks {
            if self.mirrors.arrives.as_ref().is_some_and(|arrives| arrives.open.contains(&of)) {
                continue;
            }
            if now.since(since) >= ARRIVES {
                return Err(StartFailure(format!("the disk `{}` does not open", of.disk)));
            }
            all &= self.open_one(place, &of, &placement, session.number).await?;
        }
        if all {
            self.mirrors.arrives = None;
        }
        Ok(all)
    }

    async fn open_one(
        &mut self,
        place: usize,
        of: &VolumeRef,
        placement: &Placement,
        session: u64,
    ) -> Result<bool, StartFailure> {
        let live = Arc::clone(&self.parts.live.borrow());
        let (step, _) = watch::channel(String::new());
        let Some(volume) = live.volumes.get(of) else { return Ok(false) };
        let Some(mut arrives) = self.mirrors.arrives.take() else { return Ok(false) };
        let opening = Opening {
            parts: &self.parts,
            of: of.clone(),
            vm_uid: &volume.vm_uid,
            owner_uid: placement.unix_uid(),
            owner: Owner { epoch: placement.epoch, session },
            step: &step,
            begun: Arc::clone(&arrives.begun),
        };
        let now = self.parts.clock.now();
        let deaf = arrives.deaf.iter().filter(|(_, since)| now.since(**since) >= DEAF);
        let deaf: BTreeSet<Name> = deaf.map(|(host, _)| host.clone()).collect();
        let since = arrives.waits.entry(of.clone()).or_default();
        // A store that does not answer is no reason to be deaf.
        let turn = tokio::time::timeout(GOES_ON, opening.arrive(since, &deaf)).await;
        let opened = match turn {
            Ok(Ok(Turn::Opened(launch))) => match &launch.mirror {
                Some(mirror) => {
                    let opened = self.parts.vms.open_arrived(self.vm.as_str(), place, mirror).await;
                    match opened.map_err(|error| StartFailure::of(&error))? {
                        Ok(()) => true,
                        Err(host) => {
                            arrives.deaf.entry(host).or_insert(now);
                            false
                        }
                    }
                }
                None => false,
            },
            Ok(turn) => {
                turn?;
                false
            }
            Err(_) => false,
        };
        if opened {
            arrives.open.insert(of.clone());
        }
        self.mirrors.arrives = Some(arrives);
        Ok(opened)
    }

    /// A disk broke: its guest may stand still. It goes on as soon as the disk takes what is written.
    async fn see_whether_it_stands(&mut self) {
        match self.parts.vms.is_stopped(self.vm.as_str()).await {
            Ok(false) => {
                self.mirrors.broke = false;
                if self.mirrors.went_on.take().is_some_and(|(_, times)| times >= TOLD) {
                    self.note.clear();
                }
            }
            Ok(true) => {
                if let Err(error) = self.go_on().await {
                    tracing::warn!(vm = %self.vm, why = chain(&error), "it cannot be let run on");
                }
                self.look_again(COPIES);
            }
            Err(_) => self.look_again(AGAIN),
        }
    }

    /// Whether the guest stands with a write in hand that its disk does not take. A reset would forget that write, which some
    /// replicas have and others have not; so it waits.
    pub(super) async fn waits_for_its_disk(&mut self, snapshot: &Snapshot) -> bool {
        if self.mirrored().await.is_empty() {
            return false;
        }
        self.mirrors.broke = true;
        self.keep_mirrors().await;
        if self.running.is_none() {
            return true;
        }
        if !matches!(self.parts.vms.is_stopped(self.vm.as_str()).await, Ok(true)) {
            return false;
        }
        let why = "it is reset once its disk takes what it waits to write: if its pool is full (`haven pool show`), make room";
        self.report(snapshot, VmPhase::Running, why).await;
        self.look_again(GOES_ON);
        true
    }

    /// Lets the guest run on, not too often.
    async fn go_on(&mut self) -> Result<(), VmError> {
        let now = self.parts.clock.now();
        let times = match self.mirrors.went_on {
            Some((last, _)) if now.since(last) < GOES_ON => return Ok(()),
            Some((_, times)) => times + 1,
            None => 1,
        };
        self.mirrors.went_on = Some((now, times));
        if times >= TOLD && self.mirrored().await.is_empty() && self.ended_for_ceph().await {
            return Ok(());
        }
        if times == TOLD {
            self.note = format!(
                "it stands still: its disk on {me} does not take what is written. If its pool is full (`haven pool show`), it goes on by itself once there is room; if the disk of {me} fails (`dmesg`) and its volume is whole elsewhere (`haven volume ls`), `haven host drain {me}` takes it there; of a disk in Ceph `ceph health detail` and `ceph osd blocklist ls` tell more",
                me = self.parts.me
            );
        }
        self.parts.vms.go_on(self.vm.as_str()).await
    }

    /// One step.
    async fn keep_mirror(
        &mut self,
        live: &Snapshot,
        place: usize,
        of: &VolumeRef,
    ) -> Result<Next, VmError> {
        let Some(volume) = live.volumes.get(of).map(|volume| Arc::clone(&volume.value)) else {
            return Ok(Next::Rest);
        };
        // As `steps::keep` says, before its process is asked, which may not answer.
        if volume.shut {
            return Ok(Next::End);
        }
        let vm = self.vm.to_string();
        let hosts = hosts_of(live, &volume);
        let around = self.around(live, of, &volume, &hosts);
        let disk = self.parts.vms.mirror(&vm, place, &hosts).await?;
        let step = steps::keep(&volume, &self.parts.me, &disk, &around);
        if step != Keep::Well {
            tracing::info!(vm, disk = %of.disk, ?step, is = ?disk, "its replicas");
        }
        match step {
            Keep::Well => return Ok(self.rests(&disk)),
            Keep::End => return Ok(Next::End),
            Keep::Cut(hosts) => {
                for host in &hosts {
                    self.parts.vms.cut(&vm, place, host).await?;
                }
            }
            Keep::Write(lost, record) => {
                for host in &lost {
                    self.parts.vms.note(&vm, place, host).await?;
                }
                if !self.put(live, of, &record).await {
                    return Ok(self.waits());
                }
                if lost.is_empty() {
                    return Ok(Next::Again);
                }
                let lost = lost.iter().map(Name::as_str).collect::<Vec<_>>().join(" and ");
                let what = format!("its disk `{}` goes on without its replica on {lost}", of.disk);
                self.tell_of(Severity::Warning, what).await;
            }
            Keep::LeaveOut(host) => {
                self.leave_out(place, &host, &disk).await?;
                // Something was done about it, so it need not wait to be let run on.
                self.mirrors.went_on = None;
            }
            Keep::GoOn => {
                self.mirrors.broke = true;
                self.go_on().await?;
                // Whether that was all shows in a moment.
                self.look_again(COPIES);
                return Ok(Next::Rest);
            }
            Keep::Settle(host) => self.parts.vms.settle(&vm, place, &host).await?,
            Keep::Count(host, record) => {
                self.parts.vms.flush_copy(&vm, place, &host).await?;
                // It is as it was, with all that was copied on its disk.
                let disk = self.parts.vms.mirror(&vm, place, &hosts).await?;
                let around = self.around(live, of, &volume, &hosts);
                let still = steps::keep(&volume, &self.parts.me, &disk, &around);
                if still == Keep::Count(host.clone(), record.clone()) {
                    return Ok(self.count(live, of, &host, &record).await);
                }
            }
            Keep::TakeIn(host) => {
                // For a moment a write succeeds without one of them: what is noted then has all that it lacks.
                for other in volume.counted().filter(|other| **other != self.parts.me) {
                    self.parts.vms.note(&vm, place, other).await?;
                }
                return self.take_in(live, place, of, &volume, &host).await;
            }
        }
        Ok(Next::Again)
    }

    /// Goes on without a replica that counts no more.
    async fn leave_out(
        &mut self,
        place: usize,
        host: &Name,
        disk: &DiskMirror,
    ) -> Result<(), VmError> {
        let vm = self.vm.to_string();
        let broke = |linked: &&Linked| matches!(linked.catching, Catching::Broke(_));
        if let Some(linked) = disk.linked.get(host).filter(broke) {
            self.refuse(linked.print.clone());
        }
        // One that is well was given up for what it holds: what was noted for it is not all that it lacks.
        if disk.linked.get(host).is_some_and(|linked| !linked.broken) {
            self.parts.vms.settle(&vm, place, host).await?;
        }
        self.parts.vms.leave_out(&vm, place, host).await
    }

    /// Its disk was shut to this host, so that it could start elsewhere. If it has not, since this host is heard again, it starts
    /// anew here.
    async fn shut_out(&mut self, of: &VolumeRef) {
        self.kill().await;
        if self.running.is_none() {
            self.tell(format!(
                "its process on {me} was ended: its disk `{}` was shut to it while {me} was not heard",
                of.disk,
                me = self.parts.me
            ))
            .await;
            self.look_again(AT_ONCE);
        }
    }

    async fn count(
        &mut self,
        live: &Snapshot,
        of: &VolumeRef,
        host: &Name,
        record: &Volume,
    ) -> Next {
        if !self.put(live, of, record).await {
            return self.waits();
        }
        self.mirrors.refused.clear();
        let what = format!("its disk `{}` has its replica on {host} again", of.disk);
        self.tell_of(Severity::Info, what).await;
        Next::Again
    }

    fn around(
        &self,
        live: &Snapshot,
        of: &VolumeRef,
        volume: &Volume,
        hosts: &BTreeSet<Name>,
    ) -> Around {
        let now = self.parts.clock.now();
        // One that cannot be taken in is as if it were not served, for a while.
        let refused = |print: &Print| self.mirrors.refused.get(print).is_some_and(|r| now < r.1);
        let at = |host: &Name| {
            let print = served(live, of, host, volume.run)?.print();
            (volume.counts(host) || !refused(&print)).then(|| (host.clone(), print))
        };
        let silent = self.parts.heard.silent.borrow().clone();
        let leaves = self.outgoing.is_some();
        Around { served: hosts.iter().filter_map(at).collect(), silent, leaves }
    }

    /// Nothing is to be done; while something goes on it is looked at again.
    fn rests(&mut self, disk: &DiskMirror) -> Next {
        let now = self.parts.clock.now();
        if let Some(next) = self.mirrors.refused.values().map(|r| r.1).filter(|at| *at > now).min()
        {
            self.look_again(Duration::from_nanos(next.0 - now.0));
        }
        let goes = |catching: &_| matches!(catching, Catching::Goes { .. });
        if disk.linked.values().any(|linked| goes(&linked.catching)) {
            self.look_again(COPIES);
        }
        Next::Rest
    }

    /// The store did not take it: it is tried again soon.
    fn waits(&mut self) -> Next {
        self.look_again(Duration::from_millis(50));
        Next::Rest
    }

    /// Writes the volume's record; true when the store has it and the live copy shows it.
    async fn put(&mut self, live: &Snapshot, of: &VolumeRef, record: &Volume) -> bool {
        let Some(session) = self.parts.current_session() else { return false };
        let placement = live.placements.get(&self.vm).filter(|p| p.host == self.parts.me);
        let Some(placement) = placement else { return false };
        let owner = Owner { epoch: placement.epoch, session: session.number };
        match owner.write(&self.parts, live, of, record).await {
            Ok(Some(revision)) => {
                let mut live = self.parts.live.clone();
                let shown = live.wait_for(|live| live.revision >= revision);
                tokio::time::timeout(Duration::from_secs(1), shown).await.is_ok()
            }
            Ok(None) => false,
            Err(error) => {
                tracing::debug!(vm = %self.vm, %error, "which of its replicas count could not be written");
                false
            }
        }
    }

    async fn take_in(
        &mut self,
        live: &Snapshot,
        place: usize,
        of: &VolumeRef,
        volume: &Volume,
        host: &Name,
    ) -> Result<Next, VmError> {
        let Some(replica) = served(live, of, host, volume.run) else { return Ok(Next::Rest) };
        match self.parts.vms.take_in(self.vm.as_str(), place, &replica).await {
            Ok(()) => Ok(Next::Again),
            Err(error) => {
                tracing::warn!(vm = %self.vm, disk = %of.disk, why = chain(&error), "a replica cannot be taken in");
                self.refuse(replica.print());
                Ok(Next::Again)
            }
        }
    }

    /// It is not taken in again for a while, and longer each time.
    fn refuse(&mut self, print: Print) {
        let now = self.parts.clock.now();
        let times = self.mirrors.refused.get(&print).map_or(0, |(times, _)| *times);
        let pause = (TAKES_IN * 2u32.pow(times.min(5))).min(TAKES_IN_AT_LEAST);
        self.mirrors.refused.insert(print, (times + 1, now.plus(pause)));
    }
}

/// The hosts on which its replicas may be. One that left the cluster is among them as long as the record names it: it is left
/// out once it counts no more, and not before.
fn hosts_of(live: &Snapshot, volume: &Volume) -> BTreeSet<Name> {
    live.hosts.keys().chain(volume.replicas.keys()).cloned().collect()
}

/// A volume of a process, as long as the store's record is of the same.
fn its(live: &Snapshot, volume: &str) -> Option<VolumeRef> {
    let name = VolumeName::parse(volume)?;
    let of = VolumeRef { vm: name.vm, disk: name.disk };
    let record = live.volumes.get(&of)?;
    (record.vm_uid == name.vm_uid).then_some(of)
}

/// Whether there is more to do at once.
enum Next {
    /// Look again.
    Again,
    /// Nothing for now.
    Rest,
    /// Its process can write no more.
    End,
}
