//! Mirrored disks with QEMU: a `quorum` whose threshold is the number of replicas, so that a write is acknowledged once all
//! have it. Threshold and number of children stay as they are; a replica that does not count is stood in for by a node that
//! takes everything and gives nothing.
//!
//! ```text
//!   d0  quorum, reads from the first ─┬─ l0                  the replica of this host, a file
//!                                     ├─ r0.HOST.PRINT       one that counts, by NBD
//!                                     ├─ w0.HOST.PRINT ─ r0… one that was taken in: written to, never read from
//!                                     └─ a0.N ─ n0.N         in place of one that is not there
//! ```
//!
//! HOST and PRINT are hashes: a node's name has at most 31 characters. All that a later daemon needs is in the names and in
//! the graph that QEMU tells. PRINT ends with a character that counts on, so that what QEMU says late of a node (it says the
//! same at most once a second) is not taken for what a later one does.
//!
//! A write to a replica that is taken in cannot fail unnoticed: while one child more than the threshold is there, a failure is
//! an event and the copy, which begins afterwards, brings what was missed.

use super::{
    commands,
    driver::{DiskLaunch, VmError},
    launch::system,
    mirrors::{Catching, DiskMirror, Linked, MirrorLaunch, Mirrors, Print, ReplicaAt, short},
    qemu::QemuDriver,
    qmp::{DEADLINE, QmpError},
    record,
};
use crate::storage::mirrored::{daemon::USER, driver::export};
use async_trait::async_trait;
use haven_model::Name;
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::SocketAddr,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};
use tokio::net::TcpStream;

/// Digits of a host's hash.
const HOST_DIGITS: usize = 8;
/// Bytes that one bit of what is noted stands for.
const GRANULARITY: u32 = 65_536;
/// How long a connection may take to open, s. QEMU's main loop waits for it.
const OPEN_TIMEOUT: u32 = 2;
/// How long a replica may take to accept a connection.
const CONNECTS: Duration = Duration::from_millis(500);
/// How long a copy may take to end once it was told to.
const ENDS: Duration = Duration::from_secs(5);
/// Between two looks.
const LOOK: Duration = Duration::from_millis(5);

fn hash(host: &Name) -> String {
    short(host.as_str(), HOST_DIGITS)
}

/// The names of what belongs to one replica.
struct Names {
    /// The connection by which its guest's writes go.
    writes: String,
    /// What lets nobody read from it.
    wrap: String,
    /// The connection by which it is copied to.
    copy: String,
    job: String,
}

/// `tail`: the print of what serves it, and the character that counts on.
fn names(place: usize, host: &Name, tail: &str) -> Names {
    names_of(place, &hash(host), tail)
}

/// The same, by the host's hash.
fn names_of(place: usize, host: &str, tail: &str) -> Names {
    Names {
        writes: format!("r{place}.{host}.{tail}"),
        wrap: format!("w{place}.{host}.{tail}"),
        copy: format!("c{place}.{host}.{tail}"),
        job: format!("up{place}.{host}"),
    }
}

/// That of a replica that is open when its process begins.
fn first(print: &Print) -> String {
    format!("{}0", print.as_str())
}

/// That of one that is taken in.
fn next(print: &Print) -> String {
    static TAKEN_IN: AtomicU32 = AtomicU32::new(0);
    let number = 1 + TAKEN_IN.fetch_add(1, Ordering::Relaxed) % 35;
    let last = char::from_digit(number, 36).unwrap_or('z');
    format!("{}{last}", print.as_str())
}

/// What is noted for a replica of a machine.
fn bitmap(host: &Name, machine: &str) -> String {
    format!("lacks.{}.{machine}", hash(host))
}

fn stand_ins(place: usize, number: usize) -> (String, String) {
    (format!("a{place}.{number}"), format!("n{place}.{number}"))
}

/// The object with the key of a run.
#[must_use]
pub fn key(place: usize, mirror: &MirrorLaunch) -> String {
    format!(
        "tls-creds-psk,id=k{place},endpoint=client,username={USER},dir={}",
        mirror.keys.display()
    )
}

