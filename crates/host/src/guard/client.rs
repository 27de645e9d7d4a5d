//! The agent's side: a thread that speaks to the guard, so that no request ever waits for the async runtime.

use super::{
    EXTEND, Guard, GuardError, GuardStatus, REFUSALS, REGISTER, Reply, Request, STATUS, UNREGISTER,
    bytes_of, read_as, text,
};
use async_trait::async_trait;
use nix::sys::{
    socket::{
        AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, recv, send, setsockopt,
        socket, sockopt::ReceiveTimeout,
    },
    time::TimeVal,
};
use std::{
    os::fd::{AsRawFd, OwnedFd},
    path::PathBuf,
    sync::mpsc,
};
use tokio::sync::oneshot;

type Answer = std::io::Result<Reply>;

/// A handle to the guard of this host.
pub struct GuardClient {
    requests: mpsc::Sender<(Request, oneshot::Sender<Answer>)>,
}

/// How long the guard may take to answer, seconds.
const PATIENCE_S: i64 = 1;

impl GuardClient {
    /// Speaks to the guard behind this socket; connects when first used, and again whenever the guard was restarted.
    #[must_use]
    pub fn new(socket: PathBuf) -> Self {
        let (requests, inbox) = mpsc::channel::<(Request, oneshot::Sender<Answer>)>();
        std::thread::Builder::new()
            .name("guard-client".into())
            .spawn(move || {
                let mut connection = None;
                while let Ok((request, answer)) = inbox.recv() {
                    let mut result = ask(&socket, &mut connection, &request);
                    if result.is_err() {
                        // The guard may have been restarted: it kept its state, so asking again is safe.
                        connection = None;
                        result = ask(&socket, &mut connection, &request);
                    }
                    let _ = answer.send(result);
                }
            })
            .expect("a thread can be made when the daemon starts");
        Self { requests }
    }

    async fn call(
        &self,
        kind: u32,
        vm: &str,
        pid: i32,
        deadline_ns: u64,
        tap: &str,
    ) -> Result<Reply, GuardError> {
        let request = Request { kind, pid, deadline_ns, vm: text(vm), tap: text(tap) };
        let (answer, answered) = oneshot::channel();
        let gone = || GuardError::Gone(std::io::ErrorKind::BrokenPipe.into());
        self.requests.send((request, answer)).map_err(|_| gone())?;
        answered.await.map_err(|_| gone())?.map_err(GuardError::Gone)
    }
}

fn open(path: &std::path::Path) -> std::io::Result<OwnedFd> {
    let fd = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
    connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    setsockopt(&fd, ReceiveTimeout, &TimeVal::new(PATIENCE_S, 0))?;
    Ok(fd)
}

fn ask(path: &std::path::Path, connection: &mut Option<OwnedFd>, request: &Request) -> Answer {
    let fd = match connection {
        Some(fd) => fd,
        None => connection.insert(open(path)?),
    };
    send(fd.as_raw_fd(), bytes_of(request), MsgFlags::MSG_NOSIGNAL)?;
    let mut packet = [0u8; size_of::<Reply>()];
    let length = recv(fd.as_raw_fd(), &mut packet, MsgFlags::empty())?;
    read_as(&packet[..length]).ok_or_else(|| std::io::ErrorKind::UnexpectedEof.into())
}

#[async_trait]
impl Guard for GuardClient {
    async fn extend(&self, deadline_ns: u64) -> Result<(), GuardError> {
        self.call(EXTEND, "", 0, deadline_ns, "").await.map(|_| ())
    }

    async fn register(&self, vm: &str, pid: i32, tap: &str) -> Result<(), GuardError> {
        let reply = self.call(REGISTER, vm, pid, 0, tap).await?;
        match reply.refusal {
            0 => Ok(()),
            n => Err(GuardError::Refused {
                vm: vm.to_owned(),
                why: REFUSALS
                    .get(n as usize)
                    .copied()
                    .unwrap_or("for a reason this version does not know"),
            }),
        }
    }

    async fn unregister(&self, vm: &str) -> Result<(), GuardError> {
        self.call(UNREGISTER, vm, 0, 0, "").await.map(|_| ())
    }

    async fn status(&self) -> Result<GuardStatus, GuardError> {
        let reply = self.call(STATUS, "", 0, 0, "").await?;
        Ok(GuardStatus { deadline_ns: reply.deadline_ns, live: reply.live, fired: reply.fired })
    }
}
