//! Copies of replicas as they were: what a snapshot is of a mirrored disk (docs/decisions/0027-snapshots.md).
//!
//! ```text
//!   db.data.<uid>.raw             the replica
//!   db.data.<uid>.<id>.kept       what it held at one instant: a plain sparse file
//!   db.data.<uid>.<id>.kept.back  the same once more, to be put in the place of the replica by its name alone
//!   ….<n>.part                    either, while it is made
//! ```
//!
//! A copy that has its name is whole, and never changes; each attempt to make one has an id of its own, so what an earlier one left
//! is never taken for it.

use super::pieces::data_from;
use crate::{
    agent::storage::{StorageFailure, VolumeName},
    storage::{in_words, pool, says},
    vm::{
        run_dir,
        views::{DiskView, Extent},
    },
};
use async_trait::async_trait;
use haven_model::PoolSpec;
use nix::sys::statvfs::statvfs;
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    fs::OpenOptions,
    io,
    os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    process::Stdio,
    sync::Arc,
    time::{Duration, UNIX_EPOCH},
};
use tokio::process::Command;

/// The ending of a copy.
const ENDING: &str = ".kept";
/// What is added to that of one that is to be put in the place of its replica.
const BACK: &str = ".back";
/// The ending of what is being made.
const PART: &str = ".part";
/// The most that is read in one go, bytes.
pub const MOST: u64 = 4 << 20;
/// So much is asked about in one go, bytes.
const SPAN: u64 = 1 << 30;
/// So much is written before the room is looked at again, bytes.
const LOOKS: u64 = 64 << 20;
/// So much is left free for guests, bytes; or a tenth of the pool, if that is less.
const ROOM: u64 = 1 << 30;

/// Which copy.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct KeptOf {
    /// The replica that it is of.
    pub replica: PathBuf,
    /// Its volume.
    pub volume: VolumeName,
    /// What it is called.
    pub copy: String,
}

impl KeptOf {
    fn path(&self) -> PathBuf {
        self.replica.with_file_name(format!("{}.{}{ENDING}", self.volume, self.copy))
    }

    fn back(&self) -> PathBuf {
        self.replica.with_file_name(format!("{}.{}{ENDING}{BACK}", self.volume, self.copy))
    }
}

/// A name for what is being made, which no other attempt has: one that was given up may go on for a moment.
fn part(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}{PART}", uuid::Uuid::new_v4().simple()));
    path.with_file_name(name)
}

/// A copy that is whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    /// The moment that it shows, wall clock, milliseconds since 1970.
    pub at_ms: i64,
    /// As the guest saw the disk, bytes.
    pub size: u64,
}

/// A part of a copy, as one host gives it to another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// How large the whole is, bytes.
    pub size: u64,
    /// How much room it takes, bytes.
    pub takes: u64,
    /// Where this part begins; all before it, from what was asked for on, is zeros.
    pub offset: u64,
    /// What it holds; nothing when all that is left is zeros.
    pub content: Vec<u8>,
}

impl Part {
    /// As it is sent: the numbers with their highest byte first, then the content.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let numbers = [self.size, self.takes, self.offset].map(u64::to_be_bytes).concat();
        [numbers.as_slice(), &self.content].concat()
    }

    /// Reads it; nothing when it was cut short.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (size, rest) = bytes.split_first_chunk()?;
        let (takes, rest) = rest.split_first_chunk()?;
        let (offset, content) = rest.split_first_chunk()?;
        let [size, takes, offset] = [size, takes, offset].map(|of| u64::from_be_bytes(*of));
        Some(Self { size, takes, offset, content: content.to_vec() })
    }
}

/// What a copy is made from, read once from its beginning to its end.
#[async_trait]
pub trait Source: Send {
    /// How large it is, bytes.
    fn size(&self) -> u64;
    /// How much room a copy of it takes, bytes, if that is known.
    fn takes(&self) -> u64 {
        0
    }
    /// What comes next that is not zeros, from `from` on, with where it begins; nothing at the end.
    async fn next(&mut self, from: u64) -> io::Result<Option<(u64, Vec<u8>)>>;
}

