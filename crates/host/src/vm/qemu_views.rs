//! A guest's disks as they were at one instant, with QEMU: a filter between each device and its disk keeps what the guest
//! overwrites, and gives it out again.
//!
//! ```text
//!   device ─► bc0  copy-before-write ─► d0  the disk
//!                   │        └────────► bt0 what was overwritten: a file beside the disk, without a name
//!                   └─ bs0  the view ─► NBD, at a socket that only root reaches
//! ```
//!
//! A mirrored disk that is encrypted has what decrypts it, `e0`, above `d0`. A backup sees it above that, and a copy that is kept
//! beside the replica beneath it: `e0` is opened anew with the filter in the place of `d0`.
//!
//! The guest's processors stand while the filters of all disks that are asked for are put in (3 ms for two disks), so that all of them show
//! one instant. What changed between two views is noted in bitmaps of `d0`, one for each mark. They end with the process, and
//! do not go along to another host.
//!
//! What was shown with QEMU 11.1.3 (2026-11-30): setting a device to the node that it has ends QEMU, so it is asked before;
//! the view can only be made once its filter is in, and must go before the filter does; when the file cannot take what was
//! overwritten the view breaks, and the guest's write succeeds; a guest cannot be moved while a filter is in; `stop` waits for
//! replicas that hang, until they are cut off.
//!
//! Rejected: a job (`blockdev-backup`), whose source takes no second one, so that no replica could return meanwhile.

use super::{
    commands::{self, Command},
    driver::{DiskLaunch, GuestState, VmError},
    guest_agent::Freeze,
    launch::system,
    nbd::Nbd,
    qemu::QemuDriver,
    qemu_disks::device,
    qemu_hot_disks::{self, secret},
    qmp::{DEADLINE, Qmp, QmpError},
    record, run_dir,
    views::{DiskView, Extent, View, ViewAsked, Views},
};
use crate::storage::{luks, sparse::Sparse};
use async_trait::async_trait;
use haven_model::volume::LUKS_HEAD_BYTES;
use haven_store::seal::Plain;
use serde_json::{Value, json};
use std::{
    ffi::OsString,
    fs::OpenOptions,
    io,
    os::unix::fs::{OpenOptionsExt, fchown},
    path::{Path, PathBuf},
    sync::Arc,
};
use tokio::net::UnixStream;

/// What marks are called; names of bitmaps have at most 1023 characters.
const MARK: &str = "haven-mark.";
/// A mark as it was at the instant of the view that stands.
const FROZEN: &str = "haven-mark-frozen";
/// Bytes that one bit of a mark stands for.
const GRANULARITY: u32 = 65_536;
/// A guest's write waits at most so long for what it overwrites to be kept, s.
const PATIENCE: u32 = 5;

fn mark(owner: &str, name: &str) -> String {
    format!("{MARK}{owner}.{name}")
}

/// The nodes of a disk's view.
struct Nodes {
    disk: String,
    kept: String,
    filter: String,
    view: String,
}

fn nodes(place: usize, disk: String) -> Nodes {
    Nodes {
        disk,
        kept: format!("bt{place}"),
        filter: format!("bc{place}"),
        view: format!("bs{place}"),
    }
}

/// A disk whose view is asked for.
struct Seen<'a> {
    place: usize,
    disk: &'a DiskLaunch,
    /// As it lies in its replicas: the filter is beneath what decrypts it.
    beneath: bool,
    /// It has the mark that was asked for.
    marked: bool,
}

impl Seen<'_> {
    fn nodes(&self) -> Nodes {
        let drive =
            if self.beneath { format!("d{}", self.place) } else { self.disk.drive(self.place) };
        nodes(self.place, drive)
    }
}

/// One QEMU, for views of its disks and for snapshots in them.
#[derive(Clone)]
pub(super) struct Asked {
    pub(super) vm: String,
    pub(super) qmp: Arc<Qmp>,
    pub(super) directory: PathBuf,
    pub(super) launched: record::Launched,
}

/// What the guest does that QEMU has stopped, and nobody else.
pub(super) const HELD: &str = "paused";

impl Asked {
    pub(super) async fn tell(&self, command: &Command, arguments: Value) -> Result<Value, VmError> {
        let answer = self.qmp.call(command, arguments, DEADLINE).await;
        answer.map_err(|source| VmError::Qmp { vm: self.vm.clone(), source })
    }

    pub(super) async fn state(&self) -> Result<GuestState, VmError> {
        let answer = self.tell(&commands::STATUS, json!({})).await?;
        commands::guest_state(&answer)
            .ok_or_else(|| VmError::Qmp { vm: self.vm.clone(), source: QmpError::NotQemu })
    }

