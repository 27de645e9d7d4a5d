//! Random interleavings of owners, replicas, cuts, crashes and power cuts, with the steps of [`super::steps`] as the only rules.
//!
//! More is allowed to go wrong than the product lets: an owner may be taken over while its process lives and writes, as the
//! proof `storage-fenced` does. What was sent is delivered in any order, also after its sender has died.

use super::steps::{self, Open, Other, Serve};
use haven_model::{
    Bytes, Name,
    volume::{ReplicaState, Volume},
};
use std::collections::{BTreeMap, BTreeSet};

const HOSTS: usize = 3;
const BLOCKS: u64 = 4;

/// Numbers that a seed decides (splitmix64).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % limit
    }

    fn of<T: Clone>(&mut self, all: &[T]) -> Option<T> {
        let limit = u64::try_from(all.len()).unwrap();
        (limit > 0).then(|| all[usize::try_from(self.below(limit)).unwrap()].clone())
    }
}

/// What is left out on purpose, to show that it is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Broken {
    Nothing,
    /// A write is acknowledged when one replica lacks it.
    Threshold,
    /// An owner goes on without replicas before the store says so.
    Consent,
    /// A replica that is served to a newer run still takes what older ones send.
    OldExports,
    /// What a process had under way when it ended is taken to be the same everywhere.
    Unclean,
    /// An owner writes the record although it has lost its place.
    Comparison,
    /// A replica that comes back counts before it has all.
    Early,
    /// A flush is answered before it is on all disks.
    Flush,
    /// A run that is nobody's is taken for one that this daemon has begun.
    Nobodys,
    /// A replica is served as it was, although the volume holds something else by now.
    NotBack,
    /// What a volume was made to hold is put in the place of replicas that were open since.
    BackAgain,
}

#[derive(Default)]
struct Host {
    up: bool,
    /// The write that each block holds.
    disk: BTreeMap<u64, u64>,
    /// What a power cut may take: the blocks that were written since they were flushed, and what they held then.
    cached: Vec<(u64, Option<u64>)>,
    /// On the disk.
    lowest: u64,
    serves: Option<u64>,
    /// Changes when all that were connected are so no more.
    connections: u64,
    /// What it last saw of the store: owner, epoch and record.
    saw: Option<(usize, u64, Volume)>,
    /// Under which epoch, and which run.
    begun: Option<(u64, u64)>,
}

/// A write under way.
#[derive(Clone)]
struct Write {
    id: u64,
    block: u64,
    has: BTreeSet<usize>,
}

/// A process that has the volume open, or the remains of one in the wires.
#[derive(Clone)]
struct Process {
    host: usize,
    epoch: u64,
    run: u64,
    /// To which others, by which connection.
    with: BTreeMap<usize, u64>,
    /// A replica that comes back, by which connection, and the blocks that it has got. It gets all writes, and none waits for
    /// it to succeed.
    joins: Option<(usize, u64, BTreeSet<u64>)>,
    broken: BTreeSet<usize>,
    paused: bool,
    writes: Vec<Write>,
    /// What it has acknowledged and not flushed.
    unflushed: BTreeMap<u64, u64>,
    alive: bool,
}

struct World {
    random: Random,
    broken: Broken,
    /// Power cuts take what was not flushed.
    caches: bool,
    hosts: Vec<Host>,
    cut: BTreeSet<(usize, usize)>,
    /// Hosts that do not reach the store.
    alone: BTreeSet<usize>,
    volume: Volume,
    owner: usize,
    epoch: u64,
    processes: Vec<Process>,
    /// What the guest may rely on: by block, the least write that it must find.
    told: BTreeMap<u64, u64>,
    flushed: BTreeMap<u64, u64>,
    ids: u64,
    opened: u64,
    told_often: u64,
    /// A snapshot: what it shows, and who has a copy of it.
    kept: Option<(BTreeMap<u64, u64>, BTreeSet<usize>)>,
    /// What the volume was made to hold the last time, the run from which on it does, and the last write before that.
    back: Option<(BTreeMap<u64, u64>, u64, u64)>,
    reverted: u64,
    violation: Option<String>,
}