/// Keeps copies of this host's replicas.
#[async_trait]
pub trait KeptCopies: Send + Sync {
    /// The whole copies of a replica, by what they are called.
    async fn of(
        &self,
        volume: &VolumeName,
        replica: &Path,
    ) -> Result<BTreeMap<String, Kept>, StorageFailure>;
    /// Copies a replica that nobody has open.
    async fn keep(&self, of: &KeptOf, at_ms: i64) -> Result<(), StorageFailure>;
    /// Copies what `source` gives.
    async fn keep_from(
        &self,
        of: &KeptOf,
        at_ms: i64,
        source: &mut dyn Source,
    ) -> Result<(), StorageFailure>;
    /// Makes ready what is to be put in the place of the replica: a copy of this one. Fine when it is ready.
    async fn prepare(&self, of: &KeptOf) -> Result<(), StorageFailure>;
    /// Removes a copy, whole or not; fine when there is none.
    async fn forget(&self, of: &KeptOf) -> Result<(), StorageFailure>;
    /// All copies in a pool, whole or not.
    async fn all(&self, pool: &PoolSpec) -> Result<Vec<(VolumeName, String)>, StorageFailure>;
}

/// Copies as files beside the replicas.
pub struct KeptFiles;

fn unwritable(path: &Path) -> impl Fn(io::Error) -> StorageFailure {
    let path = path.display().to_string();
    move |error| says(format!("{path} cannot be written ({error}); check the pool's file system"))
}

/// Of which volume a file is a copy, and what it is called; also of one that is being made, or put back.
fn parse(file: &str) -> Option<(VolumeName, String)> {
    let named = match file.strip_suffix(PART) {
        Some(part) => part.rsplit_once('.')?.0,
        None => file,
    };
    let whole = named.strip_suffix(BACK).unwrap_or(named).strip_suffix(ENDING)?;
    let (volume, copy) = whole.rsplit_once('.')?;
    let is_id = !copy.is_empty() && copy.bytes().all(|byte| byte.is_ascii_alphanumeric());
    Some((VolumeName::parse(volume)?, copy.to_owned())).filter(|_| is_id)
}

/// Removes what earlier attempts to make this copy, or to make it ready, left: none of them may go on.
fn sweep_parts(of: &KeptOf) -> io::Result<()> {
    let directory = of.replica.parent().unwrap_or(Path::new("/"));
    for name in names(directory)? {
        if name.ends_with(PART) && parse(&name) == Some((of.volume.clone(), of.copy.clone())) {
            run_dir::remove(&directory.join(name))?;
        }
    }
    Ok(())
}

/// The names of the files in a directory; none when there is no directory.
fn names(directory: &Path) -> io::Result<Vec<String>> {
    let entries = match std::fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let names = entries.map(|entry| Ok(entry?.file_name().into_string().ok()));
    names.filter_map(io::Result::transpose).collect()
}

async fn apart<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|_| Err(io::ErrorKind::Interrupted.into()))
}

/// Why so much more is not written beside a replica: its pool must have room for what guests write.
fn lacks_room(beside: &Path, bytes: u64) -> io::Result<Option<StorageFailure>> {
    let directory = beside.parent().unwrap_or(Path::new("/"));
    let stat = statvfs(directory).map_err(io::Error::from)?;
    let free = stat.blocks_available().saturating_mul(stat.fragment_size());
    let total = stat.blocks().saturating_mul(stat.fragment_size());
    let leaves = ROOM.min(total / 10);
    if bytes.saturating_add(leaves) <= free {
        return Ok(None);
    }
    Ok(Some(says(format!(
        "{} has {} free, and a copy of a mirrored disk takes {} there and leaves {}; free some space or enlarge it",
        directory.display(),
        in_words(free),
        in_words(bytes),
        in_words(leaves)
    ))))
}

