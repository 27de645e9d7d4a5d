//! One lab: its directory, its namespaces, its hosts.

use crate::{
    host_init::{DAEMON, Layout},
    machine::Machine,
};
use anyhow::{Context, Result, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde::{Deserialize, Serialize};
use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// The MAC address of the machine that the hosts are plugged into.
const FABRIC_MAC: &str = "02:68:76:00:00:fe";

/// What stands in `LABDIR/lab.json`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct State {
    /// Prefix of the namespaces' names.
    pub id: String,
    /// How many hosts.
    pub hosts: u32,
    /// Process that serves the power API and the watchdogs.
    pub power: Option<i32>,
    /// The cluster is not told how to switch hosts off.
    #[serde(default)]
    pub no_power_control: bool,
    /// The last host is only the cluster's witness.
    #[serde(default)]
    pub witness: bool,
    /// Packets from the first to the second host vanish.
    #[serde(default)]
    pub cuts: Vec<(String, String)>,
}

/// A host as lists show it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct HostLine {
    /// Its name.
    pub name: String,
    /// Its address.
    pub address: String,
    /// `on`, `off` or `paused`.
    pub power: &'static str,
    /// `plugged` or `unplugged`.
    pub cable: &'static str,
    /// The hosts that none of its packets reach.
    pub cut_from: Vec<String>,
}

/// A lab on this machine.
#[derive(Clone, Debug)]
pub struct Lab {
    /// Its directory.
    pub dir: PathBuf,
    /// Where the Debian tree and the tiny guest are kept.
    pub cache: PathBuf,
    /// What stands in its file.
    pub state: State,
}

/// A short name for a directory.
fn id_of(dir: &Path) -> String {
    let sum = dir
        .display()
        .to_string()
        .bytes()
        .fold(0xcbf2_9ce4_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    format!("hv{:04x}", sum & 0xffff)
}

/// Whether a process is stopped by a signal.
fn is_stopped(process: Pid) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, state)| state.starts_with('T'))
}

