//! Who has an image open, and how somebody is kept from the cluster.

use super::{
    images::Images,
    program::{CHANGE, Ended},
};
use crate::{agent::storage::StorageFailure, storage::says};
use futures::future::try_join_all;
use serde::Deserialize;
use std::{collections::BTreeSet, fmt, net::IpAddr, str::FromStr};

/// How long a client stays shut out, s: ten years. Once an entry has ended, a client that slept all the while takes
/// the lock back and writes; nothing but the end of its process makes it harmless.
pub const SHUT_OUT_SECONDS: u32 = 10 * 365 * 24 * 60 * 60;

/// One client of the cluster, like `10.0.0.4:0/3977297452`: where it is, and a number that tells it from all others.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Client(String);

impl Client {
    /// The address of its host.
    #[must_use]
    pub fn host(&self) -> Option<IpAddr> {
        let (at, _) = self.0.split_once('/')?;
        at.rsplit_once(':')?.0.trim_matches(['[', ']']).parse().ok()
    }
}

impl FromStr for Client {
    type Err = StorageFailure;

    /// An address without a number would mean every client of that host, so it is refused.
    fn from_str(text: &str) -> Result<Self, StorageFailure> {
        let client = Self(text.to_owned());
        let number = text.split_once('/').and_then(|(_, number)| number.parse::<u64>().ok());
        let port = text.split('/').next().and_then(|at| at.rsplit_once(':'));
        match (client.host(), port.map(|(_, port)| port.parse::<u16>()), number) {
            (Some(_), Some(Ok(_)), Some(number)) if number > 0 => Ok(client),
            _ => Err(says(format!(
                "`{text}` is no address of one client of Ceph's (ADDRESS:PORT/NUMBER)"
            ))),
        }
    }
}

impl fmt::Display for Client {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        to.write_str(&self.0)
    }
}

/// What `rbd status` prints.
#[derive(Deserialize)]
pub(super) struct Status {
    watchers: Vec<At>,
}

/// A watcher, or who holds a lock.
#[derive(Deserialize)]
pub(super) struct At {
    address: String,
}

/// Those that are named, each once.
pub(super) fn clients(named: &[At]) -> Result<BTreeSet<Client>, StorageFailure> {
    named.iter().map(|at| at.address.parse()).collect()
}

impl Images {
    /// Who has an image open. Of a client that is cut off, its watch ends after 30 s though it may return.
    ///
    /// # Errors
    /// When it is not known.
    pub async fn clients(&self, image: &str) -> Result<BTreeSet<Client>, StorageFailure> {
        let path = self.path(image)?;
        let status = self.programs.ask_rbd::<Status>(&["status", &path]).await;
        let status = status
            .map_err(|ended| self.failed(image, "it is not known who has it open", &ended))?;
        clients(&status.watchers)
    }

    /// Who holds its lock, which stays after a client is gone.
    async fn lockers(&self, image: &str) -> Result<BTreeSet<Client>, StorageFailure> {
        let path = self.path(image)?;
        let lockers = self.programs.ask_rbd::<Vec<At>>(&["lock", "ls", &path]).await;
        clients(
            &lockers.map_err(|ended| {
                self.failed(image, "it is not known who holds its lock", &ended)
            })?,
        )
    }

    /// Shuts out whoever has an image open, and those that were noted when they opened it (`noted`), before a new
    /// owner opens it; those in `shut` have been already. Who is shut out. Done again, it does no harm.
    ///
    /// # Errors
    /// When one of them may still write; then nobody else may open it.
    pub async fn shut_out(
        &self,
        image: &str,
        noted: &BTreeSet<Client>,
        shut: &BTreeSet<Client>,
    ) -> Result<BTreeSet<Client>, StorageFailure> {
        // First what needs only the monitors. They take all of them in one go, once a second.
        let all = noted.difference(shut).map(|client| self.shut_out_client(client));
        try_join_all(all).await?;
        let mut out: BTreeSet<Client> = noted.union(shut).cloned().collect();
        let mut there = self.clients(image).await?;
        there.extend(self.lockers(image).await?);
        try_join_all(there.difference(&out).map(|client| self.shut_out_client(client))).await?;
        out.extend(there);
        let left = self.clients(image).await?;
        if left.is_empty() {
            tracing::info!(image, ?out, "whoever had the image open is shut out");
            return Ok(out);
        }
        Err(says(format!(
            "the image {} is open to {} though they were to be shut out; nobody else may open it; it is tried again by itself",
            self.programs.pool.path() + "/" + image,
            listed(&left)
        )))
    }

    /// Has every OSD refuse this client from now on. One that did not hear of it yet does before it serves anybody
    /// who connects after this has returned.
    ///
    /// # Errors
    /// When the monitors do not confirm it.
    pub async fn shut_out_client(&self, client: &Client) -> Result<(), StorageFailure> {
        let seconds = SHUT_OUT_SECONDS.to_string();
        // When a host is lost the monitors may elect first, which takes longer than a question may.
        let patience = ["--client_mount_timeout", "30", "--rados_mon_op_timeout", "30"];
        let args = [&patience[..], &["osd", "blocklist", "add", &client.0, &seconds]].concat();
        self.programs.ceph(&args, CHANGE).await.map_err(|ended| {
            self.programs.failed(&format!("the client {client} of Ceph cannot be shut out"), &ended)
        })
    }

    /// Lets a client in again, which `profile rbd` does not allow: an administrator does. Only for one that has
    /// ended, and never needed for it, since its number is not used again.
    ///
    /// # Errors
    /// When the monitors refuse it.
    pub async fn let_in(&self, client: &Client) -> Result<(), StorageFailure> {
        let done = self.programs.ceph(&["osd", "blocklist", "rm", &client.0], CHANGE).await;
        done.map_err(|ended| match ended {
            ended if ended.is(libc::EACCES) => says(format!(
                "client.{} may not let {client} in again; an administrator may: `ceph osd blocklist rm {client}`",
                self.programs.pool.user
            )),
            ended => self.programs.failed(&format!("{client} cannot be let in again"), &ended),
        })
    }

    /// What to say of an image that somebody has open.
    pub(super) async fn in_use(&self, image: &str, what: &str, ended: &Ended) -> StorageFailure {
        match self.clients(image).await {
            Ok(who) if !who.is_empty() => self.refused_to(image, what, &who),
            _ => self.failed(image, what, ended),
        }
    }

    pub(super) fn refused_to(
        &self,
        image: &str,
        what: &str,
        who: &BTreeSet<Client>,
    ) -> StorageFailure {
        says(format!(
            "the image {}/{image} {what}, since it is open to {}; stop what uses it there (a client that has crashed is forgotten after 30 s)",
            self.programs.pool.path(),
            listed(who)
        ))
    }
}

fn listed(clients: &BTreeSet<Client>) -> String {
    clients.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}