fn name(host: usize) -> Name {
    Name::new(format!("host{}", host + 1)).unwrap()
}

fn number(name: &Name) -> usize {
    name.as_str().trim_start_matches("host").parse::<usize>().unwrap() - 1
}

impl World {
    fn new(seed: u64, broken: Broken, caches: bool) -> Self {
        let hosts = (0..HOSTS).map(|_| Host { up: true, ..Host::default() });
        let replicas = (0..HOSTS).map(|host| (name(host), ReplicaState::Counted)).collect();
        Self {
            random: Random(seed),
            broken,
            caches,
            hosts: hosts.collect(),
            cut: BTreeSet::new(),
            alone: BTreeSet::new(),
            volume: Volume {
                replicas,
                ..Volume::new("u1".into(), Name::new("pool").unwrap(), Bytes(1 << 20), [])
            },
            owner: 0,
            epoch: 1,
            processes: Vec::new(),
            told: BTreeMap::new(),
            flushed: BTreeMap::new(),
            ids: 0,
            opened: 0,
            told_often: 0,
            kept: None,
            back: None,
            reverted: 0,
            violation: None,
        }
    }

    fn host(&mut self) -> usize {
        usize::try_from(self.random.below(HOSTS as u64)).unwrap()
    }

    fn reach(&self, a: usize, b: usize) -> bool {
        let pair = (a.min(b), a.max(b));
        self.hosts[a].up && self.hosts[b].up && !self.cut.contains(&pair)
    }

    fn sees_store(&self, host: usize) -> bool {
        self.hosts[host].up && !self.alone.contains(&host)
    }

    /// Whether who is at `host` under `epoch` may write the record.
    fn owns(&self, host: usize, epoch: u64) -> bool {
        let stands = (self.owner, self.epoch) == (host, epoch);
        self.sees_store(host) && (stands || self.broken == Broken::Comparison)
    }

    fn accuse(&mut self, what: String) {
        self.violation.get_or_insert(what);
    }

    /// A write reaches a disk.
    fn apply(&mut self, host: usize, write: &Write, run: u64) {
        let newest = self.processes.iter().filter(|p| p.run == self.opened);
        let counts =
            newest.filter(|p| p.run > run).any(|p| p.host == host || p.with.contains_key(&host));
        if counts {
            let what =
                format!("a write of run {run} reached host{} in run {}", host + 1, self.opened);
            self.accuse(what);
        }
        let before = self.hosts[host].disk.insert(write.block, write.id);
        self.hosts[host].cached.push((write.block, before));
    }

    /// One that has the volume open issues a write.
    fn write(&mut self) {
        let all: Vec<usize> = (0..self.processes.len())
            .filter(|p| self.processes[*p].alive && !self.processes[*p].paused)
            .collect();
        let Some(at) = self.random.of(&all) else { return };
        let block = self.random.below(BLOCKS);
        if self.processes[at].writes.iter().any(|write| write.block == block) {
            return;
        }
        self.ids += 1;
        let write = Write { id: self.ids, block, has: BTreeSet::new() };
        self.processes[at].writes.push(write);
    }

