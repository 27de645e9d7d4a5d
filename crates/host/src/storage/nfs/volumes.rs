//! Volumes of the cluster's pools as files of an NFS server.
//!
//! Raw files, not `qcow2`: QEMU's driver looks at the length of a file when it opens it and never again, and a `qcow2` file grows under
//! a guest. The process that takes a guest which moves live would read nothing but zeros of what was written since it opened the file.
//!
//! A directory is a pool's if it holds its mark. Without it nothing is made, looked for or removed there: an empty directory is also
//! what a server exports whose own disk is not mounted.

use super::{
    directory::{Directory, NfsFile},
    node::NfsLaunch,
};
use crate::{
    agent::storage::{FilerLaunch, StorageFailure, VolumeName, VolumeReady, VolumeWanted},
    storage::{
        in_words, pool,
        qemu_img::{self, Failure},
        says, was_there,
    },
};
use haven_model::{Bytes, NfsSpec, PoolSpec, pool::PoolRoom};
use std::path::{Path, PathBuf};
use uuid::Uuid;

/// How long a pool may take to tell how full it is: it has a file for each disk.
const MEASURES: std::time::Duration = std::time::Duration::from_secs(20);
/// As who this daemon comes.
const ROOT: u32 = 0;
/// The lowest number of an owner: above those that systemd gives to containers, and below 2^31, which not all servers take.
const OWNERS: u32 = 1_900_000_000;
/// So many numbers there are.
const SO_MANY: u32 = 200_000_000;
/// What a file that is being filled is called, behind the name that it will have; each attempt has one of its own.
const PART: &str = ".part-";
/// The longest mark that is read, bytes.
const LONGEST: u32 = 256;

/// The pools of NFS servers. It knows nothing: all of it stands in the spec and at the server.
#[derive(Clone, Copy, Debug, Default)]
pub struct NfsPools;

/// A number that nobody has, so that nothing which was sent under an earlier one is taken.
fn owner() -> u32 {
    let [a, b, c, d, ..] = *Uuid::new_v4().as_bytes();
    OWNERS + u32::from_be_bytes([a, b, c, d]) % SO_MANY
}

fn file(name: &VolumeName) -> String {
    format!("{name}.raw")
}

fn part(name: &VolumeName) -> String {
    let attempt = Uuid::new_v4().simple().to_string();
    format!("{name}{PART}{}", &attempt[..8])
}

fn spec(pool: &PoolSpec) -> Result<&NfsSpec, StorageFailure> {
    let why = || says("the pool does not say which NFS server it is of; look at its manifest");
    pool.nfs.as_ref().ok_or_else(why)
}

fn launch(of: &NfsSpec, name: &str, owner: u32) -> NfsLaunch {
    NfsLaunch { server: of.server.clone(), path: format!("{}/{name}", of.path), owner }
}

/// What to say of a `qemu-img` that has no driver for it.
fn qemu_says(said: String) -> StorageFailure {
    let lacks = ["Unknown driver 'nfs'", "Unknown protocol 'nfs'"];
    if lacks.iter().any(|sign| said.contains(sign)) {
        return says(
            "QEMU of this host knows no NFS; install the package qemu-block-extra in the same version",
        );
    }
    says(said)
}

/// What a mark says that stands in the directory; nothing when there is none.
async fn read_mark(
    directory: &mut Directory,
    of: &NfsSpec,
) -> Result<Option<String>, StorageFailure> {
    let Some(there) = directory.find(pool::MARK).await? else { return Ok(None) };
    let text = directory.read(&there, pool::MARK, LONGEST).await?;
    let text = String::from_utf8_lossy(&text).trim().to_owned();
    if text.is_empty() {
        return Err(says(format!(
            "{}/{} of the NFS server {} is empty: it was being made when something broke; remove it and try again",
            of.path,
            pool::MARK,
            of.server
        )));
    }
    Ok(Some(text))
}

/// The directory of a pool, once it is sure that it is that one.
async fn open(pool: &PoolSpec) -> Result<(NfsSpec, Directory), StorageFailure> {
    let of = spec(pool)?.clone();
    let mut directory = Directory::open(&of, ROOT).await?;
    let mark = read_mark(&mut directory, &of).await?;
    match (&mark, &of.mark) {
        (Some(there), Some(wanted)) if there == wanted => Ok((of, directory)),
        (Some(_), _) => Err(says(format!(
            "{} of the NFS server {} is not this pool but another one; correct `server` or `path`",
            of.path, of.server
        ))),
        (None, _) => Err(says(format!(
            "{} of the NFS server {} holds no {}: the right file system is not mounted there; mount it, it is tried again by itself",
            of.path,
            of.server,
            pool::MARK
        ))),
    }
}

