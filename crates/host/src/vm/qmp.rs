//! A thin QMP client: lines of JSON over a unix socket, answers matched by id, events handed on as they are.
//!
//! What it promises: every call ends by its deadline, also when QEMU hangs or stops reading; a call that was given up
//! never spoils the next one; a command marked out-of-band overtakes those that hang; an event, a field or a line that
//! it does not know does no harm; when the connection ends, every caller and every listener is told.
//!
//! ```text
//!   call ─► slot (in-band only) ─► writer task ─► QEMU ─► reader task ─► the call's answer, or events
//! ```
//!
//! QEMU stops reading when eight commands queue, and then not even an out-of-band command gets through. So at most
//! seven in-band commands are under way, counting those whose callers gave up but which QEMU has not answered.

use super::commands::{self, Command};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    io::IoSlice,
    os::fd::{AsRawFd, OwnedFd},
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Interest},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{OwnedSemaphorePermit, Semaphore, broadcast, mpsc, oneshot},
};

/// What went wrong between Haven and QEMU.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QmpError {
    /// The connection ended.
    #[error("the connection to QEMU ended")]
    Closed,
    /// No answer in time.
    #[error("QEMU did not answer `{command}` within {within:?}")]
    Late {
        /// What was asked.
        command: String,
        /// How long it had.
        within: Duration,
    },
    /// QEMU refused.
    #[error("QEMU refused `{command}`: {said}")]
    Refused {
        /// What was asked.
        command: String,
        /// What it said.
        said: String,
    },
    /// The other side does not speak QMP.
    #[error("what listens at QEMU's socket does not greet as QEMU does")]
    NotQemu,
    /// The socket.
    #[error("QEMU's socket cannot be used")]
    Io(#[from] std::io::Error),
}

/// A call that waits for its answer. It holds its slot until QEMU has answered, whether or not the caller still waits.
struct Waiting {
    answer: oneshot::Sender<Value>,
    _slot: Option<OwnedSemaphorePermit>,
}

/// What ends with the connection.
struct Open {
    waiting: BTreeMap<u64, Waiting>,
    events: broadcast::Sender<Value>,
}

/// A line to QEMU, and what goes with it.
type Line = (String, Option<OwnedFd>);
type Shared = Arc<Mutex<Option<Open>>>;

/// A connection to one QEMU.
pub struct Qmp {
    lines: mpsc::UnboundedSender<Line>,
    shared: Shared,
    slots: Arc<Semaphore>,
    out_of_band: bool,
    next: AtomicU64,
}

/// The longest line taken from QEMU, bytes.
const LINE: u64 = 16 << 20;
/// In-band commands under way at most: one less than QEMU's queue holds.
const SLOTS: usize = 7;
/// Events kept for a listener that is slow.
const EVENTS_KEPT: usize = 256;
/// How long a command may take unless told otherwise.
pub const DEADLINE: Duration = Duration::from_secs(5);

impl Qmp {
    /// Connects and leaves the negotiation mode; QEMU has `patience` for each of greeting and answer.
    ///
    /// # Errors
    /// [`QmpError::Io`] when nobody listens.
    pub async fn connect(path: &Path, patience: Duration) -> Result<Arc<Self>, QmpError> {
        Self::over(UnixStream::connect(path).await?, patience).await
    }

    /// As [`Qmp::connect`], over a connection that stands.
    ///
    /// # Errors
    /// As the variants of [`QmpError`] tell.
    pub async fn over(stream: UnixStream, patience: Duration) -> Result<Arc<Self>, QmpError> {
        let (read, writer) = stream.into_split();
        let mut lines = Lines { from: BufReader::new(read), line: Vec::new() };
        let greeting = tokio::time::timeout(patience, lines.next())
            .await
            .map_err(|_| QmpError::Late { command: "the greeting".into(), within: patience })?
            .ok_or(QmpError::Closed)?;
        let offers = greeting
            .as_ref()
            .and_then(|greeting| greeting.get("QMP")?.get("capabilities")?.as_array())
            .ok_or(QmpError::NotQemu)?;
        let out_of_band = offers.iter().any(|offer| offer == commands::OUT_OF_BAND);
        let (sender, queue) = mpsc::unbounded_channel();
        let (events, _) = broadcast::channel(EVENTS_KEPT);
        let shared = Arc::new(Mutex::new(Some(Open { waiting: BTreeMap::new(), events })));
        let qmp = Arc::new(Self {
            lines: sender,
            shared: Arc::clone(&shared),
            slots: Arc::new(Semaphore::new(SLOTS)),
            out_of_band,
            next: AtomicU64::new(1),
        });
        tokio::spawn(write_lines(writer, queue));
        tokio::spawn(read_lines(lines, shared));
        let enable: &[&str] = if out_of_band { &[commands::OUT_OF_BAND] } else { &[] };
        qmp.call(&commands::CAPABILITIES, json!({ "enable": enable }), patience).await?;
        Ok(qmp)
    }

