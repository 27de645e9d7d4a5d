//! Programs of the fence-agents project, by their protocol on standard input: `key=value` lines, and an exit code.
//!
//! An agent runs as root, so only names like `fence_ipmilan`, in the agents' own directory, are ever run. It has a
//! deadline and a process group of its own; when it is late, or nobody waits for it any more, the whole group is killed.

use super::driver::PowerDriver;
use async_trait::async_trait;
use haven_model::{
    PowerProblem, PowerSpec, PowerState,
    power::{is_agent, option_refused},
};
use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use std::{
    path::PathBuf,
    process::{ExitStatus, Stdio},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt},
    process::{Child, Command},
    time::Instant,
};

/// Where Debian puts them.
const DIRECTORY: &str = "/usr/sbin";
/// So much of what an agent says is kept, bytes.
const KEPT: usize = 16 << 10;
/// So much of it is told, characters.
const TOLD: usize = 400;
/// What `status` ends with for a host that has power, and for one that has none.
const ON: i32 = 0;
const OFF: i32 = 2;

/// Runs fence agents.
pub struct FenceAgent {
    /// The directory in which they are.
    pub directory: PathBuf,
    /// How long one run may take.
    pub run: Duration,
    /// How long after the command the power must read as off.
    pub settle: Duration,
    /// The pause between two reads.
    pub pause: Duration,
}

impl Default for FenceAgent {
    /// Agents wait some 20 s themselves until the power has changed.
    fn default() -> Self {
        Self {
            directory: DIRECTORY.into(),
            run: Duration::from_secs(30),
            settle: Duration::from_secs(15),
            pause: Duration::from_millis(200),
        }
    }
}

/// What a run came to.
struct Ran {
    status: ExitStatus,
    said: String,
}

/// Kills the whole group of an agent that has not ended.
struct Group(Option<Pid>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(group) = self.0 {
            let _ = killpg(group, Signal::SIGKILL);
        }
    }
}

impl FenceAgent {
    /// Runs the agent once.
    async fn run(&self, power: &PowerSpec, action: &str) -> Result<Ran, PowerProblem> {
        let name = power.agent.as_deref().unwrap_or_default();
        if !is_agent(name) {
            let message = format!("`{name}` is no name of a fence agent");
            return Err(PowerProblem {
                message,
                hint: "write one like `fence_ipmilan` into `power.agent`".into(),
            });
        }
        let input = lines(power, action)?;
        let mut command = Command::new(self.directory.join(name));
        command
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("LC_ALL", "C.UTF-8")
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true);
        let mut child = command.spawn().map_err(|error| self.not_started(name, &error))?;
        let group = child.id().and_then(|id| i32::try_from(id).ok()).map(Pid::from_raw);
        // Made after the child, so dropped before it: the leader is still there when its group is killed.
        let mut group = Group(group);
        let late = || {
            PowerProblem {
            message: format!("{} did not end within {:?} and was killed", told(power), self.run),
            hint: "the controller may hang or be without power; shorten `login_timeout` and `power_timeout` in `power.options` if it is only slow".into(),
        }
        };
        let ran =
            tokio::time::timeout(self.run, talk(&mut child, input)).await.map_err(|_| late())?;
        group.0 = None;
        let (status, said) = ran.map_err(|error| PowerProblem {
            message: format!("{} cannot be run to its end: {error}", told(power)),
            hint: "the log of this host's daemon may say more".into(),
        })?;
        let said =
            if power.password.is_empty() { said } else { said.replace(&power.password, "…") };
        Ok(Ran { status, said })
    }

    fn not_started(&self, name: &str, error: &std::io::Error) -> PowerProblem {
        if error.kind() == std::io::ErrorKind::NotFound {
            return PowerProblem {
                message: format!("{name} is not in {} of this host", self.directory.display()),
                hint: format!(
                    "`apt install {}` on every host (Debian 12: `apt install fence-agents`)",
                    name.replacen("fence_", "fence-agents-", 1).replace('_', "-")
                ),
            };
        }
        PowerProblem {
            message: format!("{name} cannot be started: {error}"),
            hint: "reinstall its package".into(),
        }
    }
}

/// What is asked of which, in words.
fn told(power: &PowerSpec) -> String {
    format!("the fence agent {}", power.at())
}