fn connection(name: &str, place: usize, mirror: &MirrorLaunch, at: &ReplicaAt) -> Value {
    json!({
        "driver": "nbd", "node-name": name, "tls-creds": format!("k{place}"),
        "server": { "type": "inet", "host": at.address.to_string(), "port": at.port.to_string() },
        "export": export(&mirror.volume, mirror.run, &at.instance),
        // A request fails at once when the connection is gone: waiting would hold the guest up where nothing can cut it.
        "reconnect-delay": 0, "open-timeout": OPEN_TIMEOUT,
    })
}

fn unreadable(name: &str, image: &str) -> Value {
    let error = json!({ "event": "none", "iotype": "read", "errno": 5, "immediately": true });
    json!({ "driver": "blkdebug", "node-name": name, "image": image, "inject-error": [error] })
}

fn stand_in(place: usize, number: usize, size: u64) -> [Value; 2] {
    let (name, beneath) = stand_ins(place, number);
    let nothing =
        json!({ "driver": "null-co", "node-name": beneath, "size": size, "read-zeroes": true });
    [nothing, unreadable(&name, &beneath)]
}

/// The nodes of a disk at the start of its process, each after those that it stands on.
#[must_use]
pub fn nodes(place: usize, disk: &DiskLaunch, mirror: &MirrorLaunch) -> Vec<Value> {
    let local = format!("l{place}");
    let direct = json!({ "direct": true });
    let mut nodes = vec![json!({
        "driver": disk.format, "node-name": local, "discard": "unmap", "cache": direct,
        "file": { "driver": "file", "filename": disk.path, "aio": "threads", "cache": direct },
    })];
    let mut children = vec![local];
    for at in &mirror.others {
        let name = names(place, &at.host, &first(&at.print())).writes;
        nodes.push(connection(&name, place, mirror, at));
        children.push(name);
    }
    for number in children.len()..mirror.copies {
        nodes.extend(stand_in(place, number, disk.size_bytes));
        children.push(stand_ins(place, number).0);
    }
    nodes.push(json!({
        "driver": "quorum", "node-name": format!("d{place}"), "children": children,
        "vote-threshold": mirror.copies, "read-pattern": "fifo",
    }));
    nodes
}

/// A child of a mirrored disk.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Child {
    /// What the disk calls it.
    edge: String,
    node: String,
}

impl Child {
    fn stands_in(&self) -> bool {
        self.node.starts_with('a')
    }
    /// Of which host, by its hash, and which process serves it; with the tail of its name.
    fn of(&self) -> Option<(&str, Print, &str)> {
        let mut parts = self.node.split('.');
        let kind = parts.next()?;
        let replica = kind.starts_with('r') || kind.starts_with('w');
        let (host, tail) = (parts.next()?, parts.next()?);
        let print = Print::read(tail.get(..tail.len().checked_sub(1)?)?)?;
        replica.then_some((host, print, tail))
    }
    fn tail(&self) -> &str {
        self.of().map_or("", |(_, _, tail)| tail)
    }
}

/// Reads the children of a disk from the answer to [`commands::GRAPH`].
fn children(graph: &Value, place: usize) -> Vec<Child> {
    let nodes = graph["nodes"].as_array().into_iter().flatten();
    let names: BTreeMap<u64, &str> =
        nodes.filter_map(|node| Some((node["id"].as_u64()?, node["name"].as_str()?))).collect();
    let disk = format!("d{place}");
    let edges = graph["edges"].as_array().into_iter().flatten();
    let children = edges.filter_map(|edge| {
        let parent = names.get(&edge["parent"].as_u64()?)?;
        let node = names.get(&edge["child"].as_u64()?)?;
        (*parent == disk).then_some(())?;
        Some(Child { edge: edge["name"].as_str()?.to_owned(), node: (*node).to_owned() })
    });
    children.collect()
}

