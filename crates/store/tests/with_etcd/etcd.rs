//! A real etcd on loopback for tests, ended with the test.

use nix::{
    sys::{
        signal::{Signal, kill},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};
use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

/// One member.
pub struct Etcd {
    /// Its process.
    pub child: Child,
    client_port: u16,
    dir: PathBuf,
}

fn port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has a free port");
    listener.local_addr().expect("it is bound").port()
}

impl Etcd {
    /// One member that is a cluster by itself; nothing when etcd is not installed.
    pub fn start(name: &str) -> Option<Self> {
        Self::cluster(name, 1)?.pop()
    }

    /// One member that takes so many bytes; nothing when etcd is not installed.
    pub fn limited(name: &str, quota: u64) -> Option<Self> {
        Self::members(name, 1, &[format!("--quota-backend-bytes={quota}")])?.pop()
    }

    /// Several members; nothing when etcd is not installed.
    pub fn cluster(name: &str, count: usize) -> Option<Vec<Self>> {
        Self::members(name, count, &[])
    }

    fn members(name: &str, count: usize, flags: &[String]) -> Option<Vec<Self>> {
        let ports: Vec<(u16, u16)> = (0..count).map(|_| (port(), port())).collect();
        let all = |i: usize| format!("m{i}=http://127.0.0.1:{}", ports[i].1);
        let initial = (0..count).map(all).collect::<Vec<_>>().join(",");
        let mut members = Vec::new();
        for (i, (client, peer)) in ports.iter().enumerate() {
            let dir = std::env::temp_dir().join(format!("haven-{name}-{}-{i}", std::process::id()));
            let _ = std::fs::remove_dir_all(&dir);
            let child = Command::new("etcd")
                .args([format!("--name=m{i}"), format!("--data-dir={}", dir.display())])
                .arg(format!("--listen-client-urls=http://127.0.0.1:{client}"))
                .arg(format!("--advertise-client-urls=http://127.0.0.1:{client}"))
                .arg(format!("--listen-peer-urls=http://127.0.0.1:{peer}"))
                .arg(format!("--initial-advertise-peer-urls=http://127.0.0.1:{peer}"))
                .arg(format!("--initial-cluster={initial}"))
                .args(flags)
                .args(["--heartbeat-interval=100", "--election-timeout=1000"])
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .ok()?;
            members.push(Self { child, client_port: *client, dir });
        }
        for member in &members {
            member.wait();
        }
        Some(members)
    }

    /// It is healthy once there is a leader.
    fn wait(&self) {
        let until = Instant::now() + Duration::from_secs(20);
        while !self.healthy().unwrap_or(false) {
            assert!(Instant::now() < until, "etcd does not become healthy");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn healthy(&self) -> std::io::Result<bool> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.client_port))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        stream.write_all(b"GET /health HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer.contains(r#""health":"true""#))
    }

    /// Holds it still. A signal to stop is taken by each thread when it next looks: what is asked of a member before
    /// that may still be answered.
    pub fn pause(&self) {
        let pid = self.pid();
        kill(pid, Signal::SIGSTOP).expect("etcd is this test's child");
        let stopped =
            waitpid(pid, Some(WaitPidFlag::WUNTRACED)).expect("etcd is this test's child");
        assert_eq!(stopped, WaitStatus::Stopped(pid, Signal::SIGSTOP));
    }

    /// Lets it go on.
    pub fn resume(&self) {
        kill(self.pid(), Signal::SIGCONT).expect("etcd is this test's child");
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).expect("a process id is small"))
    }

    /// Where clients reach it.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.client_port)
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}