/// Copies one file to another that is not there: by sharing its blocks where the file system can, else those that hold something.
///
/// # Errors
/// A sentence: there is no room, or what `cp` says.
async fn copy(from: &Path, to: &Path) -> Result<(), StorageFailure> {
    let fails = |why: String| {
        says(format!("{} cannot be copied to {}: {why}", from.display(), to.display()))
    };
    let cp = |how: [&str; 2]| {
        let mut command = Command::new("cp");
        command.args(how).arg("--").args([from, to]).env("LC_ALL", "C").kill_on_drop(true);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        command.output()
    };
    run_dir::remove(to).map_err(unwritable(to))?;
    let shared = cp(["--reflink=always", "--sparse=auto"]).await;
    if shared.is_ok_and(|done| done.status.success()) {
        return Ok(());
    }
    run_dir::remove(to).map_err(unwritable(to))?;
    let takes = std::fs::metadata(from).map(|of| of.blocks() * 512);
    let takes = takes.map_err(|error| fails(error.to_string()))?;
    if let Some(failure) = lacks_room(to, takes).map_err(unwritable(to))? {
        return Err(failure);
    }
    match cp(["--reflink=never", "--sparse=always"]).await {
        Ok(done) if done.status.success() => Ok(()),
        Ok(done) => Err(fails(String::from_utf8_lossy(&done.stderr).trim().to_owned())),
        Err(error) => Err(fails(format!("cp cannot be started ({error})"))),
    }
}

/// Puts what was made ready in the place of its replica; when it returns that is on the disk. Nobody may have the replica open.
///
/// # Errors
/// When the disk does not take it; the replica is what it was then.
pub fn put_back(of: &KeptOf) -> io::Result<()> {
    pool::put(&of.back(), &of.replica, std::fs::metadata(&of.replica)?.uid())
}

/// Makes the file that is put in the place of the replica. Fine when it is there.
///
/// # Errors
/// A sentence: there is no such copy, or no room for another one.
pub async fn make_ready(of: &KeptOf) -> Result<(), StorageFailure> {
    let (kept, back) = (of.path(), of.back());
    if back.try_exists().map_err(unwritable(&back))? {
        return Ok(());
    }
    let there = kept.try_exists().map_err(unwritable(&kept))?;
    if !there {
        return Err(says(format!(
            "{} is not there, which this disk is to hold again; it was removed by hand, or another disk is mounted there",
            kept.display()
        )));
    }
    let (part, swept) = (part(&back), of.clone());
    apart(move || sweep_parts(&swept)).await.map_err(unwritable(&back))?;
    copy(&kept, &part).await?;
    let to = back.clone();
    apart(move || name_it(&part, &to, None)).await.map_err(unwritable(&back))
}

/// Makes another file hold what a copy does.
///
/// # Errors
/// A sentence: there is no such copy, or no room for another one.
pub async fn copy_to(of: &KeptOf, to: &Path) -> Result<(), StorageFailure> {
    let kept = of.path();
    match kept.try_exists().map_err(unwritable(&kept))? {
        true => copy(&kept, to).await,
        false => Err(says(format!(
            "{} is not there, from which this disk is made; it was removed by hand, or another disk is mounted there",
            kept.display()
        ))),
    }
}

/// Gives a file that is made its time, if it has one, and its name.
fn name_it(part: &Path, path: &Path, at_ms: Option<i64>) -> io::Result<()> {
    let file = OpenOptions::new().write(true).custom_flags(libc::O_NOFOLLOW).open(part)?;
    if let Some(at_ms) = at_ms {
        let since = Duration::from_millis(u64::try_from(at_ms).unwrap_or_default());
        file.set_modified(UNIX_EPOCH + since)?;
    }
    // Root's: no VM's process may change it.
    nix::unistd::fchown(&file, Some(0.into()), Some(0.into()))?;
    file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    file.sync_all()?;
    std::fs::rename(part, path)?;
    pool::sync(path.parent().unwrap_or(Path::new("/")))
}

/// What a copy of this host holds from `from` on, at most [`MOST`] bytes.
///
/// # Errors
/// When it is not there, or cannot be read.
pub fn read(of: &KeptOf, from: u64) -> io::Result<Part> {
    let path = of.path();
    // What was asked for may be anything.
    let named = path.file_name().and_then(|name| parse(name.to_str()?));
    if named != Some((of.volume.clone(), of.copy.clone())) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW).open(path)?;
    let (size, takes) = (file.metadata()?.len(), file.metadata()?.blocks() * 512);
    let Some(offset) = data_from(&file, from).filter(|offset| *offset < size) else {
        return Ok(Part { size, takes, offset: size, content: Vec::new() });
    };
    let mut content = vec![0; MOST.min(size - offset) as usize];
    file.read_exact_at(&mut content, offset)?;
    Ok(Part { size, takes, offset, content })
}

