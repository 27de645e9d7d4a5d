//! What QEMU is told of an image, and the files that it reads.

use super::{
    pool::{RbdPool, servers},
    program::write_private,
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::{
    io,
    os::unix::fs::chown,
    path::{Path, PathBuf},
};

/// How long QEMU may take to reach the monitors when it opens an image, s. Its main loop waits for it.
const OPENS_S: u32 = 8;

/// The files of one pool that a QEMU reads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Files {
    /// The configuration. Without one QEMU would read `/etc/ceph/ceph.conf`, whoever wrote that.
    pub conf: PathBuf,
    /// The key.
    pub key: PathBuf,
}

/// How a process opens an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RbdLaunch {
    /// Addresses of monitors.
    pub monitors: Vec<String>,
    /// The user.
    pub user: String,
    /// The pool.
    pub pool: String,
    /// The namespace in it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// The image.
    pub image: String,
    /// The file with the configuration.
    pub conf: PathBuf,
    /// The file with the key.
    pub key: PathBuf,
}

impl RbdLaunch {
    /// That of an image of a pool.
    #[must_use]
    pub fn of(pool: &RbdPool, image: &str, files: Files) -> Self {
        let RbdPool { monitors, user, pool, namespace, .. } = pool.clone();
        let Files { conf, key } = files;
        Self { monitors, user, pool, namespace, image: image.to_owned(), conf, key }
    }
}

/// Writes them into `directory`, for the user of the VM alone.
///
/// # Errors
/// When the file system does not let it.
pub fn write(directory: &Path, pool: &RbdPool, owner_uid: u32) -> io::Result<Files> {
    let files = Files { conf: directory.join("rbd.conf"), key: directory.join("rbd.key") };
    // No limit is set on requests: one that librbd gives up may yet be carried out. Who takes over the lock of one that is gone
    // does not have it refused itself: that would be for an hour, over the ten years for which it is refused already.
    let conf = format!(
        "[global]\nclient_mount_timeout = {OPENS_S}\nrados_osd_op_timeout = 0\n\
         rbd_blocklist_on_break_lock = false\nadmin_socket =\nlog_file =\nlog_to_stderr = false\n"
    );
    write_private(&files.conf, &conf)?;
    write_private(&files.key, pool.key.expose())?;
    chown(&files.conf, Some(owner_uid), Some(owner_uid))?;
    chown(&files.key, Some(owner_uid), Some(owner_uid))?;
    Ok(files)
}

/// The argument of `-object` that has QEMU read the key. QEMU takes the bytes that the text in the file stands for.
#[must_use]
pub fn secret(id: &str, rbd: &RbdLaunch) -> Value {
    json!({ "qom-type": "secret", "id": id, "format": "base64", "file": rbd.key })
}

/// The argument of `-blockdev` for an image. Its device needs `werror=stop,rerror=stop`: one that is shut out gets
/// errors.
#[must_use]
pub fn node(name: &str, of: &RbdLaunch, secret: &str) -> Value {
    let servers = servers(&of.monitors).into_iter();
    let servers: Vec<_> =
        servers.map(|(host, port)| json!({ "host": host, "port": port.to_string() })).collect();
    // Without the host's cache librbd keeps none either, and what a guest has flushed is at the OSDs.
    let cache = json!({ "direct": true, "no-flush": false });
    let mut rbd = json!({
        "driver": "rbd", "pool": of.pool, "image": of.image, "server": servers, "user": of.user,
        "key-secret": secret, "auth-client-required": ["cephx"], "conf": of.conf, "discard": "unmap",
        "cache": cache,
    });
    if let Some(namespace) = &of.namespace {
        rbd["namespace"] = json!(namespace);
    }
    json!({ "driver": "raw", "node-name": name, "discard": "unmap", "cache": cache, "file": rbd })
}
