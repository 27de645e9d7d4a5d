//! Where a VM goes: filters that forbid, then scores that prefer. Deterministic; never moves what runs.
//!
//! Wishes about neighbours count both ways: a newcomer keeps away from a VM that asks to be apart from it, and goes to
//! one that asks to be near it. The second is preferred and never waited for, since the newcomer may have no wish of
//! its own, and another's must not keep it from running; where it cannot be fulfilled the reason says so.

pub mod address;
pub mod capacity;
pub mod names;

use crate::{storage, work::Work};
use capacity::{HostRoom, cost};
use haven_model::{
    Bytes, Name, VmSpec,
    object::Stored,
    service::SpreadSpec,
    vm::{AffinitySpec, Selector},
};
use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
};

/// What a VM asks of its host.
pub struct Wish<'a> {
    vm: &'a Stored<VmSpec>,
    spec: &'a VmSpec,
    labels: &'a BTreeMap<String, String>,
    service: Option<&'a Name>,
}

impl<'a> Wish<'a> {
    /// What this VM asks.
    #[must_use]
    pub fn of(vm: &'a Stored<VmSpec>) -> Self {
        let service = vm.meta.member_of().map(|service| &service.name);
        Self { vm, spec: &vm.spec, labels: &vm.meta.labels, service }
    }
}

/// The host that was chosen, and why.
#[derive(Debug)]
pub struct Choice {
    /// The host.
    pub host: Name,
    /// In words.
    pub reason: String,
}

/// How often a CPU may be promised.
const CPU_OVERCOMMIT: u64 = 4;

/// Chooses.
///
/// # Errors
/// A sentence that begins with `waiting:` and names what is missing.
pub(crate) fn choose(work: &Work<'_>, vm: &Name, wish: &Wish<'_>) -> Result<Choice, String> {
    choose_among(work, vm, wish, &|_| true)
}

/// Chooses another host than `host`, where `vm` is, for it, among those that `may`.
///
/// # Errors
/// As [`choose`].
pub(crate) fn choose_other<'a>(
    work: &mut Work<'a>,
    vm: &'a Stored<VmSpec>,
    host: &Name,
    may: &dyn Fn(&Name) -> bool,
) -> Result<Choice, String> {
    // It is no neighbour of itself, and does not count twice.
    let before = work.room.clone();
    work.room.take_away(host, vm);
    let may = |other: &Name| other != host && may(other);
    let choice = choose_among(work, &vm.meta.name, &Wish::of(vm), &may);
    work.room = before;
    choice
}

/// Whether `vm`, which is on `from`, would be on `to` without a wish or a spread that is worse for it.
///
/// # Errors
/// Why it would not.
pub(crate) fn no_worse<'a>(
    work: &mut Work<'a>,
    vm: &'a Stored<VmSpec>,
    from: &Name,
    to: &Name,
) -> Result<(), String> {
    let before = work.room.clone();
    work.room.take_away(from, vm);
    let wish = Wish::of(vm);
    let spread = spread_of(work, &wish);
    let score = |host| {
        let room = work.room.of_host(host).ok_or("has no room")?;
        judge(work, host, room, &wish, &spread)
    };
    let wishes = |score: &Score<'_>| (score.is_missed, score.fewest_members, score.broken_wishes);
    let judged = match (score(from), score(to)) {
        (_, Err(why)) => Err(why.into_owned()),
        (Ok(here), Ok(there)) if wishes(&there) < wishes(&here) => {
            Err("suits its wishes less".to_owned())
        }
        (_, Ok(_)) => Ok(()),
    };
    work.room = before;
    judged
}

fn choose_among(
    work: &Work<'_>,
    vm: &Name,
    wish: &Wish<'_>,
    may: &dyn Fn(&Name) -> bool,
) -> Result<Choice, String> {
    let found = find(work, wish, may).map_err(|refused| refused.waiting(vm, wish))?;
    let Found { host, score } = found;
    let mut reason = score.words(host, work);
    if !score.is_missed
        && let Some((elsewhere, asking)) = missed(work, wish)
    {
        let asking = &asking.meta.name;
        reason.push_str(&format!(
            ", {asking} asks to be near it and stays apart on {elsewhere}, which cannot take it"
        ));
    }
    Ok(Choice { host: host.clone(), reason })
}

/// The best host, without words.
pub(crate) struct Found<'w> {
    /// The host.
    pub host: &'w Name,
    score: Score<'w>,
}

/// Why there is none.
#[derive(Default)]
pub(crate) struct Refused<'w> {
    /// How many hosts refuse for the same reason.
    why: BTreeMap<Cow<'static, str>, u32>,
    most_free: (u64, Option<&'w Name>),
}

