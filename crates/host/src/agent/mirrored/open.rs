//! The owner opens a mirrored volume for the process that it is about to start.
//!
//! ```text
//!   its replica counts ─► a new run in the record ─► each other one that counts is served to that run, or counts no more
//!                                                     ─► its own is shut to all others ─► the process
//! ```

use super::{Owner, base, name, pool, served};
use crate::{
    agent::{
        AgentParts,
        storage::{CopyFrom, VolumeName, VolumeWanted},
        vm_start::StartFailure,
    },
    storage::mirrored::steps::{self, Open, Other},
    vm::{driver::DiskLaunch, mirrors::MirrorLaunch},
};
use haven_model::{
    Name, PoolSpec, Snapshot, Versioned,
    volume::{ClonedFrom, ReplicaIs, Volume, VolumeRef},
};
use haven_store::{clock::Mono, seal::Plain};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::sync::watch;

/// How long a host that is heard may leave a replica unserved that it has.
const PATIENCE: Duration = Duration::from_secs(5);
/// The same while a guest stands still that has come from elsewhere.
const ARRIVES: Duration = Duration::from_secs(2);
/// How long one may fail to serve it: the process that had it open before may be about to end.
const FAILS: Duration = Duration::from_secs(3);
/// The pause after a transaction that the store did not take.
const AGAIN: Duration = Duration::from_millis(100);

/// What is opened, for whom.
pub struct Opening<'a> {
    /// What the agent has.
    pub parts: &'a Arc<AgentParts>,
    /// Which volume.
    pub of: VolumeRef,
    /// The uid of its VM.
    pub vm_uid: &'a str,
    /// The unix user of its VM.
    pub owner_uid: u32,
    /// By what this host is the owner.
    pub owner: Owner,
    /// Tells what is waited for.
    pub step: &'a watch::Sender<String>,
    /// The runs that this daemon has begun and in which no process was started yet.
    pub begun: Begun,
}

/// What one step came to.
pub enum Turn {
    /// The record was written, and there is more to do at once.
    Written,
    /// Others are waited for.
    Waits,
    /// Something has changed meanwhile.
    Again,
    /// All that the process needs.
    Opened(Box<DiskLaunch>),
}

/// By volume, the epoch of the owner, and a run that it was about to begin and in which no process was started: what was clean
/// before is so still. Nobody else begins a run under that epoch, so a record that names this run is this daemon's.
pub type Begun = Arc<Mutex<BTreeMap<VolumeRef, (u64, u64)>>>;

fn lock(begun: &Begun) -> MutexGuard<'_, BTreeMap<VolumeRef, (u64, u64)>> {
    begun.lock().unwrap_or_else(PoisonError::into_inner)
}

fn fails(error: &dyn std::error::Error) -> StartFailure {
    StartFailure::of(error)
}