fn catching(jobs: &Value, id: &str) -> Catching {
    let mut jobs = jobs.as_array().into_iter().flatten();
    let Some(job) = jobs.find(|job| job["id"] == id) else { return Catching::Not };
    let figure = |name: &str| job[name].as_u64().unwrap_or(0);
    match (job["status"].as_str().unwrap_or_default(), job["error"].as_str()) {
        ("concluded", None) => Catching::Done,
        ("concluded" | "aborting" | "null", said) => {
            Catching::Broke(said.unwrap_or("the copy was ended").to_owned())
        }
        _ => Catching::Goes { total: figure("total-progress"), done: figure("current-progress") },
    }
}

/// A mirrored disk of a process.
struct Disk {
    launch: DiskLaunch,
    mirror: MirrorLaunch,
}

impl QemuDriver {
    fn disk_of(&self, vm: &str, place: usize) -> Result<Disk, VmError> {
        let read = record::read(&self.directory(vm));
        let record = read.map_err(system(format!("the launch record of {vm} cannot be read")))?;
        let launch = record.and_then(|record| {
            let at = record.launch.at(place)?;
            record.launch.disks.into_iter().nth(at)
        });
        let with = launch.and_then(|launch| Some((launch.mirror.clone()?, launch)));
        let (mirror, launch) = with.ok_or_else(|| VmError::NotHere(vm.into()))?;
        Ok(Disk { launch, mirror })
    }

    async fn children(&self, vm: &str, place: usize) -> Result<Vec<Child>, VmError> {
        Ok(children(&self.tell(vm, &commands::GRAPH, json!({})).await?, place))
    }

    async fn child(
        &self,
        vm: &str,
        place: usize,
        host: &Name,
    ) -> Result<Option<(Child, Print)>, VmError> {
        let hash = hash(host);
        let all = self.children(vm, place).await?.into_iter();
        let mut with = all.filter_map(|child| {
            let print = child.of().filter(|(of, ..)| *of == hash)?.1;
            Some((child, print))
        });
        Ok(with.next())
    }

    /// What may have been done already.
    pub(super) async fn try_tell(
        &self,
        vm: &str,
        command: &commands::Command,
        arguments: Value,
    ) -> Result<(), VmError> {
        match self.tell(vm, command, arguments).await {
            Err(VmError::Qmp { source: QmpError::Refused { command, said }, .. }) => {
                tracing::debug!(vm, command, said, "QEMU had nothing to do");
                Ok(())
            }
            other => other.map(drop),
        }
    }

    async fn remove_node(&self, vm: &str, node: &str) -> Result<(), VmError> {
        self.try_tell(vm, &commands::REMOVE_NODE, json!({ "node-name": node })).await
    }

    /// Adds a child that takes everything and gives nothing.
    async fn stand_in_more(&self, vm: &str, place: usize, size: u64) -> Result<(), VmError> {
        let taken = self.children(vm, place).await?;
        let free = (0..=taken.len()).find(|number| {
            let name = stand_ins(place, *number).0;
            taken.iter().all(|child| child.node != name)
        });
        let number = free.unwrap_or_default();
        let (name, beneath) = stand_ins(place, number);
        for left in [&name, &beneath] {
            self.remove_node(vm, left).await?;
        }
        for node in stand_in(place, number, size) {
            self.tell(vm, &commands::ADD_NODE, node).await?;
        }
        let more = json!({ "parent": format!("d{place}"), "node": name });
        self.tell(vm, &commands::CHANGE_CHILD, more).await.map(drop)
    }

    async fn drop_child(&self, vm: &str, place: usize, child: &Child) -> Result<(), VmError> {
        let out = json!({ "parent": format!("d{place}"), "child": child.edge });
        self.tell(vm, &commands::CHANGE_CHILD, out).await.map(drop)
    }

    /// Takes stand-ins away until there are as many children as there are to be.
    async fn even(&self, vm: &str, place: usize, copies: usize) -> Result<Vec<Child>, VmError> {
        loop {
            let all = self.children(vm, place).await?;
            let spare = all.iter().find(|child| child.stands_in());
            let Some(spare) = spare.filter(|_| all.len() > copies) else { return Ok(all) };
            self.drop_child(vm, place, spare).await?;
            self.remove_node(vm, &spare.node).await?;
            self.remove_node(vm, &spare.node.replacen('a', "n", 1)).await?;
        }
    }

