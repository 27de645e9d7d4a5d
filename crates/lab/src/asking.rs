//! A client outside the cluster that asks all the time, each time with a new connection.

use crate::drive::Driver;
use anyhow::{Context, Result};
use haven_model::object::{Kind, Object};
use nix::{
    errno::Errno,
    sys::{
        socket::{self, AddressFamily, SockFlag, SockType, SockaddrIn, sockopt},
        time::{TimeVal, TimeValLike},
    },
};
use std::{
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream},
    os::fd::AsRawFd,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

/// How often a client of the figures asks.
pub const OFTEN: Duration = Duration::from_millis(10);
/// How often a client of tests asks that run beside other work: an emulated guest of a busy machine answers some dozen
/// questions per second, and no more.
pub const STEADILY: Duration = Duration::from_millis(100);
/// How long it waits for a connection, and for an answer on one.
const PATIENCE: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(1));

/// One question.
#[derive(Clone, Copy, Debug)]
pub struct Asked {
    /// When it was asked.
    pub begin: Instant,
    /// When it ended.
    pub end: Instant,
    /// It was answered well.
    pub good: bool,
    /// Otherwise, how it failed: the status, or the kind of error.
    pub how: Option<Failure>,
}

/// How a question failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Failure {
    /// No connection, or none that answered.
    Error(std::io::ErrorKind),
    /// An answer with another status than 200.
    Status(u16),
}

/// How often each failure came.
#[must_use]
pub fn failures(asked: &[Asked]) -> String {
    let mut counts = std::collections::BTreeMap::new();
    for how in asked.iter().filter_map(|a| a.how) {
        *counts.entry(how).or_insert(0) += 1;
    }
    let words: Vec<String> = counts.iter().map(|(how, n)| format!("{n} x {how:?}")).collect();
    if words.is_empty() { "none failed".into() } else { words.join(", ") }
}

/// A client at work.
pub struct Asking {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<Vec<Asked>>>,
}

impl Asking {
    /// Begins, in the client's network namespace of the lab, asking at this pace. `address` with its port.
    ///
    /// # Errors
    /// When the lab is not up, or the address is none.
    pub fn start(lab: &Driver, address: &str, every: Duration) -> Result<Self> {
        Self::patient(lab, address, every, PATIENCE.1)
    }

    /// The same, with so long for each answer.
    ///
    /// # Errors
    /// As [`Asking::start`].
    pub fn patient(
        lab: &Driver,
        address: &str,
        every: Duration,
        patience: Duration,
    ) -> Result<Self> {
        let address: SocketAddr = address.parse()?;
        Self::begin(lab, "client", every, move || question(|| ask(address, patience)))
    }

    /// Knocks at a port of a guest that nobody listens at, from one of the hosts: its kernel alone answers, so that this
    /// shows when the guest executes and is reached, and not how fast its programs are. As a balancer does, it asks with
    /// its host's own address: that of its side of the network every host has.
    ///
    /// # Errors
    /// As [`Asking::start`].
    pub fn knock(lab: &Driver, from: &str, guest: Ipv4Addr, every: Duration) -> Result<Self> {
        let hosts = lab.ask(|client| async move { client.list(Kind::Host).await })?;
        let address = hosts.into_iter().find_map(|item| match item.object {
            Object::Host(host) if host.meta.name.as_str() == from => Some(host.spec.address),
            _ => None,
        });
        let source = address.with_context(|| format!("there is no host `{from}`"))?;
        Self::begin(lab, from, every, move || question(|| knock(source, guest)))
    }

    fn begin(
        lab: &Driver,
        from: &str,
        every: Duration,
        ask: impl Fn() -> Asked + Send + Clone + 'static,
    ) -> Result<Self> {
        let id = lab.haven(&["lab", "id"])?;
        let namespace = format!("/var/run/netns/{id}-{from}");
        let stop = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let file = std::fs::File::open(&namespace).context(namespace)?;
            // Of this thread only.
            nix::sched::setns(file, nix::sched::CloneFlags::CLONE_NEWNET)?;
            // Each question has a thread of its own: one that hangs does not keep the next from being asked.
            let mut asked = Vec::new();
            let mut next = Instant::now();
            while !told.load(Ordering::Relaxed) {
                asked.push(std::thread::spawn(ask.clone()));
                next = (next + every).max(Instant::now());
                std::thread::sleep(next - Instant::now().min(next));
            }
            let ended = asked.into_iter().map(JoinHandle::join);
            ended.map(|one| one.map_err(|_| anyhow::anyhow!("a question panicked"))).collect()
        });
        Ok(Self { stop, thread })
    }

    /// Ends; everything that was asked.
    ///
    /// # Errors
    /// When the namespace could not be entered.
    pub fn end(self) -> Result<Vec<Asked>> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow::anyhow!("the client panicked"))?
    }
}

fn question(ask: impl Fn() -> std::io::Result<u16>) -> Asked {
    let begin = Instant::now();
    let how = match ask() {
        Ok(200) => None,
        Ok(status) => Some(Failure::Status(status)),
        Err(error) => Some(Failure::Error(error.kind())),
    };
    Asked { begin, end: Instant::now(), good: how.is_none(), how }
}

/// 200 when the guest's kernel says that nobody listens.
fn knock(source: Ipv4Addr, guest: Ipv4Addr) -> std::io::Result<u16> {
    let family = (AddressFamily::Inet, SockType::Stream);
    let socket = socket::socket(family.0, family.1, SockFlag::SOCK_CLOEXEC, None)?;
    let patience = TimeVal::milliseconds(PATIENCE.0.as_millis().try_into().unwrap_or(i64::MAX));
    socket::setsockopt(&socket, sockopt::SendTimeout, &patience)?;
    socket::bind(socket.as_raw_fd(), &SockaddrIn::from(SocketAddrV4::new(source, 0)))?;
    match socket::connect(socket.as_raw_fd(), &SockaddrIn::from(SocketAddrV4::new(guest, 1))) {
        Err(Errno::ECONNREFUSED) => Ok(200),
        Err(error) => Err(error.into()),
        Ok(()) => Ok(0),
    }
}

/// The status of the answer.
fn ask(address: SocketAddr, patience: Duration) -> std::io::Result<u16> {
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE.0)?;
    stream.set_read_timeout(Some(patience))?;
    stream.write_all(b"GET / HTTP/1.0\r\nHost: service\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok());
    let whole = answer.starts_with("HTTP/1.") && answer.contains("hello");
    Ok(status.filter(|status| *status != 200 || whole).unwrap_or(0))
}

/// The longest time without a good answer, also at the beginning and at the end.
#[must_use]
pub fn longest_gap(asked: &[Asked]) -> f64 {
    let good = asked.iter().filter(|a| a.good).map(|a| a.end);
    let begins = || asked.iter().map(|a| a.begin);
    let mut marks: Vec<Instant> = good.chain(begins().min()).chain(begins().max()).collect();
    marks.sort();
    marks.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64()).fold(0.0, f64::max)
}
