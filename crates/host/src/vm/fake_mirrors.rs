//! Mirrored disks as records, for the simulator: the replicas of all hosts, who serves them to which run, the processes that
//! have them open, and the writes of their guests one by one. A judge outside hears when a guest was told that something was
//! written and it is not there.

mod replicas;

use super::{
    driver::{VmError, VmEvent, VmLaunch},
    fake::{FakeVmDriver, World},
    mirrors::{Catching, DiskMirror, Linked, MirrorLaunch, Mirrors, Print, ReplicaAt},
    qmp::QmpError,
};
use async_trait::async_trait;
use haven_model::Name;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

/// Blocks of a volume.
const BLOCKS: u64 = 4;
/// Between two writes of a guest.
const WRITES: Duration = Duration::from_millis(40);

/// A rule that is left out on purpose, to show that the judge finds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Careless {
    /// A write is acknowledged when one replica lacks it.
    Threshold,
    /// A process goes on by itself without a replica that failed.
    Consent,
}

#[derive(Default)]
struct Replica {
    /// The number of the write that each block holds.
    blocks: BTreeMap<u64, u64>,
    /// Another one when it was made anew.
    file: u64,
    /// The lowest run that it may be served to.
    lowest: u64,
    /// To which run, by which process.
    serves: Option<(u64, String)>,
}

#[derive(Clone)]
struct Link {
    print: Print,
    instance: String,
    broken: bool,
    /// The blocks that are still to be copied; nothing when it was whole when it was opened.
    left: Option<BTreeSet<u64>>,
    copy_broke: bool,
}

/// A write under way.
struct Hand {
    block: u64,
    id: u64,
    has: BTreeSet<Name>,
}

struct Disk {
    place: usize,
    volume: String,
    run: u64,
    links: BTreeMap<Name, Link>,
    /// What was written since, by host, with the machine for whose replica it was noted.
    noted: BTreeMap<Name, (String, BTreeSet<u64>)>,
    hand: Option<Hand>,
    stopped: bool,
    /// Its guest is to come from elsewhere, or went there: it has nothing open.
    shut: bool,
}

#[derive(Default)]
struct State {
    /// By host and volume.
    replicas: BTreeMap<(String, String), Replica>,
    /// By host and VM.
    processes: BTreeMap<(String, String), (u64, Vec<Disk>)>,
    /// Who ended with all on all replicas.
    whole: BTreeMap<(String, String), (u64, Vec<String>)>,
    /// By volume and block, the least write that its guest must find.
    told: BTreeMap<String, BTreeMap<u64, u64>>,
    /// By volume, the hosts whose replicas count, as the store says.
    counted: BTreeMap<String, BTreeSet<String>>,
    /// By volume, the write that a guest waits for while it goes from one host to another.
    carried: BTreeMap<String, Hand>,
    /// The fewest that ever counted of any.
    fewest: Option<usize>,
    ids: u64,
    acknowledged: u64,
    careless: Option<Careless>,
    lost: Vec<String>,
    /// By host, volume and snapshot.
    kept: BTreeMap<(String, String, String), replicas::Copy>,
    /// By volume, what a copy was put in the place of.
    undone: BTreeMap<String, replicas::Undone>,
}

/// The mirrored disks of all hosts.
#[derive(Default)]
pub struct MirroredDisks(Mutex<State>);

/// How one host reaches another: it does, or nothing comes back.
type Reaches<'a> = dyn Fn(&str, &str) -> bool + 'a;

impl State {
    fn replica(&mut self, host: &str, volume: &str) -> &mut Replica {
        self.replicas.entry((host.to_owned(), volume.to_owned())).or_default()
    }

    /// Opens the replicas of others; why it cannot.
    fn link(&mut self, mirror: &MirrorLaunch) -> Result<BTreeMap<Name, Link>, String> {
        let mut links = BTreeMap::new();
        for at in &mirror.others {
            if !self.serves(at.host.as_str(), &mirror.volume, mirror.run, &at.instance) {
                return Err(format!("the replica on {} refuses", at.host));
            }
            let link = Link {
                print: at.print(),
                instance: at.instance.clone(),
                broken: false,
                left: None,
                copy_broke: false,
            };
            links.insert(at.host.clone(), link);
        }
        Ok(links)
    }