    /// Ends all copies to replicas of a disk.
    pub(super) async fn end_copies(&self, vm: &str, place: usize) -> Result<(), VmError> {
        for child in self.children(vm, place).await? {
            if let Some((host, _, tail)) = child.of() {
                self.end_copy(vm, &names_of(place, host, tail)).await?;
            }
        }
        Ok(())
    }

    /// Ends a copy, and forgets it.
    async fn end_copy(&self, vm: &str, names: &Names) -> Result<(), VmError> {
        let until = tokio::time::Instant::now() + ENDS;
        loop {
            let jobs = self.tell(vm, &commands::JOBS, json!({})).await?;
            match catching(&jobs, &names.job) {
                Catching::Not => break,
                Catching::Goes { .. } => {
                    let end = json!({ "device": names.job, "force": true });
                    self.try_tell(vm, &commands::END_MIRROR, end).await?;
                }
                Catching::Done | Catching::Broke(_) => {
                    self.try_tell(vm, &commands::DISMISS, json!({ "id": names.job })).await?;
                }
            }
            if tokio::time::Instant::now() >= until {
                let source = QmpError::Late { command: names.job.clone(), within: ENDS };
                return Err(VmError::Qmp { vm: vm.into(), source });
            }
            tokio::time::sleep(LOOK).await;
        }
        self.remove_node(vm, &names.copy).await
    }

    /// What is noted for a host's replica.
    async fn noted(&self, vm: &str, place: usize, host: &Name) -> Result<Vec<String>, VmError> {
        let nodes = self.tell(vm, &commands::NODES, json!({ "flat": true })).await?;
        let disk = format!("d{place}");
        let mut all = nodes.as_array().into_iter().flatten();
        let node = all.find(|node| node["node-name"] == disk.as_str());
        let maps = node.and_then(|node| node["dirty-bitmaps"].as_array());
        let of = bitmap(host, "");
        let names = maps.into_iter().flatten().filter_map(|map| map["name"].as_str());
        Ok(names.filter(|name| name.starts_with(&of)).map(str::to_owned).collect())
    }

    async fn begin_copy(
        &self,
        vm: &str,
        place: usize,
        disk: &Disk,
        at: &ReplicaAt,
        names: &Names,
    ) -> Result<(), VmError> {
        let node = format!("d{place}");
        let wanted = bitmap(&at.host, at.print().machine());
        let noted = self.noted(vm, place, &at.host).await?;
        for other in noted.iter().filter(|name| **name != wanted) {
            let forget = json!({ "node": node, "name": other });
            self.tell(vm, &commands::REMOVE_BITMAP, forget).await?;
        }
        let to = connection(&names.copy, place, &disk.mirror, at);
        self.tell(vm, &commands::ADD_NODE, to).await?;
        let mut copy = json!({
            "job-id": names.job, "device": node, "target": names.copy, "auto-dismiss": false,
            "sync": "full",
        });
        if noted.contains(&wanted) {
            copy["sync"] = "bitmap".into();
            copy["bitmap"] = wanted.into();
            copy["bitmap-mode"] = "on-success".into();
        }
        self.tell(vm, &commands::BACKUP, copy).await.map(drop)
    }
}

/// Sees whether a replica answers: QEMU stands still while it connects, so somebody else tries first.
pub(super) async fn meet(replica: &ReplicaAt) -> Result<(), VmError> {
    let address = SocketAddr::new(replica.address, replica.port);
    let met = tokio::time::timeout(CONNECTS, TcpStream::connect(address)).await;
    let met = met.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
    met.map(drop).map_err(system(format!(
        "the replica on {} does not answer at {address}; a firewall between the hosts may be why",
        replica.host
    )))
}