    /// A write under way comes to one of those for whom it is.
    fn deliver(&mut self) {
        let all: Vec<usize> =
            (0..self.processes.len()).filter(|p| !self.processes[*p].writes.is_empty()).collect();
        let Some(at) = self.random.of(&all) else { return };
        let process = self.processes[at].clone();
        let which = self.random.below(process.writes.len() as u64);
        let which = usize::try_from(which).unwrap();
        let write = process.writes[which].clone();
        let mut to: Vec<usize> = process.with.keys().copied().collect();
        to.extend(process.joins.iter().map(|(host, ..)| *host));
        // The remains of a process are what was sent to others.
        if process.alive {
            to.push(process.host);
        }
        to.retain(|host| !write.has.contains(host));
        let Some(host) = self.random.of(&to) else { return };
        if host != process.host {
            let there = self.reach(process.host, host) || !process.alive && self.hosts[host].up;
            let joins = process.joins.as_ref().filter(|(joins, ..)| *joins == host);
            let connection = joins.map(|(_, by, _)| *by).or(process.with.get(&host).copied());
            if connection != Some(self.hosts[host].connections) {
                if joins.is_some() {
                    self.processes[at].joins = None;
                    self.acknowledge(at);
                    return;
                }
                self.processes[at].broken.insert(host);
                self.processes[at].paused = true;
                return;
            }
            if !there {
                return;
            }
        }
        self.apply(host, &write, process.run);
        self.processes[at].writes[which].has.insert(host);
        self.acknowledge(at);
    }

    /// What all have is acknowledged.
    fn acknowledge(&mut self, at: usize) {
        let process = &self.processes[at];
        if !process.alive || process.paused {
            return;
        }
        let wants = process.with.len() + 1;
        let enough = if self.broken == Broken::Threshold && wants > 1 { wants - 1 } else { wants };
        let host = process.host;
        let joins = process.joins.as_ref().map(|(host, ..)| *host);
        // One that joins is waited for as long as it is there, and is none of those that must have it.
        let with = process.with.clone();
        let whole = |write: &Write| {
            let have = write.has.iter().filter(|has| **has == host || with.contains_key(*has));
            joins.is_none_or(|joins| write.has.contains(&joins))
                && have.count() >= enough
                && write.has.contains(&host)
        };
        let (done, left) = process.writes.clone().into_iter().partition::<Vec<_>, _>(whole);
        self.processes[at].writes = left;
        // Whoever still runs after the disk was made what it was writes to what nobody will read.
        let is_over = self.back.as_ref().is_some_and(|(_, run, _)| self.processes[at].run < *run);
        for write in done.into_iter().filter(|_| !is_over) {
            // What is acknowledged is on all that count. An owner that was taken over may still hear that the last one
            // has it: then those that count now had it before they were shut.
            let lacks = |of: &&Name| {
                let has = self.hosts[number(of)].disk.get(&write.block).copied();
                has.unwrap_or(0) < write.id
            };
            // What one had and its power took before it was flushed is no loss.
            let lacking = self.volume.counted().find(lacks).filter(|_| !self.caches).cloned();
            if self.volume.counted().next().is_none() || lacking.is_some() {
                let what = format!(
                    "host{} acknowledges write {} and {lacking:?} lacks it; these count: {:?}",
                    host + 1,
                    write.id,
                    self.volume.counted().collect::<Vec<_>>()
                );
                self.accuse(what);
            }
            let told = self.told.entry(write.block).or_default();
            *told = write.id.max(*told);
            self.processes[at].unflushed.insert(write.block, write.id);
            self.told_often += 1;
        }
    }

    fn flush(&mut self) {
        let all: Vec<usize> = (0..self.processes.len())
            .filter(|p| self.processes[*p].alive && !self.processes[*p].paused)
            .collect();
        let Some(at) = self.random.of(&all) else { return };
        let process = self.processes[at].clone();
        for (host, connection) in &process.with {
            if self.hosts[*host].connections != *connection || !self.reach(process.host, *host) {
                self.processes[at].broken.insert(*host);
                self.processes[at].paused = true;
            }
        }
        if !self.processes[at].paused {
            self.brought_to_disks(at);
        }
    }

    fn brought_to_disks(&mut self, at: usize) {
        let process = &mut self.processes[at];
        let (with, unflushed) = (process.with.clone(), std::mem::take(&mut process.unflushed));
        let joins = self.processes[at].joins.as_ref().map(|(host, ..)| *host);
        for host in with.keys().copied().chain([self.processes[at].host]).chain(joins) {
            if self.broken != Broken::Flush || host == self.processes[at].host {
                self.hosts[host].cached.clear();
            }
        }
        let is_over = self.back.as_ref().is_some_and(|(_, run, _)| self.processes[at].run < *run);
        for (block, id) in unflushed.into_iter().filter(|_| !is_over) {
            let least = self.flushed.entry(block).or_default();
            *least = id.max(*least);
        }
    }