    /// A disk that a process opens; why it cannot.
    fn opened(
        &mut self,
        host: &str,
        place: usize,
        mirror: &MirrorLaunch,
        incoming: bool,
    ) -> Result<Disk, String> {
        let mut disk = Disk {
            place,
            volume: mirror.volume.clone(),
            run: mirror.run,
            links: BTreeMap::new(),
            noted: BTreeMap::new(),
            hand: None,
            stopped: false,
            shut: incoming,
        };
        if !incoming {
            if self.replica(host, &mirror.volume).serves.is_some() {
                return Err("Failed to get \"write\" lock".into());
            }
            disk.links = self.link(mirror)?;
        }
        Ok(disk)
    }

    /// A guest finds what is there, and that must not change any more.
    fn found(&mut self, host: &str, vm: &str, volume: &str) {
        if let Some(lacks) = self.lacks(host, volume) {
            self.lost.push(format!("{vm} runs on {host}: {lacks}"));
        }
        let found = self.replica(host, volume).blocks.clone();
        if let Some(id) = self.undone_in(volume, &found) {
            self.lost
                .push(format!("{vm} runs on {host}: {volume} has write {id}, which was undone"));
        }
        // Nobody was told of what is under way.
        let under_way = self.carried.get(volume).map(|hand| hand.id);
        let told = self.told.entry(volume.to_owned()).or_default();
        for (block, id) in found.into_iter().filter(|(_, id)| Some(*id) != under_way) {
            let least = told.entry(block).or_default();
            *least = id.max(*least);
        }
    }

    fn serves(&mut self, host: &str, volume: &str, run: u64, instance: &str) -> bool {
        let serves = &self.replica(host, volume).serves;
        serves.as_ref().is_some_and(|(to, by)| *to == run && by == instance)
    }

    fn put(&mut self, host: &str, volume: &str, block: u64, id: u64) {
        self.replica(host, volume).blocks.insert(block, id);
    }

    /// What a replica lacks of what a guest was told.
    fn lacks(&self, host: &str, volume: &str) -> Option<String> {
        let here = self.holds(host, volume);
        let told = self.told.get(volume)?;
        told.iter().find_map(|(block, least)| {
            let has = here.and_then(|blocks| blocks.get(block)).copied().unwrap_or(0);
            let what = || format!("{volume} on {host} has write {has} in block {block}, and {least} was acknowledged");
            (has < *least).then(what)
        })
    }

    /// One step of a process; true when something broke.
    fn tick(&mut self, host: &str, vm: &str, reaches: &Reaches<'_>) -> bool {
        let key = (host.to_owned(), vm.to_owned());
        let Some((epoch, mut disks)) = self.processes.remove(&key) else { return false };
        let mut broke = false;
        if let Some(shut) = disks.iter().find(|disk| disk.shut) {
            self.lost.push(format!("{vm} runs on {host} and has {} not open", shut.volume));
        }
        for disk in disks.iter_mut().filter(|disk| !disk.stopped) {
            broke |= self.write(host, disk, reaches);
            if disk.hand.is_none() {
                self.copy(host, disk, reaches);
            }
        }
        self.processes.insert(key, (epoch, disks));
        broke
    }

    /// Its guest writes, and waits until all have it.
    fn write(&mut self, host: &str, disk: &mut Disk, reaches: &Reaches<'_>) -> bool {
        if disk.hand.is_none() {
            self.ids += 1;
            let (block, id) = (self.ids % BLOCKS, self.ids);
            disk.hand = Some(Hand { block, id, has: BTreeSet::new() });
        }
        let Some(hand) = &mut disk.hand else { return false };
        let (block, id) = (hand.block, hand.id);
        self.put(host, &disk.volume, block, id);
        disk.noted.values_mut().for_each(|(_, noted)| _ = noted.insert(block));
        for (other, link) in &mut disk.links {
            // Cut off, it fails at once.
            if link.broken || hand.has.contains(other) {
                continue;
            }
            // One that does not answer is waited for.
            if !reaches(host, other.as_str()) {
                continue;
            }
            if self.serves(other.as_str(), &disk.volume, disk.run, &link.instance) {
                self.put(other.as_str(), &disk.volume, block, id);
                link.left.iter_mut().for_each(|left| _ = left.remove(&block));
                hand.has.insert(other.clone());
            } else {
                link.broken = true;
            }
        }
        if self.careless == Some(Careless::Consent) {
            disk.links.retain(|_, link| !link.broken);
        }
        if disk.links.values().any(|link| link.broken) {
            disk.stopped = true;
            return true;
        }
        let lack = disk.links.keys().filter(|host| !hand.has.contains(*host)).count();
        let may_lack = usize::from(self.careless == Some(Careless::Threshold));
        if lack <= may_lack {
            disk.hand = None;
            self.acknowledge(&disk.volume, block, id);
        }
        false
    }