#[async_trait]
impl Mirrors for QemuDriver {
    async fn mirror(
        &self,
        vm: &str,
        place: usize,
        hosts: &BTreeSet<Name>,
    ) -> Result<DiskMirror, VmError> {
        let disk = self.disk_of(vm, place)?;
        let all = self.even(vm, place, disk.mirror.copies).await?;
        if all.is_empty() {
            // It is being closed, and which of its replicas are well is not to be told any more.
            return Err(VmError::NotHere(format!("the disk at {place} of {vm}")));
        }
        let jobs = self.tell(vm, &commands::JOBS, json!({})).await?;
        let failed = self.failed_nodes(vm, |_| {});
        let hosts: BTreeMap<String, &Name> = hosts.iter().map(|host| (hash(host), host)).collect();
        for child in &all {
            // Of a host that is no part of the cluster any more, and has its replica no more.
            if child.of().is_some_and(|(of, ..)| !hosts.contains_key(of)) {
                self.leave(vm, place, &disk, child).await?;
            }
        }
        let linked = all.iter().filter_map(|child| {
            let (of, print, tail) = child.of()?;
            let host = hosts.get(of)?;
            let catching = catching(&jobs, &names(place, host, tail).job);
            let broken = failed.contains(&child.node);
            Some(((*host).clone(), Linked { print, broken, catching }))
        });
        Ok(DiskMirror { linked: linked.collect(), stopped: self.is_stopped(vm).await? })
    }

    async fn cut(&self, vm: &str, place: usize, host: &Name) -> Result<(), VmError> {
        // All of it out of band: whatever else is asked may wait for the one that is silent.
        let open = self.tell(vm, &commands::YANKS, json!({})).await?;
        let (writes, copy) =
            (format!("r{place}.{}.", hash(host)), format!("c{place}.{}.", hash(host)));
        let nodes = open.as_array().into_iter().flatten();
        let nodes = nodes.filter_map(|instance| instance["node-name"].as_str());
        for node in nodes.filter(|node| node.starts_with(&writes) || node.starts_with(&copy)) {
            let instance = json!([{ "type": "block-node", "node-name": node }]);
            self.try_tell(vm, &commands::YANK, json!({ "instances": instance })).await?;
            let wrapped = node.replacen('r', "w", 1);
            self.failed_nodes(vm, |failed| failed.extend([node.to_owned(), wrapped]));
        }
        Ok(())
    }

    async fn note(&self, vm: &str, place: usize, host: &Name) -> Result<(), VmError> {
        let Some((_, print)) = self.child(vm, place, host).await? else { return Ok(()) };
        let map = json!({
            "node": format!("d{place}"), "name": bitmap(host, print.machine()), "granularity": GRANULARITY,
        });
        self.try_tell(vm, &commands::ADD_BITMAP, map).await
    }

    async fn leave_out(&self, vm: &str, place: usize, host: &Name) -> Result<(), VmError> {
        let disk = self.disk_of(vm, place)?;
        match self.child(vm, place, host).await? {
            Some((child, _)) => self.leave(vm, place, &disk, &child).await,
            None => Ok(()),
        }
    }

    async fn take_in(&self, vm: &str, place: usize, replica: &ReplicaAt) -> Result<(), VmError> {
        let disk = self.disk_of(vm, place)?;
        meet(replica).await?;
        let names = names(place, &replica.host, &next(&replica.print()));
        for left in [&names.copy, &names.wrap, &names.writes] {
            self.remove_node(vm, left).await?;
        }
        let to = connection(&names.writes, place, &disk.mirror, replica);
        self.tell(vm, &commands::ADD_NODE, to).await?;
        let wrap = unreadable(&names.wrap, &names.writes);
        self.tell(vm, &commands::ADD_NODE, wrap).await?;
        let more = json!({ "parent": format!("d{place}"), "node": names.wrap });
        self.tell(vm, &commands::CHANGE_CHILD, more).await?;
        // From here on nothing is acknowledged that it has not got.
        self.even(vm, place, disk.mirror.copies).await?;
        self.begin_copy(vm, place, &disk, replica, &names).await
    }

    async fn flush_copy(&self, vm: &str, place: usize, host: &Name) -> Result<(), VmError> {
        let Some((child, _)) = self.child(vm, place, host).await? else { return Ok(()) };
        // QEMU flushes what it closes.
        self.remove_node(vm, &names(place, host, child.tail()).copy).await
    }

