//! A scope of systemd for each VM, so that what befalls the daemon's unit does not befall its VMs.
//!
//! QEMU begins in the daemon's control group. If it stayed there, `systemctl kill haven` would end every VM, a limit on
//! the unit's tasks or memory would be one for all VMs together, and a shutdown of the host would end them without a
//! word, as remains of a unit that has stopped. systemd alone may make control groups beside its own, so it is asked.
//!
//! Best effort: a VM runs without it too, and one that still stands in the daemon's group is asked for again when the
//! next daemon adopts it. Rejected: `systemd-run --scope` as QEMU's parent (a start would wait for PID 1, and a failover
//! for its slowest moment); a group below the daemon's (`systemctl kill` and memory limits reach those as well).

use std::{io, path::Path, time::Duration};
use zbus::{Connection, Variant};

/// How long systemd may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// The daemon's own unit. It is stopped before the VMs' scopes, so that it takes no VM that a shutdown ends for one
/// that crashed.
const DAEMON: &str = "haven.service";
const SLICE: &str = "haven.slice";

/// Why a VM stays in the daemon's control group.
#[derive(Debug, thiserror::Error)]
pub enum ScopeError {
    /// The control group of a process cannot be read.
    #[error("its control group cannot be read")]
    Group(#[source] io::Error),
    /// The bus or systemd refused.
    #[error("systemd does not make a scope; is the package dbus installed and running?")]
    Bus(#[from] zbus::Error),
    /// Nobody answered.
    #[error("systemd did not answer within {} s", PATIENCE.as_secs())]
    Silent,
}

/// Whether systemd runs this daemon as a unit; not in a lab, a test or a shell's hands.
#[must_use]
pub fn wanted() -> bool {
    std::env::var_os("INVOCATION_ID").is_some() && Path::new("/run/systemd/system").exists()
}

/// The name of a VM's scope. With the process' number, for that of the last run may not be gone yet.
fn name(vm: &str, pid: i32) -> String {
    format!("haven-vm-{vm}.{pid}.scope")
}

/// Whether a process stands where this daemon does.
fn is_here(pid: i32) -> io::Result<bool> {
    let group = |who: &str| std::fs::read(format!("/proc/{who}/cgroup"));
    Ok(group(&pid.to_string())? == group("self")?)
}

/// Gives the process of a VM a scope of its own, if it has none.
///
/// # Errors
/// When systemd cannot be asked or refuses; the VM runs on where it is.
pub async fn give(vm: &str, pid: i32) -> Result<(), ScopeError> {
    if !is_here(pid).map_err(ScopeError::Group)? {
        return Ok(());
    }
    tokio::time::timeout(PATIENCE, ask(vm, pid)).await.map_err(|_| ScopeError::Silent)?
}

async fn ask(vm: &str, pid: i32) -> Result<(), ScopeError> {
    let properties = vec![
        ("Description", Variant::from(format!("VM {vm} of Haven"))),
        ("Slice", Variant::from(SLICE)),
        ("Before", Variant::from(vec![DAEMON])),
        ("CollectMode", Variant::from("inactive-or-failed")),
        ("PIDs", Variant::from(vec![pid.cast_unsigned()])),
    ];
    let others: Vec<(&str, Vec<(&str, Variant<'_>)>)> = Vec::new();
    Connection::system()
        .await?
        .call_method(
            Some("org.freedesktop.systemd1"),
            "/org/freedesktop/systemd1",
            Some("org.freedesktop.systemd1.Manager"),
            "StartTransientUnit",
            &(name(vm, pid), "fail", properties, others),
        )
        .await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{is_here, name};

    #[test]
    fn a_scope_is_named_after_its_vm_and_process() {
        assert_eq!(name("web-1", 42), "haven-vm-web-1.42.scope");
    }

    #[test]
    fn a_child_begins_in_the_group_of_its_parent() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        assert!(is_here(pid).unwrap());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(is_here(pid).is_err(), "what has ended stands nowhere");
    }
}
