//! Gluster volumes, mounted by this daemon for its pools (docs/decisions/0029-filers.md).
//!
//! ```text
//!   Pools ── "is it mounted?" ──► GlusterMounts ── glusterfs (a process for each mount) ──► servers, bricks
//!     └── then as a `shared` pool: FileStorage, at RUN/gluster/MARK/DIRECTORY
//! ```
//!
//! Each mount has a process of its own, which outlives this daemon, since QEMU's files are open through it. When that process has ended,
//! what was open is lost and the volume is mounted anew; while it lives nothing is mounted over it, whatever it answers.
//!
//! A mount that is missing is an empty directory of this host. Nothing is made there: as of a `shared` pool the mark is asked first.
//! Nothing here waits for a volume for long: what asks it runs on threads that may hang ([`Busy`]).

use crate::{
    agent::storage::StorageFailure,
    storage::{busy::Busy, pool, says},
};
use haven_model::{GlusterSpec, PoolSpec};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{DirBuilder, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, fchown},
    path::{Path, PathBuf},
    process::Stdio,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};
use tokio::process::Command;
use uuid::Uuid;

#[cfg(test)]
mod gluster_test;

/// How long a mount may take.
const MOUNTS: Duration = Duration::from_secs(20);
/// So soon a mount that failed is not tried again.
const SOON: Duration = Duration::from_secs(2);
/// What mounts are called that only try a volume out.
const CHECK: &str = "check-";
/// A user that nobody is, to try out whether files can be given away.
const SOMEBODY: u32 = 1_900_000_000;

/// The mounts of this host.
#[derive(Clone, Debug)]
pub struct GlusterMounts {
    directory: PathBuf,
    log_dir: PathBuf,
    busy: Busy,
    /// Each is mounted by one at a time.
    mounting: Arc<Mutex<BTreeMap<PathBuf, Arc<Mounting>>>>,
}

/// Who mounts it holds this; with it what the last one was told who could not.
type Mounting = tokio::sync::Mutex<Option<(Instant, String)>>;

/// Whether a mark can be a name of a file; one that somebody else wrote may be anything.
fn is_mark(text: &str) -> bool {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
    !text.is_empty() && text.len() <= 64 && text.bytes().all(fits) && !text.starts_with(CHECK)
}

/// Whether a volume is mounted there, as the kernel tells, who asks no filer.
fn is_mounted(at: &Path, table: &str) -> bool {
    let at = at.as_os_str().as_encoded_bytes();
    table.lines().any(|line| {
        let mut fields = line.split(' ');
        let there = fields.nth(4).is_some_and(|place| place.as_bytes() == at);
        there && line.contains(" - fuse.glusterfs ")
    })
}

fn mounted(at: &Path) -> Result<bool, StorageFailure> {
    let table = std::fs::read_to_string("/proc/self/mountinfo");
    let table = table.map_err(|e| says(format!("what is mounted here cannot be told ({e})")))?;
    Ok(is_mounted(at, &table))
}

fn pid_file(at: &Path) -> PathBuf {
    at.with_extension("pid")
}

/// Whether the process of a mount lives.
fn lives(at: &Path) -> bool {
    let pid = std::fs::read_to_string(pid_file(at)).unwrap_or_default();
    let Ok(pid) = pid.trim().parse::<u32>() else { return false };
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    line.split(|byte| *byte == 0).any(|word| word == at.as_os_str().as_encoded_bytes())
}

/// Takes it away even when something is open there.
fn detach(at: &Path) {
    // What is not mounted, or not there, is fine; more than one may lie over another.
    while nix::mount::umount2(at, nix::mount::MntFlags::MNT_DETACH).is_ok() {}
}

/// The directory of a pool below its mount.
fn below(at: &Path, of: &GlusterSpec) -> PathBuf {
    match &of.directory {
        Some(directory) => at.join(directory.trim_start_matches('/')),
        None => at.to_owned(),
    }
}

fn names(of: &GlusterSpec) -> String {
    of.servers.join(", ")
}

impl GlusterMounts {
    /// Puts it together; nothing is mounted.
    #[must_use]
    pub fn new(directory: PathBuf, log_dir: PathBuf) -> Self {
        let (busy, mounting) = (Busy::default(), Arc::default());
        Self { directory, log_dir, busy, mounting }
    }

    /// A pool with the directory in which this host has it: mounted, if it was not.
    ///
    /// # Errors
    /// A sentence.
    pub async fn ready(&self, pool: &PoolSpec) -> Result<PoolSpec, StorageFailure> {
        let of = pool.gluster.as_ref().zip(pool.mark().filter(|mark| is_mark(mark)));
        let (of, mark) = of.ok_or_else(|| {
            says("the pool does not say which Gluster volume it is of; look at its manifest")
        })?;
        let at = self.directory.join(mark);
        self.mount(of, &at).await?;
        let path = below(&at, of).display().to_string();
        Ok(PoolSpec { path, ..pool.clone() })
    }

