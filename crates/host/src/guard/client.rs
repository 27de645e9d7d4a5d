//! The agent's side: a thread that speaks to the guard, so that no request ever waits for the async runtime.
//!
//! Moving the deadline on goes before everything else, and a guard that is silent costs each request only its
//! patience: nothing queues behind a frozen guard for longer.

use super::{
    EXTEND, Guard, GuardError, GuardStatus, HOLD, REFUSALS, REGISTER, RELEASE, Registration, Reply,
    Request, STATUS, UNREGISTER, bytes_of, read_as, text,
};
use async_trait::async_trait;
use nix::sys::{
    signal::{Signal, kill},
    socket::{
        AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, getsockopt, recv, send,
        setsockopt, socket,
        sockopt::{PeerCredentials, ReceiveTimeout, SendTimeout},
    },
    time::TimeVal,
};
use std::{
    collections::VecDeque,
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, PoisonError},
};
use tokio::sync::oneshot;

type Answer = std::io::Result<Reply>;
type Waiting = (Request, oneshot::Sender<Answer>);

/// How long the guard may take to answer, microseconds. It answers within a millisecond unless it is frozen.
const PATIENCE_US: i64 = 200_000;

/// What waits for the guard.
#[derive(Default)]
struct Inbox {
    urgent: VecDeque<Waiting>,
    rest: VecDeque<Waiting>,
    closed: bool,
}

#[derive(Default)]
struct Shared {
    inbox: Mutex<Inbox>,
    filled: Condvar,
}

