//! How a pool is reached, as its user writes it.

use crate::{agent::storage::StorageFailure, storage::says};
use haven_model::RbdSpec;
use haven_store::seal::Plain;

/// Fewest characters of a key: 16 bytes and their head of 12, in base64.
const KEY_CHARACTERS: usize = 40;

/// A pool of a Ceph cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RbdPool {
    /// Addresses of monitors, `host` or `host:port`; one that answers is enough.
    pub monitors: Vec<String>,
    /// The user, without `client.`.
    pub user: String,
    /// Its key, as `ceph auth get-key client.USER` tells.
    pub key: Plain,
    /// The pool.
    pub pool: String,
    /// The namespace in it; the nameless one unless it is said.
    pub namespace: Option<String>,
}

/// Whether this can be an argument and a part of an image's path.
pub(super) fn is_name(text: &str) -> bool {
    !text.is_empty()
        && text.len() <= 96
        && !text.starts_with(['-', '.'])
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
}

/// A monitor's host and its port, if one is said. An IPv6 address with a port stands in brackets.
fn split(monitor: &str) -> Option<(&str, Option<u16>)> {
    let (host, port) = match monitor.strip_prefix('[') {
        Some(rest) => {
            let (host, rest) = rest.split_once(']')?;
            (host, rest.strip_prefix(':').or((!rest.is_empty()).then_some("")))
        }
        None if monitor.matches(':').count() > 1 => (monitor, None),
        None => match monitor.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (monitor, None),
        },
    };
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"-.:".contains(&byte);
    if host.is_empty() || host.starts_with('-') || !host.bytes().all(fits) {
        return None;
    }
    match port {
        Some(port) => port.parse().ok().map(|port| (host, Some(port))),
        None => Some((host, None)),
    }
}

/// Monitors with their ports, as QEMU wants them. Without a port it is the one of the present protocol.
#[must_use]
pub fn servers(monitors: &[String]) -> Vec<(String, u16)> {
    let servers = monitors.iter().filter_map(|monitor| split(monitor));
    servers.map(|(host, port)| (host.to_owned(), port.unwrap_or(3300))).collect()
}

impl RbdPool {
    /// That of a spec, with its key in the clear.
    #[must_use]
    pub fn of(spec: &RbdSpec, key: Plain) -> Self {
        let RbdSpec { monitors, user, pool, namespace, .. } = spec.clone();
        Self { monitors, user, key, pool, namespace }
    }

    /// Looks whether it can be meant so, without asking anybody.
    ///
    /// # Errors
    /// A sentence on the first thing that cannot be right.
    pub fn makes_sense(&self) -> Result<(), StorageFailure> {
        if self.monitors.is_empty() {
            return Err(says(
                "`monitors` names none; write the addresses of this Ceph cluster's monitors (`ceph mon dump` lists them)",
            ));
        }
        if let Some(wrong) = self.monitors.iter().find(|monitor| split(monitor).is_none()) {
            return Err(says(format!(
                "`{wrong}` in `monitors` is no address; write each as HOST or HOST:PORT, like 10.0.0.1 or 10.0.0.1:3300"
            )));
        }
        if let Some(bare) = self.user.strip_prefix("client.") {
            return Err(says(format!("`user` is written without `client.`: `{bare}`")));
        }
        let namespace = self.namespace.as_deref();
        for (field, text) in
            [("user", Some(&*self.user)), ("pool", Some(&*self.pool)), ("namespace", namespace)]
        {
            if text.is_some_and(|text| !is_name(text)) {
                return Err(says(format!(
                    "`{field}` is no name that Ceph and this driver take; use letters, digits, `-`, `_` and `.`"
                )));
            }
        }
        let key = self.key.expose();
        let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"+/=".contains(&byte);
        if key.len() < KEY_CHARACTERS || !key.len().is_multiple_of(4) || !key.bytes().all(fits) {
            return Err(says(format!(
                "`key` is not a key of Ceph's; take what `ceph auth get-key client.{}` prints",
                self.user
            )));
        }
        Ok(())
    }

    /// The monitors, as a configuration names them.
    #[must_use]
    pub fn monitors(&self) -> String {
        self.monitors.join(",")
    }

    /// The pool, with its namespace if it has one.
    #[must_use]
    pub fn path(&self) -> String {
        match &self.namespace {
            Some(namespace) => format!("{}/{namespace}", self.pool),
            None => self.pool.clone(),
        }
    }

    /// What an administrator gives the user, once. `profile rbd` lets it add to the blocklist and not take from it.
    #[must_use]
    pub fn caps(&self) -> String {
        let Self { user, pool, .. } = self;
        let within = match &self.namespace {
            Some(namespace) => format!("{pool} namespace={namespace}"),
            None => pool.clone(),
        };
        format!(
            "ceph auth caps client.{user} mon 'profile rbd' osd 'profile rbd pool={within}' mgr 'profile rbd pool={pool}'"
        )
    }
}