    /// Silence is cut, and whoever broke away is taken out.
    fn degrade(&mut self) {
        for at in 0..self.processes.len() {
            let process = self.processes[at].clone();
            if !process.alive {
                continue;
            }
            for host in process.with.keys() {
                if !self.reach(process.host, *host) {
                    self.processes[at].broken.insert(*host);
                    self.processes[at].paused = true;
                }
            }
            let process = self.processes[at].clone();
            if !process.paused {
                continue;
            }
            let broken: BTreeSet<Name> = process.broken.iter().map(|host| name(*host)).collect();
            if self.broken != Broken::Consent {
                if !self.owns(process.host, process.epoch) {
                    continue;
                }
                if self.volume.shut {
                    self.processes[at].alive = false;
                    continue;
                }
                self.volume = steps::degraded(&self.volume, &broken);
            }
            let going = &mut self.processes[at];
            going.joins = None;
            going.with.retain(|host, _| !process.broken.contains(host));
            going.broken.clear();
            going.paused = false;
            // What failed is issued again, to who is left.
            going.writes.iter_mut().for_each(|write| write.has.clear());
        }
    }

    /// Who is to be the owner is decided anew, whatever the one before does.
    fn take_over(&mut self) {
        let host = self.host();
        if self.random.below(3) == 0 {
            return self.shut();
        }
        if self.sees_store(host) && self.volume.counts(&name(host)) {
            (self.owner, self.epoch) = (host, self.epoch + 1);
        }
    }

    /// The plan shuts the volume to whatever has it open, and decides later who is to have it.
    fn shut(&mut self) {
        if let Some(next) = self.volume.shut_out() {
            self.volume = next;
        }
    }

    /// A host looks at the store, and does for its replica what that says.
    fn serve(&mut self) {
        let host = self.host();
        // What it knows of the store may be old.
        if self.sees_store(host) && self.random.below(2) == 0 {
            self.hosts[host].saw = Some((self.owner, self.epoch, self.volume.clone()));
        }
        if !self.hosts[host].up {
            return;
        }
        let Some((owner, _, seen)) = self.hosts[host].saw.clone() else { return };
        let (may, serves) = match steps::serve(&seen, &name(host), &name(owner)) {
            Serve::To(run) => (run, Some(run)),
            Serve::Own(run) => (run, None),
        };
        let here = &self.hosts[host];
        if may < here.lowest || may == here.lowest && here.serves == serves {
            return;
        }
        // Its own process has the file open, and ends first.
        if serves.is_some() {
            self.end(host);
        }
        if serves.is_none() || self.broken != Broken::NotBack {
            self.put_back(host, &seen);
        }
        let here = &mut self.hosts[host];
        here.lowest = may;
        here.serves = serves;
        if self.broken != Broken::OldExports {
            here.connections += 1;
        }
    }

    /// The processes on a host end at once; what they had sent is in the wires.
    fn end(&mut self, host: usize) {
        for process in &mut self.processes {
            if process.host == host {
                process.alive = false;
            }
        }
    }