/// What the agent reads. Later lines win, so that no option can change what is done.
fn lines(power: &PowerSpec, action: &str) -> Result<String, PowerProblem> {
    let own = [
        ("ip", power.address.as_deref().unwrap_or_default()),
        ("username", &power.user),
        ("password", &power.password),
        ("action", action),
    ];
    let options = power.options.iter().map(|(key, value)| (key.as_str(), value.as_str()));
    if let Some(why) = power.options.keys().find_map(|key| option_refused(key)) {
        let message = format!("{} is not asked: {why}", told(power));
        return Err(PowerProblem { message, hint: "take it out of `power.options`".into() });
    }
    let mut text = String::new();
    for (key, value) in options.chain(own.into_iter().filter(|(_, value)| !value.is_empty())) {
        if key.contains(['\n', '\r', '=']) || value.contains(['\n', '\r', '\0']) {
            let message = format!("`{}` of {} does not fit into one line", key.trim(), told(power));
            return Err(PowerProblem { message, hint: "give it without line breaks".into() });
        }
        text += &format!("{key}={value}\n");
    }
    Ok(text)
}

async fn keep(mut from: impl AsyncRead + Unpin) -> std::io::Result<Vec<u8>> {
    let (mut kept, mut part) = (Vec::new(), [0; 4096]);
    loop {
        match from.read(&mut part).await? {
            0 => return Ok(kept),
            read if kept.len() < KEPT => kept.extend_from_slice(&part[..read]),
            _ => {}
        }
    }
}

async fn talk(child: &mut Child, input: String) -> std::io::Result<(ExitStatus, String)> {
    let (stdin, out, err) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let write = async {
        if let Some(mut stdin) = stdin {
            // One that ends before it has read all says why itself.
            let _ = stdin.write_all(input.as_bytes()).await;
        }
    };
    let read = async {
        let out = async { if let Some(out) = out { keep(out).await } else { Ok(Vec::new()) } };
        let err = async { if let Some(err) = err { keep(err).await } else { Ok(Vec::new()) } };
        let (out, err) = tokio::join!(out, err);
        std::io::Result::Ok([err?, out?].concat())
    };
    // Its output ends before it is waited for: until then its number, and that of its group, stay its own.
    let ((), said) = tokio::join!(write, read);
    let status = child.wait().await?;
    Ok((status, String::from_utf8_lossy(&said?).into_owned()))
}

/// The end of what it said, on one line.
fn end_of(said: &str) -> String {
    let words: Vec<&str> = said.split_whitespace().collect();
    let line = words.join(" ");
    let skip = line.chars().count().saturating_sub(TOLD);
    line.chars().skip(skip).collect()
}

fn failed(power: &PowerSpec, action: &str, ran: &Ran) -> PowerProblem {
    let how = match ran.status.code() {
        Some(code) => format!("ended with {code}"),
        None => "was killed".into(),
    };
    let said = end_of(&ran.said);
    let low = said.to_ascii_lowercase();
    let said = if said.is_empty() { "it said nothing".to_owned() } else { said };
    let hint = if ["password", "login", "unauthorized", "authentica", "plug status"]
        .iter()
        .any(|w| low.contains(w))
    {
        "check `power.user` and `power.password`, and that this user may switch the power over the network"
    } else if ["connect", "timed out", "timeout", "unreachable", "no route"]
        .iter()
        .any(|w| low.contains(w))
    {
        "check `power.address` and that this host reaches it; a controller without power does not answer"
    } else {
        "its options stand in `man` of the agent; they go into `power.options`"
    };
    PowerProblem {
        message: format!("{} {how} when asked for `{action}`: {said}", told(power)),
        hint: hint.into(),
    }
}

#[async_trait]
impl PowerDriver for FenceAgent {
    async fn state(&self, power: &PowerSpec) -> Result<PowerState, PowerProblem> {
        let ran = self.run(power, "status").await?;
        match ran.status.code() {
            Some(ON) => Ok(PowerState::On),
            Some(OFF) => Ok(PowerState::Off),
            _ => Err(failed(power, "status", &ran)),
        }
    }

    async fn off(&self, power: &PowerSpec) -> Result<(), PowerProblem> {
        let ran = self.run(power, "off").await?;
        let refused = (!ran.status.success()).then(|| failed(power, "off", &ran));
        let begin = Instant::now();
        loop {
            match (self.state(power).await?, &refused) {
                (PowerState::Off, _) => return Ok(()),
                (PowerState::On, Some(refused)) => return Err(refused.clone()),
                (PowerState::On, None) => {}
            }
            if begin.elapsed() >= self.settle {
                let message = format!(
                    "{} says that it switched off, and then that the power is on",
                    told(power)
                );
                return Err(PowerProblem {
                    message,
                    hint: "check which host its options name".into(),
                });
            }
            tokio::time::sleep(self.pause).await;
        }
    }
}