impl NfsPools {
    /// Looks whether a pool that may be new can be used from this host, and what its directory says that it is; of an empty one, what it
    /// says from now on, unless it is `only_asked`.
    ///
    /// # Errors
    /// One sentence on the first thing that is wrong.
    pub async fn check(&self, of: &NfsSpec, only_asked: bool) -> Result<String, StorageFailure> {
        let mut directory = Directory::open(of, ROOT).await?;
        let there = read_mark(&mut directory, of).await?;
        if there.is_none() {
            let foreign = directory.names().await?.into_iter().find(|name| {
                // What file systems and filers put there themselves, and what a check that was interrupted has left.
                !["lost+found", ".snapshot", ".zfs"].contains(&name.as_str())
                    && !name.starts_with(".haven-check-")
            });
            if let Some(name) = foreign {
                return Err(says(format!(
                    "{} of the NFS server {} is not empty (it holds {name}), so no pool is made of it; empty it, or name another directory",
                    of.path, of.server
                )));
            }
        }
        let name = format!(".haven-check-{}", &Uuid::new_v4().simple().to_string()[..8]);
        let checked = self.try_out(&mut directory, of, &name).await;
        let removed = directory.remove(&name).await;
        checked?;
        removed?;
        let mark = match there {
            Some(mark) => mark,
            None => Uuid::new_v4().to_string(),
        };
        if only_asked || read_mark(&mut directory, of).await?.is_some() {
            return Ok(mark);
        }
        let made = directory.create(pool::MARK, 0, ROOT).await?;
        match directory.write(&made, pool::MARK, format!("{mark}\n").as_bytes()).await? {
            true => Ok(mark),
            false => Err(says(format!("{} cannot be written", pool::MARK))),
        }
    }

    /// Does with a file what VMs will need.
    async fn try_out(
        &self,
        directory: &mut Directory,
        of: &NfsSpec,
        name: &str,
    ) -> Result<(), StorageFailure> {
        let (first, second) = (owner(), owner());
        let made = directory.create(name, 4096, first).await?;
        directory.give(&made, name, first).await?;
        let mut as_first = Directory::open(of, first).await?;
        let its = as_first.find(name).await?;
        let may = match &its {
            Some(its) => as_first.write(its, name, b"haven").await?,
            None => false,
        };
        if !may {
            return Err(says(format!(
                "the NFS server {} does not let the owner of a file in {} write it; let everybody pass through that directory (`chmod 711`), and export it with `rw` and without `all_squash`",
                of.server, of.path
            )));
        }
        let seen = launch(of, name, first).argument();
        let look = ["info", "--output=json", seen.as_str()];
        let look = tokio::time::timeout(super::volumes::OPENS, qemu_img::run(&look)).await;
        look.unwrap_or_else(|_| Err("QEMU does not get an answer from it".into())).map_err(
            |said| {
                let failure = qemu_says(said);
                says(format!("{} of the NFS server {}: {failure}", of.path, of.server))
            },
        )?;
        directory.give(&made, name, second).await?;
        let late = match its {
            Some(its) => as_first.write(&its, name, b"late!").await?,
            None => false,
        };
        if late {
            return Err(says(format!(
                "the NFS server {} lets one write to a file in {} whose it is not any more, so a process that was lost could write late; have it check owners at each write (UNIX permissions, `sec=sys`)",
                of.server, of.path
            )));
        }
        Ok(())
    }