    async fn settle(&self, vm: &str, place: usize, host: &Name) -> Result<(), VmError> {
        let Some((child, _)) = self.child(vm, place, host).await? else { return Ok(()) };
        self.end_copy(vm, &names(place, host, child.tail())).await?;
        for name in self.noted(vm, place, host).await? {
            let forget = json!({ "node": format!("d{place}"), "name": name });
            self.try_tell(vm, &commands::REMOVE_BITMAP, forget).await?;
        }
        Ok(())
    }

    async fn go_on(&self, vm: &str) -> Result<(), VmError> {
        // If the disk of this host fails again, that is told again.
        self.failed_nodes(vm, |failed| failed.retain(|node| !node.starts_with('l')));
        self.tell(vm, &commands::CONTINUE, json!({})).await.map(drop)
    }

    async fn mirrored(&self, vm: &str) -> Vec<(usize, String)> {
        let record = record::read(&self.directory(vm)).ok().flatten();
        record.map(|record| record.launch.mirrored_volumes()).unwrap_or_default()
    }

    fn ended_whole(&self, vm: &str, epoch: u64) -> Vec<String> {
        let whole = self.was_whole(vm).filter(|(of, _)| *of == epoch);
        whole.map(|(_, volumes)| volumes).unwrap_or_default()
    }

    async fn open_arrived(
        &self,
        vm: &str,
        place: usize,
        mirror: &MirrorLaunch,
    ) -> Result<Result<(), Name>, VmError> {
        for at in &mirror.others {
            if let Err(error) = meet(at).await {
                tracing::debug!(vm, %error, "it is not opened yet");
                return Ok(Err(at.host.clone()));
            }
        }
        // What is taken in later goes by it, by whichever daemon.
        record::note_mirror(&self.directory(vm), place, mirror)
            .map_err(system(format!("the launch record of {vm} cannot be written")))?;
        let key = json!({
            "qom-type": "tls-creds-psk", "id": format!("k{place}"), "endpoint": "client",
            "username": USER, "dir": mirror.keys,
        });
        // It is there already if this was tried before.
        self.try_tell(vm, &commands::ADD_OBJECT, key).await?;
        let disk = self.disk_of(vm, place)?;
        let there = self.children(vm, place).await?;
        for at in &mirror.others {
            let name = names(place, &at.host, &first(&at.print())).writes;
            if there.iter().any(|child| child.node == name) {
                continue;
            }
            // Another process serves it by now than when this was tried before.
            if let Some((before, _)) = self.child(vm, place, &at.host).await? {
                self.leave(vm, place, &disk, &before).await?;
            }
            let node = connection(&name, place, mirror, at);
            match self.tell(vm, &commands::ADD_NODE, node).await {
                Ok(_) => {}
                Err(VmError::Qmp { source: QmpError::Refused { said, .. }, .. }) => {
                    tracing::warn!(vm, host = %at.host, said, "its replica does not open");
                    return Ok(Err(at.host.clone()));
                }
                Err(error) => return Err(error),
            }
            let more = json!({ "parent": format!("d{place}"), "node": name });
            self.tell(vm, &commands::CHANGE_CHILD, more).await?;
        }
        self.even(vm, place, mirror.copies).await.map(|_| Ok(()))
    }

    async fn let_go(&self, vm: &str) -> Result<(), VmError> {
        for (place, _) in self.mirrored(vm).await {
            let (disk, local) = (self.disk_of(vm, place)?, format!("l{place}"));
            let all = self.children(vm, place).await?;
            let Some(own) = all.iter().find(|child| child.node == local) else { continue };
            self.stand_in_more(vm, place, disk.launch.size_bytes).await?;
            self.drop_child(vm, place, own).await?;
            // QEMU keeps the file locked as long as the disk has it, although its guest is elsewhere.
            let close = json!({ "node-name": local });
            self.tell(vm, &commands::REMOVE_NODE, close).await?;
        }
        Ok(())
    }

