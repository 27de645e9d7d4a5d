//! A thin QMP client: lines of JSON over a unix socket, answers matched by id, events handed on as they are.
//!
//! Only what Haven uses; an event or a field that it does not know does no harm.

use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::{UnixStream, unix::OwnedWriteHalf},
    sync::{broadcast, oneshot},
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
    /// The socket.
    #[error("QEMU's socket cannot be used")]
    Io(#[from] std::io::Error),
}

type Pending = Arc<Mutex<BTreeMap<u64, oneshot::Sender<Value>>>>;

/// A connection to one QEMU.
pub struct Qmp {
    writer: tokio::sync::Mutex<OwnedWriteHalf>,
    pending: Pending,
    events: broadcast::Sender<Value>,
    next: AtomicU64,
}

/// The longest line taken from QEMU, bytes.
const LINE: u64 = 16 << 20;
/// How long a command may take unless told otherwise.
pub const DEADLINE: Duration = Duration::from_secs(5);

impl Qmp {
    /// Connects and leaves the negotiation mode.
    ///
    /// # Errors
    /// [`QmpError::Io`] when nobody listens yet.
    pub async fn connect(path: &Path) -> Result<Arc<Self>, QmpError> {
        let (read, writer) = UnixStream::connect(path).await?.into_split();
        let (events, _) = broadcast::channel(64);
        let qmp = Arc::new(Self {
            writer: tokio::sync::Mutex::new(writer),
            pending: Pending::default(),
            events: events.clone(),
            next: AtomicU64::new(1),
        });
        tokio::spawn(read_lines(read, Arc::clone(&qmp.pending), events));
        qmp.call("qmp_capabilities", json!({}), DEADLINE).await?;
        Ok(qmp)
    }

    /// Runs a command.
    ///
    /// # Errors
    /// As the variants of [`QmpError`] tell.
    pub async fn call(
        &self,
        command: &str,
        arguments: Value,
        within: Duration,
    ) -> Result<Value, QmpError> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (answer, answered) = oneshot::channel();
        self.pending.lock().unwrap_or_else(PoisonError::into_inner).insert(id, answer);
        let line = format!("{}\n", json!({ "execute": command, "arguments": arguments, "id": id }));
        self.writer.lock().await.write_all(line.as_bytes()).await?;
        let result = tokio::time::timeout(within, answered).await;
        self.pending.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
        let answer = match result {
            Err(_) => {
                return Err(QmpError::Late { command: command.into(), within });
            }
            Ok(Err(_)) => return Err(QmpError::Closed),
            Ok(Ok(answer)) => answer,
        };
        match answer.get("error") {
            None => Ok(answer.get("return").cloned().unwrap_or(Value::Null)),
            Some(error) => Err(QmpError::Refused {
                command: command.into(),
                said: error.get("desc").and_then(Value::as_str).unwrap_or("no reason given").into(),
            }),
        }
    }

    /// Events from now on, as QEMU sends them.
    #[must_use]
    pub fn events(&self) -> broadcast::Receiver<Value> {
        self.events.subscribe()
    }
}

async fn read_lines(
    read: tokio::net::unix::OwnedReadHalf,
    pending: Pending,
    events: broadcast::Sender<Value>,
) {
    use tokio::io::AsyncReadExt;
    let mut lines = BufReader::new(read);
    let mut line = Vec::new();
    loop {
        line.clear();
        let taken = (&mut lines).take(LINE).read_until(b'\n', &mut line).await;
        if !matches!(taken, Ok(n) if n > 0) {
            break;
        }
        let Ok(value) = serde_json::from_slice::<Value>(&line) else {
            continue;
        };
        if value.get("event").is_some() {
            let _ = events.send(value);
        } else if let Some(id) = value.get("id").and_then(Value::as_u64) {
            let waiting = pending.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
            if let Some(waiting) = waiting {
                let _ = waiting.send(value);
            }
        }
    }
    // Dropping the senders tells every caller that the connection ended.
    pending.lock().unwrap_or_else(PoisonError::into_inner).clear();
}