    fn acknowledge(&mut self, volume: &str, block: u64, id: u64) {
        self.acknowledged += 1;
        let told = self.told.entry(volume.to_owned()).or_default().entry(block).or_default();
        *told = id.max(*told);
        for host in self.counted.get(volume).cloned().unwrap_or_default() {
            if let Some(lacks) = self.lacks(&host, volume) {
                self.lost.push(format!("{lacks}, while it counts"));
            }
        }
    }

    /// A replica that was taken in gets one block more.
    fn copy(&mut self, host: &str, disk: &mut Disk, reaches: &Reaches<'_>) {
        for (other, link) in &mut disk.links {
            let Some(block) = link.left.as_ref().and_then(|left| left.first().copied()) else {
                continue;
            };
            if link.broken || link.copy_broke || !reaches(host, other.as_str()) {
                continue;
            }
            if !self.serves(other.as_str(), &disk.volume, disk.run, &link.instance) {
                link.copy_broke = true;
                continue;
            }
            let has = self.replica(host, &disk.volume).blocks.get(&block).copied().unwrap_or(0);
            self.put(other.as_str(), &disk.volume, block, has);
            link.left.iter_mut().for_each(|left| _ = left.remove(&block));
        }
    }
}

impl MirroredDisks {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A rule is left out.
    pub fn set_careless(&self, careless: Careless) {
        self.state().careless = Some(careless);
    }

    /// What went wrong.
    #[must_use]
    pub fn lost(&self) -> Vec<String> {
        self.state().lost.clone()
    }

    /// How many writes were acknowledged.
    #[must_use]
    pub fn acknowledged(&self) -> u64 {
        self.state().acknowledged
    }

    /// The volumes whose names begin so are no more.
    pub fn forget_counted(&self, prefix: &str) {
        self.state().counted.retain(|volume, _| !volume.starts_with(prefix));
    }

    /// The store says whose replicas of a volume count.
    pub fn set_counted(&self, volume: &str, hosts: BTreeSet<String>) {
        let mut state = self.state();
        for host in &hosts {
            if let Some(lacks) = state.lacks(host, volume) {
                state.lost.push(format!("{lacks}, and it is said to count"));
            }
        }
        state.fewest = Some(state.fewest.unwrap_or(usize::MAX).min(hosts.len()));
        state.counted.insert(volume.to_owned(), hosts);
    }

    /// The fewest replicas of any volume that ever counted at once, since there are any.
    #[must_use]
    pub fn fewest_counted(&self) -> Option<usize> {
        self.state().fewest
    }

    /// What each block of a replica holds; the volume by the beginning of its name.
    pub(crate) fn hashes(&self, host: &str, volume: &str) -> Option<Vec<[u8; 32]>> {
        let state = self.state();
        let of = |(on, of): &(String, String)| on == host && of.starts_with(&format!("{volume}."));
        let (_, replica) = state.replicas.iter().find(|(key, _)| of(key))?;
        let hash = |block| {
            let mut hash = [0; 32];
            let id: u64 = replica.blocks.get(&block).copied().unwrap_or(0);
            hash[..8].copy_from_slice(&id.to_be_bytes());
            hash
        };
        Some((0..BLOCKS).map(hash).collect())
    }

    /// A disk forgets what a block of a replica held, and says nothing of it.
    #[cfg(test)]
    pub(crate) fn rot(&self, host: &str, volume: &str, block: u64) {
        let mut state = self.state();
        state.replica(host, volume).blocks.insert(block, u64::MAX);
    }

    /// The replicas on a host.
    #[must_use]
    pub fn on(&self, host: &str) -> Vec<String> {
        let state = self.state();
        state.replicas.keys().filter(|(on, _)| on == host).map(|(_, v)| v.clone()).collect()
    }