    /// Makes a volume if it is not there, and at least so large as it is wanted; `image`: what it is made from, with its format.
    ///
    /// # Errors
    /// A sentence.
    pub async fn volume(
        &self,
        pool: &PoolSpec,
        wanted: &VolumeWanted,
        image: Option<(PathBuf, String)>,
    ) -> Result<VolumeReady, StorageFailure> {
        let (of, mut directory) = open(pool).await?;
        let name = file(&wanted.name);
        let there = match directory.find(&name).await? {
            Some(there) => there,
            None => {
                self.make(&of, &mut directory, wanted, image).await?;
                let made = directory.find(&name).await?;
                made.ok_or_else(|| says(format!("{name} is gone again from {}", of.path)))?
            }
        };
        if there.size < wanted.size_bytes {
            has_room(&of, &mut directory, wanted, wanted.size_bytes - there.size).await?;
            directory.lengthen(&there, &name, wanted.size_bytes).await?;
        }
        let launch = launch(&of, &name, there.owner);
        let path = PathBuf::from(launch.url());
        let filer = Some(Box::new(FilerLaunch::Nfs(launch)));
        Ok(VolumeReady { path, format: "raw".into(), rbd: None, filer })
    }

    /// Makes a volume that is not there: whole, or not at all.
    async fn make(
        &self,
        of: &NfsSpec,
        directory: &mut Directory,
        wanted: &VolumeWanted,
        image: Option<(PathBuf, String)>,
    ) -> Result<(), StorageFailure> {
        if wanted.backup.is_some() || wanted.copy.is_some() {
            return Err(says(format!(
                "the disk `{}` cannot be made from a backup or a snapshot: pools of NFS servers do not take that yet; make it in another pool",
                wanted.name.disk
            )));
        }
        if wanted.image.is_some() && image.is_none() {
            return Err(was_there(&wanted.name));
        }
        self.remove_parts(directory, &wanted.name).await?;
        has_room(of, directory, wanted, wanted.size_bytes).await?;
        let name = part(&wanted.name);
        let owner = owner();
        let made = directory.create(&name, wanted.size_bytes, owner).await;
        let made = match made {
            Ok(made) => self.fill(of, directory, (&name, &made), wanted, image).await,
            Err(failure) => Err(failure),
        };
        // What a failed step leaves goes with it; the failure itself is what is told.
        let removed = directory.remove(&name).await;
        made?;
        removed
    }

    async fn fill(
        &self,
        of: &NfsSpec,
        directory: &mut Directory,
        (name, made): (&str, &NfsFile),
        wanted: &VolumeWanted,
        image: Option<(PathBuf, String)>,
    ) -> Result<(), StorageFailure> {
        if let Some((path, format)) = image {
            fill_from(&launch(of, name, made.owner), &path, &format, wanted).await?;
            // A server that was away for long may have closed this connection.
            *directory = Directory::open(of, ROOT).await?;
        }
        // Whoever was first made it just as well.
        directory.publish(made, &file(&wanted.name)).await.map(drop)
    }

    /// What attempts before have left. Only who owns the VM makes its disks, one after another.
    async fn remove_parts(
        &self,
        directory: &mut Directory,
        name: &VolumeName,
    ) -> Result<(), StorageFailure> {
        let begin = format!("{name}{PART}");
        for name in directory.names().await? {
            if name.starts_with(&begin) {
                directory.remove(&name).await?;
            }
        }
        Ok(())
    }

    /// Shuts a volume to all that have it open: from now on it is nobody's until it is opened anew.
    ///
    /// # Errors
    /// When one of them may still write.
    pub async fn shut_out(&self, pool: &PoolSpec, name: &VolumeName) -> Result<(), StorageFailure> {
        let (_, mut directory) = open(pool).await?;
        let name = file(name);
        let Some(there) = directory.find(&name).await? else { return Ok(()) };
        directory.give(&there, &name, owner()).await
    }

    /// Whether a volume is there.
    ///
    /// # Errors
    /// When it is not known.
    pub async fn has(
        &self,
        pool: &PoolSpec,
        name: &VolumeName,
    ) -> Result<Option<PathBuf>, StorageFailure> {
        let (of, mut directory) = open(pool).await?;
        let name = file(name);
        let there = directory.find(&name).await?;
        Ok(there.map(|there| PathBuf::from(launch(&of, &name, there.owner).url())))
    }

    /// Makes a volume that is there at least so large.
    ///
    /// # Errors
    /// A sentence.
    pub async fn grow(
        &self,
        pool: &PoolSpec,
        name: &VolumeName,
        size_bytes: u64,
    ) -> Result<(), StorageFailure> {
        let (of, mut directory) = open(pool).await?;
        let name = file(name);
        match directory.find(&name).await? {
            Some(there) if there.size < size_bytes => {
                directory.lengthen(&there, &name, size_bytes).await
            }
            Some(_) => Ok(()),
            None => Err(says(format!(
                "{}/{name} is not there at the NFS server {}; who removed it?",
                of.path, of.server
            ))),
        }
    }

