//! Serves replicas with `qemu-storage-daemon`, one process for each.
//!
//! A process outlives the daemon that started it, as a VM does; its record says what it serves. Another run is another
//! key, and a server's key cannot be exchanged: so the server is stopped, which ends all its connections and exports, and
//! started anew. The process stays, and with it what it knows of the replica.

use super::{
    driver::{Base, ReplicaDriver, ReplicaError, ReplicaWanted, Served, export},
    kept, runs,
};
use crate::vm::{
    commands::{self, Command},
    launch::{find, last_words},
    process::{Process, look},
    qmp::{DEADLINE, Qmp, QmpError},
    run_dir,
};
use async_trait::async_trait;
use haven_store::seal::Plain;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io,
    net::{IpAddr, TcpListener},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{fs::MetadataExt, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::Stdio,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, UNIX_EPOCH},
};

/// What runs, and what it serves.
const RECORD: &str = "replica.json";
/// QEMU reads its keys from a file of this name.
const KEYS: &str = "keys.psk";
/// The name that goes with the key.
pub const USER: &str = "haven";
/// The variable by which a process tells which directory is its own.
const DIRECTORY: &str = "HAVEN_REPLICA_DIRECTORY";
/// The only node, and the only key.
const NODE: &str = "replica";
const KEY: &str = "key";
/// A connection for the owner's writes, one for what it copies, and some that are about to end.
const CONNECTIONS: u32 = 16;
/// How often another port is tried.
const PORTS: u32 = 8;
/// How long a process may take to begin, and to end once it was killed.
const PATIENCE: Duration = Duration::from_secs(5);

/// Serves replicas by processes of their own.
pub struct StorageDaemons {
    /// The program, looked up in `PATH` unless it is a path.
    program: PathBuf,
    /// `RUN/replicas`: gone after a reboot.
    run_dir: PathBuf,
    slots: Mutex<BTreeMap<String, Slot>>,
}

/// One volume; whoever holds it is the only one who changes anything about it.
type Slot = Arc<tokio::sync::Mutex<Option<Running>>>;

struct Running {
    process: Process,
    qmp: Arc<Qmp>,
    directory: PathBuf,
    record: Record,
}

/// What a later daemon needs to take a process over.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Record {
    volume: String,
    pid: i32,
    /// Tells it from a later process of the same number.
    start_time: u64,
    instance: String,
    /// Which file it has open.
    file: String,
    /// Nothing while that changes.
    serves: Option<Serves>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Serves {
    run: u64,
    port: u16,
}

fn system(what: impl Into<String>) -> impl FnOnce(io::Error) -> ReplicaError {
    let what = what.into();
    move |source| ReplicaError::System { what, source }
}

/// What tells a file from another one in its place: its number, and when it was made where the file system keeps that.
fn identity(path: &Path) -> io::Result<String> {
    let of = std::fs::metadata(path)?;
    let made = of.created().ok().and_then(|at| at.duration_since(UNIX_EPOCH).ok());
    Ok(format!("{}-{}-{}", of.dev(), of.ino(), made.unwrap_or_default().as_nanos()))
}

/// Writes the key of a run as QEMU reads it, for the user that its process runs as.
fn write_keys(path: &Path, key: &Plain, reader: u32) -> io::Result<()> {
    run_dir::write(path, format!("{USER}:{}\n", key.expose()).as_bytes(), Some(reader))
}

/// The same in a directory of its own, `name` beneath `directory`.
///
/// # Errors
/// When the file system does not let it.
pub fn write_key(directory: &Path, name: &str, key: &Plain, reader: u32) -> io::Result<()> {
    let keys = run_dir::prepare(directory, name)?;
    write_keys(&keys.join(KEYS), key, reader)
}

impl Running {
    fn served(&self) -> Option<Served> {
        let Serves { run, port } = self.record.serves?;
        let Record { instance, file, .. } = self.record.clone();
        Some(Served { run, port, instance, file })
    }

    fn runs(&self) -> bool {
        let stat = look(Path::new("/proc"), self.process.pid());
        stat.is_ok_and(|stat| {
            stat.is_some_and(|stat| !stat.ended && stat.start_time == self.record.start_time)
        })
    }

    fn refused(&self, source: QmpError) -> ReplicaError {
        if matches!(source, QmpError::Closed) && !self.runs() {
            let said = last_words(&self.directory);
            return ReplicaError::Died { volume: self.record.volume.clone(), said };
        }
        ReplicaError::Qmp { volume: self.record.volume.clone(), source }
    }