    /// All processes that serve replicas on a host end.
    pub fn end_serving(&self, host: &str) {
        let mut state = self.state();
        for ((on, _), replica) in &mut state.replicas {
            if on == host {
                replica.serves = None;
            }
        }
    }

    /// Serves a replica; the process that does, or why not.
    pub(crate) fn serve(&self, host: &str, volume: &str, run: u64) -> Result<String, Option<u64>> {
        let mut state = self.state();
        let mut processes = state.processes.iter();
        if processes.any(|((on, _), (_, disks))| {
            on == host && disks.iter().any(|d| d.volume == volume && !d.shut)
        }) {
            // Its file is locked.
            return Err(None);
        }
        state.ids += 1;
        let new = format!("process-{}", state.ids);
        let replica = state.replica(host, volume);
        if replica.lowest > run {
            return Err(Some(replica.lowest));
        }
        replica.lowest = run;
        let instance = replica.serves.take().map_or(new, |(_, instance)| instance);
        replica.serves = Some((run, instance.clone()));
        Ok(instance)
    }

    /// Serves it to nobody, and to none before this run ever again.
    pub(crate) fn own(&self, host: &str, volume: &str, run: u64) -> Result<(), u64> {
        let mut state = self.state();
        let replica = state.replica(host, volume);
        if replica.lowest > run {
            return Err(replica.lowest);
        }
        replica.lowest = run;
        replica.serves = None;
        Ok(())
    }

    /// To which run it is served, by which process.
    pub(crate) fn served(&self, host: &str, volume: &str) -> Option<(u64, String)> {
        self.state().replica(host, volume).serves.clone()
    }

    /// Ends what serves it.
    pub(crate) fn end_one(&self, host: &str, volume: &str) {
        self.state().replica(host, volume).serves = None;
    }

    /// A process opens its disks; why it cannot.
    fn open(&self, host: &str, launch: &VmLaunch) -> Result<(), String> {
        let mut state = self.state();
        let mut disks = Vec::new();
        for (place, launched) in launch.placed() {
            let Some(mirror) = &launched.mirror else { continue };
            disks.push(state.opened(host, place, mirror, launch.incoming)?);
        }
        if disks.is_empty() {
            return Ok(());
        }
        for disk in disks.iter().filter(|disk| !disk.shut) {
            // It starts anew, and knows of nothing that one before waited for.
            state.carried.remove(&disk.volume);
            state.found(host, &launch.vm, &disk.volume);
        }
        state.whole.remove(&(host.to_owned(), launch.vm.clone()));
        let key = (host.to_owned(), launch.vm.clone());
        state.processes.insert(key, (launch.epoch, disks));
        Ok(())
    }

    /// A process opens another disk, the last of those that it has by now; true when its guest wrote to none until then.
    fn plug(&self, host: &str, launch: &VmLaunch, disk: &str) -> Result<bool, String> {
        let mut state = self.state();
        let mut placed = launch.placed();
        let of = placed.find(|(_, launched)| launched.name == disk);
        let Some((place, launched)) = of else { return Ok(false) };
        let Some(mirror) = &launched.mirror else { return Ok(false) };
        let disk = state.opened(host, place, mirror, false)?;
        state.carried.remove(&disk.volume);
        state.found(host, &launch.vm, &disk.volume);
        let key = (host.to_owned(), launch.vm.clone());
        let first = !state.processes.contains_key(&key);
        state.processes.entry(key).or_insert((launch.epoch, Vec::new())).1.push(disk);
        Ok(first)
    }

    /// A process closes a disk; whether all that it had open have all that was written.
    pub(super) fn unplugged(&self, host: &str, vm: &str, place: usize) -> bool {
        let mut state = self.state();
        let process = state.processes.get_mut(&(host.to_owned(), vm.to_owned()));
        let Some((_, disks)) = process else { return true };
        let Some(at) = disks.iter().position(|disk| disk.place == place) else { return true };
        let disk = disks.remove(at);
        let well = disk.links.values().all(|link| !link.broken);
        well && disk.hand.is_none() && !disk.stopped
    }

    /// Whether a write of a guest that could go on is under way: QEMU waits for it before its guest stops.
    pub(super) fn writes(&self, host: &str, vm: &str) -> bool {
        let state = self.state();
        let process = state.processes.get(&(host.to_owned(), vm.to_owned()));
        let mut disks = process.into_iter().flat_map(|(_, disks)| disks);
        disks.any(|disk| disk.hand.is_some() && !disk.stopped)
    }

