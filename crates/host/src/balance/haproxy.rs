//! The driver for HAProxy, 2.6 and later.
//!
//! Every backend has a fixed number of slots (`m1`…), a multiple of 16. A member is put into a slot by the runtime
//! API; the configuration file holds the same assignment, so that a reload changes nothing.
//!
//! Every slot has a second server (`p1`…), a backup without a check: when the checks find no member up at all, which is
//! what members look like that have more to do than they can, those that Haven knows to run are asked all the same. An
//! answer that comes late is better than none.
//!
//! Weights, too, change over the runtime API. Of members that change together, those that get something are told before
//! those that get nothing any more, so that there is no instant at which nobody does.

use super::{
    certificates::{self, Certificates},
    driver::{
        BalanceDriver, BalanceError, Check, FrontendMode, FrontendWanted, LeftOut, Member,
        MemberState, Options,
    },
};
use async_trait::async_trait;
use haven_model::service::{Sticky, TlsVersion};
use std::{
    collections::BTreeMap,
    fmt::Write,
    path::{Path, PathBuf},
    process::Stdio,
    sync::Arc,
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    process::Command,
    sync::Mutex,
};

/// How long a member has to take a connection, milliseconds; as long passes before the same one is asked again. Long
/// enough for a kernel that is busy, and short for a packet that was lost, as while a guest changes its host.
const CONNECT_MS: u64 = 200;
/// How often a connection is tried anew: for 4.8 s in all.
const RETRIES: u64 = 12;
/// A connection that a lost member does not take is tried elsewhere within this. What still hangs on the member after it waits for an answer that cannot come.
const ELSEWHERE: Duration = Duration::from_millis(2 * CONNECT_MS);
/// The servers of a slot: the one that is checked, and its backup.
const KINDS: [&str; 2] = ["m", "p"];
/// The cookie that names a client's member.
const COOKIE: &str = "HAVEN";
/// Slots come in such steps.
const STEP: usize = 16;

/// One backend's slots: who is in which.
pub type Slots = Vec<Option<Member>>;

/// What HAProxy was last told.
#[derive(Default)]
struct Told {
    /// The configuration without its members: a change of it needs a reload.
    structure: String,
    slots: BTreeMap<String, Slots>,
}

/// Drives one HAProxy.
pub struct HaproxyDriver {
    /// `RUN/haproxy`.
    directory: PathBuf,
    told: Arc<Mutex<Option<Told>>>,
    certificates: Mutex<Certificates>,
}

fn failed<E: std::fmt::Display>(what: impl Into<String>) -> impl FnOnce(E) -> BalanceError {
    let what = what.into();
    move |error| BalanceError { what, why: error.to_string() }
}

/// Puts members into slots: who has one keeps it, newcomers take free ones.
#[must_use]
pub fn assign(before: &[Option<Member>], members: &[Member]) -> Slots {
    let size = members.len().next_multiple_of(STEP).max(STEP).max(before.len());
    let mut slots: Slots = vec![None; size];
    let mut new = Vec::new();
    for member in members {
        let old =
            before.iter().position(|slot| slot.as_ref().is_some_and(|s| s.name == member.name));
        match old {
            Some(i) => slots[i] = Some(member.clone()),
            None => new.push(member.clone()),
        }
    }
    for member in new {
        if let Some(slot) = slots.iter_mut().find(|slot| slot.is_none()) {
            *slot = Some(member);
        }
    }
    slots
}

