//! The witness outside: reads what every guest writes, on whichever host, and counts the processes that run.

use anyhow::{Result, bail};
use std::{
    collections::BTreeMap,
    io::{Read, Seek, SeekFrom},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// How often the consoles are read.
const LOOK: Duration = Duration::from_millis(10);

/// Where a copy counted, and from where to where.
#[derive(Clone, Debug)]
struct Place {
    host: String,
    first: u64,
    last: u64,
}

/// One copy of a VM: one boot of its guest.
#[derive(Clone, Debug)]
pub struct Copy {
    /// Where it was seen last.
    pub host: String,
    /// Where it was seen, one after another: more than one when it moved.
    places: Vec<Place>,
    /// The guest's boot id.
    pub boot: String,
    /// How far it counted.
    pub count: u64,
    /// First sign of life.
    pub first: Instant,
    /// Last sign of life.
    pub last: Instant,
}

#[derive(Default)]
struct Seen {
    /// Copies by VM, in the order of their first signs.
    copies: BTreeMap<String, Vec<Copy>>,
    violations: Vec<String>,
    /// Old copies may be seen from the first instant on, for so long.
    grace: Option<(Instant, Duration)>,
    /// A VM moves live: it has a process on two hosts, of which one executes.
    moves: bool,
}

/// Watches until the process ends.
pub struct Witness {
    seen: Arc<Mutex<Seen>>,
    dir: PathBuf,
}

impl Witness {
    /// Begins to watch the lab in `dir`.
    pub fn start(dir: PathBuf) -> Self {
        let seen = Arc::new(Mutex::new(Seen::default()));
        let (shared, lab) = (Arc::clone(&seen), dir.clone());
        std::thread::spawn(move || {
            let mut files: BTreeMap<PathBuf, (u64, String)> = BTreeMap::new();
            let mut looks = 0u64;
            loop {
                if looks.is_multiple_of(20) {
                    find(&lab, &mut files);
                }
                for (path, (offset, rest)) in &mut files {
                    read(path, offset, rest, &shared);
                }
                if looks.is_multiple_of(5) {
                    processes(&lab, &shared);
                }
                looks += 1;
                std::thread::sleep(LOOK);
            }
        });
        Self { seen, dir }
    }

    fn lock(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The newest copy of every VM.
    pub fn newest(&self) -> BTreeMap<String, Copy> {
        let seen = self.lock();
        let last = |(vm, copies): (&String, &Vec<Copy>)| Some((vm.clone(), copies.last()?.clone()));
        seen.copies.iter().filter_map(last).collect()
    }

    /// Whether the newest copy of a VM counts on this host now.
    pub fn counts_now(&self, vm: &str, host: &str) -> bool {
        let newest = self.newest();
        newest
            .get(vm)
            .is_some_and(|copy| copy.host == host && copy.last.elapsed() < Duration::from_secs(2))
    }

    /// The last sign of life of a VM on a host.
    pub fn last_of(&self, vm: &str, host: &str) -> Option<Instant> {
        let seen = self.lock();
        seen.copies.get(vm)?.iter().filter(|copy| copy.host == host).map(|copy| copy.last).max()
    }

    /// Waits until the newest copies are as wanted.
    pub fn until(
        &self,
        limit: Duration,
        what: &str,
        wanted: impl Fn(&BTreeMap<String, Copy>) -> bool,
    ) -> Result<()> {
        let end = Instant::now() + limit;
        while !wanted(&self.newest()) {
            if Instant::now() > end {
                bail!("{what}: not within {} s", limit.as_secs());
            }
            std::thread::sleep(LOOK);
        }
        Ok(())
    }

    /// Processes of VMs that run now.
    pub fn running(&self) -> usize {
        qemus(&self.dir).values().map(Vec::len).sum()
    }

    /// Forgets all but the newest copies.
    pub fn forget(&self) {
        let mut seen = self.lock();
        for copies in seen.copies.values_mut() {
            copies.drain(..copies.len().saturating_sub(1));
        }
        seen.grace = None;
    }

    /// A host without a watchdog wakes now; its old copies may be seen for so long.
    pub fn woken(&self, at: Instant, grace: Duration) {
        self.lock().grace = Some((at, grace));
    }

    /// VMs move live from now on, or no more.
    pub fn moves(&self, moves: bool) {
        self.lock().moves = moves;
    }

    /// On how many places, one after another, the newest copy of a VM has counted.
    pub fn places(&self, vm: &str) -> usize {
        self.newest().get(vm).map_or(0, |copy| copy.places.len())
    }

    /// What was seen that must not be.
    pub fn verdict(&self) -> Result<()> {
        let seen = self.lock();
        match seen.violations.first() {
            None => Ok(()),
            Some(what) => bail!("{} violations, the first: {what}", seen.violations.len()),
        }
    }
}

impl Copy {
    /// It counts here. A copy that has moved counts on where it went, and no more where it was; what it said before
    /// may be read late.
    fn counts(&mut self, host: &str, count: u64) -> Result<(), String> {
        let newest = self.places.len() - 1;
        if count > self.count {
            self.count = count;
            host.clone_into(&mut self.host);
            if self.places[newest].host == host {
                self.places[newest].last = count;
            } else {
                self.places.push(Place { host: host.to_owned(), first: count, last: count });
            }
            return Ok(());
        }
        let again = |at: usize| {
            let (here, next) = (&self.places[at], self.places.get(at + 1));
            // What it said there is read late, or once more.
            next.is_none_or(|next| count <= here.last || count < next.first)
        };
        if self.places.iter().rposition(|place| place.host == host).is_some_and(again) {
            return Ok(());
        }
        Err(format!(
            "counts {count} on {host}, after it counted {} on {}",
            self.count, self.places[newest].host
        ))
    }
}

fn graced(seen: &Seen) -> bool {
    seen.grace.is_some_and(|(at, grace)| at.elapsed() <= grace)
}

/// The consoles of all counting guests on all hosts.
fn find(lab: &Path, files: &mut BTreeMap<PathBuf, (u64, String)>) {
    for host in crate::lab::HOSTS {
        let mut folders = vec![lab.join("hosts").join(host).join("upper/var/log/haven/vms")];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
                let path = entry.path();
                if path.is_dir() {
                    folders.push(path);
                } else if path.display().to_string().contains("console") {
                    files.entry(path).or_default();
                }
            }
        }
    }
}

