//! Whether everything that runs could be started again after hosts are lost.
//!
//! It is found out by placing it, with the code that places after a real loss: the same order, the same filters, the
//! same scores. So affinity, spread rules and the sizes of single hosts count as they would then. Sums alone would
//! promise too much: three hosts with 2 GiB free each take no VM of 4 GiB.
//!
//! ```text
//!   snapshot ──► what waits is placed first ──► for each set of hosts: take them away, place what they ran ──► who is left
//! ```
//!
//! What does not move counts for nothing here: a VM with a disk in a local pool waits for its host, and takes no room
//! elsewhere meanwhile.
//!
//! Every single host is tried. Of two or three at once every set is tried while that is cheap; in large clusters only
//! sets of the largest hosts are, since a host that is lost takes with it what it has free and leaves behind what it
//! ran, which together is its size.

use crate::{
    placement::{self, Wish, capacity::cost, selects},
    tolerance::{
        hosts::HostState,
        order::Order,
        recovery::{bound_by, queue},
    },
    work::Work,
};
use haven_model::{
    Bytes, Name, Observations, ProofKind, Snapshot, VmSpec, cluster::MOST_RESERVED_HOSTS,
    object::Stored,
};
use std::{collections::BTreeMap, fmt};

/// The most hosts whose loss at once is looked at. More voters than this are never lost without the store.
pub const MOST: usize = MOST_RESERVED_HOSTS as usize;
/// So often a VM is compared with a host, at most, to look at the loss of several hosts at once.
const EFFORT: usize = 120_000;
/// So many hosts and VMs are named; of the others only how many they are.
const NAMED: usize = 4;

/// A VM for which no host is left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Homeless {
    /// Which.
    pub vm: Name,
    /// What its guest has.
    pub memory: Bytes,
    /// What hosts lack beside memory, in words.
    pub why: Option<String>,
}

impl fmt::Display for Homeless {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}", self.vm, size(self.memory.0))?;
        self.why.as_ref().map_or(Ok(()), |why| write!(f, ": {why}"))?;
        f.write_str(")")
    }
}

/// What would not run again after a loss.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shortfall {
    /// The hosts that are taken as lost.
    pub lost: Vec<Name>,
    /// What their VMs take, bytes, with QEMU's own part.
    pub needs: u64,
    /// What is free on each other host that takes VMs, bytes.
    pub free: Vec<(Name, u64)>,
    /// Who finds no place, in the order in which they look for one.
    pub homeless: Vec<Homeless>,
}

impl fmt::Display for Shortfall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lost: Vec<&str> = self.lost.iter().map(Name::as_str).collect();
        let its = if lost.len() == 1 { "its" } else { "their" };
        write!(f, "{} lost: {its} {} ", and(&lost), size(self.needs))?;
        let free = |(host, free): &(Name, u64)| format!("{host} ({} free)", size(*free));
        let free: Vec<String> = self.free.iter().map(free).collect();
        if free.is_empty() {
            write!(f, "have no other host to go to")?;
        } else {
            write!(f, "do not fit on {}", and(&free))?;
        }
        write!(f, ": {}", places(&self.homeless))
    }
}

/// Who finds no place, as a sentence.
pub(crate) fn places(homeless: &[Homeless]) -> String {
    let names: Vec<String> = homeless.iter().map(ToString::to_string).collect();
    let verb = if names.len() == 1 { "finds" } else { "find" };
    format!("{} {verb} no place", and(&names))
}

/// Words in a row, the first few of them.
fn and<T: AsRef<str>>(words: &[T]) -> String {
    let words: Vec<&str> = words.iter().map(AsRef::as_ref).collect();
    match words.as_slice() {
        [] => String::new(),
        [one] => (*one).to_owned(),
        [some @ .., last] if words.len() <= NAMED => format!("{} and {last}", some.join(", ")),
        [..] => format!("{} and {} others", words[..NAMED].join(", "), words.len() - NAMED),
    }
}

/// A size as people read it: never more than there is.
pub(crate) fn size(bytes: u64) -> String {
    const GIB: u64 = 1 << 30;
    match (bytes / GIB, bytes % GIB * 100 / GIB) {
        (0, _) => format!("{} MiB", bytes >> 20),
        (whole, 0) => format!("{whole} GiB"),
        (whole, part) if part % 10 == 0 => format!("{whole}.{} GiB", part / 10),
        (whole, part) => format!("{whole}.{part:02} GiB"),
    }
}

/// What a host would leave behind.
#[derive(Clone, Copy)]
struct Left<'a> {
    /// Its place in the order of recovery.
    rank: usize,
    name: &'a Name,
    vm: &'a Stored<VmSpec>,
    /// It ran before.
    ran: bool,
}

