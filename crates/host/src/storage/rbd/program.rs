//! The programs `rbd` and `ceph`: run with a deadline, told of key and monitors by files that only this user reads.

use super::pool::RbdPool;
use crate::{agent::storage::StorageFailure, storage::says};
use serde::de::DeserializeOwned;
use std::{
    fs::{DirBuilder, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};
use tokio::process::Command;

/// How long a question may take.
pub const QUESTION: Duration = Duration::from_secs(8);
/// How long a small change may take: Ceph waits up to 30 s for a client that vanished.
pub const CHANGE: Duration = Duration::from_secs(60);
/// How long what moves data may take.
pub const COPY: Duration = Duration::from_secs(6 * 60 * 60);
/// How long the monitors may take, s. The daemon's own programs end then; no guest's requests do.
const MONITORS_S: u32 = 5;
/// So much of what a program says is told, characters.
const TOLD: usize = 300;

/// How a program ended that did not do what it was asked.
#[derive(Debug)]
pub enum Ended {
    /// It could not be started.
    NotStarted(io::Error),
    /// It was killed when its time was over.
    Late(Duration),
    /// It gave up. The code of `rbd` is an `errno`.
    Failed {
        /// Its exit code.
        code: i32,
        /// What it said.
        said: String,
    },
    /// It said something else than was expected.
    Unreadable(serde_json::Error),
}

impl Ended {
    /// Whether it ended with this code, once it had reached the cluster.
    #[must_use]
    pub fn is(&self, errno: i32) -> bool {
        matches!(self, Self::Failed { code, said } if *code == errno && !unconnected(said))
    }
}

/// Whether it did not even reach the cluster.
fn unconnected(said: &str) -> bool {
    said.contains("couldn't connect")
        || said.contains("error connecting")
        || said.contains("ETIMEDOUT")
        || said.trim() == "timed out"
}

/// Runs them for one pool.
#[derive(Debug)]
pub struct Programs {
    /// The pool.
    pub pool: RbdPool,
    /// Its configuration, which names the keyring.
    conf: PathBuf,
}

/// Writes a file that only this user reads, whole or not at all.
///
/// # Errors
/// When the file system does not let it.
pub(super) fn write_private(path: &Path, text: &str) -> io::Result<()> {
    // Many may need it at the same moment, and most find it as it is to be.
    if std::fs::read_to_string(path).is_ok_and(|there| there == text) {
        return Ok(());
    }
    let part = path.with_added_extension(format!("{}.part", uuid::Uuid::new_v4().simple()));
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&part)?;
    let put = file.write_all(text.as_bytes()).and_then(|()| std::fs::rename(&part, path));
    if put.is_err() {
        let _ = std::fs::remove_file(&part);
    }
    put
}

impl Programs {
    /// Writes the files that the programs read into `directory`.
    ///
    /// # Errors
    /// When the pool makes no sense, or the directory cannot be written.
    pub fn prepare(pool: &RbdPool, directory: &Path) -> Result<Self, StorageFailure> {
        pool.makes_sense()?;
        let (conf, keyring) = (directory.join("ceph.conf"), directory.join("keyring"));
        let key = format!("[client.{}]\n\tkey = {}\n", pool.user, pool.key.expose());
        let text = configuration(pool, &keyring);
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .and_then(|()| write_private(&keyring, &key))
            .and_then(|()| write_private(&conf, &text))
            .map_err(|error| {
                says(format!(
                    "{} cannot be written ({error}); check its file system",
                    directory.display()
                ))
            })?;
        Ok(Self { pool: pool.clone(), conf })
    }

    /// The configuration, with the key in a file that it names.
    #[must_use]
    pub fn conf(&self) -> &Path {
        &self.conf
    }

    /// Runs `rbd`; what it printed.
    ///
    /// # Errors
    /// How it ended instead.
    pub async fn rbd(&self, args: &[&str], within: Duration) -> Result<Vec<u8>, Ended> {
        self.run("rbd", args, within).await
    }

    /// Runs `rbd`; what it printed as JSON.
    ///
    /// # Errors
    /// How it ended instead.
    pub async fn ask_rbd<T: DeserializeOwned>(&self, args: &[&str]) -> Result<T, Ended> {
        let args = [args, &["--format", "json"]].concat();
        read(&self.run("rbd", &args, QUESTION).await?)
    }

    /// Runs `ceph`; what it printed as JSON.
    ///
    /// # Errors
    /// How it ended instead.
    pub async fn ask_ceph<T: DeserializeOwned>(&self, args: &[&str]) -> Result<T, Ended> {
        let args = [args, &["--format", "json"]].concat();
        read(&self.run("ceph", &args, QUESTION).await?)
    }

    /// Runs `ceph`.
    ///
    /// # Errors
    /// How it ended instead.
    pub async fn ceph(&self, args: &[&str], within: Duration) -> Result<(), Ended> {
        self.run("ceph", args, within).await.map(drop)
    }

    async fn run(&self, program: &str, args: &[&str], within: Duration) -> Result<Vec<u8>, Ended> {
        let mut command = Command::new(program);
        command.arg("--conf").arg(&self.conf).args(["--id", &self.pool.user]).args(args);
        run(command, within).await
    }