impl Shared {
    /// The next request that somebody still waits for; nothing when the client is gone.
    fn next(&self) -> Option<Waiting> {
        let mut inbox = self.inbox.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            while let Some(waiting) = inbox.urgent.pop_front().or_else(|| inbox.rest.pop_front()) {
                if !waiting.1.is_closed() {
                    return Some(waiting);
                }
            }
            if inbox.closed {
                return None;
            }
            inbox = self.filled.wait(inbox).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// A handle to the guard of this host.
pub struct GuardClient {
    shared: Arc<Shared>,
    socket: PathBuf,
}

impl GuardClient {
    /// Speaks to the guard behind this socket; connects when first used, and again whenever the guard was restarted.
    #[must_use]
    pub fn new(socket: PathBuf) -> Self {
        let shared = Arc::new(Shared::default());
        let (inbox, path) = (Arc::clone(&shared), socket.clone());
        std::thread::Builder::new()
            .name("guard-client".into())
            .spawn(move || {
                let mut connection = None;
                while let Some((request, answer)) = inbox.next() {
                    let fresh = connection.is_none();
                    let mut result = ask(&path, &mut connection, &request);
                    // A guard that was restarted kept its state, so asking again is safe. A silent one stays silent.
                    if !fresh && result.as_ref().is_err_and(|e| !is_silence(e)) {
                        connection = None;
                        result = ask(&path, &mut connection, &request);
                    }
                    if result.is_err() {
                        // A late answer must not be taken for that to the next question.
                        connection = None;
                    }
                    let _ = answer.send(result);
                }
            })
            .expect("a thread can be made when the daemon starts");
        Self { shared, socket }
    }

    async fn call(
        &self,
        kind: u32,
        of: Registration<'_>,
        deadline_ns: u64,
    ) -> Result<Reply, GuardError> {
        let Registration { vm, pid, session, tap } = of;
        let request = Request { kind, pid, deadline_ns, session, vm: text(vm), tap: text(tap) };
        let (answer, answered) = oneshot::channel();
        {
            let mut inbox = self.shared.inbox.lock().unwrap_or_else(PoisonError::into_inner);
            let queue = if kind == EXTEND { &mut inbox.urgent } else { &mut inbox.rest };
            queue.push_back((request, answer));
        }
        self.shared.filled.notify_one();
        let gone = || GuardError::Gone(std::io::ErrorKind::BrokenPipe.into());
        let reply = answered.await.map_err(|_| gone())?.map_err(GuardError::Gone)?;
        match reply.refusal {
            0 => Ok(reply),
            n => Err(GuardError::Refused {
                vm: if vm.is_empty() { "this host".into() } else { vm.to_owned() },
                why: REFUSALS
                    .get(n as usize)
                    .copied()
                    .unwrap_or("for a reason this version does not know"),
            }),
        }
    }
}

impl Drop for GuardClient {
    fn drop(&mut self) {
        self.shared.inbox.lock().unwrap_or_else(PoisonError::into_inner).closed = true;
        self.shared.filled.notify_one();
    }
}

/// For requests that name no process.
const NOBODY: Registration<'static> = Registration { vm: "", pid: 0, session: 0, tap: "" };

fn is_silence(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut)
}

fn open(path: &Path) -> std::io::Result<OwnedFd> {
    let fd = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
    // The limit of sending also bounds `connect`, which waits while the backlog of a frozen guard is full.
    setsockopt(&fd, SendTimeout, &TimeVal::new(0, PATIENCE_US))?;
    setsockopt(&fd, ReceiveTimeout, &TimeVal::new(0, PATIENCE_US))?;
    connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(fd)
}

fn ask(path: &Path, connection: &mut Option<OwnedFd>, request: &Request) -> Answer {
    let fd = match connection {
        Some(fd) => fd,
        None => connection.insert(open(path)?),
    };
    send(fd.as_raw_fd(), bytes_of(request), MsgFlags::MSG_NOSIGNAL)?;
    let mut packet = [0u8; size_of::<Reply>()];
    let length = recv(fd.as_raw_fd(), &mut packet, MsgFlags::empty())?;
    read_as(&packet[..length]).ok_or_else(|| std::io::ErrorKind::UnexpectedEof.into())
}

/// Ends the process that listens on this socket.
fn end_listener(path: &Path) -> std::io::Result<()> {
    let peer = getsockopt(&open(path)?, PeerCredentials)?;
    kill(nix::unistd::Pid::from_raw(peer.pid()), Signal::SIGKILL)?;
    Ok(())
}

#[async_trait]
impl Guard for GuardClient {
    async fn extend(&self, session: u64, deadline_ns: u64) -> Result<(), GuardError> {
        self.call(EXTEND, Registration { session, ..NOBODY }, deadline_ns).await.map(|_| ())
    }

    async fn register(&self, start: &Registration<'_>) -> Result<(), GuardError> {
        self.call(REGISTER, *start, 0).await.map(|_| ())
    }

    async fn unregister(&self, vm: &str) -> Result<(), GuardError> {
        self.call(UNREGISTER, Registration { vm, ..NOBODY }, 0).await.map(|_| ())
    }

    async fn hold(&self, label: &str) -> Result<(), GuardError> {
        self.call(HOLD, Registration { tap: label, ..NOBODY }, 0).await.map(|_| ())
    }

    async fn release(&self, label: &str) -> Result<(), GuardError> {
        self.call(RELEASE, Registration { tap: label, ..NOBODY }, 0).await.map(|_| ())
    }

    async fn status(&self) -> Result<GuardStatus, GuardError> {
        let reply = self.call(STATUS, NOBODY, 0).await?;
        Ok(GuardStatus { deadline_ns: reply.deadline_ns, live: reply.live, fired: reply.fired })
    }

    async fn replace(&self) {
        let path = self.socket.clone();
        let result = tokio::task::spawn_blocking(move || end_listener(&path)).await;
        match result {
            Ok(Ok(())) => {
                tracing::warn!("the silent guard was ended; its supervisor starts it again")
            }
            Ok(Err(error)) => tracing::error!(%error, "the silent guard cannot be ended"),
            Err(error) => tracing::error!(%error, "the silent guard cannot be ended"),
        }
    }
}