    /// The node that a device has.
    pub(super) async fn has(&self, place: usize) -> Result<Option<String>, VmError> {
        let of = json!({ "path": format!("/machine/peripheral/{}", device(place)), "property": "drive" });
        let answer = self.tell(&commands::PROPERTY, of).await?;
        Ok(answer.as_str().map(str::to_owned))
    }

    /// Gives a device another node.
    pub(super) async fn set(&self, place: usize, node: &str) -> Result<(), VmError> {
        // The one that it has already would end QEMU.
        if self.has(place).await?.as_deref() == Some(node) {
            return Ok(());
        }
        let set = json!({
            "path": format!("/machine/peripheral/{}", device(place)), "property": "drive", "value": node,
        });
        self.tell(&commands::SET_PROPERTY, set).await.map(drop)
    }

    /// The names of all nodes, and those of the bitmaps of each.
    async fn named(&self) -> Result<Vec<(String, Vec<String>)>, VmError> {
        let answer = self.tell(&commands::NODES, json!({ "flat": true })).await?;
        let text = |of: &Value| of.as_str().map(str::to_owned);
        let nodes = answer.as_array().into_iter().flatten().filter_map(|node| {
            let maps = node["dirty-bitmaps"].as_array().into_iter().flatten();
            let maps = maps.filter_map(|map| text(&map["name"])).collect();
            Some((text(&node["node-name"])?, maps))
        });
        Ok(nodes.collect())
    }

    async fn forget(&self, node: &str, name: &str) -> Result<(), VmError> {
        self.tell(&commands::REMOVE_BITMAP, json!({ "node": node, "name": name })).await.map(drop)
    }

    /// All its disks.
    fn disks(&self) -> impl Iterator<Item = (usize, &DiskLaunch)> {
        self.launched.launch.placed()
    }

    /// Puts the filter of a disk in, or takes it out: what stands there instead is `node`. Beneath what decrypts a disk, or before
    /// its device.
    async fn put(&self, place: usize, beneath: bool, node: &str) -> Result<(), VmError> {
        if !beneath {
            return self.set(place, node).await;
        }
        let options = json!([qemu_hot_disks::decrypts(place, node)]);
        self.tell(&commands::REOPEN, json!({ "options": options })).await.map(drop)
    }

    /// What is noted of this process, and of no later one.
    pub(super) fn own(&self) -> String {
        format!("{} {}", self.launched.pid, self.launched.start_time)
    }

    /// Whether a note of this name was left by this process.
    pub(super) fn noted(&self, name: &str) -> bool {
        std::fs::read_to_string(self.directory.join(name)).is_ok_and(|of| of == self.own())
    }

    /// Notes that its guest is about to stand: who finds that lets it run.
    pub(super) fn note_held(&self) -> Result<(), VmError> {
        let note = self.directory.join(run_dir::HELD);
        run_dir::write(&note, self.own().as_bytes(), None)
            .map_err(system(format!("{} cannot be written", note.display())))
    }

    pub(super) fn forget_note(&self, name: &str) -> Result<(), VmError> {
        let path = self.directory.join(name);
        run_dir::remove(&path).map_err(system(format!("{} cannot be removed", path.display())))
    }

    /// Lets a guest run that stands for a view. What is in already does it no harm. One of which a disk is parked stands on.
    async fn release(&self) -> Result<(), VmError> {
        if !self.noted(run_dir::HELD) {
            return Ok(());
        }
        if self.is_parked().await? {
            return self.forget_note(run_dir::HELD);
        }
        let answer = self.tell(&commands::STATUS, json!({})).await?;
        if answer["status"] == HELD {
            self.tell(&commands::CONTINUE, json!({})).await?;
        }
        self.forget_note(run_dir::HELD)
    }