    /// Runs `qemu-img`, which reads the same configuration.
    ///
    /// # Errors
    /// How it ended instead.
    pub async fn qemu_img(&self, args: &[&str], within: Duration) -> Result<Vec<u8>, Ended> {
        let mut command = Command::new("qemu-img");
        command.args(args);
        run(command, within).await
    }

    /// What went wrong, as a sentence: what is wrong with the way to the pool if it is that, else `what` and what was
    /// said.
    #[must_use]
    pub fn failed(&self, what: &str, ended: &Ended) -> StorageFailure {
        self.way(ended).unwrap_or_else(|| says(format!("{what}: {}", words(ended))))
    }

    /// What is wrong with the way to the pool, if it is that.
    fn way(&self, ended: &Ended) -> Option<StorageFailure> {
        let RbdPool { user, pool, .. } = &self.pool;
        let (code, said) = match ended {
            Ended::NotStarted(error) => return Some(not_started(error)),
            Ended::Late(within) => {
                return Some(says(format!(
                    "the Ceph pool {pool} did not answer within {} s though its monitors may; its OSDs may be down: see `ceph health detail`",
                    within.as_secs()
                )));
            }
            Ended::Unreadable(_) => return None,
            Ended::Failed { code, said } => (*code, said.as_str()),
        };
        let lower = said.to_lowercase();
        if unconnected(said) {
            let what = if lower.contains("timed out") {
                format!(
                    "none of the Ceph monitors {} answered within {MONITORS_S} s; check `monitors`, the ports 3300 and 6789 between this host and them, and that most of them run",
                    self.pool.monitors.join(", ")
                )
            } else if lower.contains("permission denied") || code == libc::EACCES {
                format!(
                    "Ceph does not take the key of client.{user}, or has no such user; compare `user` and `key` with `ceph auth get client.{user}`"
                )
            } else if said.contains("unable to parse addrs") {
                let monitors = self.pool.monitors.join(", ");
                format!(
                    "the Ceph monitors {monitors} cannot be found by name; write their addresses in `monitors`, or mend this host's name resolution"
                )
            } else {
                format!(
                    "the Ceph cluster at {} cannot be reached: {}",
                    self.pool.monitors.join(", "),
                    told(said)
                )
            };
            return Some(says(what));
        }
        if said.contains("error opening pool") && code == libc::ENOENT {
            return Some(says(format!(
                "Ceph has no pool {pool}; correct `pool`, or make it: `ceph osd pool create {pool} && rbd pool init {pool}`"
            )));
        }
        if said.contains("namespace") && said.contains("does not exist") {
            let path = self.pool.path();
            return Some(says(format!(
                "the Ceph pool {pool} has no such namespace; correct `namespace`, or make it: `rbd namespace create {path}`"
            )));
        }
        let denied = [libc::EACCES, libc::EPERM].contains(&code);
        let denied = denied && ["denied", "not permitted"].iter().any(|word| lower.contains(word));
        denied.then(|| {
            says(format!(
                "client.{user} may not use the Ceph pool {} as is needed; let an administrator run: {}",
                self.pool.path(),
                self.pool.caps()
            ))
        })
    }
}

/// Clones need no protected snapshot (v2), which lets an image go before its clones. No limit is set on requests to
/// the OSDs: one that was given up may yet be carried out.
fn configuration(pool: &RbdPool, keyring: &Path) -> String {
    format!(
        "[global]\nmon_host = {}\nkeyring = {}\nclient_mount_timeout = {MONITORS_S}\nrados_mon_op_timeout = {MONITORS_S}\n\
         rbd_default_clone_format = 2\nrbd_blocklist_on_break_lock = false\nlog_to_stderr = false\nlog_file =\nadmin_socket =\n",
        pool.monitors(),
        keyring.display()
    )
}

async fn run(mut command: Command, within: Duration) -> Result<Vec<u8>, Ended> {
    command
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .env("LC_ALL", "C.UTF-8")
        // Times are told in it.
        .env("TZ", "UTC")
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true);
    let output = tokio::time::timeout(within, command.output()).await;
    let output = output.map_err(|_| Ended::Late(within))?.map_err(Ended::NotStarted)?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(Ended::Failed { code: output.status.code().unwrap_or(-1), said })
}

fn read<T: DeserializeOwned>(printed: &[u8]) -> Result<T, Ended> {
    serde_json::from_slice(printed).map_err(Ended::Unreadable)
}

fn not_started(error: &io::Error) -> StorageFailure {
    if error.kind() == io::ErrorKind::NotFound {
        return says(
            "the programs `rbd` and `ceph` or `qemu-img` are not on this host; run `apt install ceph-common qemu-utils qemu-block-extra` on every host",
        );
    }
    says(format!("a program of ceph-common cannot be started ({error}); reinstall that package"))
}

fn told(said: &str) -> String {
    let lines = said.lines().map(str::trim).filter(|line| !line.is_empty());
    lines.collect::<Vec<_>>().join("; ").chars().take(TOLD).collect()
}

/// How it ended, in words.
fn words(ended: &Ended) -> String {
    match ended {
        Ended::NotStarted(error) => error.to_string(),
        Ended::Late(within) => format!("it took longer than {} s", within.as_secs()),
        Ended::Failed { code, said } if said.is_empty() => format!("it ended with code {code}"),
        Ended::Failed { said, .. } => told(said),
        Ended::Unreadable(error) => {
            format!(
                "what it printed is not understood ({error}); is its version one that Haven knows (16 to 19)?"
            )
        }
    }
}