/// The cluster, with all that can be started now started.
pub(crate) struct Reserve<'a> {
    work: Work<'a>,
    left: BTreeMap<Name, Vec<Left<'a>>>,
    /// What waits now, and not for memory: with other hosts gone it might find a place before others.
    stranded: Vec<Left<'a>>,
    /// What finds no place now.
    pub homeless: Vec<Homeless>,
}

/// Whether a VM asks for labels that one host at most has: no room elsewhere would be of use to it.
fn pinned(snapshot: &Snapshot, vm: &VmSpec) -> bool {
    let wanted = &vm.affinity.hosts;
    let fits = snapshot.hosts.values().filter(|host| selects(wanted, &host.meta.labels));
    !wanted.is_empty() && fits.count() <= 1
}

impl<'a> Reserve<'a> {
    pub fn of(snapshot: &'a Snapshot, seen: &'a Observations) -> Self {
        let work = Work::new(snapshot, seen);
        let mut reserve =
            Self { work, left: BTreeMap::new(), stranded: Vec::new(), homeless: Vec::new() };
        let mut all: Vec<_> = snapshot
            .vms
            .iter()
            .filter(|(_, vm)| vm.spec.running && !vm.meta.deleting)
            .filter(|(_, vm)| bound_by(snapshot, vm).is_none() && !pinned(snapshot, &vm.spec))
            .collect();
        let order = Order::of(snapshot);
        all.sort_by_cached_key(|(name, vm)| order.place(name, vm));
        let ranks: BTreeMap<&Name, usize> =
            all.iter().enumerate().map(|(rank, (name, _))| (*name, rank)).collect();
        let left = |name: &'a Name, vm: &'a Stored<VmSpec>, ran| {
            ranks.get(name).map(|rank| Left { rank: *rank, name, vm, ran })
        };
        for (name, vm) in queue(&reserve.work) {
            if let Some(left) = left(name, vm, true) {
                reserve.start(left);
            }
        }
        for (name, placement) in &snapshot.placements {
            let Some(vm) = snapshot.vms.get(name) else { continue };
            if let Some(left) = left(name, vm, true)
                && reserve.work.room.of_host(&placement.host).is_some()
            {
                reserve.left.entry(placement.host.clone()).or_default().push(left);
            }
        }
        reserve
    }

    /// Gives a VM that waits its place.
    fn start(&mut self, vm: Left<'a>) {
        match placement::find(&self.work, &Wish::of(vm.vm), &|_| true) {
            Ok(found) => {
                let host = found.host.clone();
                self.work.room.use_up(&host, vm.vm);
                self.left.entry(host).or_default().push(vm);
            }
            Err(refused) => {
                let why = refused.beside_memory();
                if why.is_some() {
                    self.stranded.push(Left { ran: false, ..vm });
                }
                let memory = vm.vm.spec.memory;
                self.homeless.push(Homeless { vm: vm.name.clone(), memory, why });
            }
        }
    }

    /// What would not run again if these hosts were lost.
    fn loss(&mut self, lost: &[Name]) -> Option<Shortfall> {
        let mut queue: Vec<Left<'a>> =
            lost.iter().filter_map(|host| self.left.get(host)).flatten().copied().collect();
        if queue.is_empty() {
            return None;
        }
        let needs = queue.iter().map(|vm| cost(&vm.vm.spec).memory).sum();
        queue.extend(&self.stranded);
        queue.sort_unstable_by_key(|vm| vm.rank);
        let before = self.work.room.clone();
        let mut states = Vec::new();
        for host in lost {
            self.work.room.lose(host);
            let state = HostState::Lost(ProofKind::LeaseExpired);
            states.extend(self.work.states.insert(host.clone(), state));
        }
        let mut homeless = Vec::new();
        for Left { name, vm, ran, .. } in queue {
            match placement::find(&self.work, &Wish::of(vm), &|_| true) {
                Ok(found) => {
                    let host = found.host.clone();
                    self.work.room.use_up(&host, vm);
                }
                Err(refused) if ran => {
                    let (vm, memory) = (name.clone(), vm.spec.memory);
                    homeless.push(Homeless { vm, memory, why: refused.beside_memory() });
                }
                Err(_) => {}
            }
        }
        self.work.room = before;
        self.work.states.extend(lost.iter().cloned().zip(states));
        (!homeless.is_empty()).then(|| Shortfall {
            lost: lost.to_vec(),
            needs,
            free: self.free(lost),
            homeless,
        })
    }