    /// Runs a command; returns by the deadline.
    ///
    /// # Errors
    /// As the variants of [`QmpError`] tell.
    pub async fn call(
        &self,
        command: &Command,
        arguments: Value,
        within: Duration,
    ) -> Result<Value, QmpError> {
        debug_assert!(
            arguments.as_object().is_some_and(|given| {
                given.keys().all(|key| command.arguments().contains(&key.as_str()))
            }),
            "`{}` has an argument that commands.rs does not name",
            command.name()
        );
        self.call_with(command, arguments, None, within).await
    }

    /// As [`Qmp::call`], with a descriptor that QEMU gets a copy of.
    ///
    /// # Errors
    /// As the variants of [`QmpError`] tell.
    pub async fn call_with(
        &self,
        command: &Command,
        arguments: Value,
        fd: Option<OwnedFd>,
        within: Duration,
    ) -> Result<Value, QmpError> {
        let answer = tokio::time::timeout(within, self.exchange(command, arguments, fd))
            .await
            .map_err(|_| QmpError::Late { command: command.name().into(), within })??;
        match answer.get("error") {
            None => Ok(answer.get("return").cloned().unwrap_or(Value::Null)),
            Some(error) => Err(QmpError::Refused {
                command: command.name().into(),
                said: error.get("desc").and_then(Value::as_str).unwrap_or("no reason given").into(),
            }),
        }
    }

    async fn exchange(
        &self,
        command: &Command,
        arguments: Value,
        fd: Option<OwnedFd>,
    ) -> Result<Value, QmpError> {
        let overtake = command.out_of_band() && self.out_of_band;
        let slot = if overtake {
            None
        } else {
            let slot = Arc::clone(&self.slots).acquire_owned().await;
            Some(slot.map_err(|_| QmpError::Closed)?)
        };
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (answer, answered) = oneshot::channel();
        match &mut *lock(&self.shared) {
            Some(open) => open.waiting.insert(id, Waiting { answer, _slot: slot }),
            None => return Err(QmpError::Closed),
        };
        let execute = if overtake { "exec-oob" } else { "execute" };
        let line = json!({ execute: command.name(), "arguments": arguments, "id": id });
        self.lines.send((format!("{line}\n"), fd)).map_err(|_| QmpError::Closed)?;
        answered.await.map_err(|_| QmpError::Closed)
    }

    /// Events from now on, as QEMU sends them; closed when the connection ends.
    #[must_use]
    pub fn events(&self) -> broadcast::Receiver<Value> {
        match &*lock(&self.shared) {
            Some(open) => open.events.subscribe(),
            None => broadcast::channel(1).1,
        }
    }

    /// Whether the connection has ended.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        lock(&self.shared).is_none()
    }
}

fn lock(shared: &Shared) -> std::sync::MutexGuard<'_, Option<Open>> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Lines from QEMU.
struct Lines {
    from: BufReader<OwnedReadHalf>,
    line: Vec<u8>,
}

impl Lines {
    /// The next line, or nothing in it when it is not JSON; nothing at all at the end.
    async fn next(&mut self) -> Option<Option<Value>> {
        self.line.clear();
        let taken = (&mut self.from).take(LINE).read_until(b'\n', &mut self.line).await;
        // A line that was cut ends the connection too: what follows would be read as another line.
        if taken.is_err() || self.line.last() != Some(&b'\n') {
            return None;
        }
        Some(serde_json::from_slice(&self.line).ok())
    }
}

/// A task of its own, so that a caller that gives up never leaves half a line behind.
async fn write_lines(mut writer: OwnedWriteHalf, mut queue: mpsc::UnboundedReceiver<Line>) {
    while let Some((line, fd)) = queue.recv().await {
        let sent = match fd {
            Some(fd) => send_with(&writer, line.as_bytes(), &fd).await,
            None => Ok(0),
        };
        let Ok(sent) = sent else { return };
        if writer.write_all(&line.as_bytes()[sent..]).await.is_err() {
            return;
        }
    }
}

/// Sends the beginning of a line, and a descriptor with it; how much of the line that was.
async fn send_with(
    writer: &OwnedWriteHalf,
    line: &[u8],
    fd: &OwnedFd,
) -> Result<usize, std::io::Error> {
    let stream: &UnixStream = writer.as_ref();
    let (parts, fds) = ([IoSlice::new(line)], [fd.as_raw_fd()]);
    let with = [ControlMessage::ScmRights(&fds)];
    loop {
        stream.writable().await?;
        let send = || {
            let to = stream.as_raw_fd();
            Ok(sendmsg::<()>(to, &parts, &with, MsgFlags::empty(), None)?)
        };
        match stream.try_io(Interest::WRITABLE, send) {
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            other => return other,
        }
    }
}

async fn read_lines(mut lines: Lines, shared: Shared) {
    while let Some(value) = lines.next().await {
        let Some(value) = value else { continue };
        let mut shared = lock(&shared);
        let Some(open) = &mut *shared else { return };
        if value.get("event").is_some() {
            // Nobody listening is fine.
            let _ = open.events.send(value);
        } else if let Some(id) = value.get("id").and_then(Value::as_u64) {
            if let Some(waiting) = open.waiting.remove(&id) {
                // The caller may have given up.
                let _ = waiting.answer.send(value);
            }
        } else {
            tracing::warn!(%value, "QEMU said something that belongs to no command");
        }
    }
    // Dropping the senders tells every caller and every listener that the connection ended.
    lock(&shared).take();
}
