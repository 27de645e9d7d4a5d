//! A lab driven from outside, for tests and benchmarks: the product's own command, its API, and the processes of each
//! host as this machine sees them.

use anyhow::{Context, Result, bail};
use haven_client::{Client, ClientError};
use haven_model::{AdmissionPolicy, ClusterSpec, api::Overview, manifest::to_yaml, object::Kind};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{
    path::PathBuf,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

/// How long one question to one host may take.
const PATIENCE: Duration = Duration::from_secs(3);

/// A lab.
pub struct Driver {
    /// Its directory.
    pub dir: PathBuf,
    /// The names of its hosts.
    pub hosts: Vec<String>,
    /// Where the root file system of its hosts is, if that is another one than usual.
    pub cache: Option<PathBuf>,
    binary: PathBuf,
    runtime: tokio::runtime::Runtime,
}

impl Driver {
    /// A lab of so many hosts in `dir`, which may not be up yet, driven with this `haven`.
    ///
    /// # Errors
    /// When the client's runtime cannot be made.
    pub fn new(binary: PathBuf, dir: PathBuf, hosts: u32) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let hosts = (1..=hosts).map(|i| format!("host{i}")).collect();
        Ok(Self { dir, hosts, cache: None, binary, runtime })
    }

    /// The product's command for this lab.
    #[must_use]
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.binary);
        command.args(args).env("HAVEN_LAB_DIR", &self.dir).stdin(Stdio::null());
        command.envs(self.cache.iter().map(|cache| ("HAVEN_LAB_CACHE", cache)));
        command
    }

    /// Runs it; what it printed.
    ///
    /// # Errors
    /// With what it said.
    pub fn haven(&self, args: &[&str]) -> Result<String> {
        let output = self.command(args).output()?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        if output.status.success() {
            return Ok(text(&output.stdout));
        }
        bail!("`haven {}`: {} {}", args.join(" "), text(&output.stderr), text(&output.stdout))
    }

    /// Applies a manifest.
    ///
    /// # Errors
    /// With what `haven apply` said.
    pub fn apply(&self, manifest: &str, options: &[&str]) -> Result<()> {
        let path = self.dir.join("manifest.yaml");
        std::fs::write(&path, manifest)?;
        let file = path.display().to_string();
        self.haven(&[&["apply", "-f", &file], options].concat()).map(|_| ())
    }

    /// Asks the first host that answers.
    ///
    /// # Errors
    /// With what the last one said.
    pub fn ask<T, F>(&self, question: impl Fn(Client) -> F) -> Result<T>
    where
        F: Future<Output = Result<T, ClientError>>,
    {
        let mut last = None;
        for host in &self.hosts {
            let client = Client::local(self.dir.join("hosts").join(host).join("run/api.sock"));
            let asked = async { tokio::time::timeout(PATIENCE, question(client)).await };
            match self.runtime.block_on(asked) {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(error)) => last = Some(anyhow::Error::new(error)),
                Err(_) => last = Some(anyhow::anyhow!("{host} does not answer")),
            }
        }
        Err(last.context("the lab has no hosts")?)
    }

    /// The cluster on one screen.
    ///
    /// # Errors
    /// When no host answers.
    pub fn overview(&self) -> Result<Overview> {
        self.ask(|client| async move { client.status().await })
    }

    /// Sets what becomes of changes for which the reserve is too small.
    ///
    /// # Errors
    /// When no host answers, or the cluster refuses.
    pub fn admission(&self, policy: AdmissionPolicy) -> Result<()> {
        self.change_cluster(|spec| spec.admission = policy)
    }

    /// Changes what is wanted of the cluster as a whole.
    ///
    /// # Errors
    /// When no host answers, or the cluster refuses.
    pub fn change_cluster(&self, change: impl FnOnce(&mut ClusterSpec)) -> Result<()> {
        let mut item = self.ask(|client| async move { client.cluster().await })?;
        change(&mut item.spec);
        let item = &item;
        self.ask(|client| async move { client.replace_cluster(item).await }).map(|_| ())
    }

    /// Gives a host a label.
    ///
    /// # Errors
    /// When the host is not known, or the cluster refuses.
    pub fn label(&self, host: &str, key: &str, value: &str) -> Result<()> {
        let list = self.ask(|client| async move { client.list(Kind::Host).await })?;
        let item = list.iter().find(|item| item.object.meta().name.as_str() == host);
        let mut object = item.with_context(|| format!("{host} is no host"))?.object.clone();
        object.meta_mut().labels.insert(key.into(), value.into());
        self.apply(&to_yaml(&object), &[])
    }

    /// The host on which a VM is placed.
    ///
    /// # Errors
    /// When it has none, or no host answers.
    pub fn host_of(&self, vm: &str) -> Result<String> {
        let list = self.ask(|client| async move { client.list(Kind::Vm).await })?;
        let item = list.iter().find(|item| item.object.meta().name.as_str() == vm);
        let host = item.and_then(|item| item.host.as_ref()).map(ToString::to_string);
        host.with_context(|| format!("{vm} has no host"))
    }

    /// Waits until this holds, looking every 50 ms.
    ///
    /// # Errors
    /// `what` when it does not within the limit.
    pub fn wait(&self, what: &str, limit: Duration, holds: impl Fn(&Self) -> bool) -> Result<()> {
        let until = Instant::now() + limit;
        while !holds(self) {
            if Instant::now() > until {
                bail!("{what}: not within {} s", limit.as_secs());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    /// Waits until the store has the voters that it wants: three, or all hosts of a smaller lab.
    ///
    /// # Errors
    /// When they do not vote within a minute.
    pub fn voting(&self) -> Result<()> {
        let wanted = self.hosts.len().min(3);
        self.wait("the store has its voters", Duration::from_secs(60), |lab| {
            lab.overview().is_ok_and(|seen| seen.voters.0 >= wanted)
        })
    }

    /// Waits until a host is online.
    ///
    /// # Errors
    /// When it is not within 60 s.
    pub fn online(&self, host: &str) -> Result<()> {
        self.wait(&format!("{host} is online"), Duration::from_secs(60), |lab| {
            lab.overview().is_ok_and(|overview| {
                overview.hosts.iter().any(|line| line.name == host && line.state == "online")
            })
        })
    }

    /// The processes of a host whose command line holds these words.
    #[must_use]
    pub fn pids(&self, host: &str, words: &str) -> Vec<i32> {
        let mark = format!("/hosts/{host}/");
        let dir = self.dir.display().to_string();
        let mut found = Vec::new();
        for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
            let Ok(pid) = entry.file_name().to_string_lossy().parse::<i32>() else { continue };
            let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            if line.is_empty() || !line.contains(words) || line.starts_with("unshare") {
                continue;
            }
            let mounts =
                std::fs::read_to_string(entry.path().join("mountinfo")).unwrap_or_default();
            if mounts.lines().any(|m| m.contains(&mark) && m.contains(&dir)) {
                found.push(pid);
            }
        }
        found
    }

    /// Signals them; at least one must be there.
    ///
    /// # Errors
    /// When there is none.
    pub fn signal(&self, host: &str, words: &str, signal: Signal) -> Result<Vec<i32>> {
        let pids = self.pids(host, words);
        for pid in &pids {
            kill(Pid::from_raw(*pid), signal).with_context(|| format!("{words} of {host}"))?;
        }
        if pids.is_empty() {
            bail!("{host} has no process `{words}`");
        }
        Ok(pids)
    }

    /// What a person would look at after a failure.
    #[must_use]
    pub fn report(&self) -> String {
        let mut text = String::new();
        for args in [&["status"][..], &["events"][..], &["vm", "ls"][..]] {
            text += &self.haven(args).unwrap_or_else(|why| format!("{why:#}"));
            text.push('\n');
        }
        for host in &self.hosts {
            let path = self.dir.join("hosts").join(host).join("upper/var/log/haven/daemon.log");
            let log = std::fs::read_to_string(path).unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            text +=
                &format!("--- {host}\n{}\n", lines[lines.len().saturating_sub(25)..].join("\n"));
        }
        text
    }
}