    /// Removes a volume; fine when it is not there.
    ///
    /// # Errors
    /// A sentence.
    pub async fn delete(&self, pool: &PoolSpec, name: &VolumeName) -> Result<(), StorageFailure> {
        let (_, mut directory) = open(pool).await?;
        self.remove_parts(&mut directory, name).await?;
        directory.remove(&file(name)).await
    }

    /// The room in a pool.
    ///
    /// # Errors
    /// A sentence.
    pub async fn room(&self, pool: &PoolSpec) -> Result<PoolRoom, StorageFailure> {
        let measured = tokio::time::timeout(MEASURES, Self::measured(pool)).await;
        measured.unwrap_or_else(|_| {
            let s = MEASURES.as_secs();
            Err(says(format!("{} does not tell within {s} s how full it is", pool.place())))
        })
    }

    async fn measured(pool: &PoolSpec) -> Result<PoolRoom, StorageFailure> {
        let (_, mut directory) = open(pool).await?;
        let mut used = 0;
        let names = directory.names().await?;
        for name in names.iter().filter(|name| name.ends_with(".raw") || name.contains(PART)) {
            // What was removed meanwhile takes nothing. After a question without an answer nothing else on this connection has one.
            used += directory.find(name).await?.map_or(0, |there| there.used);
        }
        let room = directory.room().await?;
        // As `df` counts: what is kept back for root is neither.
        let taken = room.total.saturating_sub(room.free);
        Ok(PoolRoom {
            total: Bytes(taken.saturating_add(room.available)),
            free: Bytes(room.available),
            used: Bytes(used),
        })
    }
}

/// How long QEMU may take to look at a file.
const OPENS: std::time::Duration = std::time::Duration::from_secs(15);

/// Refuses what the server could never hold.
async fn has_room(
    of: &NfsSpec,
    directory: &mut Directory,
    wanted: &VolumeWanted,
    more: u64,
) -> Result<(), StorageFailure> {
    let free = directory.room().await?.available;
    if more <= free {
        return Ok(());
    }
    let VolumeName { vm, disk, .. } = &wanted.name;
    Err(says(format!(
        "{} of the NFS server {} is full ({} free, {} needed for the disk `{disk}` of {vm}): make room there, or ask for a smaller disk; it is tried again by itself",
        of.path,
        of.server,
        in_words(free),
        in_words(more)
    )))
}

/// Copies an image into a file that is all zeros.
async fn fill_from(
    to: &NfsLaunch,
    image: &Path,
    format: &str,
    wanted: &VolumeWanted,
) -> Result<(), StorageFailure> {
    let holds = qemu_img::size_of(image, format).await?;
    if holds > wanted.size_bytes {
        let VolumeName { vm, disk, .. } = &wanted.name;
        return Err(says(format!(
            "the disk `{disk}` of {vm} is {} and its image holds {}; make the disk at least that large",
            in_words(wanted.size_bytes),
            in_words(holds)
        )));
    }
    let (image, target) = (qemu_img::text(image)?, to.argument());
    // `writeback`: all of it is at the server's disk before this ends.
    let args = ["convert", "-p", "-n", "--target-is-zero", "-t", "writeback", "-f", format];
    let args = [&args[..], &["-O", "raw", image, &target]].concat();
    let made = qemu_img::make_slowly(&args, None, |percent| wanted.progress.is_at(percent)).await;
    made.map_err(|failure| match failure {
        Failure::Full => says(format!(
            "{} of the NFS server {} is full; make room there, it is tried again by itself",
            to.path, to.server
        )),
        Failure::Other(failure) => qemu_says(failure.what),
    })
}

#[cfg(test)]
mod tests {
    use super::{OWNERS, SO_MANY, owner};

    #[test]
    fn owners_are_of_nobody_else_and_each_is_another_one() {
        let all: std::collections::BTreeSet<u32> = (0..100).map(|_| owner()).collect();
        assert!(all.len() > 98, "{all:?}");
        assert!(all.iter().all(|one| (OWNERS..OWNERS + SO_MANY).contains(one)), "{all:?}");
        assert!(OWNERS.checked_add(SO_MANY).is_some_and(|end| end < 1 << 31));
    }
}