fn read(path: &Path, offset: &mut u64, rest: &mut String, shared: &Mutex<Seen>) {
    let text = path.display().to_string();
    let Some(vm) = ["tick-1", "tick-2"].into_iter().find(|vm| text.contains(vm)) else { return };
    let Some(host) = crate::lab::HOSTS.into_iter().find(|h| text.contains(&format!("/{h}/")))
    else {
        return;
    };
    let Ok(mut file) = std::fs::File::open(path) else { return };
    let length = file.metadata().map_or(0, |meta| meta.len());
    if length < *offset {
        // It was begun anew.
        *offset = 0;
    }
    if length == *offset || file.seek(SeekFrom::Start(*offset)).is_err() {
        return;
    }
    let mut bytes = Vec::new();
    *offset += file.read_to_end(&mut bytes).unwrap_or(0) as u64;
    rest.push_str(&String::from_utf8_lossy(&bytes));
    while let Some(end) = rest.find('\n') {
        let line: String = rest.drain(..=end).collect();
        let mut words = line.split_whitespace().skip_while(|word| *word != "tick").skip(1);
        if let (Some(boot), Some(Ok(count))) = (words.next(), words.next().map(str::parse)) {
            let mut seen = shared.lock().unwrap_or_else(PoisonError::into_inner);
            sign(&mut seen, vm, host, boot, count);
        }
    }
}

/// A sign of life.
fn sign(seen: &mut Seen, vm: &str, host: &str, boot: &str, count: u64) {
    let (now, grace) = (Instant::now(), graced(seen));
    let copies = seen.copies.entry(vm.to_owned()).or_default();
    let Some(index) = copies.iter().position(|copy| copy.boot == boot) else {
        let places = vec![Place { host: host.to_owned(), first: count, last: count }];
        let (host, boot) = (host.to_owned(), boot.to_owned());
        copies.push(Copy { host, places, boot, count, first: now, last: now });
        return;
    };
    if let Err(what) = copies[index].counts(host, count) {
        seen.violations.push(format!("{vm} {what}"));
        return;
    }
    copies[index].last = now;
    if index + 1 < copies.len() && !grace {
        let newer = &copies[index + 1];
        let what = format!(
            "{vm} counts {count} on {host}, {:?} after its newer copy on {} began",
            now - newer.first,
            newer.host
        );
        seen.violations.push(what);
    }
}

/// The processes that run each VM of this lab and are not stopped.
fn qemus(lab: &Path) -> BTreeMap<String, Vec<String>> {
    let mut running: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let dir = lab.display().to_string();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Ok(line) = std::fs::read(entry.path().join("cmdline")) else { continue };
        if !line.starts_with(b"qemu-system") && !line.starts_with(b"/usr/bin/qemu-system") {
            continue;
        }
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        let mounts = std::fs::read_to_string(entry.path().join("mountinfo")).unwrap_or_default();
        let stat = std::fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
        // Dead or being killed, or paused with its host: it executes nothing.
        if !mounts.contains(&dir) || matches!(state, None | Some('Z' | 'X' | 'T')) {
            continue;
        }
        let name = line.split("guest=").nth(1).and_then(|rest| rest.split([',', ' ']).next());
        let host = crate::lab::HOSTS.into_iter().find(|h| mounts.contains(&format!("/{h}/")));
        if let (Some(name), Some(host)) = (name, host) {
            running.entry(name.to_owned()).or_default().push(host.to_owned());
        }
    }
    running
}

fn processes(lab: &Path, shared: &Mutex<Seen>) {
    let running = qemus(lab);
    let mut seen = shared.lock().unwrap_or_else(PoisonError::into_inner);
    if graced(&seen) || seen.moves {
        return;
    }
    for (vm, hosts) in running {
        if hosts.len() > 1 {
            seen.violations.push(format!("processes of {vm} run on {}", hosts.join(" and ")));
        }
    }
}
