//! The QEMU guest agent: whether it answers, and file systems that it freezes. Each question is a connection of its own, so that what an earlier one left
//! half said is none of its business; the agent answers one at a time.
//!
//! <https://www.qemu.org/docs/master/interop/qemu-ga-ref.html>, `guest-sync-delimited`.

use std::{
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
};

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(2);
/// It ends what was half said before: no JSON holds it.
const SENTINEL: u8 = 0xff;
/// An answer holds so many bytes at most, with what was said before.
const MOST: u64 = 65_536;

static QUESTION: AtomicU64 = AtomicU64::new(1);

/// Whether the agent behind a socket answers. One that is not there, hangs, or is no agent does not.
pub async fn answers(socket: &Path) -> bool {
    let number = QUESTION.fetch_add(1, Ordering::Relaxed);
    tokio::time::timeout(PATIENCE, ask(socket, number)).await.is_ok_and(|said| said.is_ok())
}

/// How long a guest may take to bring all to its disks and freeze its file systems.
const FREEZES: Duration = Duration::from_secs(10);
/// The pause before it is told again to thaw them.
const AGAIN: Duration = Duration::from_secs(1);

/// The file systems of a guest, frozen: nothing of it is under way to its disks. It stands noted beside the socket until they
/// are thawed, so that the next daemon thaws them when this one is killed.
pub struct Freeze {
    socket: PathBuf,
    note: PathBuf,
}

impl Freeze {
    /// Freezes them; nothing when the agent does not answer, or cannot. `of` is noted: whose they are.
    pub async fn begin(socket: &Path, note: &Path, of: &str) -> Option<Self> {
        if !answers(socket).await {
            return None;
        }
        let this = Self { socket: socket.to_owned(), note: note.to_owned() };
        if let Err(error) = std::fs::write(note, of) {
            tracing::warn!(%error, "{} cannot be written, so nothing is frozen", note.display());
            return None;
        }
        match tokio::time::timeout(FREEZES, command(socket, "guest-fsfreeze-freeze")).await {
            Ok(Ok(count)) if count.as_u64().is_some_and(|count| count > 0) => Some(this),
            said => {
                tracing::warn!(socket = %socket.display(), ?said, "its file systems are not frozen");
                // It may have frozen some of them, or do so yet.
                this.end().await;
                None
            }
        }
    }

    /// Thaws what an earlier daemon has left frozen.
    pub async fn left(socket: &Path, note: &Path) {
        Self { socket: socket.to_owned(), note: note.to_owned() }.end().await;
    }

    /// Thaws them. An agent that does not answer yet is told again and again until it has done so, or is gone.
    pub async fn end(self) {
        if self.thaw().await {
            return;
        }
        tokio::spawn(async move {
            while !self.thaw().await {
                tokio::time::sleep(AGAIN).await;
            }
        });
    }

    /// Whether nothing is frozen any more.
    async fn thaw(&self) -> bool {
        let said =
            tokio::time::timeout(PATIENCE, command(&self.socket, "guest-fsfreeze-thaw")).await;
        let gone = match &said {
            Ok(Ok(_)) => true,
            // Its process has ended.
            Ok(Err(error)) => matches!(
                error.kind(),
                std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused
            ),
            Err(_) => false,
        };
        match gone {
            true => _ = std::fs::remove_file(&self.note),
            false => {
                tracing::warn!(socket = %self.socket.display(), ?said, "its file systems are not thawed yet");
            }
        }
        gone
    }
}

/// Has the agent carry out a command without arguments.
async fn command(socket: &Path, name: &str) -> std::io::Result<serde_json::Value> {
    let number = QUESTION.fetch_add(1, Ordering::Relaxed);
    let (mut read, mut write) = synced(socket, number).await?;
    let asked = serde_json::json!({ "execute": name });
    write.write_all(format!("{asked}\n").as_bytes()).await?;
    let mut said = Vec::new();
    loop {
        if read.read_buf(&mut said).await? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        let Ok(answer) = serde_json::from_slice::<serde_json::Value>(said.trim_ascii()) else {
            continue;
        };
        return match answer.get("return") {
            Some(value) => Ok(value.clone()),
            None => Err(std::io::Error::other(answer["error"]["desc"].to_string())),
        };
    }
}

async fn ask(socket: &Path, number: u64) -> std::io::Result<()> {
    synced(socket, number).await.map(drop)
}