    async fn tell(&self, command: &Command, arguments: Value) -> Result<Value, ReplicaError> {
        let answer = self.qmp.call(command, arguments, DEADLINE).await;
        answer.map_err(|source| self.refused(source))
    }

    /// The same for what may have nothing to do.
    async fn undo(&self, command: &Command, arguments: Value) -> Result<(), ReplicaError> {
        match self.qmp.call(command, arguments, DEADLINE).await {
            Ok(_) | Err(QmpError::Refused { .. }) => Ok(()),
            Err(source) => Err(self.refused(source)),
        }
    }

    fn note(&mut self, serves: Option<Serves>) -> Result<(), ReplicaError> {
        self.record.serves = serves;
        let text = serde_json::to_vec(&self.record).expect("a record is plain data");
        let path = self.directory.join(RECORD);
        let what = format!("{} cannot be written", path.display());
        run_dir::write(&path, &text, None).map_err(system(what))
    }

    /// Ends who is served, and serves another run.
    async fn change(&mut self, wanted: &ReplicaWanted) -> Result<Served, ReplicaError> {
        // First: a daemon that is killed in between must not be believed to serve what it did.
        self.note(None)?;
        self.undo(&commands::SERVE_NO_MORE, json!({})).await?;
        let left = self.tell(&commands::EXPORTS, json!({})).await?;
        if left.as_array().is_none_or(|left| !left.is_empty()) {
            let said = format!("it still serves after it was told to stop: {left}");
            return Err(ReplicaError::Died { volume: wanted.volume.clone(), said });
        }
        self.grow(wanted).await?;
        self.undo(&commands::REMOVE_OBJECT, json!({ "id": KEY })).await?;
        let keys = self.directory.join(KEYS);
        write_keys(&keys, &wanted.key, wanted.owner_uid)
            .map_err(system(format!("{} cannot be written", keys.display())))?;
        let key = json!({ "qom-type": "tls-creds-psk", "id": KEY, "endpoint": "server", "dir": self.directory });
        self.tell(&commands::ADD_OBJECT, key).await?;
        let port = self.listen(wanted.address).await?;
        let export = json!({
            "type": "nbd", "id": NODE, "node-name": NODE,
            "name": export(&wanted.volume, wanted.run, &self.record.instance), "writable": true,
        });
        self.tell(&commands::EXPORT, export).await?;
        self.note(Some(Serves { run: wanted.run, port }))?;
        let Record { instance, file, .. } = self.record.clone();
        Ok(Served { run: wanted.run, port, instance, file })
    }

    /// Makes the file as large as the volume is in the run that it is to be served to.
    async fn grow(&self, wanted: &ReplicaWanted) -> Result<(), ReplicaError> {
        let unseen = || system(format!("{} cannot be looked at", wanted.path.display()));
        // Also when the file is so large already: its daemon may have opened it before.
        let length = std::fs::metadata(&wanted.path).map_err(unseen())?.len();
        let size = json!({ "node-name": NODE, "size": length.max(wanted.size_bytes) });
        self.tell(&commands::RESIZE, size).await.map(drop)
    }

    /// Listens at a port that is free. Somebody may take it in between; then it is another one.
    async fn listen(&self, address: IpAddr) -> Result<u16, ReplicaError> {
        let mut tried = 0;
        loop {
            tried += 1;
            let free = TcpListener::bind((address, 0)).and_then(|socket| socket.local_addr());
            let port = free
                .map_err(system(format!("no port of {address} can be had for a replica")))?
                .port();
            let at = json!({ "type": "inet", "data": { "host": address.to_string(), "port": port.to_string() } });
            let arguments = json!({ "addr": at, "tls-creds": KEY, "max-connections": CONNECTIONS });
            match self.qmp.call(&commands::SERVE, arguments, DEADLINE).await {
                Ok(_) => return Ok(port),
                Err(QmpError::Refused { said, .. }) if said.contains("in use") && tried < PORTS => {
                }
                Err(source) => return Err(self.refused(source)),
            }
        }
    }
}

impl StorageDaemons {
    /// Knows of nothing yet; what an earlier daemon left is taken over when it is asked for.
    #[must_use]
    pub fn new(program: PathBuf, run_dir: PathBuf) -> Self {
        Self { program, run_dir, slots: Mutex::default() }
    }

