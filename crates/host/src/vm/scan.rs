//! Looks over `/proc` for QEMU processes of this host.
//!
//! A daemon that is killed between starting QEMU and writing its launch record leaves a process that nothing names. It
//! carries the VM's name in its arguments and the VM's directory in its environment ([`DIRECTORY`]); QEMU has no
//! argument for the latter, since it opens nothing there itself. Its guest never ran: a guest is let run only after
//! its record stands.

use super::process::{is_gone, look};
use std::{
    io,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

/// The variable by which a process tells to which VM's directory it belongs.
pub const DIRECTORY: &str = "HAVEN_VM_DIRECTORY";

/// A QEMU process of this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Its number.
    pub pid: i32,
    /// When it started.
    pub start_time: u64,
    /// The VM that it says to run.
    pub vm: String,
}

/// All of them: those of this PID namespace (a lab's hosts live in others) whose VM has its directory in `run_dir`.
///
/// # Errors
/// When a process cannot be looked at: one that is overlooked would run on.
pub fn processes(proc: &Path, run_dir: &Path) -> io::Result<Vec<Found>> {
    let here = std::fs::read_link(proc.join("self/ns/pid"))?;
    let mut found = Vec::new();
    for entry in std::fs::read_dir(proc)? {
        let entry = entry?;
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        match process(proc, &entry.path(), pid, run_dir, &here) {
            Ok(one) => found.extend(one),
            Err(error) if is_gone(&error) => {}
            Err(error) => return Err(error),
        }
    }
    found.sort_by_key(|one: &Found| one.pid);
    Ok(found)
}

fn process(
    proc: &Path,
    entry: &Path,
    pid: i32,
    run_dir: &Path,
    here: &Path,
) -> io::Result<Option<Found>> {
    let Some(vm) = guest(&std::fs::read(entry.join("cmdline"))?) else {
        return Ok(None);
    };
    // Asked before what follows, and again with it: a zombie has neither environment nor namespaces.
    if look(proc, pid)?.is_none_or(|stat| stat.ended)
        || std::fs::read_link(entry.join("ns/pid"))? != here
        || directory(&std::fs::read(entry.join("environ"))?) != Some(run_dir.join(&vm))
    {
        return Ok(None);
    }
    let stat = look(proc, pid)?.filter(|stat| !stat.ended);
    Ok(stat.map(|stat| Found { pid, start_time: stat.start_time, vm }))
}

/// The VM that a command line of QEMU names.
fn guest(cmdline: &[u8]) -> Option<String> {
    let mut args = cmdline.split(|byte| *byte == 0);
    args.find(|arg| *arg == b"-name")?;
    let value = std::str::from_utf8(args.next()?).ok()?;
    Some(value.strip_prefix("guest=")?.split(',').next()?.to_owned())
}

fn directory(environ: &[u8]) -> Option<PathBuf> {
    let mut variables = environ.split(|byte| *byte == 0);
    let value = variables
        .find_map(|one| one.strip_prefix(DIRECTORY.as_bytes())?.strip_prefix(b"=".as_slice()))?;
    Some(PathBuf::from(std::ffi::OsStr::from_bytes(value)))
}

#[cfg(test)]
mod tests {
    use super::{Found, processes};
    use std::{os::unix::fs::symlink, path::Path};

    /// A process as `/proc` shows it.
    fn shows(proc: &Path, pid: i32, cmdline: &str, environ: &str, namespace: &str, state: char) {
        let at = proc.join(pid.to_string());
        std::fs::create_dir_all(at.join("ns")).unwrap();
        std::fs::write(at.join("cmdline"), cmdline).unwrap();
        std::fs::write(at.join("environ"), environ).unwrap();
        let stat =
            format!("{pid} (x) {state} 1 7 7 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 {} 0", pid * 10);
        std::fs::write(at.join("stat"), stat).unwrap();
        symlink(namespace, at.join("ns/pid")).unwrap();
    }

    #[test]
    fn only_this_hosts_machines_are_found() {
        let proc = tempfile::tempdir().unwrap();
        let proc = proc.path();
        std::fs::create_dir_all(proc.join("self/ns")).unwrap();
        symlink("pid:[1]", proc.join("self/ns/pid")).unwrap();
        let qemu = |vm: &str| format!("qemu-system-x86_64\0-name\0guest={vm},process=haven-{vm}\0");
        let inside = |vm: &str| format!("A=b\0HAVEN_VM_DIRECTORY=/run/haven/vms/{vm}\0");
        shows(proc, 11, &qemu("web-1"), &inside("web-1"), "pid:[1]", 'S');
        // Another PID namespace, another Haven, one that only names the same directory, one that ended, a stranger.
        shows(proc, 12, &qemu("web-2"), &inside("web-2"), "pid:[2]", 'S');
        shows(proc, 13, &qemu("web-3"), "HAVEN_VM_DIRECTORY=/tmp/other/web-3\0", "pid:[1]", 'S');
        shows(proc, 14, &qemu("web-4"), &inside("web-1"), "pid:[1]", 'S');
        shows(proc, 15, &qemu("web-5"), &inside("web-5"), "pid:[1]", 'Z');
        shows(proc, 16, "less\0-name\0", "", "pid:[1]", 'S');
        // One that went while it was looked at.
        std::fs::create_dir_all(proc.join("17")).unwrap();
        let found = processes(proc, Path::new("/run/haven/vms")).unwrap();
        assert_eq!(found, [Found { pid: 11, start_time: 110, vm: "web-1".into() }]);
    }

    #[test]
    fn what_cannot_be_looked_at_is_an_error() {
        let proc = tempfile::tempdir().unwrap();
        assert!(processes(proc.path(), Path::new("/run/haven/vms")).is_err());
    }
}
