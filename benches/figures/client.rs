//! A client outside the cluster that asks all the time, each time with a new connection.

use anyhow::{Context, Result};
use haven_lab::drive::Driver;
use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

/// How often it asks.
const EVERY: Duration = Duration::from_millis(10);
/// How long it waits for a connection, and for an answer on one.
const PATIENCE: (Duration, Duration) = (Duration::from_millis(200), Duration::from_millis(500));

/// One question.
#[derive(Clone, Copy, Debug)]
pub struct Asked {
    /// When it began.
    pub at: Instant,
    /// When it ended.
    pub end: Instant,
    /// It was answered well.
    pub good: bool,
}

/// A client at work.
pub struct Asking {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<Vec<Asked>>>,
}

impl Asking {
    /// Begins, in the client's network namespace of the lab.
    pub fn start(lab: &Driver, address: &str) -> Result<Self> {
        let id = lab.haven(&["lab", "id"])?;
        let namespace = format!("/var/run/netns/{id}-client");
        let address: SocketAddr = address.parse()?;
        let stop = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let file = std::fs::File::open(&namespace).context(namespace)?;
            // Of this thread only.
            nix::sched::setns(file, nix::sched::CloneFlags::CLONE_NEWNET)?;
            let mut all = Vec::new();
            let mut next = Instant::now();
            while !told.load(Ordering::Relaxed) {
                let at = Instant::now();
                let good = ask(address).unwrap_or(false);
                all.push(Asked { at, end: Instant::now(), good });
                next = (next + EVERY).max(Instant::now());
                std::thread::sleep(next - Instant::now().min(next));
            }
            Ok(all)
        });
        Ok(Self { stop, thread })
    }

    /// Ends; everything that was asked.
    pub fn end(self) -> Result<Vec<Asked>> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow::anyhow!("the client panicked"))?
    }
}

fn ask(address: SocketAddr) -> std::io::Result<bool> {
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE.0)?;
    stream.set_read_timeout(Some(PATIENCE.1))?;
    stream.write_all(b"GET / HTTP/1.0\r\nHost: service\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer.starts_with("HTTP/1.") && answer.contains(" 200 ") && answer.contains("hello"))
}

/// The longest time between two good answers.
pub fn longest_gap(asked: &[Asked]) -> f64 {
    let good: Vec<Instant> = asked.iter().filter(|a| a.good).map(|a| a.end).collect();
    good.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64()).fold(0.0, f64::max)
}
