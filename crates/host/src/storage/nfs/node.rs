//! What QEMU is told of a file of an NFS server.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// How a process opens a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NfsLaunch {
    /// The server's address or name.
    pub server: String,
    /// The file there.
    pub path: String,
    /// Its owner, as which the process writes.
    pub owner: u32,
}

impl NfsLaunch {
    /// The file, as QEMU names it.
    #[must_use]
    pub fn url(&self) -> String {
        format!("nfs://{}{}", self.server, self.path)
    }

    fn file(&self) -> Value {
        json!({
            "driver": "nfs", "server": { "type": "inet", "host": self.server }, "path": self.path,
            "user": self.owner, "group": self.owner,
        })
    }

    /// The file, as an argument of `qemu-img`.
    #[must_use]
    pub fn argument(&self) -> String {
        format!("json:{}", json!({ "driver": "raw", "file": self.file() }))
    }
}

/// The argument of `-blockdev` for a file. Its device needs `werror=stop,rerror=stop`: one that was shut out gets errors.
#[must_use]
pub fn node(name: &str, of: &NfsLaunch) -> Value {
    // Nothing is kept on this side: what a guest has flushed is at the server.
    let cache = json!({ "direct": true, "no-flush": false });
    let mut file = of.file();
    file["cache"] = cache.clone();
    json!({ "driver": "raw", "node-name": name, "cache": cache, "file": file })
}