/// Runs a tool and fails with what it said.
pub fn tool(program: &str, args: &[&str]) -> Result<String> {
    let output = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("`{program}` cannot be started; is it installed?"))?;
    if !output.status.success() {
        bail!(
            "`{program} {}` failed: {}",
            args.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

impl Lab {
    /// The lab of `HAVEN_LAB_DIR`, or of `/var/lib/haven-lab`; it need not exist yet.
    ///
    /// # Errors
    /// When its file is damaged.
    pub fn open() -> Result<Self> {
        let path = |name: &str, default: &str| {
            PathBuf::from(std::env::var(name).unwrap_or_else(|_| default.into()))
        };
        let dir = path("HAVEN_LAB_DIR", "/var/lib/haven-lab");
        let cache = path("HAVEN_LAB_CACHE", "/var/cache/haven-lab");
        let state = match std::fs::read(dir.join("lab.json")) {
            Ok(text) => serde_json::from_slice(&text).with_context(|| {
                format!("{} is damaged; remove it", dir.join("lab.json").display())
            })?,
            Err(_) => State { id: id_of(&dir), ..State::default() },
        };
        Ok(Self { dir, cache, state })
    }

    /// Writes its file.
    ///
    /// # Errors
    /// When the directory is not writable.
    pub fn save(&self) -> Result<()> {
        std::fs::create_dir_all(&self.dir)?;
        std::fs::write(self.dir.join("lab.json"), serde_json::to_vec_pretty(&self.state)?)?;
        Ok(())
    }

    /// The fabric's namespace.
    #[must_use]
    pub fn fabric(&self) -> String {
        format!("{}-fab", self.state.id)
    }

    /// A host's or the client's namespace.
    #[must_use]
    pub fn netns(&self, name: &str) -> String {
        format!("{}-{name}", self.state.id)
    }

    /// The hosts' names.
    #[must_use]
    pub fn hosts(&self) -> Vec<String> {
        (1..=self.state.hosts).map(|i| format!("host{i}")).collect()
    }

    /// Checks a host's name.
    ///
    /// # Errors
    /// When the lab has no such host.
    pub fn host(&self, name: &str) -> Result<u32> {
        let number = name.strip_prefix("host").and_then(|n| n.parse().ok());
        match number {
            Some(number) if (1..=self.state.hosts).contains(&number) => Ok(number),
            _ if self.state.hosts == 0 => bail!("no lab is up; start one with `haven lab up`"),
            _ => bail!("the lab has no `{name}`; it has {}", self.hosts().join(", ")),
        }
    }

    /// A host's directory.
    #[must_use]
    pub fn host_dir(&self, name: &str) -> PathBuf {
        self.dir.join("hosts").join(name)
    }

    /// A host's API socket as this machine sees it.
    #[must_use]
    pub fn socket(&self, name: &str) -> PathBuf {
        self.host_dir(name).join("run/api.sock")
    }

    /// PID 1 of a host that is on.
    #[must_use]
    pub fn init(&self, name: &str) -> Option<Pid> {
        let text = std::fs::read_to_string(self.host_dir(name).join("pid")).ok()?;
        let pid: i32 = text.trim().parse().ok()?;
        let line = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let dir = self.host_dir(name).display().to_string();
        (line.contains("host-init") && line.contains(&dir)).then(|| Pid::from_raw(pid))
    }

    /// The hosts and how they stand.
    #[must_use]
    pub fn list(&self) -> Vec<HostLine> {
        let line = |(i, name): (usize, String)| {
            let power = match self.init(&name) {
                None => "off",
                Some(init) if is_stopped(init) => "paused",
                Some(_) => "on",
            };
            let shown =
                tool("ip", &["-n", &self.fabric(), "-o", "link", "show", &self.cable(&name)]);
            let plugged = shown.is_ok_and(|link| link.contains("master br0"));
            let cuts = self.state.cuts.iter().filter(|(from, _)| *from == name);
            HostLine {
                address: format!("10.88.0.{}", i + 1),
                power,
                cable: if plugged { "plugged" } else { "unplugged" },
                cut_from: cuts.map(|(_, to)| to.clone()).collect(),
                name,
            }
        };
        self.hosts().into_iter().enumerate().map(line).collect()
    }

    /// The name of the fabric's end of a host's cable.
    #[must_use]
    pub fn cable(&self, name: &str) -> String {
        format!("p-{name}")
    }

    fn plug(&self, name: &str, address: &str) -> Result<()> {
        let (netns, fabric, cable) = (self.netns(name), self.fabric(), self.cable(name));
        tool("ip", &["netns", "add", &netns])?;
        tool(
            "ip",
            &[
                "-n", &fabric, "link", "add", &cable, "type", "veth", "peer", "name", "eth0",
                "netns", &netns,
            ],
        )?;
        tool("ip", &["-n", &fabric, "link", "set", &cable, "master", "br0", "up"])?;
        tool("ip", &["-n", &netns, "link", "set", "lo", "up"])?;
        tool("ip", &["-n", &netns, "addr", "add", address, "dev", "eth0"])?;
        tool("ip", &["-n", &netns, "link", "set", "eth0", "up"])?;
        tool("ip", &["-n", &netns, "route", "add", "default", "via", "10.88.0.254"])?;
        Ok(())
    }

    /// True when [`Self::make_network`] has been through since this machine was started.
    #[must_use]
    pub fn has_network(&self) -> bool {
        // The client's route is made last.
        tool("ip", &["-n", &self.netns("client"), "route", "show", "default"])
            .is_ok_and(|route| !route.is_empty())
    }

    /// Makes the namespaces and their cables.
    ///
    /// # Errors
    /// With what `ip` said.
    pub fn make_network(&self) -> Result<()> {
        let fabric = self.fabric();
        tool("ip", &["netns", "add", &fabric])?;
        tool("ip", &["-n", &fabric, "link", "set", "lo", "up"])?;
        // Of its own: a bridge without one takes the lowest of its ports, another one with every cable, and hosts that
        // knew the last one send into the void for as long as they remember it.
        let own = ["link", "add", "br0", "address", FABRIC_MAC, "type", "bridge"];
        tool("ip", &[&["-n", &fabric][..], &own, &["forward_delay", "0"]].concat())?;
        tool("ip", &["-n", &fabric, "addr", "add", "10.88.0.254/24", "dev", "br0"])?;
        tool("ip", &["-n", &fabric, "link", "set", "br0", "up"])?;
        for (i, host) in self.hosts().iter().enumerate() {
            self.plug(host, &format!("10.88.0.{}/24", i + 1))?;
        }
        self.plug("client", "10.88.0.250/24")
    }

    /// Switches a host on.
    ///
    /// # Errors
    /// When it does not come up; its `boot.log` says why.
    pub fn power_on(&self, name: &str) -> Result<()> {
        self.host(name)?;
        if self.init(name).is_some() {
            return Ok(());
        }
        let binary = self.dir.join("bin").join(DAEMON);
        let layout = Layout {
            lower: self.cache.join("base/root"),
            host_dir: self.host_dir(name),
            shared: self.dir.join("shared"),
            binaries: self.dir.join("bin"),
            watchdog: Some(crate::watchdog::make(self, name)?),
            name: name.to_owned(),
        };
        self.set_cable(name, true)?;
        let machine = Machine::power_on(&binary, &self.netns(name), &layout)?;
        let pid = machine.detach();
        std::fs::write(self.host_dir(name).join("pid"), pid.to_string())?;
        Ok(())
    }

    /// Cuts a host's power: its packets vanish, then every process of it is gone.
    ///
    /// # Errors
    /// When the lab has no such host.
    pub fn power_off(&self, name: &str) -> Result<()> {
        self.host(name)?;
        self.set_cable(name, false)?;
        if let Some(init) = self.init(name) {
            let _ = kill(init, Signal::SIGKILL);
            for _ in 0..500 {
                if self.init(name).is_none() {
                    break;
                }
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
        }
        let _ = std::fs::remove_file(self.host_dir(name).join("pid"));
        // What the network namespace still has would be gone with a real host.
        let netns = self.netns(name);
        for link in tool("ip", &["-n", &netns, "-o", "link"])?.lines() {
            let device =
                link.split(": ").nth(1).unwrap_or_default().split('@').next().unwrap_or_default();
            if device.starts_with("hv") {
                let _ = tool("ip", &["-n", &netns, "link", "del", device]);
            }
        }
        for line in tool("ip", &["-n", &netns, "-o", "-4", "addr", "show", "dev", "eth0"])?.lines()
        {
            let address = line.split_whitespace().nth(3).unwrap_or_default();
            if address.ends_with("/32") {
                let _ = tool("ip", &["-n", &netns, "addr", "del", address, "dev", "eth0"]);
            }
        }
        Ok(())
    }

    /// Plugs a host's cable in or out.
    ///
    /// # Errors
    /// With what `ip` said.
    pub fn set_cable(&self, name: &str, plugged: bool) -> Result<()> {
        let (fabric, cable) = (self.fabric(), self.cable(name));
        if plugged {
            tool("ip", &["-n", &fabric, "link", "set", &cable, "master", "br0"])?;
        } else {
            tool("ip", &["-n", &fabric, "link", "set", &cable, "nomaster"])?;
        }
        Ok(())
    }

    /// Lets the packets vanish that its cuts name, and only those.
    ///
    /// # Errors
    /// With what `nft` said.
    pub fn set_cuts(&self) -> Result<()> {
        let mut rules = String::from("table bridge lab {}\ndelete table bridge lab\n");
        rules.push_str(
            "table bridge lab {\n  chain cuts {\n    type filter hook forward priority 0;\n",
        );
        for (from, to) in &self.state.cuts {
            rules.push_str(&format!(
                "    iifname \"{}\" oifname \"{}\" drop\n",
                self.cable(from),
                self.cable(to)
            ));
        }
        rules.push_str("  }\n}\n");
        let file = self.dir.join("cuts.nft");
        std::fs::write(&file, rules)?;
        let path = file.display().to_string();
        tool("ip", &["netns", "exec", &self.fabric(), "nft", "-f", &path])?;
        Ok(())
    }

    /// Every process of a host's PID namespace.
    #[must_use]
    pub fn processes(&self, name: &str) -> Vec<Pid> {
        let Some(init) = self.init(name) else {
            return Vec::new();
        };
        let namespace = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
        let Some(own) = namespace(&init.to_string()) else {
            return Vec::new();
        };
        let Ok(entries) = std::fs::read_dir("/proc") else {
            return Vec::new();
        };
        let pids = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        pids.filter(|pid| {
            pid.bytes().all(|b| b.is_ascii_digit()) && namespace(pid).as_ref() == Some(&own)
        })
        .filter_map(|pid| pid.parse().ok().map(Pid::from_raw))
        .collect()
    }

    /// Stops all processes of a host at once, or lets them go on.
    ///
    /// # Errors
    /// When the lab has no such host.
    pub fn set_paused(&self, name: &str, paused: bool) -> Result<()> {
        self.host(name)?;
        let signal = if paused { Signal::SIGSTOP } else { Signal::SIGCONT };
        // Twice, for processes that were born meanwhile.
        for _ in 0..2 {
            for pid in self.processes(name) {
                let _ = kill(pid, signal);
            }
        }
        Ok(())
    }

    /// A command inside a host, or in the client's namespace.
    ///
    /// # Errors
    /// When that host is off.
    pub fn command(&self, place: &str, program: &str) -> Result<Command> {
        if place == "client" {
            if self.state.hosts == 0 {
                bail!("no lab is up; start one with `haven lab up`");
            }
            let mut command = Command::new("ip");
            command.args(["netns", "exec", &self.netns("client"), program]);
            return Ok(command);
        }
        self.host(place)?;
        let init = self.init(place).with_context(|| {
            format!("{place} is off; switch it on with `haven lab start {place}`")
        })?;
        let mut command = Command::new("nsenter");
        command.args([
            "--net",
            "--mount",
            "--pid",
            "--uts",
            "--ipc",
            "--target",
            &init.to_string(),
        ]);
        command.arg(format!("--root=/proc/{init}/root")).args(["--wd=/", "--", program]);
        Ok(command)
    }

    /// Ends every process and namespace of it; the hosts' disks stay.
    ///
    /// # Errors
    /// When a namespace cannot be removed.
    pub fn end_everything(&mut self) -> Result<()> {
        // First what could switch a host on again.
        if let Some(power) = self.state.power.take() {
            let line =
                std::fs::read_to_string(format!("/proc/{power}/cmdline")).unwrap_or_default();
            if line.contains("power-api") {
                let _ = kill(Pid::from_raw(power), Signal::SIGKILL);
            }
        }
        for host in self.hosts() {
            if let Some(init) = self.init(&host) {
                let _ = kill(init, Signal::SIGKILL);
            }
        }
        for _ in 0..500 {
            if self.hosts().iter().all(|host| self.init(host).is_none()) {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        let prefix = format!("{}-", self.state.id);
        for line in tool("ip", &["netns", "list"])?.lines() {
            let name = line.split_whitespace().next().unwrap_or_default();
            if name.starts_with(&prefix) {
                tool("ip", &["netns", "del", name])?;
            }
        }
        Ok(())
    }

    /// Ends everything and forgets the hosts' disks.
    ///
    /// # Errors
    /// When something cannot be removed.
    pub fn down(&mut self) -> Result<()> {
        self.end_everything()?;
        if self.dir.exists() {
            std::fs::remove_dir_all(&self.dir)
                .with_context(|| format!("{} cannot be removed", self.dir.display()))?;
        }
        self.state = State { id: self.state.id.clone(), ..State::default() };
        Ok(())
    }
}