    /// Its guest goes over to another host, with the write that it waits for.
    pub(super) fn carry(&self, host: &str, vm: &str) {
        let mut state = self.state();
        let State { processes, carried, .. } = &mut *state;
        let process = processes.get_mut(&(host.to_owned(), vm.to_owned()));
        for disk in process.into_iter().flat_map(|(_, disks)| disks) {
            carried.remove(&disk.volume);
            if let Some(hand) = disk.hand.take() {
                carried.insert(disk.volume.clone(), Hand { has: BTreeSet::new(), ..hand });
            }
        }
    }

    /// Whether a guest has come to a process with a write that it waits for.
    pub(super) fn waits_to_write(&self, host: &str, vm: &str) -> bool {
        let state = self.state();
        let process = state.processes.get(&(host.to_owned(), vm.to_owned()));
        let mut disks = process.into_iter().flat_map(|(_, disks)| disks);
        disks.any(|disk| disk.shut && state.carried.contains_key(&disk.volume))
    }

    /// A process ended.
    pub(super) fn ended(&self, host: &str, vm: &str) {
        self.state().processes.remove(&(host.to_owned(), vm.to_owned()));
    }

    /// Its guest has ended by itself: whether all that it wrote is on all replicas is noted.
    fn close(&self, host: &str, vm: &str, reaches: &Reaches<'_>) {
        let mut state = self.state();
        state.tick(host, vm, reaches);
        let key = (host.to_owned(), vm.to_owned());
        let Some((epoch, disks)) = state.processes.get(&key) else { return };
        let whole = disks.iter().all(|disk| disk.hand.is_none() && !disk.stopped);
        let (epoch, volumes) = (*epoch, disks.iter().map(|disk| disk.volume.clone()).collect());
        if whole {
            state.whole.insert(key, (epoch, volumes));
        }
    }

    /// Changes one disk of a process.
    fn change<T>(
        &self,
        host: &str,
        (vm, place): (&str, usize),
        change: impl FnOnce(&mut Disk) -> T,
    ) -> Option<T> {
        let mut state = self.state();
        let (_, disks) = state.processes.get_mut(&(host.to_owned(), vm.to_owned()))?;
        disks.iter_mut().find(|disk| disk.place == place).map(change)
    }
}

/// Writes as long as the process is there.
async fn write_on(driver: Writer) {
    loop {
        tokio::time::sleep(WRITES).await;
        let Writer { world, host, vm, epoch, copies } = &driver;
        let there = {
            let state = world.mirrors.state();
            state.processes.get(&(host.clone(), vm.clone())).is_some_and(|(now, _)| now == epoch)
        };
        if !there {
            return;
        }
        if world.is_frozen(host) || !world.running().contains_key(&(host.clone(), vm.clone())) {
            continue;
        }
        let reaches = |from: &str, to: &str| copies.reach(from, to) && !world.is_frozen(to);
        let broke = world.mirrors.state().tick(host, vm, &reaches);
        if broke {
            world.tell(host, VmEvent::DiskBroke { vm: vm.clone() });
        }
    }
}

struct Writer {
    world: Arc<World>,
    host: String,
    vm: String,
    epoch: u64,
    copies: Arc<dyn super::fake_migration::Copies>,
}

impl FakeVmDriver {
    /// Opens the mirrored disks of a process that begins; its guest writes to them from then on.
    pub(super) fn open_mirrors(&self, launch: &VmLaunch) -> Result<(), VmError> {
        if !launch.is_mirrored() {
            return Ok(());
        }
        let opened = self.world.mirrors.open(&self.host, launch);
        opened.map_err(|said| VmError::Died { vm: launch.vm.clone(), said })?;
        self.write_mirrors(launch);
        Ok(())
    }

    /// Opens the last disk of a process that runs.
    pub(super) fn plug_mirror(&self, launch: &VmLaunch, disk: &str) -> Result<(), VmError> {
        let plugged = self.world.mirrors.plug(&self.host, launch, disk);
        let first = plugged.map_err(|said| {
            let source = super::qmp::QmpError::Refused { command: "blockdev-add".into(), said };
            VmError::Qmp { vm: launch.vm.clone(), source }
        })?;
        if first {
            self.write_mirrors(launch);
        }
        Ok(())
    }

