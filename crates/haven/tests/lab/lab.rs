//! The lab of these tests: three hosts and two guests that count.

use crate::witness::Witness;
use anyhow::Result;
use haven_lab::drive::Driver;
use haven_model::{Name, ObjectRef, object::Kind};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{
    ops::Deref,
    path::PathBuf,
    time::{Duration, Instant},
};

/// Its hosts.
pub const HOSTS: [&str; 3] = ["host1", "host2", "host3"];

/// Another host than this one.
pub fn other(host: &str) -> &'static str {
    HOSTS.into_iter().find(|other| *other != host).unwrap_or_default()
}

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
pub struct Lab(Driver);

impl Deref for Lab {
    type Target = Driver;
    fn deref(&self) -> &Driver {
        &self.0
    }
}

impl Lab {
    /// A lab that may not be up yet.
    pub fn new(dir: PathBuf) -> Result<Self> {
        Ok(Self(Driver::new(PathBuf::from(env!("CARGO_BIN_EXE_haven")), dir, 3)?))
    }

    /// Hosts, cluster, guests. No power control: a lost host is recovered when its lease has expired.
    pub fn up(&mut self) -> Result<()> {
        self.haven(&["lab", "down"])?;
        self.haven(&["lab", "up", "--no-power-control"])?;
        // Small hosts that are filled on purpose: `reserve.rs` shows what is refused.
        self.admission(haven_model::AdmissionPolicy::Warn)?;
        let vms = ["tick-1", "tick-2"].map(|name| VM.replace("NAME", name)).concat();
        self.apply(&format!("{MANIFEST}{vms}"), &[])
    }

    /// Waits until all hosts are online and both guests count where they are placed.
    pub fn all_well(&self, witness: &Witness) -> Result<()> {
        for host in HOSTS {
            self.online(host)?;
        }
        self.voting()?;
        for vm in ["tick-1", "tick-2"] {
            self.wait(&format!("{vm} counts"), Duration::from_secs(120), |lab| {
                witness.counts_now(vm, &lab.host_of(vm).unwrap_or_default())
            })?;
        }
        Ok(())
    }

    /// How often a tiny guest has booted, anywhere: each time it says so on its console, which every host keeps.
    pub fn boots_of(&self, vm: &str) -> usize {
        self.said_by(vm, "TINY-UP")
    }

    /// How often a guest has said something on its console, anywhere.
    pub fn said_by(&self, vm: &str, words: &str) -> usize {
        self.all_said_by(vm).matches(words).count()
    }

    /// All that a guest has said on its console, anywhere: whole lines. What is being said has no number yet, or half of one.
    pub fn all_said_by(&self, vm: &str) -> String {
        let consoles = HOSTS.into_iter().flat_map(|host| {
            let folder = self.dir.join(format!("hosts/{host}/upper/var/log/haven/vms"));
            let here = std::fs::read_dir(folder).into_iter().flatten().flatten();
            here.filter(|file| file.file_name().to_string_lossy().starts_with(&format!("{vm}.")))
        });
        let said = consoles.filter_map(|file| std::fs::read(file.path()).ok());
        let whole = |said: Vec<u8>| {
            let end = said.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
            String::from_utf8_lossy(&said[..end]).into_owned()
        };
        said.map(whole).collect()
    }

    /// Stops a VM; returns once it is.
    pub fn stopped(&self, vm: &str) -> Result<()> {
        self.haven(&["vm", "stop", vm])?;
        self.becomes(vm, "stopped")
    }

    /// Waits until a VM stands so.
    pub fn becomes(&self, vm: &str, state: &str) -> Result<()> {
        let named = ObjectRef::new(Kind::Vm, Name::new(vm)?);
        self.wait(&format!("{vm} is {state}"), Duration::from_secs(90), |lab| {
            let item = lab.ask(|client| {
                let named = named.clone();
                async move { client.object(&named).await }
            });
            item.is_ok_and(|item| item.state == state)
        })
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
}