    /// Keeps a volume to itself, with the lowest run raised; refused when a later one has begun.
    async fn raised(
        &self,
        volume: &str,
        path: &Path,
        run: u64,
        base: Option<&Base>,
    ) -> Result<tokio::sync::OwnedMutexGuard<Option<Running>>, ReplicaError> {
        let mut held = self.slot(volume).lock_owned().await;
        if let Some(base) = base {
            held = self.based(held, volume, path, run, base).await?;
        }
        let (path, beside) = (path.to_owned(), runs::beside(path));
        // It keeps the volume to itself until the disk has answered, also when nobody waits for it any more.
        let risen = tokio::task::spawn_blocking(move || {
            let raised = || Ok((runs::raise(&path, run)?, runs::lowest(&path)?));
            (raised(), held)
        });
        let interrupted = |_| system("this host's daemon ends")(io::ErrorKind::Interrupted.into());
        let (risen, held) = risen.await.map_err(interrupted)?;
        let (may, lowest) = risen.map_err(system(format!(
            "the lowest run of {volume} cannot be kept in {}",
            beside.display()
        )))?;
        if may { Ok(held) } else { Err(ReplicaError::Over { volume: volume.into(), run, lowest }) }
    }

    /// Puts in its place what it is to hold, unless it was open since: then the lowest run tells so.
    async fn based(
        &self,
        mut held: tokio::sync::OwnedMutexGuard<Option<Running>>,
        volume: &str,
        path: &Path,
        run: u64,
        base: &Base,
    ) -> Result<tokio::sync::OwnedMutexGuard<Option<Running>>, ReplicaError> {
        let (asked, beside) = (path.to_owned(), runs::beside(path));
        let look = tokio::task::spawn_blocking(move || (runs::lowest(&asked), held));
        let interrupted = |_| system("this host's daemon ends")(io::ErrorKind::Interrupted.into());
        let lowest;
        (lowest, held) = look.await.map_err(interrupted)?;
        let lowest = lowest.map_err(system(format!("{} cannot be read", beside.display())))?;
        if lowest >= base.run || run < base.run {
            return Ok(held);
        }
        let not_back = |failure| ReplicaError::NotBack { volume: volume.into(), failure };
        kept::make_ready(&base.kept).await.map_err(not_back)?;
        self.ended_of(&mut held, volume).await?;
        let of = base.kept.clone();
        // It keeps the volume to itself until that is done, also when nobody waits for it any more.
        let put = tokio::task::spawn_blocking(move || (kept::put_back(&of), held));
        let put_back;
        (put_back, held) = put.await.map_err(interrupted)?;
        put_back.map_err(system(format!("{} cannot be put in its place", path.display())))?;
        tracing::info!(volume, copy = base.kept.copy, "its replica is what it was");
        Ok(held)
    }