    /// Mounts a volume where it is not.
    async fn mount(&self, of: &GlusterSpec, at: &Path) -> Result<(), StorageFailure> {
        let one = {
            let mut all = self.mounting.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(all.entry(at.to_owned()).or_default())
        };
        let mut failed = one.lock().await;
        if mounted(at)? {
            if lives(at) {
                return Ok(());
            }
            tracing::warn!(at = %at.display(), "the process of this mount has ended; it is mounted anew");
            detach(at);
        }
        // Those who have waited meanwhile do not wait as long once more.
        if let Some((_, what)) = failed.as_ref().filter(|(when, _)| when.elapsed() < SOON) {
            return Err(says(what.clone()));
        }
        let prepared = DirBuilder::new().recursive(true).mode(0o711).create(&self.directory);
        let prepared = prepared.and_then(|()| match DirBuilder::new().mode(0o700).create(at) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            made => made,
        });
        prepared.map_err(|e| says(format!("{} cannot be made ({e})", at.display())))?;
        let done = self.run(of, at).await;
        *failed = done.as_ref().err().map(|failure| (Instant::now(), failure.what.clone()));
        if done.is_err() {
            detach(at);
        }
        done
    }

    /// Runs the program that mounts, and stays in the background as the mount's process.
    async fn run(&self, of: &GlusterSpec, at: &Path) -> Result<(), StorageFailure> {
        let log = at.file_name().unwrap_or_default().to_string_lossy();
        let log = self.log_dir.join(format!("gluster-{log}.log"));
        let begin = std::fs::metadata(&log).map_or(0, |log| log.len());
        let mut command = Command::new("glusterfs");
        command.args(of.servers.iter().map(|server| format!("--volfile-server={server}")));
        command.arg(format!("--volfile-id={}", of.volume));
        // Nothing is kept on this side: another host may write what this one reads next, when a guest moves live.
        command.args(["--direct-io-mode=enable", "--attribute-timeout=0", "--entry-timeout=0"]);
        command.args(["--negative-timeout=0", "--xlator-option=*-md-cache.md-cache-timeout=0"]);
        command.arg("--log-level=WARNING").arg(format!("--log-file={}", log.display()));
        command.arg(format!("--pid-file={}", pid_file(at).display())).arg(at);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let ended = tokio::time::timeout(MOUNTS, command.kill_on_drop(true).status()).await;
        let (servers, volume) = (names(of), &of.volume);
        match ended {
            Err(_) => Err(says(format!(
                "the Gluster servers {servers} have not answered for {} s; look whether they run and are reached from this host",
                MOUNTS.as_secs()
            ))),
            Ok(Err(error)) => Err(says(format!(
                "the program glusterfs cannot be started ({error}); install the package glusterfs-client on this host"
            ))),
            Ok(Ok(ended)) if ended.success() && mounted(at)? => Ok(()),
            Ok(Ok(ended)) if ended.code() == Some(libc::ENOTCONN) => Err(says(format!(
                "none of the Gluster servers {servers} answers; correct `servers`, or look whether glusterd runs there"
            ))),
            Ok(Ok(_)) => {
                let why = last_error(&log, begin);
                Err(says(format!(
                    "the Gluster servers {servers} do not give the volume `{volume}` to this host ({why}); correct `volume` (`gluster volume info` there lists them), or start it"
                )))
            }
        }
    }

    /// Takes mounts away that no pool has any more; one in which a VM has files open stays.
    pub async fn settle(&self, pools: &[PoolSpec]) {
        let marks: BTreeSet<&str> = pools.iter().filter_map(PoolSpec::mark).collect();
        let entries = std::fs::read_dir(&self.directory);
        let names = entries.into_iter().flatten().flatten().map(|entry| entry.file_name());
        for name in names.filter_map(|name| name.into_string().ok()) {
            if !is_mark(&name) || marks.contains(&*name) {
                continue;
            }
            let at = self.directory.join(&name);
            let taken = self.busy.run(&at.clone(), move || Ok(take_away(&at))).await;
            match taken {
                Ok(Ok(())) => tracing::info!(
                    mount = name,
                    "no pool has it any more, so it is not mounted any more"
                ),
                Ok(Err(error)) => tracing::debug!(mount = name, %error, "it stays mounted"),
                Err(failure) => tracing::debug!(mount = name, %failure, "it stays mounted"),
            }
        }
    }

    /// Looks whether a pool that may be new can be used from this host, and what its directory says that it is; of an empty one, what it
    /// says from now on, unless it is `only_asked`.
    ///
    /// # Errors
    /// One sentence on the first thing that is wrong.
    pub async fn check(
        &self,
        of: &GlusterSpec,
        only_asked: bool,
    ) -> Result<String, StorageFailure> {
        let at = self.directory.join(format!("{CHECK}{}", Uuid::new_v4().simple()));
        let checked = match self.mount(of, &at).await {
            Ok(()) => {
                let (of, below) = (of.clone(), below(&at, of));
                self.busy.run(&at, move || try_out(&of, &below, only_asked)).await
            }
            Err(failure) => Err(failure),
        };
        self.mounting.lock().unwrap_or_else(PoisonError::into_inner).remove(&at);
        if take_away(&at).is_err() {
            detach(&at);
            let _ = take_away(&at);
        }
        let log = at.file_name().unwrap_or_default().to_string_lossy();
        let _ = std::fs::remove_file(self.log_dir.join(format!("gluster-{log}.log")));
        checked
    }
}