    /// Takes away whatever is there of a view. A guest that stands for its sake goes on first.
    async fn clear(&self) -> Result<(), VmError> {
        self.release().await?;
        if self.noted(run_dir::FROZEN) {
            let agent = self.directory.join(run_dir::AGENT_SOCKET);
            Freeze::left(&agent, &self.directory.join(run_dir::FROZEN)).await;
        }
        let named = self.named().await?;
        let there = |name: &str| named.iter().any(|(node, _)| node == name);
        let has = |(place, disk): &(usize, &DiskLaunch)| {
            let of = nodes(*place, disk.drive(*place));
            there(&of.filter) || there(&of.kept)
        };
        let held: Vec<(usize, &DiskLaunch)> = self.disks().filter(has).collect();
        if !held.is_empty() {
            // Whoever reads is cut off; it is no error that nobody did.
            let _ = self.tell(&commands::SERVE_NO_MORE, json!({})).await;
        }
        for (place, disk) in held {
            let of = nodes(place, disk.drive(place));
            for node in [&of.view, &of.filter, &of.kept] {
                if *node == of.filter {
                    // Which of the two it is a daemon before may have known.
                    if disk.decrypted_above() && there(&of.disk) {
                        self.put(place, true, &format!("d{place}")).await?;
                    }
                    match self.set(place, &of.disk).await {
                        // Its guest has let the device go meanwhile.
                        Err(VmError::Qmp { source: QmpError::Refused { .. }, .. }) => {}
                        other => other?,
                    }
                }
                if there(node) {
                    self.tell(&commands::REMOVE_NODE, json!({ "node-name": node })).await?;
                }
            }
        }
        for (node, maps) in &named {
            if maps.iter().any(|map| map == FROZEN) {
                self.forget(node, FROZEN).await?;
            }
        }
        Ok(())
    }

    /// Makes the filter of a disk, which does nothing before its device has it.
    async fn filter(&self, of: &Seen<'_>) -> Result<(), VmError> {
        let (disk, uid) = (of.disk, self.launched.launch.uid);
        // What the filter sees of an encrypted disk is clear, and must not lie in a file as it is.
        let key = disk.luks.as_ref().filter(|_| !of.beneath);
        let stored = disk.size_bytes + if key.is_some() { LUKS_HEAD_BYTES } else { 0 };
        let size = if of.beneath { disk.stored_bytes() } else { stored };
        let (place, of) = (of.place, of.nodes());
        let path = scratch(&disk.path, ".view", uid, size).map_err(system(format!(
            "no file can be made beside {} for what the guest overwrites while it is read",
            disk.path.display()
        )))?;
        // It need not outlive QEMU, and its end must not wait for a disk.
        let cache = json!({ "no-flush": true });
        let mut kept = json!({
            "driver": "file", "filename": path, "discard": "unmap", "aio": "threads", "cache": cache,
        });
        if let Some(key) = key {
            put_head(key, &path)?;
            kept = json!({
                "driver": "luks", "key-secret": secret(place), "discard": "unmap", "cache": cache, "file": kept,
            });
        }
        kept["node-name"] = of.kept.clone().into();
        let kept = self.tell(&commands::ADD_NODE, kept).await;
        // QEMU has it open, and nobody else needs to.
        let removed = std::fs::remove_file(&path);
        kept?;
        removed.map_err(system(format!("{} cannot be removed", path.display())))?;
        let filter = json!({
            "driver": "copy-before-write", "node-name": of.filter, "file": of.disk, "target": of.kept,
            "on-cbw-error": "break-snapshot", "cbw-timeout": PATIENCE, "discard": "unmap",
        });
        self.tell(&commands::ADD_NODE, filter).await.map(drop)
    }

