//! `/dev/userfaultfd`, by which a guest's page faults wait for memory that follows it: lent to one QEMU for as long as
//! it takes hold of it.
//!
//! QEMU opens the device itself, when it is told that memory may follow, and keeps it. Its user may not; and a machine
//! where every user may is weaker against whoever attacks its kernel. So it is given to that user's group for these
//! milliseconds, to one after another.

use super::driver::VmError;
use nix::unistd::{Gid, Uid};
use std::{
    fs::Permissions,
    io,
    os::unix::fs::{MetadataExt, PermissionsExt, chown},
    path::Path,
};
use tokio::sync::{Mutex, MutexGuard};

const DEVICE: &str = "/dev/userfaultfd";

/// One at a time.
static ONE: Mutex<()> = Mutex::const_new(());

/// The device, lent until this is dropped.
pub struct Lent {
    _one: MutexGuard<'static, ()>,
}

fn give(group: u32, mode: u32) -> io::Result<()> {
    let device = Path::new(DEVICE);
    chown(device, Some(Uid::from_raw(0).as_raw()), Some(Gid::from_raw(group).as_raw()))?;
    std::fs::set_permissions(device, Permissions::from_mode(mode))
}

/// Takes back what a daemon that was killed had lent.
pub fn take_back() {
    let lent = std::fs::metadata(DEVICE).is_ok_and(|of| of.gid() != 0);
    if lent && let Err(error) = give(0, 0o600) {
        tracing::warn!(%error, "{DEVICE} stays lent to a VM's user");
    }
}

/// Lends it to a VM's user, whose group has the same number.
///
/// # Errors
/// When the kernel has none, which is told with what to do.
pub async fn lend(uid: u32) -> Result<Lent, VmError> {
    let lent = Lent { _one: ONE.lock().await };
    give(uid, 0o660).map_err(|source| VmError::System {
        what: format!(
            "{DEVICE} cannot be lent to QEMU, so the guest's memory cannot follow it here; it needs Linux 6.1 or newer with userfaultfd, or move it without `--postcopy`"
        ),
        source,
    })?;
    Ok(lent)
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let Err(error) = give(0, 0o600) {
            tracing::warn!(%error, "{DEVICE} stays lent to a VM's user");
        }
    }
}
