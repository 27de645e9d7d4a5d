//! The lab of these tests, driven from outside as a person drives it.

use crate::witness::Witness;
use haven_client::Client;
use haven_model::object::Kind;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{
    path::PathBuf,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

/// Its hosts.
pub const HOSTS: [&str; 3] = ["host1", "host2", "host3"];

/// Two guests that count on their consoles, so that what they say stands on the host that runs them.
const MANIFEST: &str = r#"
kind: Network
name: front
subnet: 10.77.0.0/24
"#;
const VM: &str = r#"---
kind: VM
name: NAME
image: tiny
memory: 128MiB
networks:
- network: front
userData: |
  #!/bin/sh
  boot=$(cat /proc/sys/kernel/random/boot_id)
  i=0
  while true; do i=$((i + 1)); echo "tick $boot $i" > /dev/console; usleep 30000; done
"#;

/// A lab with three hosts and two counting guests.
pub struct Lab {
    /// Its directory.
    pub dir: PathBuf,
    runtime: tokio::runtime::Runtime,
}

impl Lab {
    /// A lab that may not be up yet.
    pub fn new(dir: PathBuf) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime for the client");
        Self { dir, runtime }
    }

    /// Runs the product's command.
    pub fn haven(&self, args: &[&str]) -> Result<String, String> {
        let output = Command::new(env!("CARGO_BIN_EXE_haven"))
            .args(args)
            .env("HAVEN_LAB_DIR", &self.dir)
            .stdin(Stdio::null())
            .output()
            .map_err(|e| e.to_string())?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        if output.status.success() {
            return Ok(text(&output.stdout));
        }
        Err(format!(
            "`haven {}`: {} {}",
            args.join(" "),
            text(&output.stderr),
            text(&output.stdout)
        ))
    }

    /// Hosts, cluster, guests. No power control: a lost host is recovered when its lease has expired.
    pub fn up(&mut self) -> Result<(), String> {
        self.down();
        self.haven(&["lab", "up", "--no-power-control"])?;
        let vms = ["tick-1", "tick-2"].map(|name| VM.replace("NAME", name)).concat();
        let path = self.dir.join("ticks.yaml");
        std::fs::write(&path, format!("{MANIFEST}{vms}")).map_err(|e| e.to_string())?;
        self.haven(&["apply", "-f", &path.display().to_string()])?;
        Ok(())
    }

    /// Ends it.
    pub fn down(&self) {
        if let Err(why) = self.haven(&["lab", "down"]) {
            println!("{why}");
        }
    }

    /// Asks the first host that answers.
    fn ask<T, F>(&self, question: impl Fn(Client) -> F) -> Result<T, String>
    where
        F: Future<Output = Result<T, haven_client::ClientError>>,
    {
        let mut last = "no host".to_owned();
        for host in HOSTS {
            let client = Client::local(self.dir.join("hosts").join(host).join("run/api.sock"));
            let patience = Duration::from_secs(3);
            let answer = self
                .runtime
                .block_on(async { tokio::time::timeout(patience, question(client)).await });
            match answer {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(error)) => last = error.to_string(),
                Err(_) => last = format!("{host} does not answer"),
            }
        }
        Err(last)
    }

    /// The host on which a VM is placed.
    pub fn host_of(&self, vm: &str) -> Result<String, String> {
        let list = self.ask(|client| async move { client.list(Kind::Vm).await })?;
        let item = list.iter().find(|item| item.object.meta().name.as_str() == vm);
        let host = item.and_then(|item| item.host.as_ref()).map(ToString::to_string);
        host.ok_or_else(|| format!("{vm} has no host"))
    }

    fn hosts_online(&self) -> Result<Vec<String>, String> {
        let overview = self.ask(|client| async move { client.status().await })?;
        let online = overview.hosts.iter().filter(|host| host.state == "online");
        Ok(online.map(|host| host.name.clone()).collect())
    }

    /// Waits until a host is online.
    pub fn online(&self, host: &str) -> Result<(), String> {
        let until = Instant::now() + Duration::from_secs(60);
        while !self.hosts_online().is_ok_and(|online| online.iter().any(|name| name == host)) {
            if Instant::now() > until {
                return Err(format!("{host} is not online again after 60 s"));
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }

    /// Waits until all hosts are online and both guests count where they are placed.
    pub fn all_well(&self, witness: &Witness) -> Result<(), String> {
        for host in HOSTS {
            self.online(host)?;
        }
        for vm in ["tick-1", "tick-2"] {
            let until = Instant::now() + Duration::from_secs(120);
            loop {
                let host = self.host_of(vm).unwrap_or_default();
                if witness.counts_now(vm, &host) {
                    break;
                }
                if Instant::now() > until {
                    return Err(format!("{vm} does not count on {host} after 120 s"));
                }
                std::thread::sleep(Duration::from_millis(100));
            }
        }
        Ok(())
    }

    /// The processes of a host whose command line holds these words.
    pub fn pids(&self, host: &str, words: &str) -> Vec<i32> {
        let mark = format!("/hosts/{host}/");
        let dir = self.dir.display().to_string();
        let mut found = Vec::new();
        for entry in std::fs::read_dir("/proc").expect("/proc is there").flatten() {
            let Ok(pid) = entry.file_name().to_string_lossy().parse::<i32>() else { continue };
            let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            let mounts =
                std::fs::read_to_string(entry.path().join("mountinfo")).unwrap_or_default();
            let root = mounts.lines().any(|m| m.contains(&mark) && m.contains(&dir));
            if root && line.contains(words) && !line.starts_with("unshare") {
                found.push(pid);
            }
        }
        found
    }

    /// Signals them; at least one must be there.
    pub fn signal(&self, host: &str, words: &str, signal: Signal) -> Result<Vec<i32>, String> {
        let pids = self.pids(host, words);
        for pid in &pids {
            kill(Pid::from_raw(*pid), signal).map_err(|e| format!("{words} of {host}: {e}"))?;
        }
        if pids.is_empty() { Err(format!("{host} has no process `{words}`")) } else { Ok(pids) }
    }

    /// Lets a paused host go on; the instant before its first process does.
    pub fn resume(&self, host: &str) -> Instant {
        let pids = self.pids(host, "");
        let woken = Instant::now();
        for pid in pids {
            let _ = kill(Pid::from_raw(pid), Signal::SIGCONT);
        }
        woken
    }

    /// What a person would look at after a failure.
    pub fn report(&self) {
        for args in [&["status"][..], &["events"][..], &["vm", "ls"][..]] {
            match self.haven(args) {
                Ok(text) => println!("{text}"),
                Err(why) => println!("{why}"),
            }
        }
        for host in HOSTS {
            let path = self.dir.join("hosts").join(host).join("upper/var/log/haven/daemon.log");
            let log = std::fs::read_to_string(path).unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            println!("--- {host}\n{}", lines[lines.len().saturating_sub(25)..].join("\n"));
        }
    }
}