    /// Its guest writes to its mirrored disks from now on.
    fn write_mirrors(&self, launch: &VmLaunch) {
        let writer = Writer {
            world: Arc::clone(&self.world),
            host: self.host.clone(),
            vm: launch.vm.clone(),
            epoch: launch.epoch,
            copies: Arc::clone(&self.copies),
        };
        tokio::spawn(write_on(writer));
    }

    /// A guest that was asked to end has ended.
    pub(super) fn close_mirrors(&self, vm: &str) {
        let reaches =
            |from: &str, to: &str| self.copies.reach(from, to) && !self.world.is_frozen(to);
        self.world.mirrors.close(&self.host, vm, &reaches);
    }

    async fn of_disk<T>(
        &self,
        vm: &str,
        place: usize,
        change: impl FnOnce(&mut Disk) -> T,
    ) -> Result<T, VmError> {
        self.clock.pass().await;
        if self.world.is_silent(&self.host, vm) {
            return Err(VmError::Qmp { vm: vm.into(), source: QmpError::Closed });
        }
        let changed = self.world.mirrors.change(&self.host, (vm, place), change);
        changed.ok_or_else(|| VmError::NotHere(vm.into()))
    }
}

#[async_trait]
impl Mirrors for FakeVmDriver {
    async fn mirror(
        &self,
        vm: &str,
        place: usize,
        hosts: &BTreeSet<Name>,
    ) -> Result<DiskMirror, VmError> {
        let link = |link: &Link| Linked {
            print: link.print.clone(),
            broken: link.broken,
            catching: match &link.left {
                _ if link.copy_broke => Catching::Broke("simulated".into()),
                None => Catching::Not,
                Some(left) if left.is_empty() => Catching::Done,
                Some(left) => Catching::Goes { total: BLOCKS, done: BLOCKS - left.len() as u64 },
            },
        };
        let read = |disk: &mut Disk| DiskMirror {
            linked: disk
                .links
                .iter()
                .filter(|(host, _)| hosts.contains(*host))
                .map(|(host, of)| (host.clone(), link(of)))
                .collect(),
            stopped: disk.stopped,
        };
        self.of_disk(vm, place, read).await
    }
    async fn cut(&self, vm: &str, place: usize, host: &Name) -> Result<(), VmError> {
        let cut = |disk: &mut Disk| {
            let Some(link) = disk.links.get_mut(host) else { return };
            link.broken = true;
            disk.stopped |= disk.hand.is_some();
        };
        self.of_disk(vm, place, cut).await
    }
    async fn note(&self, vm: &str, place: usize, host: &Name) -> Result<(), VmError> {
        let note = |disk: &mut Disk| {
            let Some(link) = disk.links.get(host) else { return };
            let machine = link.print.machine().to_owned();
            let noted = disk.hand.iter().map(|hand| hand.block).collect();
            disk.noted.entry(host.clone()).or_insert((machine, noted));
        };
        self.of_disk(vm, place, note).await
    }
    async fn leave_out(&self, vm: &str, place: usize, host: &Name) -> Result<(), VmError> {
        self.of_disk(vm, place, |disk| _ = disk.links.remove(host)).await
    }
    async fn take_in(&self, vm: &str, place: usize, at: &ReplicaAt) -> Result<(), VmError> {
        let disk = self.of_disk(vm, place, |disk| (disk.volume.clone(), disk.run)).await?;
        let there = self.copies.reach(&self.host, at.host.as_str())
            && !self.world.is_frozen(at.host.as_str())
            && self.world.mirrors.state().serves(at.host.as_str(), &disk.0, disk.1, &at.instance);
        if !there {
            let what = format!("the replica on {} does not answer", at.host);
            let source = std::io::ErrorKind::ConnectionRefused.into();
            return Err(VmError::System { what, source });
        }
        let take_in = |disk: &mut Disk| {
            let noted = disk.noted.get(&at.host).filter(|(of, _)| of == at.print().machine());
            let left = match noted {
                Some((_, blocks)) => blocks.clone(),
                None => {
                    disk.noted.remove(&at.host);
                    (0..BLOCKS).collect()
                }
            };
            let link = Link {
                print: at.print(),
                instance: at.instance.clone(),
                broken: false,
                left: Some(left),
                copy_broke: false,
            };
            disk.links.insert(at.host.clone(), link);
        };
        self.of_disk(vm, place, take_in).await
    }
    async fn flush_copy(&self, vm: &str, place: usize, _host: &Name) -> Result<(), VmError> {
        self.of_disk(vm, place, |_| ()).await
    }
    async fn settle(&self, vm: &str, place: usize, host: &Name) -> Result<(), VmError> {
        let settle = |disk: &mut Disk| {
            disk.noted.remove(host);
            if let Some(link) = disk.links.get_mut(host) {
                link.left = None;
            }
        };
        self.of_disk(vm, place, settle).await
    }
    async fn go_on(&self, vm: &str) -> Result<(), VmError> {
        self.clock.pass().await;
        let mut state = self.world.mirrors.state();
        let process = state.processes.get_mut(&(self.host.clone(), vm.to_owned()));
        for disk in process.into_iter().flat_map(|(_, disks)| disks) {
            disk.stopped = false;
            // What failed is issued again, to all.
            disk.hand.iter_mut().for_each(|hand| hand.has.clear());
        }
        Ok(())
    }
    async fn mirrored(&self, vm: &str) -> Vec<(usize, String)> {
        let state = self.world.mirrors.state();
        let process = state.processes.get(&(self.host.clone(), vm.to_owned()));
        let disks = process.into_iter().flat_map(|(_, disks)| disks);
        disks.map(|disk| (disk.place, disk.volume.clone())).collect()
    }
    fn ended_whole(&self, vm: &str, epoch: u64) -> Vec<String> {
        let state = self.world.mirrors.state();
        let whole = state.whole.get(&(self.host.clone(), vm.to_owned()));
        whole.filter(|(of, _)| *of == epoch).map(|(_, all)| all.clone()).unwrap_or_default()
    }
    async fn open_arrived(
        &self,
        vm: &str,
        place: usize,
        mirror: &MirrorLaunch,
    ) -> Result<Result<(), Name>, VmError> {
        self.clock.pass().await;
        let there = |at: &&ReplicaAt| {
            let host = at.host.as_str();
            self.copies.reach(&self.host, host) && !self.world.is_frozen(host)
        };
        if let Some(deaf) = mirror.others.iter().find(|at| !there(at)) {
            return Ok(Err(deaf.host.clone()));
        }
        let died = |said: String| VmError::Died { vm: vm.into(), said };
        let mut state = self.world.mirrors.state();
        if state.replica(&self.host, &mirror.volume).serves.is_some() {
            return Err(died("Failed to get \"write\" lock".into()));
        }
        let refuses = |at: &&ReplicaAt| {
            !state.serves(at.host.as_str(), &mirror.volume, mirror.run, &at.instance)
        };
        if let Some(deaf) = mirror.others.iter().find(refuses) {
            return Ok(Err(deaf.host.clone()));
        }
        let links = state.link(mirror).map_err(died)?;
        state.found(&self.host, vm, &mirror.volume);
        let hand = state.carried.remove(&mirror.volume);
        let process = state.processes.get_mut(&(self.host.clone(), vm.to_owned()));
        let disk = process.and_then(|(_, disks)| disks.iter_mut().find(|disk| disk.place == place));
        let disk = disk.ok_or_else(|| VmError::NotHere(vm.into()))?;
        (disk.links, disk.run, disk.hand, disk.shut) = (links, mirror.run, hand, false);
        Ok(Ok(()))
    }
    async fn let_go(&self, vm: &str) -> Result<(), VmError> {
        self.clock.pass().await;
        let mut state = self.world.mirrors.state();
        let process = state.processes.get_mut(&(self.host.clone(), vm.to_owned()));
        for disk in process.into_iter().flat_map(|(_, disks)| disks) {
            disk.shut = true;
            disk.links.clear();
        }
        Ok(())
    }
    async fn is_stopped(&self, vm: &str) -> Result<bool, VmError> {
        self.clock.pass().await;
        let state = self.world.mirrors.state();
        let process = state.processes.get(&(self.host.clone(), vm.to_owned()));
        Ok(process.is_some_and(|(_, disks)| disks.iter().any(|disk| disk.stopped)))
    }
}