/// The configuration file; without `slots` only its structure.
#[must_use]
pub fn config(
    directory: &Path,
    wanted: &[FrontendWanted],
    slots: Option<&BTreeMap<String, Slots>>,
) -> String {
    let socket = directory.join("admin.sock");
    let mut text = format!(
        "global\n  stats socket {} mode 600 level admin expose-fd listeners\n  stats timeout 1m\n  maxconn 4000\n  hard-stop-after 30s\n\n\
         defaults\n  timeout connect {CONNECT_MS}ms\n  timeout client 60s\n  timeout server 60s\n  timeout check 1s\n  retries {RETRIES}\n  option redispatch 1\n  option dontlognull\n\n",
        socket.display()
    );
    for frontend in wanted {
        let (name, mode) = (&frontend.service, mode_word(frontend.mode));
        frontend_lines(&mut text, directory, frontend);
        let _ = writeln!(
            text,
            "\nbackend b_{name}\n  mode {mode}\n  balance {}\n  option allbackups\n  source {}",
            if frontend.options.sticky == Sticky::Source {
                "source\n  hash-type consistent"
            } else {
                "roundrobin"
            },
            frontend.source
        );
        if frontend.options.sticky == Sticky::Cookie {
            let secure = if frontend.tls.is_some() { " secure" } else { "" };
            let _ = writeln!(text, "  cookie {COOKIE} insert indirect nocache httponly{secure}");
        }
        let limits = &frontend.options;
        if limits.max_connections.or(limits.max_connections_per_member).is_some() {
            // Whoever goes away while it waits takes nobody's place.
            text.push_str("  timeout queue 30s\n  option abortonclose\n");
        }
        if frontend.mode == FrontendMode::Http {
            // What was sent may have been done: only what changes nothing is sent twice.
            text.push_str("  retry-on conn-failure empty-response response-timeout\n  http-request disable-l7-retry unless METH_GET\n  option http-server-close\n");
        }
        let check = check_lines(&mut text, frontend.check.as_ref());
        let count = slots
            .and_then(|s| s.get(name))
            .map_or_else(|| frontend.members.len().next_multiple_of(STEP).max(STEP), Vec::len);
        let _ = writeln!(text, "  # {count} slots");
        if let Some(slots) = slots.and_then(|s| s.get(name)) {
            for (i, slot) in slots.iter().enumerate() {
                let (address, port, weight) = slot
                    .as_ref()
                    .map_or(("127.0.0.1".into(), 9, 100), |m| (m.ip.to_string(), m.port, m.weight));
                let down = if slot.as_ref().is_some_and(|m| m.state != MemberState::Down) {
                    ""
                } else {
                    " disabled"
                };
                let (all, cookie) = server_words(&frontend.options, slot.as_ref());
                let own = format!("{check}{cookie}");
                for (kind, more) in KINDS.into_iter().zip([own.as_str(), " backup"]) {
                    let _ = writeln!(
                        text,
                        "  server {kind}{} {address}:{port} weight {weight}{all}{more}{down}",
                        i + 1
                    );
                }
            }
        }
        text.push('\n');
    }
    text
}

/// What HAProxy listens on.
fn frontend_lines(text: &mut String, directory: &Path, frontend: &FrontendWanted) {
    let (name, mode) = (&frontend.service, mode_word(frontend.mode));
    let _ = writeln!(
        text,
        "frontend f_{name}\n  mode {mode}\n  bind {}:{}{}{}\n  default_backend b_{name}",
        frontend.address,
        frontend.port,
        if frontend.options.proxy_protocol.accept { " accept-proxy" } else { "" },
        tls_words(directory, frontend)
    );
    if frontend.mode == FrontendMode::Http {
        // A kept connection is closed with an answer, never under a question that is on its way.
        text.push_str("  option idle-close-on-response\n");
    }
    if frontend.tls.is_some() && frontend.mode == FrontendMode::Http {
        text.push_str("  http-request set-header X-Forwarded-Proto https\n");
    }
    if let Some(most) = frontend.options.max_connections {
        let _ = writeln!(text, "  maxconn {most}");
    }
}

/// What TLS adds to the line on which a frontend listens.
fn tls_words(directory: &Path, frontend: &FrontendWanted) -> String {
    let Some(tls) = &frontend.tls else { return String::new() };
    let version = match tls.min_version {
        TlsVersion::V12 => "TLSv1.2",
        TlsVersion::V13 => "TLSv1.3",
    };
    // What is spoken within connections is not known.
    let alpn = if frontend.mode == FrontendMode::Http { " alpn h2,http/1.1" } else { "" };
    let file = certificates::file(directory, tls);
    format!(" ssl crt {}{alpn} ssl-min-ver {version}", file.display())
}

/// What the options add to the lines of both servers of a slot, and to that of the checked one.
fn server_words(options: &Options, member: Option<&Member>) -> (String, String) {
    let mut all = String::new();
    if let Some(most) = options.max_connections_per_member {
        let _ = write!(all, " maxconn {most}");
    }
    if options.proxy_protocol.send {
        all.push_str(" send-proxy-v2");
    }
    let cookie = member.filter(|_| options.sticky == Sticky::Cookie);
    (all, cookie.map(|member| format!(" cookie {}", member.name)).unwrap_or_default())
}

fn mode_word(mode: FrontendMode) -> &'static str {
    match mode {
        FrontendMode::Http => "http",
        FrontendMode::Tcp => "tcp",
    }
}

/// Writes the backend's check lines; returns what goes on each server's line.
fn check_lines(text: &mut String, check: Option<&Check>) -> String {
    let Some(check) = check else {
        return String::new();
    };
    if check.mode == FrontendMode::Http {
        let _ = writeln!(text, "  option httpchk GET {}", check.path);
    }
    let interval = check.interval_ms.min(500);
    format!(
        " check port {} inter {interval}ms fastinter 100ms downinter 300ms fall 2 rise 1",
        check.port
    )
}

