//! What this host can run VMs with: which QEMU, and whether KVM works (`kvm.rs` tries it).

use super::kvm::{self, Kvm, LIMITS, Trial};
use std::{
    path::{Path, PathBuf},
    process::Command,
};

/// The oldest QEMU that Haven is made for.
const OLDEST: u32 = 10;
/// QEMU's program.
const PROGRAM: &str = "qemu-system-x86_64";

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostCheck {
    /// QEMU's version, empty when it is missing.
    pub qemu: String,
    /// Guests run under KVM.
    pub kvm: bool,
    /// What a person should know, one sentence each.
    pub problems: Vec<String>,
}

/// Looks. `HAVEN_ACCEL=kvm|tcg` decides instead of a trial. The verdict of a trial is kept in `state`; without one this
/// takes as long as [`LIMITS`] allow.
#[must_use]
pub fn check(state: &Path) -> HostCheck {
    let wanted = std::env::var("HAVEN_ACCEL").unwrap_or_default();
    check_with(Path::new(PROGRAM), &wanted, |qemu| {
        let trial = Trial {
            program: PROGRAM.into(),
            qemu: qemu.into(),
            kernel: kvm::kernel(),
            state: PathBuf::from(state),
            limits: LIMITS,
        };
        trial.verdict()
    })
}

fn check_with(program: &Path, wanted: &str, verdict: impl FnOnce(&str) -> Kvm) -> HostCheck {
    let mut found = HostCheck::default();
    match version(program) {
        Ok(version) => found.qemu = version,
        Err(problem) => {
            found.problems.push(problem);
            return found;
        }
    }
    let major: u32 = found.qemu.split('.').next().and_then(|n| n.parse().ok()).unwrap_or(0);
    if major < OLDEST {
        found.problems.push(format!(
            "vms: QEMU {} is older than {OLDEST}; install a newer one, for example from Debian's backports",
            found.qemu
        ));
    }
    match wanted {
        "kvm" => found.kvm = true,
        "tcg" => {}
        "" => judge(&mut found, verdict),
        other => {
            found.problems.push(format!(
                "vms: HAVEN_ACCEL is `{other}`; it must be `kvm`, `tcg` or absent, and counts as absent now"
            ));
            judge(&mut found, verdict);
        }
    }
    found
}

fn judge(found: &mut HostCheck, verdict: impl FnOnce(&str) -> Kvm) {
    match verdict(&found.qemu) {
        Kvm::Works => found.kvm = true,
        Kvm::Fails(why) => found.problems.push(format!(
            "vms: KVM does not work on this host ({why}), so guests are emulated and slow; HAVEN_ACCEL=kvm uses it all the same"
        )),
        // Nothing is known to be wrong with it.
        Kvm::NotTried(why) => tracing::warn!(why, "KVM was not tried, so guests are emulated and slow"),
    }
}

/// The version of QEMU, or a sentence for people.
fn version(program: &Path) -> Result<String, String> {
    let output = Command::new(program).arg("--version").output().map_err(|error| {
        if error.kind() == std::io::ErrorKind::NotFound {
            "vms: QEMU is not installed on this host; install the package qemu-system-x86".into()
        } else {
            format!(
                "vms: QEMU cannot be started ({error}); install the package qemu-system-x86 anew"
            )
        }
    })?;
    version_of(&String::from_utf8_lossy(&output.stdout)).ok_or_else(|| {
        let said = String::from_utf8_lossy(&output.stderr);
        let said = said.lines().next().unwrap_or("nothing").to_owned();
        format!(
            "vms: QEMU does not tell its version (it says: {said}); install the package qemu-system-x86 anew"
        )
    })
}

fn version_of(text: &str) -> Option<String> {
    text.split_whitespace().skip_while(|word| *word != "version").nth(1).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::{HostCheck, Kvm, check_with, version_of};
    use crate::machine::command::program;
    use std::path::{Path, PathBuf};

    #[test]
    fn the_version_is_read() {
        let text = "QEMU emulator version 11.1.0 (Debian 1:11.1.0)";
        assert_eq!(version_of(text).as_deref(), Some("11.1.0"));
    }

    /// A program that says to be QEMU.
    fn qemu(directory: &Path, says: &str) -> PathBuf {
        let path = directory.join("qemu");
        program(&path, format!("#!/bin/sh\n{says}\n").as_bytes());
        path
    }

    #[test]
    fn a_missing_a_broken_and_an_old_qemu_are_told_in_one_sentence() {
        let directory = tempfile::tempdir().unwrap();
        let check = |path: &Path| check_with(path, "", |_| Kvm::Works);
        let missing = check(&directory.path().join("none"));
        assert_eq!(
            missing.problems,
            ["vms: QEMU is not installed on this host; install the package qemu-system-x86"]
        );
        assert!(!missing.kvm && missing.qemu.is_empty());
        let broken = check(&qemu(directory.path(), "echo 'no libfdt.so.1' >&2; exit 127"));
        assert!(broken.problems[0].contains("no libfdt.so.1") && broken.problems.len() == 1);
        let old = check(&qemu(directory.path(), "echo QEMU emulator version 7.2.0"));
        assert!(old.problems[0].contains("older than 10"));
    }

    #[test]
    fn the_trial_decides_unless_somebody_does() {
        let directory = tempfile::tempdir().unwrap();
        let path = qemu(directory.path(), "echo QEMU emulator version 11.1.3");
        let check = |wanted: &str, verdict: Kvm| check_with(&path, wanted, |_| verdict);
        let fine = HostCheck { qemu: "11.1.3".into(), kvm: true, problems: Vec::new() };
        assert_eq!(check("", Kvm::Works), fine);
        assert_eq!(check("kvm", Kvm::Fails("it hangs".into())), fine);
        assert!(!check("tcg", Kvm::Works).kvm);
        let hangs = check("", Kvm::Fails("it hangs".into()));
        assert!(!hangs.kvm && hangs.problems[0].contains("does not work on this host (it hangs)"));
        assert_eq!(check("", Kvm::NotTried("no kernel".into())).problems, [""; 0]);
        let odd = check("fast", Kvm::Works);
        assert!(odd.kvm && odd.problems[0].contains("HAVEN_ACCEL is `fast`"));
    }
}
