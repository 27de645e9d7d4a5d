//! What this host can run VMs with. KVM is believed only where somebody says so: on some machines `/dev/kvm` opens
//! and Linux guests hang under it, so the default is QEMU's emulation until `HAVEN_ACCEL=kvm` is set.

use std::process::Command;

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

/// Looks.
#[must_use]
pub fn check() -> HostCheck {
    let mut found = HostCheck::default();
    match Command::new("qemu-system-x86_64").arg("--version").output() {
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stdout);
            found.qemu = version_of(&text).unwrap_or_default();
        }
        Err(_) => found.problems.push(
            "vms: QEMU is not installed on this host; install the package qemu-system-x86".into(),
        ),
    }
    let major: u32 = found.qemu.split('.').next().and_then(|n| n.parse().ok()).unwrap_or(0);
    if !found.qemu.is_empty() && major < 10 {
        found.problems.push(format!(
            "vms: QEMU {} is older than 10; install a newer one, for example from Debian's backports",
            found.qemu
        ));
    }
    found.kvm = std::env::var("HAVEN_ACCEL").is_ok_and(|accel| accel == "kvm");
    found
}

fn version_of(text: &str) -> Option<String> {
    text.split_whitespace().skip_while(|word| *word != "version").nth(1).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::version_of;

    #[test]
    fn the_version_is_read() {
        let text = "QEMU emulator version 11.1.0 (Debian 1:11.1.0)";
        assert_eq!(version_of(text).as_deref(), Some("11.1.0"));
    }
}