/// What HAProxy says is wrong, without what follows from it.
pub(super) fn alerts(said: &[u8]) -> String {
    let said = String::from_utf8_lossy(said);
    let alerts = said.lines().filter(|line| line.contains("ALERT"));
    alerts.take(2).collect::<Vec<_>>().join("; ")
}

/// One command of the runtime API of the HAProxy whose files stand in `directory`, and its answer.
async fn ask(directory: &Path, command: &str) -> Result<String, BalanceError> {
    let what = || format!("HAProxy was asked `{}`", command.lines().next().unwrap_or_default());
    let talk = async {
        let mut stream = UnixStream::connect(directory.join("admin.sock")).await?;
        stream.write_all(command.as_bytes()).await?;
        stream.write_all(b"\n").await?;
        stream.shutdown().await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        std::io::Result::Ok(answer)
    };
    let answer = tokio::time::timeout(Duration::from_secs(1), talk).await;
    answer.map_err(failed(what()))?.map_err(failed(what()))
}

impl HaproxyDriver {
    /// A driver whose files stand in `directory`, on a tmpfs.
    #[must_use]
    pub fn new(directory: PathBuf) -> Self {
        let certificates = Mutex::new(Certificates::new(directory.clone()));
        Self { directory, told: Arc::default(), certificates }
    }

    fn pid(&self) -> Option<i32> {
        let pid: i32 =
            std::fs::read_to_string(self.directory.join("pid")).ok()?.trim().parse().ok()?;
        let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
        (name.trim() == "haproxy").then_some(pid)
    }

    /// One command of the runtime API, and its answer.
    async fn ask(&self, command: &str) -> Result<String, BalanceError> {
        ask(&self.directory, command).await
    }

    /// Ends, after [`ELSEWHERE`], what still hangs on members that have gone down, so that who waits for them is told.
    fn end_sessions(&self, service: &str, before: &Slots, slots: &Slots) {
        let down =
            |slot: &Option<Member>| slot.as_ref().map(|m| m.state) == Some(MemberState::Down);
        let gone: Vec<usize> = (0..slots.len().min(before.len()))
            .filter(|i| down(&slots[*i]) && !down(&before[*i]))
            .collect();
        if gone.is_empty() {
            return;
        }
        let (told, directory, service) =
            (Arc::clone(&self.told), self.directory.clone(), service.to_owned());
        tokio::spawn(async move {
            tokio::time::sleep(ELSEWHERE).await;
            let told = told.lock().await;
            let Some(slots) = told.as_ref().and_then(|told| told.slots.get(&service)) else {
                return;
            };
            for i in gone.into_iter().filter(|i| slots.get(*i).is_some_and(down)) {
                let servers = KINDS.map(|kind| format!("b_{service}/{kind}{}", i + 1));
                let commands = servers.map(|server| format!("shutdown sessions server {server}"));
                if let Err(error) = ask(&directory, &commands.join(";")).await {
                    tracing::debug!(%error, "sessions of a lost member could not be ended");
                }
            }
        });
    }

    /// Writes the configuration, has it checked, and starts or reloads.
    async fn reload(&self, text: &str) -> Result<(), BalanceError> {
        std::fs::create_dir_all(&self.directory)
            .map_err(failed("the balancer's directory cannot be made"))?;
        let file = self.directory.join("haproxy.cfg");
        std::fs::write(&file, text)
            .map_err(failed(format!("{} cannot be written", file.display())))?;
        let old = self.pid();
        let mut command = Command::new("haproxy");
        command.arg("-D").arg("-f").arg(&file).arg("-p").arg(self.directory.join("pid"));
        if let Some(old) = old {
            command
                .arg("-x")
                .arg(self.directory.join("admin.sock"))
                .args(["-sf", &old.to_string()]);
        }
        let output = command
            .stdin(Stdio::null())
            .output()
            .await
            .map_err(failed("HAProxy cannot be started; install the package haproxy"))?;
        if output.status.success() {
            return Ok(());
        }
        let why = alerts(&output.stderr);
        Err(BalanceError { what: "HAProxy refuses its configuration".into(), why })
    }

    /// Brings the members from what HAProxy was told to `slots`.
    async fn move_members(
        &self,
        FrontendWanted { service, options, .. }: &FrontendWanted,
        before: &Slots,
        slots: &Slots,
    ) -> Result<(), BalanceError> {
        let changed = before.iter().zip(slots).enumerate().filter(|(_, (old, new))| old != new);
        let mut changed: Vec<_> = changed.collect();
        changed.sort_by_key(|(_, (_, new))| {
            new.as_ref().is_none_or(|member| member.state != MemberState::Ready)
        });
        let mut commands = Vec::new();
        for (i, (old, new)) in changed {
            tell(&mut commands, service, options.sticky, i + 1, old.as_ref(), new.as_ref());
        }
        // HAProxy reads at most 16 KiB at once.
        for commands in commands.chunks(COMMANDS) {
            let answer = self.ask(&commands.join(";")).await?;
            let refused = answer.lines().find(|line| REFUSALS.iter().any(|no| line.contains(no)));
            if let Some(line) = refused {
                let what = "HAProxy refused a change of a member".into();
                return Err(BalanceError { what, why: line.into() });
            }
        }
        Ok(())
    }
}

