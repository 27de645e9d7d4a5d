//! What a person types at a lab and at a guest.

use crate::lab::Lab;
use crate::witness::Witness;
use anyhow::{Context, Result, bail, ensure};
use haven_lab::drive::Driver;
use std::{
    io::{Read, Write},
    net::{TcpListener, UdpSocket},
    path::PathBuf,
    process::{ChildStdin, Command, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

const PATIENCE: Duration = Duration::from_secs(30);
/// The key that leaves a console: Ctrl-].
const LEAVE: u8 = 0x1d;

/// Types at a command, and what it has printed since.
struct Typing {
    child: std::process::Child,
    stdin: Option<ChildStdin>,
    said: mpsc::Receiver<Vec<u8>>,
    text: String,
}

impl Typing {
    fn at(mut command: Command) -> Result<Self> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn()?;
        let stdin = child.stdin.take();
        let mut stdout = child.stdout.take().context("an output")?;
        let (out, said) = mpsc::channel();
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(n) = stdout.read(&mut bytes)
                && n > 0
                && out.send(bytes[..n].to_vec()).is_ok()
            {}
        });
        Ok(Self { child, stdin, said, text: String::new() })
    }

    fn type_in(&mut self, keys: &[u8]) -> Result<()> {
        let stdin = self.stdin.as_mut().context("an input")?;
        stdin.write_all(keys)?;
        Ok(stdin.flush()?)
    }

    /// Waits until it has printed these words.
    fn until(&mut self, words: &str) -> Result<()> {
        let until = Instant::now() + PATIENCE;
        while !self.text.contains(words) {
            let left = until.saturating_duration_since(Instant::now());
            let Ok(bytes) = self.said.recv_timeout(left) else {
                bail!("`{words}` should be printed, and this was: {:?}", self.text);
            };
            self.text.push_str(&String::from_utf8_lossy(&bytes));
        }
        Ok(())
    }

    /// Waits for its end, which the open input does not bring.
    fn ended(mut self) -> Result<()> {
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait()? {
                ensure!(status.success(), "it ended with {status}");
                return Ok(());
            }
            if Instant::now() > until {
                let _ = self.child.kill();
                let _ = self.child.wait();
                bail!("it does not end");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// A console leads into a guest from any host, and Ctrl-] leaves it; the guest runs on.
pub fn console(lab: &mut Lab, _: &Witness) -> Result<()> {
    let place = lab.host_of("tick-1")?;
    // Asked at another host, the way leads over its API and that of the guest's host.
    let away = lab.hosts.iter().find(|host| **host != place).context("another host")?;
    for host in [&place, away] {
        let args = ["lab", "exec", host, "--", "haven", "vm", "console", "tick-1"];
        let mut typing = Typing::at(lab.command(&args))?;
        typing.type_in(b"\n")?;
        typing.until("haven> ").with_context(|| format!("the guest's shell, seen from {host}"))?;
        typing.type_in(b"echo it-is-$((6*7))\n")?;
        typing.until("it-is-42").with_context(|| format!("a command, typed at {host}"))?;
        typing.type_in(&[LEAVE])?;
        typing.ended().with_context(|| format!("Ctrl-] at {host}"))?;
    }
    Ok(())
}

/// Something opened within a host's network, by a thread of its own: it belongs there for good.
fn opened_in<T: Send + 'static>(
    lab: &Driver,
    host: &str,
    open: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> Result<T> {
    let path = format!("/var/run/netns/{}-{host}", lab.haven(&["lab", "id"])?);
    let opening = std::thread::spawn(move || -> Result<T> {
        nix::sched::setns(std::fs::File::open(&path)?, nix::sched::CloneFlags::CLONE_NEWNET)?;
        Ok(open()?)
    });
    opening.join().map_err(|_| anyhow::anyhow!("the opening thread died"))?
}

/// Other programs have the ports of a host that begins a cluster: each is named with what to do, and once they are free
/// the host goes on by itself.
fn ports_in_use(lab: &Driver) -> Result<()> {
    let tcp = |port: u16| opened_in(lab, "host1", move || TcpListener::bind(("0.0.0.0", port)));
    let store = [tcp(7379)?, tcp(7380)?];
    let api = tcp(7443)?;
    let heartbeat = opened_in(lab, "host1", || UdpSocket::bind("0.0.0.0:7381"))?;
    lab.haven(&["lab", "exec", "host1", "--", "haven", "init", "--address", "10.88.0.1"])?;
    let says = |words: &str| -> Result<()> {
        let until = Instant::now() + PATIENCE;
        loop {
            let said = match lab.haven(&["lab", "exec", "host1", "--", "haven", "status"]) {
                Ok(said) => said,
                Err(why) => format!("{why:#}"),
            };
            if said.contains(words) {
                return Ok(());
            }
            ensure!(Instant::now() < until, "`haven status` should say `{words}`, and says {said}");
            std::thread::sleep(Duration::from_millis(200));
        }
    };
    let [client, peer] = store;
    let named = |port: u16| format!("another program has the port {port}, which etcd needs");
    says(&named(7379))?;
    drop(client);
    says(&named(7380))?;
    drop(peer);
    says("another program has the port 7443, so that this host answers nobody")?;
    says("another program has the port 7381, so that no other host hears this one")?;
    drop((api, heartbeat));
    let until = Instant::now() + PATIENCE;
    let status = ["lab", "exec", "host1", "--", "haven", "status"];
    while lab.haven(&status)?.contains("another program") {
        ensure!(Instant::now() < until, "the ports are free: {}", lab.haven(&status)?);
        std::thread::sleep(Duration::from_millis(200));
    }
    Ok(())
}

fn refused(lab: &Driver, args: &[&str], words: &str) -> Result<()> {
    let said = match lab.haven(args) {
        Ok(said) => bail!("`haven {}` should be refused, and says {said}", args.join(" ")),
        Err(why) => format!("{why:#}"),
    };
    ensure!(said.contains(words), "`{}` should say `{words}`, and says: {said}", args.join(" "));
    Ok(())
}

/// The lab's own commands, on a lab beside this one whose hosts have no cluster.
pub fn lab_commands(lab: &mut Lab, _: &Witness) -> Result<()> {
    let dir = PathBuf::from(format!("{}-bare", lab.dir.display()));
    let bare = Driver::new(PathBuf::from(env!("CARGO_BIN_EXE_haven")), dir, 2)?;
    let result = on_bare_hosts(&bare);
    bare.haven(&["lab", "down"])?;
    ensure!(!bare.dir.exists(), "{} is left behind", bare.dir.display());
    result?;
    lab.haven(&["lab", "up"]).context("`lab up` a second time")?;
    refused(lab, &["lab", "kill", "host9"], "host9")
}

fn on_bare_hosts(lab: &Driver) -> Result<()> {
    refused(lab, &["lab", "up", "--hosts", "10"], "1 to 9 hosts")?;
    lab.haven(&["lab", "up", "--hosts", "2", "--bare"])?;
    let power = |host: &str, word: &str| -> Result<()> {
        let list = lab.haven(&["lab", "ls"])?;
        let is = list.lines().any(|line| line.starts_with(host) && line.ends_with(word));
        ensure!(is, "{host} should be {word}:\n{list}");
        Ok(())
    };
    let reaches = |from: &str, to: &str| {
        lab.haven(&["lab", "exec", from, "--", "busybox", "ping", "-c", "1", "-W", "1", to]).is_ok()
    };
    power("host1", "on")?;
    lab.haven(&["lab", "kill", "host1"])?;
    power("host1", "off")?;
    lab.haven(&["lab", "start", "host1"])?;
    power("host1", "on")?;
    ensure!(reaches("host1", "10.88.0.2") && reaches("client", "10.88.0.1"), "the network");
    lab.haven(&["lab", "cut", "host2", "--from", "host1"])?;
    ensure!(!reaches("host1", "10.88.0.2"), "host2 is cut off host1");
    ensure!(reaches("client", "10.88.0.2"), "and from nothing else");
    lab.haven(&["lab", "heal"])?;
    lab.haven(&["lab", "cut", "host2", "--from", "host1", "--one-way"])?;
    ensure!(!reaches("host1", "10.88.0.2"), "answers of host2 vanish");
    listed(
        lab,
        1,
        &serde_json::json!({"name": "host2", "address": "10.88.0.2", "power": "on",
        "cable": "plugged", "cut_from": ["host1"]}),
    )?;
    lab.haven(&["lab", "heal"])?;
    ensure!(reaches("host1", "10.88.0.2"), "healed");
    let mut typing = Typing::at(lab.command(&["lab", "shell", "host2"]))?;
    typing.type_in(b"hostname; exit\n")?;
    typing.until("host2")?;
    typing.ended()?;
    lab.haven(&["lab", "watchdog", "off"])?;
    lab.haven(&["lab", "pause", "host2"])?;
    let stands = |word: &str| -> Result<()> {
        let daemons = lab.pids("host2", "haven daemon");
        ensure!(!daemons.is_empty(), "no daemon runs on host2");
        for pid in daemons {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
            let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
            ensure!((state == Some('T')) == (word == "paused"), "{stat}");
        }
        Ok(())
    };
    stands("paused")?;
    listed(
        lab,
        1,
        &serde_json::json!({"name": "host2", "address": "10.88.0.2", "power": "paused",
        "cable": "plugged", "cut_from": []}),
    )?;
    lab.haven(&["lab", "resume", "host2"])?;
    std::thread::sleep(Duration::from_millis(100));
    stands("awake")?;
    power_control(lab)?;
    ports_in_use(lab)?;
    // As after an interrupted `up`, or a restart of this machine: it is made whole again.
    let client = format!("{}-client", lab.haven(&["lab", "id"])?.trim());
    let gone = Command::new("ip").args(["netns", "del", &client]).status()?;
    ensure!(gone.success() && !reaches("client", "10.88.0.1"), "the client is gone");
    lab.haven(&["lab", "up", "--bare"])?;
    ensure!(reaches("client", "10.88.0.1") && reaches("host1", "10.88.0.2"), "whole again");
    refused(lab, &["lab", "up", "--hosts", "3", "--bare"], "`haven lab down`")
}

fn listed(lab: &Driver, index: usize, line: &serde_json::Value) -> Result<()> {
    let text = lab.haven(&["lab", "ls", "-o", "json"])?;
    let list: serde_json::Value = serde_json::from_str(&text)?;
    ensure!(list[index] == *line, "`lab ls -o json` should say {line}, and says {text}");
    Ok(())
}

/// What a management controller offers, asked as one is.
fn power_control(lab: &Driver) -> Result<()> {
    let ask = |login: &str, system: &str, more: &[&str]| {
        let url = format!("http://10.88.0.254:8000/redfish/v1/Systems/{system}");
        let curl =
            ["lab", "exec", "client", "--", "curl", "-s", "-w", " %{http_code}", "-u", login];
        lab.haven(&[&curl[..], more, &[&url]].concat())
    };
    let reads = |state: &str| -> Result<()> {
        let said = ask("lab:lab", "host1", &[])?;
        ensure!(said == format!("{{\"PowerState\":\"{state}\"}} 200"), "{said}");
        Ok(())
    };
    ensure!(ask("lab:wrong", "host1", &[])?.ends_with(" 401"), "a wrong password");
    ensure!(ask("lab:lab", "host9", &[])?.ends_with(" 404"), "no such host");
    for (reset, state) in [("ForceOff", "Off"), ("On", "On"), ("ForceRestart", "On")] {
        let before = lab.pids("host1", "haven daemon");
        let body = format!("{{\"ResetType\":\"{reset}\"}}");
        let said = ask("lab:lab", "host1/Actions/ComputerSystem.Reset", &["-d", &body])?;
        ensure!(said.ends_with("204"), "{reset}: {said}");
        reads(state)?;
        let runs = !lab.pids("host1", "haven daemon").is_empty();
        ensure!(state == "On" || (!runs && !before.is_empty()), "{reset} left the daemon running");
    }
    Ok(())
}