    /// The owner goes one step on towards its process.
    fn open(&mut self) {
        let host = if self.random.below(2) == 0 { self.owner } else { self.host() };
        let Some((owner, epoch, _)) = self.hosts[host].saw else { return };
        let here = &self.hosts[host];
        let runs = self.processes.iter().any(|p| p.alive && p.host == host);
        if owner != host || !here.up || here.serves.is_some() || runs {
            return;
        }
        let others = (0..HOSTS).filter(|other| *other != host).filter_map(|other| {
            let gone = !self.reach(host, other);
            let serves = self.hosts[other].serves.map(Other::Serves);
            Some((name(other), if gone { Other::Gone } else { serves? }))
        });
        let others: BTreeMap<Name, Other> = others.collect();
        let begun = here.begun.filter(|(under, _)| *under == epoch).map(|(_, run)| run);
        let mut seen = self.volume.clone();
        seen.clean |= self.broken == Broken::Unclean;
        seen.shut &= self.broken != Broken::Nobodys;
        match steps::open(&seen, &name(host), begun, &others) {
            Open::NotHere | Open::Wait(_) => {}
            Open::Write(next) => {
                // Its own replica is shut first, whether or not the word gets there.
                if next.run > self.volume.run {
                    let volume = self.volume.clone();
                    self.put_back(host, &volume);
                    self.hosts[host].lowest = self.hosts[host].lowest.max(next.run);
                }
                if self.owns(host, epoch) && self.random.below(10) > 0 {
                    self.hosts[host].begun = Some((epoch, next.run));
                    // Somebody else may have written it meanwhile: the plan, say.
                    match self.random.below(8) {
                        0 => self.shut(),
                        _ => self.volume = next,
                    }
                }
            }
            Open::With(with) => {
                // Nothing is opened by a word that is old.
                if !self.owns(host, epoch) {
                    return;
                }
                let with: BTreeMap<usize, u64> = with
                    .iter()
                    .map(number)
                    .map(|other| (other, self.hosts[other].connections))
                    .collect();
                self.hosts[host].begun = None;
                let volume = self.volume.clone();
                self.put_back(host, &volume);
                // Its own replica is shut to earlier runs as others' are.
                self.hosts[host].lowest = self.volume.run;
                self.begin(host, epoch, with);
            }
        }
    }

    /// A host puts its copy of what the volume holds from a run on in the place of its replica, unless that was open since.
    fn put_back(&mut self, host: usize, seen: &Volume) {
        let Some(based) = seen.based(&name(host)) else { return };
        let since = self.hosts[host].lowest >= based.run && self.broken != Broken::BackAgain;
        let Some((holds, run, _)) = &self.back else { return };
        // One of before is over by now, and what it writes is not counted.
        if since || based.run != *run {
            return;
        }
        let here = &mut self.hosts[host];
        here.disk.clone_from(holds);
        here.cached.clear();
    }

    /// The owner keeps what its replica holds, others get a copy, or the volume is made to hold what was kept.
    fn snapshot(&mut self) {
        let host = self.owner;
        let counts = self.volume.counts(&name(host)) && self.volume.run > 0;
        if self.kept.is_none() || self.random.below(4) == 0 {
            // A process that is not open yet has not put back what it is to hold.
            let whole =
                self.processes.iter().any(|p| p.alive && p.host == host && p.run == self.opened);
            if counts && whole {
                self.kept = Some((self.hosts[host].disk.clone(), BTreeSet::from([host])));
            }
            return;
        }
        let another = self.host();
        let Some((holds, copies)) = &mut self.kept else { return };
        if self.random.below(2) == 0 {
            copies.insert(another);
            return;
        }
        let (holds, copies) = (holds.clone(), copies.iter().map(|host| name(*host)));
        let copies: Vec<Name> = copies.collect();
        // Its VM is stopped first.
        self.end(host);
        let Some(next) = steps::reverted(&self.volume, &name(host), "s", &copies) else { return };
        if !self.owns(host, self.epoch) {
            return;
        }
        self.back = Some((holds.clone(), next.run, self.ids));
        self.volume = next;
        (self.told, self.flushed) = (holds.clone(), holds);
        self.reverted += 1;
    }