/// What a host says that has no memory left.
const NO_MEMORY: &str = "has too little free memory";

/// The best host among those that `may`.
pub(crate) fn find<'w>(
    work: &'w Work<'_>,
    wish: &Wish<'_>,
    may: &dyn Fn(&Name) -> bool,
) -> Result<Found<'w>, Refused<'w>> {
    let mut refused = Refused::default();
    let spread = spread_of(work, wish);
    let mut best: Option<Found<'_>> = None;
    let mut rooms = work.room.hosts().peekable();
    for (host, state) in &work.states {
        while rooms.next_if(|(of, _)| *of < host).is_some() {}
        let room = rooms.next_if(|(of, _)| *of == host).map(|(_, room)| room);
        if !may(host) {
            continue;
        }
        let Some(room) = room.filter(|_| state.usable()) else {
            *refused.why.entry(format!("is {}", plain(*state)).into()).or_default() += 1;
            continue;
        };
        if room.memory_free() >= refused.most_free.0 {
            refused.most_free = (room.memory_free(), Some(host));
        }
        match judge(work, host, room, wish, &spread) {
            Ok(score) => {
                if best.as_ref().is_none_or(|than| score > than.score) {
                    best = Some(Found { host, score });
                }
            }
            Err(why) => *refused.why.entry(why).or_default() += 1,
        }
    }
    best.ok_or(refused)
}

/// A VM that asks to be near this one and is near none such yet, and its host.
fn missed<'a>(work: &'a Work<'_>, wish: &Wish<'_>) -> Option<(&'a Name, &'a Stored<VmSpec>)> {
    work.room.hosts().find_map(|(host, room)| Some((host, room.misses(wish.labels)?)))
}

/// A state without its figures, so that like reasons are counted together.
fn plain(state: crate::HostState) -> &'static str {
    use crate::HostState::{
        Cordoned, Drained, Draining, Joining, Lost, Online, Silent, Suspected, Witness,
    };
    match state {
        Joining => "joining",
        Online => "without a status",
        Cordoned => "cordoned",
        Witness => "a witness",
        Draining => "draining",
        Drained => "drained",
        Suspected => "suspected",
        Silent(_) => "silent",
        Lost(_) => "lost",
    }
}

impl Refused<'_> {
    /// How many hosts refuse, in words, a reason each.
    fn reasons(&self) -> Vec<String> {
        let words = |(why, n): (&Cow<'_, str>, &u32)| {
            if *n == 1 { format!("1 host {why}") } else { format!("{n} hosts each: {why}") }
        };
        self.why.iter().map(words).collect()
    }

    /// What hosts lack beside memory; nothing when it is memory alone, or when no host is left.
    pub fn beside_memory(&self) -> Option<String> {
        let other = self.why.keys().any(|why| why != NO_MEMORY && !why.starts_with("is "));
        other.then(|| self.reasons().join("; "))
    }

    fn waiting(&self, vm: &Name, wish: &Wish<'_>) -> String {
        let mut why = self.reasons();
        if let Some(host) = self.most_free.1 {
            why.insert(0, format!("largest free is {} on {host}", mib(self.most_free.0)));
        } else {
            why.insert(0, "no host is online".into());
        }
        format!("waiting: {vm} needs {}, {}", wish.spec.memory, why.join("; "))
    }
}

fn mib(bytes: u64) -> Bytes {
    Bytes::mib(bytes >> 20)
}

/// Larger is better, field by field.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Score<'w> {
    /// A VM that is there asks to be near this one.
    is_missed: bool,
    fewest_members: std::cmp::Reverse<usize>,
    broken_wishes: std::cmp::Reverse<u32>,
    /// Thousandths of the host's memory that stay free.
    memory_free: u64,
    /// Thousandths of the host's CPUs that stay free, over all promises.
    cpu_free: u64,
    /// The first by name.
    name: std::cmp::Reverse<&'w Name>,
}

impl Score<'_> {
    fn words(&self, host: &Name, work: &Work<'_>) -> String {
        let members = match self.fewest_members.0 {
            0 => "no other member is there".to_owned(),
            n => format!("{n} other members are there, no host has fewer"),
        };
        let wishes = match self.broken_wishes.0 {
            0 => String::new(),
            n => format!(", {n} soft affinity wishes are broken"),
        };
        let free = work.room.of_host(host).map_or(0, HostRoom::memory_free);
        format!("{members}, {} was free{wishes}", mib(free))
    }
}

struct Spread<'a> {
    by: &'a str,
    required: bool,
    /// Members of the same service per value of the spread key.
    counts: BTreeMap<Cow<'a, str>, usize>,
}