impl Opening<'_> {
    /// Opens it; returns when its process can be started.
    ///
    /// # Errors
    /// A sentence for people.
    pub async fn run(&self) -> Result<DiskLaunch, StartFailure> {
        let mut live = self.parts.live.clone();
        let mut silent = self.parts.heard.silent.clone();
        let mut made = false;
        let mut since: BTreeMap<Name, Mono> = BTreeMap::new();
        loop {
            let now = Arc::clone(&live.borrow_and_update());
            let mut pause = Duration::from_secs(1);
            if let Some(volume) = now.volumes.get(&self.of).filter(|v| v.vm_uid == self.vm_uid) {
                if volume.run == 0 && !made {
                    self.make(&now, volume).await?;
                    made = true;
                }
                let around = self.around(&now, volume, &mut since, PATIENCE);
                let step = steps::open(volume, &self.parts.me, self.begun(), &around);
                let step = self.grown(&now, volume, step);
                match self.turn(&now, volume, step).await? {
                    Turn::Opened(launch) => return Ok(*launch),
                    Turn::Written => {
                        since.clear();
                        continue;
                    }
                    Turn::Waits => {}
                    Turn::Again => pause = AGAIN,
                }
            } else {
                self.say("hosts are chosen for it");
            }
            silent.borrow_and_update();
            tokio::select! {
                _ = live.changed() => {}
                _ = silent.changed() => {}
                () = self.parts.clock.sleep(pause) => {}
            }
        }
    }

    /// A new run begins with the size that is wanted by now, if that is more: each replica grows before it is served to it. A guest
    /// that has come from elsewhere goes on with the disk that it had.
    fn grown(&self, now: &Snapshot, volume: &Volume, step: Open) -> Open {
        let Open::Write(record) = step else { return step };
        let disks = now.vms.get(&self.of.vm).map(|vm| &vm.spec.disks);
        let wanted = disks.and_then(|disks| disks.iter().find(|disk| disk.name == self.of.disk));
        let size = match wanted {
            Some(wanted) if record.run > volume.run => wanted.size.max(record.size),
            _ => record.size,
        };
        Open::Write(Volume { size, ..record })
    }

    fn begun(&self) -> Option<u64> {
        let begun = lock(&self.begun).get(&self.of).copied();
        begun.filter(|(epoch, _)| *epoch == self.owner.epoch).map(|(_, run)| run)
    }

    /// Carries out one step.
    async fn turn(
        &self,
        now: &Snapshot,
        volume: &Versioned<Volume>,
        step: Open,
    ) -> Result<Turn, StartFailure> {
        match step {
            Open::NotHere => Err(self.not_here(volume)),
            Open::Write(record) => {
                let raises = record.run > volume.run;
                if raises {
                    // Only over a replica that is there: the others may not count any more then.
                    self.own(now, volume, record.run).await?;
                    // Before: it may be carried out although nobody hears of it.
                    lock(&self.begun).insert(self.of.clone(), (self.owner.epoch, record.run));
                }
                match self.write(now, &record).await? {
                    true => Ok(Turn::Written),
                    false => Ok(Turn::Again),
                }
            }
            Open::Wait(hosts) => {
                let hosts: Vec<&str> = hosts.iter().map(Name::as_str).collect();
                self.say(&format!("its replica on {}", hosts.join(" and ")));
                Ok(Turn::Waits)
            }
            Open::With(hosts) => {
                let launch = self.launch(now, volume, &hosts).await?;
                Ok(launch.map_or(Turn::Again, |launch| Turn::Opened(Box::new(launch))))
            }
        }
    }

    /// What a process opens that is to take its guest from another host: the replica of this one, which is served to that until
    /// then.
    ///
    /// # Errors
    /// A sentence for people.
    pub async fn arriving(&self) -> Result<DiskLaunch, StartFailure> {
        let now = Arc::clone(&self.parts.live.borrow());
        let volume = self.record(&now)?;
        if !volume.counts(&self.parts.me) {
            return Err(self.not_here(volume));
        }
        let pool = pool(&now, volume).ok_or_else(|| self.no_pool(volume))?;
        let path = self.file(&pool, volume).await?;
        let mirror = MirrorLaunch {
            volume: name(&self.of, volume).to_string(),
            run: volume.run,
            keys: PathBuf::new(),
            copies: pool.copies(),
            others: Vec::new(),
        };
        let luks = self.secret(self.key(volume).await?.as_ref()).await?;
        Ok(DiskLaunch { luks, ..self.disk(volume, path, mirror) })
    }

    /// One step for a guest that has come and that stands still until all is open. `deaf`: whose replicas do not answer although
    /// they are served.
    ///
    /// # Errors
    /// A sentence for people; it can only be started anew.
    pub async fn arrive(
        &self,
        since: &mut BTreeMap<Name, Mono>,
        deaf: &BTreeSet<Name>,
    ) -> Result<Turn, StartFailure> {
        let now = Arc::clone(&self.parts.live.borrow());
        let volume = self.record(&now)?;
        let mut around = self.around(&now, volume, since, ARRIVES);
        let counted = volume.counted().filter(|host| deaf.contains(*host));
        around.extend(counted.map(|host| (host.clone(), Other::Gone)));
        let step = steps::arrive(volume, &self.parts.me, self.begun(), &around);
        let turn = self.turn(&now, volume, step).await?;
        if matches!(turn, Turn::Written) {
            since.clear();
        }
        Ok(turn)
    }

    fn record<'s>(&self, now: &'s Snapshot) -> Result<&'s Versioned<Volume>, StartFailure> {
        let volume = now.volumes.get(&self.of).filter(|volume| volume.vm_uid == self.vm_uid);
        volume.ok_or_else(|| {
            let disk = &self.of.disk;
            StartFailure(format!("it is not recorded on which hosts the disk `{disk}` is"))
        })
    }

    fn say(&self, what: &str) {
        let what = format!("the disk `{}`: {what}", self.of.disk);
        self.step.send_if_modified(|now| std::mem::replace(now, what.clone()) != what);
    }

    fn not_here(&self, volume: &Volume) -> StartFailure {
        let hosts: Vec<&str> = volume.counted().map(Name::as_str).collect();
        StartFailure(format!(
            "the replica of the disk `{}` on {} may lack what its guest was told to be written; {} has all of it (`haven vm migrate` takes the VM there)",
            self.of.disk,
            self.parts.me,
            hosts.join(" and ")
        ))
    }

    /// Makes the replica of this host, with what the volume holds at first.
    async fn make(&self, now: &Snapshot, volume: &Volume) -> Result<(), StartFailure> {
        let Some(pool) = pool(now, volume) else { return Err(self.no_pool(volume)) };
        let key = self.key(volume).await?;
        let wanted = wanted(&self.of, volume, self.owner_uid, true, key);
        let made = self.parts.storage.volume(&pool, &wanted).await;
        made.map(drop).map_err(|error| fails(&error))
    }

    /// The key of a volume that is encrypted; made as long as nobody has opened that.
    async fn key(&self, volume: &Volume) -> Result<Option<Plain>, StartFailure> {
        super::key(self.parts, &self.of, volume).await.map_err(|error| fails(&error))
    }

    /// The file with the key of a volume that is encrypted, for its process.
    async fn secret(&self, key: Option<&Plain>) -> Result<Option<PathBuf>, StartFailure> {
        let Some(key) = key else { return Ok(None) };
        let (vm, disk) = (self.of.vm.as_str(), &self.of.disk);
        let file = self.parts.storage.disk_secret(vm, disk, key, self.owner_uid).await;
        file.map(Some).map_err(|error| fails(&error))
    }

    /// Shuts the replica of this host to all others, and to all runs before this one; its file.
    async fn own(
        &self,
        now: &Snapshot,
        volume: &Volume,
        run: u64,
    ) -> Result<PathBuf, StartFailure> {
        let Some(pool) = pool(now, volume) else { return Err(self.no_pool(volume)) };
        let path = self.file(&pool, volume).await?;
        let name = name(&self.of, volume);
        let base = base(&self.parts.me, volume, &name, &path);
        let name = name.to_string();
        super::serve::old(self.parts, volume, &name, &path).await.map_err(|error| fails(&error))?;
        let owned = self.parts.replicas.own(&name, &path, run, base.as_ref()).await;
        owned.map(|()| path).map_err(|error| fails(&error))
    }

    /// The file of the replica of this host.
    async fn file(&self, pool: &PoolSpec, volume: &Volume) -> Result<PathBuf, StartFailure> {
        let name = name(&self.of, volume);
        let found = self.parts.storage.has_volume(pool, &name, self.owner_uid).await;
        found.map_err(|error| fails(&error))?.ok_or_else(|| {
            StartFailure(format!(
                "the file of the disk `{}` is missing in {} on {} although it counts; if another disk should be mounted there, mount it",
                self.of.disk, pool.path, self.parts.me
            ))
        })
    }

    fn no_pool(&self, volume: &Volume) -> StartFailure {
        StartFailure(format!(
            "the pool `{}` of the disk `{}` does not exist or cannot be read by this host's version of Haven",
            volume.pool, self.of.disk
        ))
    }

    async fn write(&self, now: &Snapshot, record: &Volume) -> Result<bool, StartFailure> {
        let revision = match self.owner.write(self.parts, now, &self.of, record).await {
            Ok(Some(revision)) => revision,
            Ok(None) => return Ok(false),
            Err(error) => {
                tracing::debug!(volume = %self.of, %error, "its record could not be written");
                return Ok(false);
            }
        };
        let mut live = self.parts.live.clone();
        let shows = |live: &Arc<Snapshot>| live.revision >= revision;
        let ended = |_| StartFailure("this host's daemon ends".into());
        live.wait_for(shows).await.map(drop).map_err(ended)?;
        Ok(true)
    }

    /// How the other replicas that count are, as far as this host can tell.
    fn around(
        &self,
        now: &Snapshot,
        volume: &Volume,
        since: &mut BTreeMap<Name, Mono>,
        patience: Duration,
    ) -> BTreeMap<Name, Other> {
        let silent = self.parts.heard.silent.borrow().clone();
        let clock = self.parts.clock.now();
        let mut around = BTreeMap::new();
        for host in volume.counted().filter(|host| **host != self.parts.me) {
            let waited = clock.since(*since.entry(host.clone()).or_insert(clock));
            let told = now.replica_told(&self.of, host);
            let gone = !now.session_open(host) || silent.contains(host);
            let is = match told {
                _ if gone => Other::Gone,
                Some(ReplicaIs::Served { run, .. }) if *run == volume.run => Other::Serves(*run),
                Some(ReplicaIs::Failed { .. }) if waited >= FAILS.min(patience) => Other::Gone,
                // One that is being made takes its time.
                _ if waited >= patience && volume.run > 0 => Other::Gone,
                _ => continue,
            };
            around.insert(host.clone(), is);
        }
        around
    }

    /// All that its process needs; nothing when a replica is not served any more.
    async fn launch(
        &self,
        now: &Snapshot,
        volume: &Versioned<Volume>,
        hosts: &BTreeSet<Name>,
    ) -> Result<Option<DiskLaunch>, StartFailure> {
        let others: Option<Vec<_>> =
            hosts.iter().map(|host| served(now, &self.of, host, volume.run)).collect();
        let Some(others) = others else { return Ok(None) };
        let Some(pool) = pool(now, volume) else { return Err(self.no_pool(volume)) };
        let plain = self.key(volume).await?;
        let path = self.own(now, volume, volume.run).await?;
        let (of, size) = (name(&self.of, volume), volume.size.0);
        let grown = self.parts.storage.grow(&pool, &of, size, plain.as_ref()).await;
        grown.map_err(|error| fails(&error))?;
        let volume_name = name(&self.of, volume).to_string();
        let Some(secrets) = &self.parts.secrets else {
            return Err(StartFailure(
                "this host cannot derive the cluster's key, so no replica can be opened; look at `haven host ls`".into(),
            ));
        };
        let key = secrets.volume_key(&volume_name, volume.run).map_err(|error| fails(&error))?;
        let (vm, disk) = (self.of.vm.as_str(), &self.of.disk);
        let keys = self.parts.storage.volume_keys(vm, disk, &key, self.owner_uid).await;
        let mirror = MirrorLaunch {
            volume: volume_name,
            run: volume.run,
            keys: keys.map_err(|error| fails(&error))?,
            copies: pool.copies(),
            others,
        };
        let luks = self.secret(plain.as_ref()).await?;
        Ok(Some(DiskLaunch { luks, ..self.disk(volume, path, mirror) }))
    }

    fn disk(&self, volume: &Volume, path: PathBuf, mirror: MirrorLaunch) -> DiskLaunch {
        DiskLaunch {
            name: self.of.disk.to_string(),
            path,
            format: "raw".into(),
            read_only: false,
            size_bytes: volume.size.0,
            arrives: false,
            mirror: Some(mirror),
            rbd: None,
            luks: None,
            filer: None,
            slot: None,
            parked: false,
        }
    }
}

/// The file of a replica; with its first content, or empty when it is to be copied to. Then what is copied to it has all that
/// makes it encrypted, and it is as long as that.
pub(super) fn wanted(
    of: &VolumeRef,
    volume: &Volume,
    owner_uid: u32,
    whole: bool,
    key: Option<Plain>,
) -> VolumeWanted {
    let first = volume.first.as_ref().filter(|_| whole);
    let cloned = volume.cloned.as_deref().filter(|_| whole);
    let copy_from = |from: &ClonedFrom| {
        let VolumeRef { vm, disk } = from.volume.clone();
        let name = VolumeName { vm, disk, vm_uid: from.vm_uid.clone() };
        CopyFrom { name, tag: from.copy.clone() }
    };
    VolumeWanted {
        name: name(of, volume),
        size_bytes: if key.is_some() { volume.size.0 } else { volume.stored_bytes() },
        key,
        image: first.map(|first| (first.file.clone(), first.format.clone())),
        backup: volume.restored.as_deref().filter(|_| whole).cloned(),
        copy: cloned.map(copy_from),
        progress: Default::default(),
        owner_uid,
    }
}