    fn begin(&mut self, host: usize, epoch: u64, with: BTreeMap<usize, u64>) {
        let run = self.volume.run;
        let needs = if self.caches { &self.flushed } else { &self.told };
        for (block, least) in needs.clone() {
            let has = self.hosts[host].disk.get(&block).copied().unwrap_or(0);
            if has < least {
                let what = format!(
                    "host{} begins run {run} with write {has} in block {block}, and {least} was acknowledged",
                    host + 1
                );
                self.accuse(what);
            }
        }
        for other in with.keys() {
            if self.hosts[*other].disk != self.hosts[host].disk {
                let what = format!("host{} and host{} differ in run {run}", host + 1, other + 1);
                self.accuse(what);
            }
        }
        if let Some((holds, _, last)) = &self.back {
            let odd = self.hosts[host]
                .disk
                .iter()
                .find(|(block, id)| *id <= last && holds.get(block) != Some(*id));
            if let Some((block, id)) = odd {
                let what = format!(
                    "host{} begins run {run} with write {id} in block {block}, which was undone",
                    host + 1
                );
                self.accuse(what);
            }
        }
        // What the guest finds must not change any more.
        for (block, id) in self.hosts[host].disk.clone() {
            let told = self.told.entry(block).or_default();
            *told = id.max(*told);
        }
        self.opened = self.opened.max(run);
        self.processes.push(Process {
            host,
            epoch,
            run,
            with,
            joins: None,
            broken: BTreeSet::new(),
            paused: false,
            writes: Vec::new(),
            unflushed: BTreeMap::new(),
            alive: true,
        });
    }

    /// A process ends by itself, with all that it was asked for on all disks.
    fn close(&mut self) {
        let quiet = |p: &Process| p.alive && !p.paused && p.writes.is_empty();
        let all: Vec<usize> =
            (0..self.processes.len()).filter(|p| quiet(&self.processes[*p])).collect();
        let Some(at) = self.random.of(&all) else { return };
        let process = self.processes[at].clone();
        let connected = |(host, connection): (&usize, &u64)| {
            self.reach(process.host, *host) && self.hosts[*host].connections == *connection
        };
        if !process.with.iter().all(connected) {
            return;
        }
        self.brought_to_disks(at);
        self.processes[at].alive = false;
        let with = process.with.keys().map(|host| name(*host)).collect();
        if self.owns(process.host, process.epoch)
            && let Some(next) = steps::closed(&self.volume, &name(process.host), &with)
        {
            self.volume = next;
        }
    }

    /// A replica that does not count gets one block more of what it lacks; once it has all of them it counts again.
    fn catch_up(&mut self) {
        let all: Vec<usize> = (0..self.processes.len())
            .filter(|p| self.processes[*p].alive && !self.processes[*p].paused)
            .collect();
        let Some(at) = self.random.of(&all) else { return };
        let process = self.processes[at].clone();
        let Some((host, connection, mut got)) = process.joins.clone() else {
            return self.join(at);
        };
        if self.hosts[host].connections != connection || !self.reach(process.host, host) {
            self.processes[at].joins = None;
            return self.acknowledge(at);
        }
        let early = self.broken == Broken::Early && got.len() > 1;
        if got.len() < usize::try_from(BLOCKS).unwrap() && !early {
            let block = self.random.below(BLOCKS);
            // A write to it comes before or after its copy, and not in between.
            if process.writes.iter().any(|write| write.block == block) {
                return;
            }
            let before = self.hosts[host].disk.get(&block).copied();
            match self.hosts[process.host].disk.get(&block).copied() {
                Some(id) => self.hosts[host].disk.insert(block, id),
                None => self.hosts[host].disk.remove(&block),
            };
            self.hosts[host].cached.push((block, before));
            got.insert(block);
            self.processes[at].joins = Some((host, connection, got));
            return;
        }
        // From now on each write needs it; then it is on the disk; then it counts.
        if !process.writes.is_empty() {
            return;
        }
        self.hosts[host].cached.clear();
        self.processes[at].joins = None;
        self.processes[at].with.insert(host, connection);
        if self.owns(process.host, process.epoch) && !self.volume.shut {
            self.volume.replicas.insert(name(host), ReplicaState::Counted);
            let lacks = |(block, least): (&u64, &u64)| {
                self.hosts[host].disk.get(block).copied().unwrap_or(0) < *least
            };
            let needs = if self.caches { &self.flushed } else { &self.told };
            if needs.iter().any(lacks) {
                self.accuse(format!("host{} counts and lacks what was acknowledged", host + 1));
            }
        } else {
            // It is needed all the same: nobody knows whether that was written.
            self.processes[at].paused = true;
        }
    }