    /// The disks that are asked for.
    fn of<'a>(&'a self, asked: &'a ViewAsked) -> impl Iterator<Item = Seen<'a>> + 'a {
        let all = asked.disks.is_empty();
        let placed = self.disks().filter(move |(_, disk)| all || asked.disks.contains(&disk.name));
        placed.map(|(place, disk)| {
            let beneath = asked.stored && disk.decrypted_above();
            Seen { place, disk, beneath, marked: false }
        })
    }

    /// Removes the marks of this owner but for the one that is asked for; of each disk, whether it has that.
    async fn marks<'a>(&'a self, view: &'a ViewAsked) -> Result<Vec<Seen<'a>>, VmError> {
        let mut seen: Vec<Seen<'_>> = self.of(view).collect();
        let Some(asked) = &view.marks else { return Ok(seen) };
        let named = self.named().await?;
        let since = asked.since.as_ref().map(|since| mark(&asked.owner, since));
        for of in &mut seen {
            let node = of.nodes().disk;
            let maps = named.iter().filter(|(name, _)| *name == node).flat_map(|(_, maps)| maps);
            for map in maps.filter(|map| map.starts_with(&mark(&asked.owner, ""))) {
                if Some(map) == since.as_ref() {
                    of.marked = true;
                } else {
                    self.forget(&node, map).await?;
                }
            }
        }
        Ok(seen)
    }

    /// The instant: the guest stands until that is done. One that does not run has a reason, which is
    /// not this one's to judge.
    pub(super) async fn instant(
        &self,
        done: impl Future<Output = Result<(), VmError>>,
    ) -> Result<(), VmError> {
        let stands = |what: &str| VmError::System {
            what: format!("{} {what}, so its disks cannot be seen at one instant", self.vm),
            source: io::ErrorKind::Interrupted.into(),
        };
        if self.state().await? != GuestState::Running {
            return Err(stands("does not run"));
        }
        self.note_held()?;
        let put_in = match self.tell(&commands::STOP, json!({})).await {
            Ok(_) => done.await,
            Err(error) => Err(error),
        };
        // Somebody else may have let it run meanwhile, for its disk's sake: then it is not one instant.
        let held = self.tell(&commands::STATUS, json!({})).await;
        // Also after a `stop` of which nothing was heard: QEMU does one after the other. It may be on its way out, and then
        // it is `clear` that tries again.
        let released = self.tell(&commands::CONTINUE, json!({})).await;
        released?;
        self.forget_note(run_dir::HELD)?;
        put_in?;
        match held?["status"] == HELD {
            true => Ok(()),
            false => Err(stands("went on, or broke, while its disks were held")),
        }
    }

    /// The new marks come first and what is known since the one before is taken last, so that both say rather too much.
    async fn put_in(&self, view: &ViewAsked, seen: &[Seen<'_>]) -> Result<(), VmError> {
        if let Some(keep) = &view.keep {
            self.keep_in(&keep.disks, &keep.snapshot).await?;
        }
        let Some(asked) = &view.marks else {
            for of in seen {
                self.put(of.place, of.beneath, &of.nodes().filter).await?;
            }
            return Ok(());
        };
        let add = |of: &Seen<'_>, name: &str, disabled: bool| {
            json!({ "type": "block-dirty-bitmap-add", "data": {
                "node": of.nodes().disk, "name": name, "granularity": GRANULARITY, "disabled": disabled,
            }})
        };
        let new = mark(&asked.owner, &asked.mark);
        let begin: Vec<Value> = seen.iter().map(|of| add(of, &new, false)).collect();
        self.tell(&commands::TRANSACTION, json!({ "actions": begin })).await?;
        for of in seen {
            self.put(of.place, of.beneath, &of.nodes().filter).await?;
        }
        let Some(since) = &asked.since else { return Ok(()) };
        let mut known = Vec::new();
        for of in seen.iter().filter(|of| of.marked) {
            known.push(add(of, FROZEN, true));
            known.push(json!({ "type": "block-dirty-bitmap-merge", "data": {
                "node": of.nodes().disk, "target": FROZEN, "bitmaps": [mark(&asked.owner, since)],
            }}));
        }
        match known.is_empty() {
            true => Ok(()),
            false => self.tell(&commands::TRANSACTION, json!({ "actions": known })).await.map(drop),
        }
    }

    /// Serves the views.
    async fn serve(&self, socket: &Path, seen: &[Seen<'_>]) -> Result<(), VmError> {
        let listener = run_dir::listen(socket)
            .map_err(system(format!("the socket {} cannot be made", socket.display())))?;
        let name = json!({ "fdname": "view" });
        let taken = self.qmp.call_with(&commands::TAKE, name, Some(listener), DEADLINE).await;
        taken.map_err(|source| VmError::Qmp { vm: self.vm.clone(), source })?;
        let at = json!({ "addr": { "type": "fd", "data": { "str": "view" } } });
        self.tell(&commands::SERVE, at).await?;
        for disk in seen {
            let of = disk.nodes();
            let view = json!({
                "driver": "snapshot-access", "node-name": of.view, "file": of.filter, "discard": "unmap",
            });
            self.tell(&commands::ADD_NODE, view).await?;
            let mut export = json!({
                "type": "nbd", "id": format!("view-{}", of.view), "node-name": of.view, "name": of.view,
                // What is not read any more is given back by discarding it.
                "writable": true,
            });
            if disk.marked {
                export["bitmaps"] = json!([{ "node": of.disk, "name": FROZEN }]);
            }
            self.tell(&commands::EXPORT, export).await?;
        }
        Ok(())
    }
}

/// An empty file as large as the disk, beside it.
pub(super) fn scratch(disk: &Path, ending: &str, uid: u32, size: u64) -> io::Result<PathBuf> {
    let mut name = OsString::from(disk.file_name().ok_or(io::ErrorKind::InvalidInput)?);
    name.push(ending);
    let path = disk.with_file_name(name);
    run_dir::remove(&path)?;
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
    fchown(&file, Some(uid), Some(uid))?;
    file.set_len(size)?;
    Ok(path)
}