    /// What hosts that take VMs have free, the largest first.
    fn free(&self, lost: &[Name]) -> Vec<(Name, u64)> {
        let takes = |host: &Name| self.work.states.get(host).is_some_and(|state| state.usable());
        let rooms = self.work.room.hosts().filter(|(host, _)| takes(host) && !lost.contains(host));
        let mut free: Vec<(Name, u64)> =
            rooms.map(|(host, room)| (host.clone(), room.memory_free())).collect();
        free.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
        free
    }

    /// The sets of so many hosts that are tried, those of the largest hosts first.
    fn sets(&self, count: usize) -> Vec<Vec<Name>> {
        let mut hosts: Vec<(&Name, u64)> =
            self.work.room.hosts().map(|(host, room)| (host, room.memory)).collect();
        hosts.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(b.0)));
        let vms: usize = self.left.values().map(Vec::len).sum();
        // Of one set: what it leaves behind, each with every host.
        let each = (count * (vms / hosts.len().max(1) + 1)).max(1) * hosts.len();
        let mut of = hosts.len();
        while count > 1 && of > count && sets_of(of, count).saturating_mul(each) > EFFORT {
            of -= 1;
        }
        let hosts: Vec<&Name> = hosts.into_iter().take(of).map(|(host, _)| host).collect();
        let mut sets = Vec::new();
        subsets(&hosts, count, &mut Vec::new(), &mut sets);
        sets
    }

    /// The worst that the loss of so many hosts can do; nothing when all of it runs again.
    pub fn worst(&mut self, count: usize) -> Option<Shortfall> {
        let lacks = |short: &Shortfall| short.homeless.iter().map(|h| h.memory.0).sum::<u64>();
        let short: Vec<Shortfall> =
            self.sets(count).iter().filter_map(|set| self.loss(set)).collect();
        short.into_iter().rev().max_by_key(lacks)
    }

    /// How many hosts can be lost and all runs again, up to [`MOST`].
    pub fn survives(&mut self) -> usize {
        let hosts = self.work.room.hosts().count();
        let most = MOST.min(hosts.saturating_sub(1));
        let bad = |count: &usize| self.sets(*count).iter().any(|set| self.loss(set).is_some());
        (1..=most).find(bad).map_or(most, |count| count - 1)
    }
}

/// How many subsets there are.
fn sets_of(of: usize, count: usize) -> usize {
    (0..count).fold(1usize, |sets, i| sets.saturating_mul(of - i) / (i + 1))
}

fn subsets(of: &[&Name], count: usize, taken: &mut Vec<Name>, all: &mut Vec<Vec<Name>>) {
    if count == 0 {
        return all.push(taken.clone());
    }
    for (i, host) in of.iter().enumerate() {
        taken.push((*host).clone());
        subsets(&of[i + 1..], count - 1, taken, all);
        taken.pop();
    }
}

/// How many hosts can be lost now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Losses {
    /// Whichever they are, and every VM that can move runs again; [`MOST`] stands for as many or more.
    pub vms: usize,
    /// Voters, and the store keeps its quorum.
    pub store: usize,
    /// Memory is kept for the loss of so many.
    pub reserved: usize,
    /// What would not run again after the loss of so many, if anything.
    pub short: Option<Shortfall>,
}

impl Losses {
    /// For the VMs and for the store.
    #[must_use]
    pub fn both(&self) -> usize {
        self.vms.min(self.store)
    }
}

/// For the loss of how many hosts memory is kept.
pub(crate) fn reserved(snapshot: &Snapshot) -> usize {
    let run_vms = snapshot.hosts.values().filter(|host| !host.spec.witness).count();
    snapshot.cluster_spec().reserved_hosts(run_vms)
}

/// How many hosts can be lost now, as things stand: also while one is lost already.
#[must_use]
pub fn losses(snapshot: &Snapshot, seen: &Observations) -> Losses {
    let mut reserve = Reserve::of(snapshot, seen);
    let vms = reserve.survives();
    let reserved = reserved(snapshot);
    let short = if vms < reserved { reserve.worst(vms + 1) } else { None };
    Losses { vms, store: store_losses(snapshot, &reserve.work), reserved, short }
}

fn store_losses(snapshot: &Snapshot, work: &Work<'_>) -> usize {
    let voters = snapshot.host_status.iter().filter(|(_, status)| status.etcd_member.is_some());
    let (all, answer) = voters.fold((0, 0), |(all, answer), (name, status)| {
        use HostState::{Cordoned, Online, Witness};
        let up = matches!(work.states.get(name), Some(Online | Cordoned | Witness));
        let up = up && !status.etcd_silent;
        (all + 1, answer + usize::from(up))
    });
    usize::saturating_sub(answer, all / 2 + 1)
}