/// So many commands are sent at once.
const COMMANDS: usize = 100;
/// Words of an answer that refuses.
const REFUSALS: [&str; 4] = ["No such", "Invalid", "static LB algorithm", "Require"];

/// The commands that bring one slot's servers from what they were to what is wanted.
fn tell(
    commands: &mut Vec<String>,
    service: &str,
    sticky: Sticky,
    slot: usize,
    old: Option<&Member>,
    new: Option<&Member>,
) {
    let moved = new.filter(|n| old.is_none_or(|o| (o.ip, o.port) != (n.ip, n.port)));
    let weight = new.map(|n| n.weight).filter(|now| old.map(|o| o.weight) != Some(*now));
    let state = match new.map_or(MemberState::Down, |m| m.state) {
        MemberState::Ready => "ready",
        // One that only drains still gets those who have its cookie.
        MemberState::Drain if sticky == Sticky::Cookie => "maint",
        MemberState::Drain => "drain",
        MemberState::Down => "maint",
    };
    for kind in KINDS {
        let server = format!("b_{service}/{kind}{slot}");
        if let Some(Member { ip, port, .. }) = moved {
            commands.push(format!("set server {server} state maint"));
            commands.push(format!("set server {server} addr {ip} port {port}"));
        }
        if let Some(weight) = weight {
            commands.push(format!("set server {server} weight {weight}"));
        }
        commands.push(format!("set server {server} state {state}"));
    }
    let was = old.is_some_and(|o| o.healthy && moved.is_none());
    if new.is_some_and(|n| n.healthy && n.state != MemberState::Down) && !was {
        commands.push(format!("set server b_{service}/m{slot} health up"));
    }
}

impl HaproxyDriver {
    /// Makes HAProxy serve these frontends, whose certificates are there.
    async fn serve(&self, wanted: &[FrontendWanted]) -> Result<(), BalanceError> {
        let mut told = self.told.lock().await;
        let before = told.take();
        let old = |service: &str| {
            before.as_ref().and_then(|t| t.slots.get(service)).cloned().unwrap_or_default()
        };
        let slots: BTreeMap<String, Slots> = wanted
            .iter()
            .map(|frontend| {
                (frontend.service.clone(), assign(&old(&frontend.service), &frontend.members))
            })
            .collect();
        let mut structure = config(&self.directory, wanted, None);
        for frontend in wanted {
            let slots = &slots[&frontend.service];
            let _ = write!(structure, "# {} {}", frontend.service, slots.len());
            if frontend.options.sticky == Sticky::Cookie {
                // Cookies stand in the file alone.
                let names = slots.iter().map(|slot| slot.as_ref().map_or("-", |m| m.name.as_str()));
                names.for_each(|name| {
                    let _ = write!(structure, " {name}");
                });
            }
            structure.push('\n');
        }
        let running = self.pid().is_some();
        if wanted.is_empty() && !running {
            return Ok(());
        }
        let same = running && before.as_ref().is_some_and(|before| before.structure == structure);
        if same {
            for frontend in wanted {
                let (before, now) = (old(&frontend.service), &slots[&frontend.service]);
                self.move_members(frontend, &before, now).await?;
                self.end_sessions(&frontend.service, &before, now);
            }
        } else {
            self.reload(&config(&self.directory, wanted, Some(&slots))).await?;
            for frontend in wanted {
                let slots = &slots[&frontend.service];
                // Draining cannot be written into the file.
                let ready: Slots = slots
                    .iter()
                    .map(|slot| {
                        slot.clone().map(|m| Member {
                            state: if m.state == MemberState::Drain {
                                MemberState::Ready
                            } else {
                                m.state
                            },
                            ..m
                        })
                    })
                    .collect();
                if ready != *slots {
                    self.move_members(frontend, &ready, slots).await?;
                }
            }
        }
        *told = Some(Told { structure, slots });
        Ok(())
    }
}

#[async_trait]
impl BalanceDriver for HaproxyDriver {
    async fn apply(&self, wanted: &[FrontendWanted]) -> Result<LeftOut, BalanceError> {
        let mut certificates = self.certificates.lock().await;
        let (served, left_out) = certificates.prepare(wanted).await;
        self.serve(&served).await?;
        // Those of before are needed until HAProxy has taken the new ones.
        certificates.sweep(&served);
        Ok(left_out)
    }
}