    fn join(&mut self, at: usize) {
        let (host, process) = (self.host(), self.processes[at].clone());
        let serves = self.hosts[host].serves == Some(process.run);
        let there = process.host == host || process.with.contains_key(&host);
        if !there && serves && self.reach(process.host, host) && !self.volume.counts(&name(host)) {
            let connection = self.hosts[host].connections;
            self.processes[at].joins = Some((host, connection, BTreeSet::new()));
        }
    }

    fn power_cut(&mut self) {
        let host = self.host();
        self.end(host);
        // What its process had sent is in the wires; what was sent to it is lost with its connections.
        let lose = self.caches;
        let here = &mut self.hosts[host];
        here.up = false;
        here.serves = None;
        here.begun = None;
        here.connections += 1;
        if lose {
            let lost = std::mem::take(&mut here.cached);
            for (block, before) in lost.into_iter().rev() {
                match before {
                    Some(id) => here.disk.insert(block, id),
                    None => here.disk.remove(&block),
                };
            }
        }
    }

    fn step(&mut self) {
        match self.random.below(100) {
            0..20 => self.write(),
            20..53 => self.deliver(),
            53..58 => self.catch_up(),
            58..63 => self.flush(),
            63..70 => self.degrade(),
            70..72 => self.take_over(),
            72..80 => self.serve(),
            80..87 => self.open(),
            87 | 88 => self.close(),
            89 => self.snapshot(),
            90..92 => self.catch_up(),
            92 => self.power_cut(),
            93 | 94 => {
                let host = self.host();
                self.hosts[host].up = true;
            }
            95 => {
                let (a, b) = (self.host(), self.host());
                self.cut.insert((a.min(b), a.max(b)));
            }
            96 => self.cut.clear(),
            97 | 98 => {
                let host = self.host();
                if !self.alone.remove(&host) {
                    self.alone.insert(host);
                }
            }
            // A process crashes.
            _ => {
                let host = self.host();
                self.end(host);
            }
        }
    }
}

/// The first violation, and how many writes were acknowledged, processes began, and snapshots were gone back to.
fn run(seed: u64, broken: Broken, caches: bool) -> (Option<String>, u64, u64, u64) {
    let mut world = World::new(seed, broken, caches);
    for _ in 0..600 {
        world.step();
        if world.violation.is_some() {
            break;
        }
    }
    (world.violation, world.told_often, world.opened, world.reverted)
}

#[test]
fn no_acknowledged_write_is_lost_and_no_stale_one_is_taken() {
    let (mut writes, mut runs, mut back) = (0, 0, 0);
    for seed in 0..20_000 {
        let (violation, told, opened, reverted) = run(seed, Broken::Nothing, seed % 2 == 1);
        assert_eq!(violation, None, "seed {seed}");
        writes += told;
        runs += opened;
        back += reverted;
    }
    println!("{writes} writes acknowledged, {runs} runs, {back} times back to a snapshot");
    let much = writes > 100_000 && runs > 20_000 && back > 1_000;
    assert!(much, "too little happened: {writes}, {runs}, {back}");
}

#[test]
fn whatever_breaks_a_rule_is_found() {
    let all = [
        (Broken::Threshold, false),
        (Broken::Consent, false),
        (Broken::OldExports, false),
        (Broken::Unclean, false),
        (Broken::Comparison, false),
        (Broken::Early, false),
        (Broken::Flush, true),
        (Broken::Nobodys, false),
        (Broken::NotBack, false),
        (Broken::BackAgain, false),
    ];
    for (broken, caches) in all {
        let first = (0..5000).find(|seed| run(*seed, broken, caches).0.is_some());
        println!("{broken:?} is found by seed {first:?}");
        assert!(first.is_some(), "{broken:?} is not found");
    }
}