    async fn is_stopped(&self, vm: &str) -> Result<bool, VmError> {
        let status = self.ask(vm, &commands::STATUS, DEADLINE).await?;
        Ok(status["status"] == commands::STOPPED_BY_DISK)
    }
}

impl QemuDriver {
    /// Puts what takes everything and gives nothing in the place of a replica.
    async fn leave(
        &self,
        vm: &str,
        place: usize,
        disk: &Disk,
        child: &Child,
    ) -> Result<(), VmError> {
        let Some((host, _, tail)) = child.of() else { return Ok(()) };
        let names = names_of(place, host, tail);
        // Whatever it does, it holds nobody up.
        self.yank(vm, &names).await?;
        self.end_copy(vm, &names).await?;
        self.stand_in_more(vm, place, disk.launch.size_bytes).await?;
        self.drop_child(vm, place, child).await?;
        for node in [&names.wrap, &names.writes] {
            self.remove_node(vm, node).await?;
        }
        self.failed_nodes(vm, |failed| _ = failed.remove(&child.node));
        Ok(())
    }

    /// Ends the connections to a replica at once.
    async fn yank(&self, vm: &str, names: &Names) -> Result<(), VmError> {
        for node in [&names.writes, &names.copy] {
            let instance = json!([{ "type": "block-node", "node-name": node }]);
            self.try_tell(vm, &commands::YANK, json!({ "instances": instance })).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::{Child, catching, children, names, next};
    use crate::vm::mirrors::{Catching, Print};
    use haven_model::Name;
    use serde_json::json;

    #[test]
    fn names_fit_and_are_read_back() {
        let print = Print::of("boot", "instance");
        let host = Name::new("a-host-with-a-name-of-forty-characters-x").unwrap();
        let names = names(99, &host, &next(&print));
        assert!(names.writes.len() <= 31, "{}", names.writes);
        assert_ne!(next(&print), next(&print));
        for node in [names.writes, names.wrap] {
            let child = Child { edge: "children.1".into(), node };
            assert_eq!(child.of().unwrap().1, print);
        }
        let other = |node: &str| Child { edge: String::new(), node: node.into() };
        assert_eq!(other("l0").of(), None);
        assert_eq!(other("a0.1").of(), None);
        assert!(other("a0.1").stands_in());
        assert_ne!(Print::of("boot", "another").as_str(), print.as_str());
        assert_eq!(Print::of("boot", "another").machine(), print.machine());
    }

    #[test]
    fn what_qemu_says_of_a_mirrored_disk_is_read() {
        let graph = json!({
            "nodes": [
                { "id": 1, "type": "block-driver", "name": "d0" },
                { "id": 2, "type": "block-driver", "name": "l0" },
                { "id": 3, "type": "block-driver", "name": "a0.1" },
                { "id": 4, "type": "block-backend", "name": "" },
                { "id": 5, "type": "block-driver", "name": "n0.1" },
            ],
            "edges": [
                { "parent": 4, "child": 1, "name": "root" },
                { "parent": 1, "child": 2, "name": "children.0" },
                { "parent": 1, "child": 3, "name": "children.1" },
                { "parent": 3, "child": 5, "name": "image" },
            ],
        });
        let nodes: Vec<String> = children(&graph, 0).into_iter().map(|c| c.node).collect();
        assert_eq!(nodes, ["l0", "a0.1"]);
        assert!(children(&graph, 1).is_empty());
        let jobs = json!([
            { "id": "up0.x", "status": "running", "current-progress": 3, "total-progress": 9 },
            { "id": "up0.y", "status": "concluded" },
            { "id": "up0.z", "status": "concluded", "error": "no way" },
        ]);
        assert_eq!(catching(&jobs, "up0.x"), Catching::Goes { total: 9, done: 3 });
        assert_eq!(catching(&jobs, "up0.y"), Catching::Done);
        assert_eq!(catching(&jobs, "up0.z"), Catching::Broke("no way".into()));
        assert_eq!(catching(&jobs, "up1.x"), Catching::Not);
    }
}
