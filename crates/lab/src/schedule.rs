//! Schedules of faults that are made from a number, for a lab that is already up: the same number gives the same faults at the
//! same moments.

use std::{fmt, time::Duration};

/// What breaks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Its daemon is killed; its supervisor starts it again.
    KillDaemon(String),
    /// What serves its replicas is killed.
    KillStorage(String),
    /// The process of a VM is killed.
    KillVm(String),
    /// A VM is to move live meanwhile; it may fail.
    Move(String),
    /// The disk of a VM is to be larger.
    Grow(String),
    /// It has no power.
    Power(String),
    /// No host has power; they come back in this order.
    AllPower(Vec<String>),
    /// Every process of it stands, and it finds out only when they go on.
    Pause(String),
    /// What serves its replicas stands.
    FreezeStorage(String),
    /// It reaches nobody, and nobody reaches it.
    CutOff(String),
    /// Packets of the first to the second vanish.
    CutOneWay(String, String),
    /// The two do not reach each other.
    Cut(String, String),
    /// The disk of its pool is full.
    Fill(String),
}

impl Fault {
    /// The hosts whose power or processes it takes.
    #[must_use]
    pub fn stops(&self) -> Vec<&str> {
        match self {
            Self::Power(host) | Self::Pause(host) | Self::FreezeStorage(host) => vec![host],
            Self::AllPower(hosts) => hosts.iter().map(String::as_str).collect(),
            _ => Vec::new(),
        }
    }

    /// It is over by itself.
    #[must_use]
    pub fn mends_itself(&self) -> bool {
        matches!(
            self,
            Self::KillDaemon(_)
                | Self::KillStorage(_)
                | Self::KillVm(_)
                | Self::Move(_)
                | Self::Grow(_)
        )
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::KillDaemon(host) => write!(f, "kill the daemon of {host}"),
            Self::KillStorage(host) => write!(f, "kill what serves replicas on {host}"),
            Self::KillVm(vm) => write!(f, "kill the process of {vm}"),
            Self::Move(vm) => write!(f, "move {vm} live"),
            Self::Grow(vm) => write!(f, "make the disk of {vm} larger"),
            Self::Power(host) => write!(f, "cut the power of {host}"),
            Self::AllPower(hosts) => write!(f, "cut all power, back as {}", hosts.join(", ")),
            Self::Pause(host) => write!(f, "pause {host}"),
            Self::FreezeStorage(host) => write!(f, "freeze what serves replicas on {host}"),
            Self::CutOff(host) => write!(f, "cut {host} off"),
            Self::CutOneWay(from, to) => write!(f, "drop what {from} sends to {to}"),
            Self::Cut(one, other) => write!(f, "cut {one} from {other}"),
            Self::Fill(host) => write!(f, "fill the disk of {host}"),
        }
    }
}

/// A fault at its time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// Since the schedule began.
    pub at: Duration,
    /// It is mended at this time, unless it is over by itself.
    pub until: Duration,
    /// What breaks.
    pub fault: Fault,
}

/// The faults of one number, in the order in which they begin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// Its number.
    pub seed: u64,
    /// Its faults.
    pub steps: Vec<Step>,
    /// A replica of this VM changes what it holds, once all is well again: found by a comparison, and repaired.
    pub damage: Option<String>,
}

