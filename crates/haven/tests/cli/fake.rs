//! A daemon that is played: it notes what was asked and answers as a test says.

use serde_json::{Value, json};
use std::{
    io::{BufRead, BufReader, Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::PathBuf,
    sync::{Arc, Mutex},
};
use tempfile::TempDir;

/// What was asked.
#[derive(Clone, Debug)]
pub struct Asked {
    pub method: String,
    pub path: String,
    pub body: Value,
}

impl Asked {
    /// `GET /v1/…`.
    pub fn line(&self) -> String {
        format!("{} {}", self.method, self.path)
    }
}

/// An answer: a status and a body. The connection ends with it.
pub type Answer = (u16, String);

/// An answer in JSON.
pub fn ok(value: &Value) -> Answer {
    (200, value.to_string())
}

/// A refusal as the API gives it.
pub fn no(status: u16, detail: &str, hint: &str) -> Answer {
    let body = json!({"title": "no", "status": status, "detail": detail, "hint": hint});
    (status, body.to_string())
}

pub struct Fake {
    pub socket: PathBuf,
    pub asked: Arc<Mutex<Vec<Asked>>>,
    _directory: TempDir,
}

impl Fake {
    /// `answer` gets what was asked, and how many times that same line was asked before.
    pub fn new(answer: impl Fn(&Asked, usize) -> Answer + Send + Sync + 'static) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("api.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let asked = Arc::new(Mutex::new(Vec::<Asked>::new()));
        let (all, answer) = (Arc::clone(&asked), Arc::new(answer));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (all, answer) = (Arc::clone(&all), Arc::clone(&answer));
                std::thread::spawn(move || {
                    // A probe connects and says nothing.
                    let Some(one) = read(&stream) else { return };
                    let before = {
                        let mut all = all.lock().unwrap();
                        let same = all.iter().filter(|a| a.line() == one.line()).count();
                        all.push(one.clone());
                        same
                    };
                    write(stream, &answer(&one, before));
                });
            }
        });
        Self { socket, asked, _directory: directory }
    }

    /// The lines that were asked.
    pub fn lines(&self) -> Vec<String> {
        self.asked.lock().unwrap().iter().map(Asked::line).collect()
    }
}

fn read(stream: &UnixStream) -> Option<Asked> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let mut words = line.split_whitespace().map(str::to_owned);
    let (method, path) = (words.next()?, words.next()?);
    let mut length = 0;
    loop {
        let mut header = String::new();
        reader.read_line(&mut header).ok()?;
        let header = header.trim().to_ascii_lowercase();
        if header.is_empty() {
            break;
        }
        if let Some(value) = header.strip_prefix("content-length:") {
            length = value.trim().parse().ok()?;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    Some(Asked { method, path, body: serde_json::from_slice(&body).unwrap_or_default() })
}

fn write(mut stream: UnixStream, (status, body): &Answer) {
    let head = format!("HTTP/1.1 {status} x\r\nconnection: close\r\n\r\n");
    let _ = stream.write_all(head.as_bytes());
    let _ = stream.write_all(body.as_bytes());
}

/// A VM as the API gives it.
pub fn vm(version: i64, cpus: u32) -> Value {
    json!({
        "resourceVersion": version,
        "kind": "VM",
        "meta": {"name": "web", "uid": "u", "generation": 3, "created_ms": 1},
        "spec": {"cpus": cpus, "memory": "128MiB"},
        "state": "ready",
        "host": "host1",
        "columns": {"addresses": "10.77.0.2"},
    })
}

/// A service as the API gives it.
pub fn service(generation: u64, state: &str, updated: &str) -> Value {
    json!({
        "resourceVersion": 9,
        "kind": "Service",
        "meta": {"name": "hello", "uid": "u", "generation": generation, "created_ms": 1},
        "spec": {"replicas": 3, "template": {"spec": {"memory": "128MiB"}}},
        "state": state,
        "columns": {"updated": updated},
    })
}