/// A connection over which the agent has answered, and says nothing more of its own.
async fn synced(
    socket: &Path,
    number: u64,
) -> std::io::Result<(tokio::io::Take<OwnedReadHalf>, OwnedWriteHalf)> {
    let (read, mut write) = UnixStream::connect(socket).await?.into_split();
    let question = serde_json::json!({
        "execute": "guest-sync-delimited", "arguments": { "id": number }
    });
    let mut bytes = vec![SENTINEL];
    bytes.extend(question.to_string().into_bytes());
    bytes.push(b'\n');
    write.write_all(&bytes).await?;
    let (mut read, mut said) = (read.take(MOST), Vec::new());
    while !is_answer(&said, number) {
        if read.read_buf(&mut said).await? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok((read, write))
}

/// Whether what was said ends with the answer to this question. Answers to earlier ones may stand before it.
fn is_answer(said: &[u8], number: u64) -> bool {
    said.split(|byte| *byte == SENTINEL).skip(1).any(|part| {
        let mut values =
            serde_json::Deserializer::from_slice(part).into_iter::<serde_json::Value>();
        values.next().is_some_and(|value| value.is_ok_and(|value| value["return"] == number))
    })
}

#[cfg(test)]
mod tests {
    use super::{Freeze, SENTINEL, answers, is_answer};
    use std::{
        os::unix::net::UnixListener,
        path::Path,
        process::Command,
        sync::{
            Arc,
            atomic::{AtomicBool, AtomicU64, Ordering},
        },
        time::Duration,
    };
    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};

    #[test]
    fn only_the_answer_to_this_question_counts() {
        assert!(is_answer(b"\xff{\"return\": 7}\n", 7));
        assert!(is_answer(b"{\"error\": {}}\n\xff{\"return\": 6}\n\xff{\"return\": 7}\n", 7));
        for other in
            [&b""[..], b"\xff", b"{\"return\": 7}\n", b"\xff{\"return\": 70}\n", b"\xff{\"ret"]
        {
            assert!(!is_answer(other, 7), "{other:?}");
        }
    }

    /// An agent that answers one connection after the other, and takes so long to freeze. Whether it has frozen, and how often
    /// it was told to thaw.
    fn slow_agent(socket: &Path, freezes: Duration) -> Arc<(AtomicBool, AtomicU64)> {
        let listener = tokio::net::UnixListener::bind(socket).unwrap();
        let is = Arc::new((AtomicBool::new(false), AtomicU64::new(0)));
        let told = Arc::clone(&is);
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (read, mut write) = stream.into_split();
                let mut lines = BufReader::new(read).split(b'\n');
                while let Ok(Some(line)) = lines.next_segment().await {
                    let line = line.strip_prefix(&[SENTINEL]).unwrap_or(&line);
                    let asked: serde_json::Value = serde_json::from_slice(line).unwrap();
                    let mut answer = match asked["execute"].as_str().unwrap() {
                        "guest-sync-delimited" => {
                            write.write_all(&[SENTINEL]).await.ok();
                            asked["arguments"]["id"].clone()
                        }
                        "guest-fsfreeze-freeze" => {
                            tokio::time::sleep(freezes).await;
                            told.0.store(true, Ordering::Release);
                            2.into()
                        }
                        "guest-fsfreeze-thaw" => {
                            told.0.store(false, Ordering::Release);
                            told.1.fetch_add(1, Ordering::Relaxed);
                            2.into()
                        }
                        other => panic!("{other}"),
                    };
                    answer = serde_json::json!({ "return": answer });
                    write.write_all(format!("{answer}\n").as_bytes()).await.ok();
                }
            }
        });
        is
    }

    #[tokio::test(start_paused = true)]
    async fn file_systems_are_frozen_and_thawed_and_that_is_noted_meanwhile() {
        let directory = tempfile::tempdir().unwrap();
        let (socket, note) = (directory.path().join("agent.sock"), directory.path().join("frozen"));
        assert!(Freeze::begin(&socket, &note, "7 1").await.is_none(), "nobody is there");
        assert!(!note.exists());
        let is = slow_agent(&socket, Duration::from_millis(100));
        let frozen = Freeze::begin(&socket, &note, "7 1").await.unwrap();
        assert!(is.0.load(Ordering::Acquire));
        assert_eq!(std::fs::read_to_string(&note).unwrap(), "7 1");
        frozen.end().await;
        assert!(!is.0.load(Ordering::Acquire) && !note.exists());
        // A daemon that was killed in between left it so.
        std::mem::forget(Freeze::begin(&socket, &note, "7 1").await.unwrap());
        assert!(is.0.load(Ordering::Acquire) && note.exists());
        Freeze::left(&socket, &note).await;
        assert!(!is.0.load(Ordering::Acquire) && !note.exists());
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_freezes_late_is_thawed_once_it_has() {
        let directory = tempfile::tempdir().unwrap();
        let (socket, note) = (directory.path().join("agent.sock"), directory.path().join("frozen"));
        let is = slow_agent(&socket, Duration::from_secs(45));
        assert!(Freeze::begin(&socket, &note, "7 1").await.is_none(), "it took too long");
        assert!(note.exists(), "it may freeze yet");
        for _ in 0..200 {
            tokio::time::sleep(Duration::from_secs(1)).await;
            if !note.exists() {
                break;
            }
        }
        assert!(!note.exists() && !is.0.load(Ordering::Acquire));
        assert!(is.1.load(Ordering::Relaxed) > 0, "it was thawed");
        // Its process is gone: there is nothing to thaw.
        std::fs::write(&note, "7 1").unwrap();
        std::fs::remove_file(&socket).unwrap();
        Freeze::left(&socket, &note).await;
        assert!(!note.exists());
    }

    #[tokio::test]
    async fn a_real_agent_answers_again_and_again_and_what_is_none_does_not() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("agent.sock");
        assert!(!answers(&socket).await, "nobody is there");
        let silent = UnixListener::bind(&socket).unwrap();
        assert!(!answers(&socket).await, "somebody is there who says nothing");
        drop(silent);
        std::fs::remove_file(&socket).unwrap();
        let agent = Command::new("qemu-ga")
            .args(["--method", "unix-listen", "--path"])
            .arg(&socket)
            .arg("--statedir")
            .arg(directory.path())
            .spawn();
        let Ok(mut agent) = agent else {
            println!("skipped: needs qemu-ga, from the package qemu-guest-agent");
            return;
        };
        for _ in 0..100 {
            if socket.exists() {
                break;
            }
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
        let said = [answers(&socket).await, answers(&socket).await, answers(&socket).await];
        agent.kill().unwrap();
        agent.wait().unwrap();
        assert_eq!(said, [true; 3]);
        assert!(!answers(&socket).await);
    }
}