#[async_trait]
impl KeptCopies for KeptFiles {
    async fn of(
        &self,
        volume: &VolumeName,
        replica: &Path,
    ) -> Result<BTreeMap<String, Kept>, StorageFailure> {
        let (volume, replica) = (volume.clone(), replica.to_owned());
        let directory = replica.parent().unwrap_or(Path::new("/")).to_owned();
        let unread = |error| {
            says(format!("{} cannot be read ({error}); check its disk", directory.display()))
        };
        let listed = directory.clone();
        let look = apart(move || {
            let mut found = BTreeMap::new();
            for name in names(&listed)?.iter().filter(|name| name.ends_with(ENDING)) {
                let Some((volume, copy)) = parse(name).filter(|(of, _)| *of == volume) else {
                    continue;
                };
                let of = KeptOf { replica: replica.clone(), volume, copy: copy.clone() };
                let meta = std::fs::symlink_metadata(of.path())?;
                let since = meta.modified()?.duration_since(UNIX_EPOCH).unwrap_or_default();
                let at_ms = i64::try_from(since.as_millis()).unwrap_or(i64::MAX);
                found.insert(copy, Kept { at_ms, size: meta.len() });
            }
            Ok(found)
        });
        look.await.map_err(unread)
    }

    async fn keep(&self, of: &KeptOf, at_ms: i64) -> Result<(), StorageFailure> {
        let path = of.path();
        let part = part(&path);
        copy(&of.replica, &part).await?;
        let to = path.clone();
        apart(move || name_it(&part, &to, Some(at_ms))).await.map_err(unwritable(&path))
    }

    async fn keep_from(
        &self,
        of: &KeptOf,
        at_ms: i64,
        source: &mut dyn Source,
    ) -> Result<(), StorageFailure> {
        let path = of.path();
        let part = part(&path);
        let (size, made, swept) = (source.size(), part.clone(), of.clone());
        if let Some(failure) = lacks_room(&part, source.takes()).map_err(unwritable(&part))? {
            return Err(failure);
        }
        let file = apart(move || {
            sweep_parts(&swept)?;
            let mut options = OpenOptions::new();
            let file = options.write(true).create_new(true).mode(0o600).open(&made)?;
            file.set_len(size).map(|()| file)
        });
        let file = Arc::new(file.await.map_err(unwritable(&part))?);
        let (mut at, mut written) = (0, LOOKS);
        loop {
            let next = source.next(at).await;
            let next = next.map_err(|error| {
                says(format!("the disk `{}` cannot be copied: {error}", of.volume.disk))
            })?;
            let Some((offset, content)) = next else { break };
            if written >= LOOKS {
                if let Some(failure) = lacks_room(&part, LOOKS).map_err(unwritable(&part))? {
                    return Err(failure);
                }
                written = 0;
            }
            at = offset + content.len() as u64;
            written += content.len() as u64;
            let file = Arc::clone(&file);
            let write = apart(move || file.write_all_at(&content, offset));
            write.await.map_err(unwritable(&part))?;
        }
        let to = path.clone();
        apart(move || name_it(&part, &to, Some(at_ms))).await.map_err(unwritable(&path))
    }

    async fn prepare(&self, of: &KeptOf) -> Result<(), StorageFailure> {
        make_ready(of).await
    }

    async fn forget(&self, of: &KeptOf) -> Result<(), StorageFailure> {
        let (path, back, of) = (of.path(), of.back(), of.clone());
        let what = path.clone();
        let removed = apart(move || {
            sweep_parts(&of)?;
            run_dir::remove(&back)?;
            run_dir::remove(&path)?;
            pool::sync(path.parent().unwrap_or(Path::new("/")))
        });
        removed.await.map_err(unwritable(&what))
    }

    async fn all(&self, pool: &PoolSpec) -> Result<Vec<(VolumeName, String)>, StorageFailure> {
        let directory = PathBuf::from(&pool.path);
        let found = apart(move || names(&directory)).await;
        let found = found.map_err(|error| {
            says(format!("{} cannot be read ({error}); check its disk", pool.path))
        })?;
        let found: BTreeSet<_> = found.iter().filter_map(|name| parse(name)).collect();
        Ok(found.into_iter().collect())
    }
}

/// A disk's view, read once from its beginning to its end.
pub struct ViewSource {
    /// The view.
    view: Box<dyn DiskView>,
    known: VecDeque<Extent>,
    /// From where the next extent that is known is.
    known_at: u64,
}

