//! Judges what scribes (`guests/scribe`) say of their disks: whatever happens to a cluster, a record that was told as written
//! is there after every boot, and nobody who is an old copy is told that it wrote something.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::{Read, Seek, SeekFrom},
    path::{Path, PathBuf},
};

/// What one VM's guests have said, on whichever host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scribe {
    /// The largest record that was told as written.
    pub wrote: u64,
    /// The largest one that was there at the last boot.
    pub found: u64,
    /// How often one has booted and found its disk in order.
    pub boots: u64,
    /// Records that a disk had refused.
    pub failed: u64,
    /// The host on which one has written or booted last.
    pub host: String,
    /// Where a copy has heard late of the last record that was found.
    late: BTreeSet<String>,
}

/// All that is wrong, in words, and what stands.
#[derive(Debug, Default)]
pub struct Judge {
    scribes: BTreeMap<String, Scribe>,
    violations: Vec<String>,
}

impl Judge {
    /// Takes a line that the guest of `vm` said on `host`. Lines of one host come in their order; of two hosts, in the order in
    /// which somebody saw them.
    pub fn hear(&mut self, vm: &str, host: &str, line: &str) {
        let Some((_, said)) = line.split_once("SCRIBE-") else { return };
        let mut words = said.split_whitespace();
        let (Some(what), Some(Ok(number))) = (words.next(), words.next().map(str::parse::<u64>))
        else {
            return;
        };
        let scribe = self.scribes.entry(vm.into()).or_default();
        match what {
            // A copy that stood, or that may be kept, hears late of its last write, which was done before its disk was shut to it:
            // the next copy has found that record.
            "WROTE" if number == scribe.found && scribe.late.insert(host.into()) => {}
            "WROTE" if number <= scribe.wrote => self.violations.push(format!(
                "{vm} was told on {host} that record {number} is written, after {} on {}: two copies write",
                scribe.wrote, scribe.host
            )),
            "WROTE" => (scribe.wrote, scribe.host) = (number, host.into()),
            "HAS" => {
                if number < scribe.wrote {
                    self.violations.push(format!(
                        "{vm} on {host} has records up to {number}, and up to {} were told as written (on {})",
                        scribe.wrote, scribe.host
                    ));
                }
                // The one that was under way when its guest ended counts as written once it was found.
                (scribe.wrote, scribe.found, scribe.host) = (number, number, host.into());
                scribe.late.clear();
                scribe.boots += 1;
            }
            "BAD" => self.violations.push(format!("{vm} on {host} finds damage: {}", line.trim())),
            "FAILED" => scribe.failed += 1,
            _ => {}
        }
    }

    /// What a VM's guests have said.
    #[must_use]
    pub fn of(&self, vm: &str) -> Scribe {
        self.scribes.get(vm).cloned().unwrap_or_default()
    }

    /// What is wrong, and forgets it.
    pub fn violations(&mut self) -> Vec<String> {
        std::mem::take(&mut self.violations)
    }
}

/// Reads the consoles of a lab, from where it read last.
#[derive(Debug)]
pub struct Consoles {
    dir: PathBuf,
    hosts: Vec<String>,
    /// Read so far, and the beginning of a line that has no end yet.
    files: BTreeMap<PathBuf, (u64, String)>,
}

impl Consoles {
    /// Of the lab in `dir`.
    #[must_use]
    pub fn new(dir: PathBuf, hosts: Vec<String>) -> Self {
        Self { dir, hosts, files: BTreeMap::new() }
    }

    /// Hands all new lines to the judge.
    pub fn read(&mut self, judge: &mut Judge) {
        for host in &self.hosts {
            let folder = self.dir.join(format!("hosts/{host}/upper/var/log/haven/vms"));
            for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
                let name = entry.file_name().to_string_lossy().into_owned();
                let Some(vm) = name.strip_suffix(".console.log") else { continue };
                let path = entry.path();
                let (read, rest) = self.files.entry(path.clone()).or_default();
                rest.push_str(&since(&path, read).unwrap_or_default());
                while let Some((line, later)) = rest.split_once('\n') {
                    judge.hear(vm, host, line);
                    *rest = later.into();
                }
            }
        }
    }
}

/// What a file holds from there on. One that has become shorter is read from its beginning.
fn since(path: &Path, read: &mut u64) -> std::io::Result<String> {
    let mut file = File::open(path)?;
    if file.metadata()?.len() < *read {
        *read = 0;
    }
    file.seek(SeekFrom::Start(*read))?;
    let mut bytes = Vec::new();
    *read += file.read_to_end(&mut bytes)? as u64;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::Judge;

    fn judged(lines: &[(&str, &str)]) -> (u64, usize) {
        let mut judge = Judge::default();
        for (host, line) in lines {
            judge.hear("vm", host, line);
        }
        (judge.of("vm").wrote, judge.violations().len())
    }

    #[test]
    fn a_record_that_was_told_must_be_found() {
        let wrote = [("a", "SCRIBE-WROTE 7\r"), ("a", "SCRIBE-WROTE 8\r")];
        let then = |said| judged(&[wrote[0], wrote[1], ("b", said)]);
        assert_eq!(then("SCRIBE-HAS 8\r"), (8, 0));
        assert_eq!(then("SCRIBE-HAS 9\r"), (9, 0), "it was under way");
        assert_eq!(then("SCRIBE-HAS 7\r"), (7, 1));
        assert_eq!(then("SCRIBE-BAD 3 1027 3\r"), (8, 1));
        assert_eq!(then("Booting from Hard Disk...\r"), (8, 0));
    }

    #[test]
    fn an_old_copy_must_not_be_told_that_it_wrote() {
        let old = ("a", "SCRIBE-WROTE 8\r");
        let newer = [old, ("b", "SCRIBE-HAS 8\r"), ("b", "SCRIBE-WROTE 9\r")];
        assert_eq!(judged(&newer), (9, 0));
        assert_eq!(judged(&[newer[0], newer[1], newer[2], ("a", "SCRIBE-WROTE 9\r")]), (9, 1));
        let late = [old, ("b", "SCRIBE-HAS 9\r"), ("b", "SCRIBE-WROTE 10\r")];
        assert_eq!(judged(&[late[0], late[1], late[2], ("a", "SCRIBE-WROTE 9\r")]), (10, 0));
        assert_eq!(judged(&[late[0], late[1], late[2], ("a", "SCRIBE-WROTE 10\r")]), (10, 1));
        assert_eq!(judged(&[late[0], late[1], late[2], ("a", "SCRIBE-WROTE 8\r")]), (10, 1));
        let twice = ("a", "SCRIBE-WROTE 9\r");
        assert_eq!(judged(&[late[0], late[1], late[2], twice, twice]), (10, 1));
        assert_eq!(
            judged(&[newer[0], newer[1], ("b", "SCRIBE-WROTE 10\r")]),
            (10, 0),
            "moved live"
        );
    }
}
