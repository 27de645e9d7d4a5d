//! Work by commands: what `/etc/haven/reboot` and `/etc/haven/upgrade` say, or what fits a Debian with systemd.
//!
//! A command runs in a process group of its own, which neither the end of the daemon nor that of its unit takes along
//! (`KillMode=process`), and leaves its exit code in a file that the next daemon finds. These files stand under the run
//! directory, so a restart of the machine forgets them.

use super::driver::{Machine, Outcome};
use async_trait::async_trait;
use haven_model::maintenance::Work;
use std::{
    io,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// What is run where nothing else is said.
fn usual(work: Work) -> &'static str {
    match work {
        Work::Reboot => "systemctl reboot",
        Work::Upgrade => {
            "apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes --only-upgrade haven"
        }
    }
}

/// Runs commands.
pub struct Commands {
    /// Where an operator's own commands are: `reboot` and `upgrade`.
    pub own: PathBuf,
    /// Where what became of them is kept.
    pub run: PathBuf,
}

impl Commands {
    fn file(&self, id: &str, ending: &str) -> PathBuf {
        self.run.join(format!("{id}.{ending}"))
    }

    fn script(&self, work: Work) -> String {
        let own = self.own.join(work.as_str());
        if own.exists() { quoted(&own) } else { usual(work).to_owned() }
    }
}

/// A path as a word of the shell.
fn quoted(path: &Path) -> String {
    format!("'{}'", path.display().to_string().replace('\'', "'\\''"))
}

#[async_trait]
impl Machine for Commands {
    async fn begin(&self, work: Work, id: &str) -> io::Result<()> {
        std::fs::create_dir_all(&self.run)?;
        let code = self.file(id, "code");
        let unfinished = self.file(id, "unfinished");
        // It may be a second try.
        if let Err(error) = std::fs::remove_file(&code)
            && error.kind() != io::ErrorKind::NotFound
        {
            return Err(error);
        }
        let log = std::fs::File::create(self.file(id, "log"))?;
        let (script, to) = (self.script(work), quoted(&code));
        let from = quoted(&unfinished);
        let text = format!("( {script} ); echo $? > {from}; mv {from} {to}");
        let mut command = Command::new("setsid");
        command.args(["--fork", "sh", "-c", &text]);
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).process_group(0);
        let status = tokio::task::spawn_blocking(move || command.status()).await;
        let status = status.map_err(io::Error::other)??;
        if !status.success() {
            return Err(io::Error::other(format!("setsid ended with {status}")));
        }
        tracing::info!(%work, script, "this host is worked on, since it is its turn");
        Ok(())
    }

    async fn outcome(&self, id: &str) -> Outcome {
        let log = self.file(id, "log");
        let Ok(code) = std::fs::read_to_string(self.file(id, "code")) else {
            return if log.exists() { Outcome::Runs } else { Outcome::Unknown };
        };
        if code.trim() == "0" {
            return Outcome::Done;
        }
        let said = std::fs::read_to_string(&log).unwrap_or_default();
        let last = said.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("nothing");
        Outcome::Failed(format!(
            "its command ended with code {}; it said last: {} (all of it is in {} there)",
            code.trim(),
            last.trim(),
            log.display()
        ))
    }
}

/// Makes a program for a test. Another process writes it: while a file is open for writing here, a test beside this one may fork,
/// and as long as that child has it open, too, nobody can run it ("text file busy").
#[cfg(test)]
pub(crate) fn program(path: &Path, content: &[u8]) {
    let text = path.with_extension("content");
    std::fs::write(&text, content).expect("a test's directory can be written");
    let mut install = std::process::Command::new("install");
    let done = install.args(["-m", "755"]).arg(&text).arg(path).status();
    assert!(done.is_ok_and(|status| status.success()), "{} cannot be made", path.display());
}

#[cfg(test)]
mod tests {
    use super::{Commands, Machine, Outcome, program};
    use haven_model::maintenance::Work;
    use std::time::Duration;

    async fn ended(machine: &Commands, id: &str) -> Outcome {
        for _ in 0..500 {
            match machine.outcome(id).await {
                Outcome::Runs => tokio::time::sleep(Duration::from_millis(20)).await,
                outcome => return outcome,
            }
        }
        Outcome::Runs
    }

    #[tokio::test]
    async fn what_an_operator_wrote_is_run_and_its_end_is_known_to_the_next_daemon() {
        let dir = tempfile::tempdir().unwrap();
        let machine = || Commands { own: dir.path().join("own"), run: dir.path().join("run") };
        std::fs::create_dir_all(dir.path().join("own")).unwrap();
        let write = |script: &str| {
            let own = dir.path().join("own/upgrade");
            program(&own, format!("#!/bin/sh\n{script}\n").as_bytes());
        };
        assert_eq!(machine().outcome("m1").await, Outcome::Unknown);
        write("sleep 0.3; echo fine");
        machine().begin(Work::Upgrade, "m1").await.unwrap();
        assert_eq!(machine().outcome("m1").await, Outcome::Runs);
        assert_eq!(ended(&machine(), "m1").await, Outcome::Done);
        write("echo begun; echo 'no space left' >&2; exit 3");
        machine().begin(Work::Upgrade, "m2").await.unwrap();
        let Outcome::Failed(why) = ended(&machine(), "m2").await else { panic!() };
        assert!(
            why.starts_with("its command ended with code 3; it said last: no space left"),
            "{why}"
        );
        // A second try knows nothing of the first one's end.
        write("sleep 0.3");
        machine().begin(Work::Upgrade, "m2").await.unwrap();
        assert_eq!(machine().outcome("m2").await, Outcome::Runs);
        assert_eq!(ended(&machine(), "m2").await, Outcome::Done);
        // Another one's end is not this one's.
        assert_eq!(machine().outcome("m3").await, Outcome::Unknown);
    }
}