/// Puts the head of an encrypted disk on a file, whose key stands in another one.
fn put_head(key: &Path, path: &Path) -> Result<(), VmError> {
    let unread = || format!("the key {} cannot be read", key.display());
    let key = Plain::new(std::fs::read_to_string(key).map_err(system(unread()))?);
    let head = luks::head(&key).map_err(|failure| VmError::System {
        what: failure.what,
        source: io::ErrorKind::Unsupported.into(),
    })?;
    let unwritten = system(format!("{} cannot be written", path.display()));
    luks::put_head(path, &head).map_err(unwritten)
}

/// A disk's view, served by QEMU.
struct Served {
    nbd: Nbd<UnixStream>,
    marked: bool,
}

#[async_trait]
impl DiskView for Served {
    fn size(&self) -> u64 {
        self.nbd.size()
    }
    fn is_marked(&self) -> bool {
        self.marked
    }
    async fn status(&mut self, offset: u64, length: u32) -> io::Result<Vec<Extent>> {
        self.nbd.status(offset, length).await
    }
    async fn read(&mut self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.nbd.read(offset, into).await
    }
    async fn release(&mut self, offset: u64, length: u32) -> io::Result<()> {
        self.nbd.trim(offset, length).await.map(drop)
    }
}

/// All that is done for a view, in one go: whoever waits for it may be gone.
async fn open(asked: Asked, wanted: ViewAsked) -> Result<View, VmError> {
    let (vm, directory, record) = (asked.vm.clone(), &asked.directory, &asked.launched);
    asked.clear().await?;
    let seen = asked.marks(&wanted).await?;
    let made = async {
        for disk in &seen {
            asked.filter(disk).await?;
        }
        let agent = directory.join(run_dir::AGENT_SOCKET);
        let frozen = match record.launch.agent {
            true => {
                let note = directory.join(run_dir::FROZEN);
                Freeze::begin(&agent, &note, &asked.own()).await
            }
            false => None,
        };
        let instant = asked.instant(asked.put_in(&wanted, &seen)).await;
        let is_frozen = frozen.is_some();
        if let Some(frozen) = frozen {
            frozen.end().await;
        }
        instant?;
        let socket = directory.join(run_dir::VIEW_SOCKET);
        asked.serve(&socket, &seen).await?;
        let mut views: Vec<(String, Box<dyn DiskView>)> = Vec::new();
        for of in &seen {
            let unserved = system(format!("the disks of {vm} are not served as they were"));
            let connect = async {
                let stream = UnixStream::connect(&socket).await?;
                let mark = of.marked.then_some(FROZEN);
                let nbd = Nbd::connect(stream, &of.nodes().view, mark).await?;
                let view: Box<dyn DiskView> = Box::new(Served { nbd, marked: of.marked });
                if of.disk.decrypted_above() && !of.beneath {
                    let sparse = Sparse::new(view, &of.disk.path)?;
                    return Ok(Box::new(sparse) as Box<dyn DiskView>);
                }
                Ok(view)
            };
            views.push((of.disk.name.clone(), connect.await.map_err(unserved)?));
        }
        Ok(View { frozen: is_frozen, disks: views })
    };
    let made = made.await;
    if made.is_err() {
        let _ = asked.clear().await;
    }
    made
}

impl QemuDriver {
    /// The process of a VM, for views of it.
    pub(super) async fn asked(&self, vm: &str) -> Result<Option<Asked>, VmError> {
        let directory = self.directory(vm);
        let launched = record::read(&directory)
            .map_err(system(format!("the launch record of {vm} cannot be read")))?;
        let Some(launched) = launched else { return Ok(None) };
        let qmp = self.qmp(vm, DEADLINE).await?;
        Ok(Some(Asked { vm: vm.into(), qmp, directory, launched }))
    }
}

#[async_trait]
impl Views for QemuDriver {
    async fn open_view(&self, vm: &str, asked: &ViewAsked) -> Result<View, VmError> {
        let held = self.views(vm).ok_or_else(|| VmError::NotHere(vm.into()))?;
        let held = held.lock_owned().await;
        let wanted = asked.clone();
        let asked = self.asked(vm).await?.ok_or_else(|| VmError::NotHere(vm.into()))?;
        // A guest that stands half-way would stand for ever.
        let opened = tokio::spawn(async move {
            let _held = held;
            open(asked, wanted).await
        });
        opened.await.unwrap_or_else(|error| {
            let what = format!("the view of the disks of {vm} was given up");
            Err(VmError::System { what, source: io::Error::other(error) })
        })
    }

    async fn close_view(&self, vm: &str) -> Result<(), VmError> {
        let Some(held) = self.views(vm) else { return Ok(()) };
        let _held = held.lock().await;
        match self.asked(vm).await? {
            Some(asked) => asked.clear().await,
            None => Ok(()),
        }
    }
}