/// Unmounts it where nobody has a file open, and removes what is left.
fn take_away(at: &Path) -> io::Result<()> {
    match nix::mount::umount2(at, nix::mount::MntFlags::empty()) {
        Ok(()) | Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOENT) => {}
        Err(error) => return Err(error.into()),
    }
    let _ = std::fs::remove_file(pid_file(at));
    match std::fs::remove_dir(at) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The last error that a log tells, from `begin` on.
fn last_error(log: &Path, begin: u64) -> String {
    let said = std::fs::read(log).unwrap_or_default();
    let said = said.get(usize::try_from(begin).unwrap_or(0)..).unwrap_or_default();
    let said = String::from_utf8_lossy(said);
    let errors = said.lines().filter(|line| line.contains("] E ["));
    // `[time] E [MSGID: 1] [file.c:1:function] 0-name: what [{a=b}]`
    let last = errors.filter_map(|line| line.rsplit_once("] 0-")).next_back();
    match last {
        Some((_, what)) => what.split_once(": ").map_or(what, |(_, what)| what).trim().to_owned(),
        None => format!("{} tells more", log.display()),
    }
}

/// Does with a directory what VMs will need.
fn try_out(of: &GlusterSpec, at: &Path, only_asked: bool) -> Result<String, StorageFailure> {
    let place = format!(
        "{}{} of the Gluster servers {}",
        of.volume,
        of.directory.as_deref().unwrap_or_default(),
        names(of)
    );
    let fails = |what: &str| {
        let what = format!("{place} cannot be {what}");
        move |error: io::Error| says(format!("{what} ({error}); look at `gluster volume status`"))
    };
    match std::fs::metadata(at) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            if only_asked {
                return Ok(Uuid::new_v4().to_string());
            }
            DirBuilder::new().recursive(true).mode(0o711).create(at).map_err(fails("made"))?;
        }
        there => _ = there.map_err(fails("looked at"))?,
    }
    let there = match std::fs::read_to_string(at.join(pool::MARK)) {
        Ok(mark) if is_mark(mark.trim()) => Some(mark.trim().to_owned()),
        Ok(mark) => {
            return Err(says(format!(
                "the {} of {place} is none of Haven's (it says `{}`); name another directory, or remove it",
                pool::MARK,
                mark.trim()
            )));
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(fails("read")(error)),
    };
    if there.is_none()
        && let Some(name) = foreign(at).map_err(fails("read"))?
    {
        return Err(says(format!(
            "{place} is not empty (it holds {name}), so no pool is made of it; empty it, or name another directory"
        )));
    }
    for place in [Some(at), at.parent().filter(|_| of.directory.is_some())].into_iter().flatten() {
        let mode = std::fs::metadata(place).map_err(fails("looked at"))?.mode();
        if mode & 0o011 != 0o011 {
            return Err(says(format!(
                "VMs' users may not pass through a directory of the Gluster volume {} ({mode:o}); let everybody pass there (`chmod 711`)",
                of.volume
            )));
        }
    }
    let name = at.join(format!(".haven-check-{}", &Uuid::new_v4().simple().to_string()[..8]));
    let tried = try_file(&name);
    std::fs::remove_file(&name).or_else(|error| match error.kind() {
        io::ErrorKind::NotFound => Ok(()),
        _ => Err(fails("written")(error)),
    })?;
    tried.map_err(fails("written, or its files given to VMs"))?;
    if let Some(mark) = there {
        return Ok(mark);
    }
    let mark = Uuid::new_v4().to_string();
    if !only_asked {
        let file = OpenOptions::new().write(true).create_new(true).open(at.join(pool::MARK));
        let written = file.and_then(|mut file| {
            file.write_all(format!("{mark}\n").as_bytes())?;
            file.sync_all()
        });
        written.and_then(|()| pool::sync(at)).map_err(fails("written"))?;
    }
    Ok(mark)
}

/// What is there that neither Haven nor Gluster has put there.
fn foreign(at: &Path) -> io::Result<Option<String>> {
    for entry in std::fs::read_dir(at)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name != ".trashcan" && !name.starts_with(".haven-check-") {
            return Ok(Some(name));
        }
    }
    Ok(None)
}

fn try_file(name: &Path) -> io::Result<()> {
    let mut options = OpenOptions::new();
    let mut file = options.write(true).create_new(true).mode(0o600).open(name)?;
    file.write_all(b"haven")?;
    fchown(&file, Some(SOMEBODY), Some(SOMEBODY))?;
    file.sync_all()?;
    match file.metadata()?.uid() {
        SOMEBODY => Ok(()),
        other => Err(io::Error::other(format!("it is {other}'s, not {SOMEBODY}'s"))),
    }
}