impl ViewSource {
    /// Reads this.
    #[must_use]
    pub fn new(view: Box<dyn DiskView>) -> Self {
        Self { view, known: VecDeque::new(), known_at: 0 }
    }
}

#[async_trait]
impl Source for ViewSource {
    fn size(&self) -> u64 {
        self.view.size()
    }

    async fn next(&mut self, _from: u64) -> io::Result<Option<(u64, Vec<u8>)>> {
        self.read_on().await.map_err(|error| {
            io::Error::other(format!(
                "what it held cannot be read ({error}); if its pool is nearly full, there was no room for what the guest overwrote meanwhile"
            ))
        })
    }
}

impl ViewSource {
    async fn read_on(&mut self) -> io::Result<Option<(u64, Vec<u8>)>> {
        let size = self.view.size();
        while self.known_at < size {
            let Some(extent) = self.known.front_mut() else {
                let span = SPAN.min(size - self.known_at);
                self.known = self.view.status(self.known_at, span as u32).await?.into();
                if self.known.iter().all(|extent| extent.length == 0) {
                    return Err(io::Error::other("it tells nothing of its content"));
                }
                continue;
            };
            let (begin, zero) = (self.known_at, extent.zero);
            let length = extent.length.min(if zero { SPAN } else { MOST }).min(size - begin);
            extent.length -= length;
            if extent.length == 0 {
                self.known.pop_front();
            }
            self.known_at += length;
            let mut content = Vec::new();
            if !zero {
                content = vec![0; length as usize];
                self.view.read(begin, &mut content).await?;
            }
            // What is not read any more need not be kept.
            self.view.release(begin, length as u32).await?;
            if !zero {
                return Ok(Some((begin, content)));
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::{
        Kept, KeptCopies, KeptFiles, KeptOf, Part, Source, ViewSource, copy_to, parse, put_back,
        read,
    };
    use crate::{
        agent::storage::VolumeName,
        vm::views::{DiskView, Extent},
    };
    use async_trait::async_trait;
    use haven_model::{PoolDriverKind, PoolSpec};
    use std::{
        io,
        os::unix::fs::{FileExt, MetadataExt},
        path::Path,
    };

    const SIZE: u64 = 64 << 20;

    /// A replica that holds something at its beginning and in its middle.
    fn replica(directory: &Path) -> KeptOf {
        let volume = VolumeName::parse("db.data.u1").unwrap();
        let replica = directory.join("db.data.u1.raw");
        let file = std::fs::File::create(&replica).unwrap();
        file.set_len(SIZE).unwrap();
        file.write_all_at(&[1; 4096], 0).unwrap();
        file.write_all_at(&[2; 4096], SIZE / 2).unwrap();
        KeptOf { replica, volume, copy: "a1".into() }
    }

    /// A copy, as another host reads it.
    struct Over<'a>(&'a KeptOf);

    #[async_trait]
    impl Source for Over<'_> {
        fn size(&self) -> u64 {
            read(self.0, 0).unwrap().size
        }
        async fn next(&mut self, from: u64) -> io::Result<Option<(u64, Vec<u8>)>> {
            let part = read(self.0, from)?;
            let part = Part::from_bytes(&part.to_bytes()).unwrap();
            Ok((!part.content.is_empty()).then_some((part.offset, part.content)))
        }
    }

    #[tokio::test]
    async fn a_copy_is_made_fetched_and_put_back() {
        let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (mine, theirs) = (replica(here.path()), replica(there.path()));
        let held = std::fs::read(&mine.replica).unwrap();
        KeptFiles.keep(&mine, 1234).await.unwrap();
        // What is left of one that was given up is in nobody's way.
        let left = theirs.replica.with_file_name("db.data.u1.a1.kept.x7.part");
        std::fs::write(&left, "half").unwrap();
        KeptFiles.keep_from(&theirs, 1234, &mut Over(&mine)).await.unwrap();
        assert!(!left.exists());
        for of in [&mine, &theirs] {
            let listed = KeptFiles.of(&of.volume, &of.replica).await.unwrap();
            assert_eq!(listed["a1"], Kept { at_ms: 1234, size: SIZE });
            let path = of.replica.with_file_name("db.data.u1.a1.kept");
            assert!(std::fs::metadata(&path).unwrap().blocks() * 512 < SIZE / 4, "it is sparse");
            std::fs::OpenOptions::new().write(true).open(&of.replica).unwrap().set_len(0).unwrap();
            KeptFiles.prepare(of).await.unwrap();
            assert_eq!(std::fs::metadata(&of.replica).unwrap().len(), 0, "it is not put back yet");
            put_back(of).unwrap();
            assert!(std::fs::read(&of.replica).unwrap() == held);
            assert!(std::fs::read(&path).unwrap() == held, "it is still there");
        }
        let pool = PoolSpec::new(PoolDriverKind::Mirrored, here.path().to_str().unwrap());
        assert_eq!(KeptFiles.all(&pool).await.unwrap(), [(mine.volume.clone(), "a1".to_owned())]);
        let another = here.path().join("another");
        copy_to(&mine, &another).await.unwrap();
        assert!(std::fs::read(&another).unwrap() == held);
        KeptFiles.forget(&mine).await.unwrap();
        KeptFiles.forget(&mine).await.unwrap();
        let why = copy_to(&mine, &another).await.unwrap_err().what;
        assert!(why.contains("from which this disk is made"), "{why}");
        assert!(KeptFiles.all(&pool).await.unwrap().is_empty());
        let why = KeptFiles.prepare(&mine).await.unwrap_err().what;
        assert!(why.contains("db.data.u1.a1.kept is not there"), "{why}");
        assert!(std::fs::read(&mine.replica).unwrap() == held, "it is what it was");
    }

    #[test]
    fn only_copies_of_volumes_are_taken_for_such() {
        let of = |name: &str| parse(name).map(|(of, id)| (of.to_string(), id));
        let is = Some(("db.data.u1".to_owned(), "a1".to_owned()));
        assert_eq!(of("db.data.u1.a1.kept"), is);
        assert_eq!(of("db.data.u1.a1.kept.9f.part"), is);
        assert_eq!(of("db.data.u1.a1.kept.back"), is);
        assert_eq!(of("db.data.u1.a1.kept.back.9f.part"), is);
        for other in
            ["db.data.u1.raw", "db.data.u1.kept", "db.data.kept", "x.kept", "db.data.u1.part"]
        {
            assert_eq!(of(other), None, "{other}");
        }
        let directory = tempfile::tempdir().unwrap();
        let odd = KeptOf { copy: "../a1".into(), ..replica(directory.path()) };
        assert_eq!(read(&odd, 0).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }

    /// A view whose parts are told in pieces, some of zeros, and that refuses what was given up.
    struct Pieces {
        content: Vec<u8>,
        released: u64,
    }

    #[async_trait]
    impl DiskView for Pieces {
        fn size(&self) -> u64 {
            self.content.len() as u64
        }
        fn is_marked(&self) -> bool {
            false
        }
        async fn status(&mut self, offset: u64, length: u32) -> io::Result<Vec<Extent>> {
            let pieces = (offset..offset + u64::from(length)).step_by(8192);
            Ok(pieces
                .map(|at| {
                    let end = (at + 8192).min(self.size());
                    let zero =
                        self.content[at as usize..end as usize].iter().all(|byte| *byte == 0);
                    Extent { length: end - at, zero, dirty: true }
                })
                .collect())
        }
        async fn read(&mut self, offset: u64, into: &mut [u8]) -> io::Result<()> {
            assert!(offset >= self.released);
            let from = offset as usize;
            into.copy_from_slice(&self.content[from..from + into.len()]);
            Ok(())
        }
        async fn release(&mut self, offset: u64, length: u32) -> io::Result<()> {
            assert_eq!(offset, self.released);
            self.released += u64::from(length);
            Ok(())
        }
    }

    #[tokio::test]
    async fn a_view_is_copied_as_it_is() {
        let directory = tempfile::tempdir().unwrap();
        let of = replica(directory.path());
        let mut content = vec![0; 100_000];
        content[5] = 1;
        content[60_000..80_000].fill(9);
        content[99_999] = 3;
        let view = Pieces { content: content.clone(), released: 0 };
        KeptFiles.keep_from(&of, 1, &mut ViewSource::new(Box::new(view))).await.unwrap();
        assert_eq!(std::fs::read(of.path()).unwrap(), content);
    }
}