fn spread_of<'a>(work: &'a Work<'_>, wish: &Wish<'_>) -> Spread<'a> {
    let service = wish.service.and_then(|name| work.snapshot.services.get(name));
    let Some((service, name)) = service.zip(wish.service) else {
        return Spread { by: "host", required: false, counts: BTreeMap::new() };
    };
    let SpreadSpec { by, required } = &service.spec.spread;
    let mut counts = BTreeMap::new();
    for host in work.room.hosts_of_service(name) {
        *counts.entry(domain(work, host, by)).or_default() += 1;
    }
    Spread { by, required: *required, counts }
}

fn domain<'w>(work: &'w Work<'_>, host: &'w Name, by: &str) -> Cow<'w, str> {
    if by == "host" {
        return host.as_str().into();
    }
    let labels = work.snapshot.hosts.get(host).map(|h| &h.meta.labels);
    labels
        .and_then(|labels| labels.get(by))
        .map_or_else(|| format!("no {by} of {host}").into(), |label| label.as_str().into())
}

fn judge<'w>(
    work: &Work<'_>,
    host: &'w Name,
    room: &HostRoom,
    wish: &Wish<'_>,
    spread: &Spread<'_>,
) -> Result<Score<'w>, Cow<'static, str>> {
    let affinity: &AffinitySpec = &wish.spec.affinity;
    if !affinity.hosts.is_empty()
        && !selects(&affinity.hosts, &work.snapshot.hosts[host].meta.labels)
    {
        return Err(format!("lacks the labels {:?}", affinity.hosts).into());
    }
    if let Some(network) = work.cut_off.network(host, wish.spec) {
        return Err(format!("is cut off from the network `{network}`").into());
    }
    if let Some(disk) = storage::replicas::lacks(work.snapshot, wish.vm, host) {
        return Err(
            format!("does not have all that was written to the disk `{}`", disk.name).into()
        );
    }
    if let Some(source) = storage::copies::elsewhere(work.snapshot, wish.vm, host) {
        return Err(format!("is not the host of {source}, from whose disks it is made").into());
    }
    let cost = cost(wish.spec);
    if room.memory_free() < cost.memory {
        return Err(NO_MEMORY.into());
    }
    if u64::from(wish.spec.cpus) > room.cpus
        || room.cpus_used + cost.cpus > room.cpus * CPU_OVERCOMMIT
    {
        return Err("has too few CPUs".into());
    }
    let members = match spread.counts.is_empty() {
        true => 0,
        false => spread.counts.get(domain(work, host, spread.by).as_ref()).copied().unwrap_or(0),
    };
    if spread.required && members > 0 {
        return Err(format!("shares its {} with another member", spread.by).into());
    }
    let mut broken = 0;
    if let Some(other) = room.refuses(wish.labels) {
        if !other.spec.affinity.soft {
            return Err(format!("runs {}, which must be apart from it", other.meta.name).into());
        }
        broken += 1;
    }
    if !affinity.apart.is_empty() && room.will_run(&affinity.apart) {
        if !affinity.soft {
            return Err("runs a VM it must be apart from".into());
        }
        broken += 1;
    }
    if !affinity.near.is_empty() && work.room.anywhere(&affinity.near) && !room.runs(&affinity.near)
    {
        if !affinity.soft {
            return Err("does not run the VM it must be near".into());
        }
        broken += 1;
    }
    Ok(Score {
        is_missed: room.misses(wish.labels).is_some(),
        fewest_members: std::cmp::Reverse(members),
        broken_wishes: std::cmp::Reverse(broken),
        memory_free: (room.memory_free() - cost.memory) * 1000 / room.memory.max(1),
        cpu_free: (room.cpus * CPU_OVERCOMMIT - room.cpus_used - cost.cpus) * 1000
            / (room.cpus * CPU_OVERCOMMIT).max(1),
        name: std::cmp::Reverse(host),
    })
}

/// Whether a VM asks to be apart from VMs with these labels.
pub(crate) fn asks_apart(of: &VmSpec, labels: &BTreeMap<String, String>) -> bool {
    !of.affinity.apart.is_empty() && selects(&of.affinity.apart, labels)
}

/// Whether a VM asks to be near VMs with these labels.
pub(crate) fn asks_near(of: &VmSpec, labels: &BTreeMap<String, String>) -> bool {
    !of.affinity.near.is_empty() && selects(&of.affinity.near, labels)
}

/// Whether all of `selector` stands in `labels`.
pub(crate) fn selects(selector: &Selector, labels: &BTreeMap<String, String>) -> bool {
    selector.iter().all(|(key, value)| labels.get(key) == Some(value))
}

/// The set of hosts as words.
#[must_use]
pub fn names(hosts: &BTreeSet<Name>) -> String {
    hosts.iter().map(Name::as_str).collect::<Vec<_>>().join(", ")
}