    /// Ends what serves a volume, if anything does.
    async fn ended_of(&self, held: &mut Option<Running>, volume: &str) -> Result<(), ReplicaError> {
        let directory = self.directory(volume);
        // One that does not answer is ended all the same.
        let _ = self.found(held, volume).await;
        if let Some(running) = held.take() {
            ended(&running.process, volume).await?;
        }
        Self::end_strays(&directory).await?;
        match std::fs::remove_dir_all(&directory) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(system(format!("{} cannot be removed", directory.display()))(error))
            }
            _ => Ok(()),
        }
    }

    fn slot(&self, volume: &str) -> Slot {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(slots.entry(volume.to_owned()).or_default())
    }

    /// A short name, for that of a socket may not be long.
    fn directory(&self, volume: &str) -> PathBuf {
        let print = Sha256::digest(volume.as_bytes());
        let name: String = print.iter().take(10).map(|byte| format!("{byte:02x}")).collect();
        self.run_dir.join(name)
    }

    /// The process of a volume, if one runs.
    async fn found(&self, held: &mut Option<Running>, volume: &str) -> Result<bool, ReplicaError> {
        if held.as_ref().is_some_and(|running| running.runs() && !running.qmp.is_closed()) {
            return Ok(true);
        }
        if let Some(before) = held.take()
            && !before.runs()
        {
            // Not to be found for ever as one that has ended.
            let _ = before.process.ended().await;
        }
        let directory = self.directory(volume);
        let path = directory.join(RECORD);
        let unread = || format!("{} cannot be read", path.display());
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(system(unread())(error)),
        };
        let Ok(record) = serde_json::from_slice::<Record>(&text) else { return Ok(false) };
        let process = Process::find(record.pid, record.start_time).map_err(system(unread()))?;
        let Some(process) = process.filter(|_| record.volume == volume) else { return Ok(false) };
        let qmp = Qmp::connect(&directory.join(run_dir::QMP_SOCKET), PATIENCE).await;
        let qmp = qmp.map_err(|source| ReplicaError::Qmp { volume: volume.into(), source })?;
        tracing::info!(volume, pid = record.pid, "the storage daemon is taken over");
        *held = Some(Running { process, qmp, directory, record });
        Ok(true)
    }

    /// Ends processes of this directory that no record names: a daemon was killed before it could write one. They serve
    /// nobody, and hold the file.
    async fn end_strays(directory: &Path) -> Result<(), ReplicaError> {
        let sign = format!("{DIRECTORY}={}", directory.display());
        let failed =
            || system("the processes of this host cannot be told; the daemon needs root and /proc");
        for entry in std::fs::read_dir("/proc").map_err(failed())? {
            let entry = entry.map_err(failed())?;
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            // One that has ended has none.
            let environ = std::fs::read(entry.path().join("environ")).unwrap_or_default();
            if !environ.split(|byte| *byte == 0).any(|one| one == sign.as_bytes()) {
                continue;
            }
            let Some(stat) = look(Path::new("/proc"), pid).map_err(failed())? else { continue };
            if let Some(process) = Process::find(pid, stat.start_time).map_err(failed())? {
                tracing::warn!(pid, "a storage daemon that nothing names is ended");
                ended(&process, &directory.display().to_string()).await?;
            }
        }
        Ok(())
    }

    async fn begin(&self, wanted: &ReplicaWanted) -> Result<Running, ReplicaError> {
        let directory = self.directory(&wanted.volume);
        Self::end_strays(&directory).await?;
        let name = directory.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let prepared = || format!("the directory {} cannot be prepared", directory.display());
        run_dir::prepare(&self.run_dir, &name).map_err(system(prepared()))?;
        let socket = directory.join(run_dir::QMP_SOCKET);
        let listens = run_dir::listen(&socket).map_err(system(prepared()))?;
        let messages =
            File::create(directory.join(run_dir::MESSAGES)).map_err(system(prepared()))?;
        let process = self.spawn(wanted, &directory, &listens, messages)?;
        drop(listens);
        let start_time = look(Path::new("/proc"), process.pid())
            .map_err(system("a storage daemon cannot be looked at"))?
            .map(|stat| stat.start_time);
        let died =
            || ReplicaError::Died { volume: wanted.volume.clone(), said: last_words(&directory) };
        let Some(start_time) = start_time else { return Err(died()) };
        let record = Record {
            volume: wanted.volume.clone(),
            pid: process.pid(),
            start_time,
            instance: uuid::Uuid::new_v4().to_string(),
            file: identity(&wanted.path)
                .map_err(system(format!("{} cannot be looked at", wanted.path.display())))?,
            serves: None,
        };
        let met = tokio::select! {
            biased;
            _ = process.ended() => return Err(died()),
            met = Qmp::connect(&socket, PATIENCE) => met,
        };
        match met {
            Ok(qmp) => {
                let mut running = Running { process, qmp, directory, record };
                running.note(None)?;
                Ok(running)
            }
            Err(source) => {
                ended(&process, &wanted.volume).await?;
                Err(match source {
                    QmpError::Closed | QmpError::Io(_) => died(),
                    source => ReplicaError::Qmp { volume: wanted.volume.clone(), source },
                })
            }
        }
    }

    fn spawn(
        &self,
        wanted: &ReplicaWanted,
        directory: &Path,
        listens: &OwnedFd,
        messages: File,
    ) -> Result<Process, ReplicaError> {
        let qmp = listens.as_raw_fd();
        // The file's lock stays on: the owner's QEMU has its own replica open as a file, and not while it is served.
        let node = json!({
            "driver": "raw", "node-name": NODE, "discard": "unmap", "cache": { "direct": true },
            "file": { "driver": "file", "filename": wanted.path, "aio": "threads", "cache": { "direct": true } },
        });
        let mut command =
            std::process::Command::new(find(&self.program).ok_or(ReplicaError::NoProgram)?);
        command
            .arg("--chardev")
            .arg(format!("socket,id=qmp,fd={qmp},server=on,wait=off"))
            .args(["--monitor", "chardev=qmp", "--blockdev", &node.to_string()])
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_else(|| "/usr/bin:/bin".into()))
            .env(DIRECTORY, directory)
            .current_dir("/")
            .uid(wanted.owner_uid)
            .gid(wanted.owner_uid)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(messages);
        // SAFETY: setsid and fcntl are async-signal-safe and touch only the child.
        unsafe {
            command.pre_exec(move || {
                nix::unistd::setsid()?;
                match libc::fcntl(qmp, libc::F_SETFD, 0) {
                    0.. => Ok(()),
                    _ => Err(io::Error::last_os_error()),
                }
            });
        }
        let volume = &wanted.volume;
        let child = command
            .spawn()
            .map_err(system(format!("the storage daemon of {volume} cannot be started")))?;
        i32::try_from(child.id())
            .map_err(|_| io::Error::from(io::ErrorKind::InvalidData))
            .and_then(Process::of_child)
            .map_err(system(format!("the storage daemon of {volume} cannot be held")))
    }
}

