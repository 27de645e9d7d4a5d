//! The command line as people run it: the built binary, against a daemon that is played here (`fake`) or against the
//! real API over a real etcd (`real`). No lab, nothing outside temporary directories.

#![expect(clippy::unwrap_used, reason = "what helps tests fails by panicking, too")]

mod certificates;
mod connecting;
mod draining;
mod editing;
mod fake;
mod fencing;
mod following;
mod maintaining;
mod objects;
mod real;

use std::{
    io::Write,
    path::Path,
    process::{Command, Stdio},
};
use tempfile::TempDir;

/// How a command ended.
#[derive(Debug)]
pub struct Ended {
    pub code: i32,
    pub out: String,
    pub err: String,
}

/// A person's surroundings: nothing of this machine is seen.
pub struct Person {
    pub home: TempDir,
    pub variables: Vec<(String, String)>,
}

impl Person {
    pub fn anybody() -> Self {
        Self { home: tempfile::tempdir().unwrap(), variables: Vec::new() }
    }

    /// Speaks to the daemon behind this socket.
    pub fn at(socket: &Path) -> Self {
        Self::anybody().with("HAVEN_SOCKET", &socket.display().to_string())
    }

    pub fn with(mut self, name: &str, value: &str) -> Self {
        self.variables.push((name.into(), value.into()));
        self
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let home = |name: &str| self.home.path().join(name);
        let mut command = Command::new(env!("CARGO_BIN_EXE_haven"));
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("HAVEN_")) {
            command.env_remove(name);
        }
        command
            .args(args)
            .env_remove("VISUAL")
            .env("EDITOR", "true")
            .env("XDG_CONFIG_HOME", home("config"))
            .env("TMPDIR", self.home.path())
            .env("HAVEN_RUN_DIR", home("run"))
            .env("HAVEN_STATE_DIR", home("state"))
            .env("HAVEN_LAB_DIR", home("lab"))
            .envs(self.variables.iter().cloned())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    pub fn run(&self, args: &[&str]) -> Ended {
        self.say("", args)
    }

    /// Runs it with this on standard input.
    pub fn say(&self, input: &str, args: &[&str]) -> Ended {
        let mut child = self.command(args).spawn().unwrap();
        // A command that reads nothing may have ended already.
        let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
        let output = child.wait_with_output().unwrap();
        let home = self.home.path().display().to_string();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).replace(&home, "HOME");
        let code = output.status.code().unwrap_or(-1);
        Ended { code, out: text(&output.stdout), err: text(&output.stderr) }
    }

    /// A file of this person.
    pub fn file(&self, name: &str, text: &str) -> String {
        let path = self.home.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    }
}