impl Schedule {
    /// Of a lab with these hosts and VMs, of which there must be some.
    #[must_use]
    pub fn of(seed: u64, hosts: &[String], vms: &[String]) -> Self {
        let mut dice = Dice(seed);
        let mut at = Duration::ZERO;
        let mut steps: Vec<Step> = Vec::new();
        for _ in 0..1 + dice.below(4) {
            let fault = fault(&mut dice, hosts, vms);
            // Shorter than what is noticed at all, about what is noticed, and longer than a host has to be proven lost.
            let lasts = [300, 1500, 4000, 9000][dice.below(4)] + dice.below(1500);
            let until = at + Duration::from_millis(u64::try_from(lasts).unwrap_or_default());
            let stops = fault.stops();
            let free = steps.iter().all(|step| {
                let taken = step.fault.stops().iter().any(|host| stops.contains(host));
                step.until <= at || !taken
            });
            if free {
                steps.push(Step { at, until, fault });
            }
            // The guest stands for a moment while its disk grows, so what breaks then breaks soon.
            let grows = steps.last().is_some_and(|step| matches!(step.fault, Fault::Grow(_)));
            let pause = match grows {
                true => 20 + u64::try_from(dice.below(300)).unwrap_or_default(),
                false => [50, 400, 1500, 5000][dice.below(4)],
            };
            at += Duration::from_millis(pause);
        }
        let damage = (dice.below(4) == 0).then(|| vms[dice.below(vms.len())].clone());
        Self { seed, steps, damage }
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = |at: Duration| at.as_secs_f64();
        write!(f, "{}:", self.seed)?;
        for (i, step) in self.steps.iter().enumerate() {
            let sign = if i == 0 { "" } else { ";" };
            write!(f, "{sign} {:.1} s {}", seconds(step.at), step.fault)?;
            if !step.fault.mends_itself() {
                write!(f, " for {:.1} s", seconds(step.until.saturating_sub(step.at)))?;
            }
        }
        self.damage.iter().try_for_each(|vm| write!(f, "; damage a replica of {vm}"))
    }
}

fn fault(dice: &mut Dice, hosts: &[String], vms: &[String]) -> Fault {
    let host = hosts[dice.below(hosts.len())].clone();
    let vm = vms[dice.below(vms.len())].clone();
    let others: Vec<&String> = hosts.iter().filter(|other| **other != host).collect();
    let other = others.get(dice.below(others.len().max(1))).map_or(host.clone(), |o| (*o).clone());
    match dice.below(18) {
        0 => Fault::KillDaemon(host),
        1 | 2 => Fault::KillStorage(host),
        3 => Fault::KillVm(vm),
        4 | 5 => Fault::Move(vm),
        6 | 7 => Fault::Power(host),
        8 => {
            let mut order = hosts.to_vec();
            for i in (1..order.len()).rev() {
                order.swap(i, dice.below(i + 1));
            }
            Fault::AllPower(order)
        }
        9 | 10 => Fault::Pause(host),
        11 => Fault::FreezeStorage(host),
        12 => Fault::CutOff(host),
        13 => Fault::CutOneWay(host, other),
        14 => Fault::Cut(host, other),
        15 | 16 => Fault::Grow(vm),
        _ => Fault::Fill(host),
    }
}

/// Numbers that follow from a number (SplitMix64).
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Less than `limit`, which is more than 0.
    fn below(&mut self, limit: usize) -> usize {
        let limit = u64::try_from(limit).unwrap_or(u64::MAX);
        usize::try_from(self.next() % limit).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::{Fault, Schedule};
    use std::collections::HashSet;

    fn names(prefix: &str) -> Vec<String> {
        (1..=3).map(|i| format!("{prefix}{i}")).collect()
    }

    #[test]
    fn a_number_gives_the_same_faults_and_all_kinds_come() {
        let (hosts, vms) = (names("host"), names("vm"));
        let mut kinds = HashSet::new();
        for seed in 0..300 {
            let schedule = Schedule::of(seed, &hosts, &vms);
            assert_eq!(schedule, Schedule::of(seed, &hosts, &vms));
            assert!(!schedule.steps.is_empty());
            kinds.extend(schedule.steps.iter().map(|step| std::mem::discriminant(&step.fault)));
            for (i, step) in schedule.steps.iter().enumerate() {
                if let Fault::CutOneWay(one, other) | Fault::Cut(one, other) = &step.fault {
                    assert_ne!(one, other);
                }
                let stops = step.fault.stops();
                let beside = schedule.steps[i + 1..].iter().filter(|later| later.at < step.until);
                for later in beside {
                    assert!(later.fault.stops().iter().all(|host| !stops.contains(host)));
                }
            }
        }
        assert_eq!(kinds.len(), 13);
    }
}