/// Ends a process, and waits for its end.
async fn ended(process: &Process, whose: &str) -> Result<(), ReplicaError> {
    process.kill();
    let late = || io::Error::from(io::ErrorKind::TimedOut);
    let waited = tokio::time::timeout(PATIENCE, process.ended()).await;
    waited.unwrap_or_else(|_| Err(late())).map_err(system(format!(
        "the storage daemon of {whose} does not end; it waits for a disk that does not answer"
    )))
}

#[async_trait]
impl ReplicaDriver for StorageDaemons {
    async fn serve(&self, wanted: &ReplicaWanted) -> Result<Served, ReplicaError> {
        let run = wanted.run;
        let base = wanted.base.as_ref();
        let mut held = self.raised(&wanted.volume, &wanted.path, run, base).await?;
        let file = identity(&wanted.path);
        let file =
            file.map_err(system(format!("{} cannot be looked at", wanted.path.display())))?;
        if self.found(&mut held, &wanted.volume).await?
            && held.as_ref().is_some_and(|running| running.record.file != file)
        {
            // What it has open is not what stands there now.
            self.ended_of(&mut held, &wanted.volume).await?;
        }
        if !self.found(&mut held, &wanted.volume).await? {
            *held = Some(self.begin(wanted).await?);
        }
        let Some(running) = held.as_mut() else { return Err(ReplicaError::NoProgram) };
        match running.served() {
            Some(served) if served.run == run => Ok(served),
            _ => running.change(wanted).await,
        }
    }

    async fn served(&self, volume: &str) -> Option<Served> {
        let slot = self.slot(volume);
        let mut held = slot.lock().await;
        match self.found(&mut held, volume).await {
            Ok(true) => held.as_ref()?.served(),
            Ok(false) => None,
            Err(error) => {
                tracing::warn!(
                    volume,
                    why = crate::agent::chain(&error),
                    "it cannot be told how it is served"
                );
                None
            }
        }
    }

    async fn own(
        &self,
        volume: &str,
        path: &Path,
        run: u64,
        base: Option<&Base>,
    ) -> Result<(), ReplicaError> {
        let mut held = self.raised(volume, path, run, base).await?;
        self.ended_of(&mut held, volume).await
    }

    async fn lowest(&self, _volume: &str, path: &Path) -> io::Result<u64> {
        let path = path.to_owned();
        let read = tokio::task::spawn_blocking(move || runs::lowest(&path)).await;
        read.unwrap_or_else(|_| Err(io::ErrorKind::Interrupted.into()))
    }

    async fn known(&self) -> BTreeSet<String> {
        let entries = std::fs::read_dir(&self.run_dir).into_iter().flatten().flatten();
        let records = entries.filter_map(|entry| {
            let text = std::fs::read(entry.path().join(RECORD)).ok()?;
            serde_json::from_slice::<Record>(&text).ok()
        });
        records.map(|record| record.volume).collect()
    }

    async fn end(&self, volume: &str) -> Result<(), ReplicaError> {
        let slot = self.slot(volume);
        let mut held = slot.lock().await;
        self.ended_of(&mut held, volume).await
    }
}
