//! How long a disk of a 10 GiB image takes to be made, and one of a disk that a VM has, by the kind of pool and of file system.
//! `cargo test -p haven-host --test clone_time -- [RUNS]`
//!
//! The image is 10 GiB, of which 2 GiB are written, as of a usual system; `qcow2`. What makes a disk the first time on a host or in a
//! pool (the master) is told apart. An XFS on a loop device stands for file systems that share blocks.

use async_trait::async_trait;
use haven_host::{
    agent::storage::{CopyFrom, SnapshotStep, Storage, StorageFailure, VolumeName, VolumeWanted},
    storage::{
        backup::target::Targets,
        files::{Fetch, FileStorage},
        images::ImageStore,
        pool,
    },
};
use haven_model::{Bytes, PoolDriverKind, PoolSpec, image::ImageFile};
use std::{
    fs::File,
    io::{BufWriter, Write},
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

const SIZE: u64 = 10 << 30;
const WRITTEN: u64 = 2 << 30;

struct Nobody;

#[async_trait]
impl Fetch for Nobody {
    async fn fetch(&self, _: &ImageFile, _: &ImageStore) -> Result<(), StorageFailure> {
        Err(StorageFailure { what: "no other host has it".into() })
    }
}

fn run(program: &str, args: &[&str]) -> bool {
    Command::new(program).args(args).output().is_ok_and(|output| output.status.success())
}

/// An image that cannot be compressed, spread over all of its size.
fn image(base: &Path) -> PathBuf {
    let (raw, image) = (base.join("image.raw"), base.join("image.qcow2"));
    let file = File::create(&raw).expect("the directory can be written");
    file.set_len(SIZE).expect("the file system takes large files");
    let mut to = BufWriter::with_capacity(1 << 20, file);
    let mut word = 0x9e37_79b9_7f4a_7c15_u64;
    let mut block = vec![0; 1 << 20];
    for _ in 0..WRITTEN >> 20 {
        for at in block.chunks_exact_mut(8) {
            word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            at.copy_from_slice(&word.to_le_bytes());
        }
        to.write_all(&block).expect("there is room");
        std::io::Seek::seek_relative(&mut to, 4 << 20).expect("a file seeks");
    }
    to.flush().expect("there is room");
    drop(to);
    let (from, to) = (raw.to_str().expect("UTF-8"), image.to_str().expect("UTF-8"));
    assert!(run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", from, to]), "qemu-img failed");
    std::fs::remove_file(raw).expect("it is there");
    image
}

fn told(what: &str, times: &mut [Duration], wanted: &str) {
    times.sort();
    let ms = |time: Duration| format!("{:.0} ms", time.as_secs_f64() * 1000.0);
    println!(
        "{what:<74} {:>9} {:>9} {:>9} {:>3}  {wanted}",
        ms(times[times.len() / 2]),
        ms(times[0]),
        ms(times[times.len() - 1]),
        times.len()
    );
}

struct Bench {
    storage: FileStorage,
    image: ImageFile,
    runs: usize,
}

impl Bench {
    fn wanted(&self, vm: &str) -> VolumeWanted {
        VolumeWanted {
            name: VolumeName::parse(&format!("{vm}.root.u-{vm}")).expect("it is a name"),
            size_bytes: SIZE,
            image: None,
            backup: None,
            copy: None,
            progress: Default::default(),
            owner_uid: nix::unistd::geteuid().as_raw(),
        }
    }

    async fn made(&self, pool: &PoolSpec, wanted: &VolumeWanted) -> Duration {
        let begin = Instant::now();
        self.storage.volume(pool, wanted).await.unwrap_or_else(|failure| panic!("{failure}"));
        begin.elapsed()
    }

    /// Disks of the image, the first apart; then disks of one of those.
    async fn pool(&self, at: &Path, driver: PoolDriverKind, on: &str, wanted: &str) {
        let path = at.join(format!("{driver:?}"));
        std::fs::create_dir_all(&path).expect("the directory can be written");
        let pool = PoolSpec::new(driver, path.to_str().expect("UTF-8"));
        if driver == PoolDriverKind::Shared {
            pool::create_shared(&pool).unwrap_or_else(|failure| panic!("{failure}"));
        }
        let of_image = |vm: &str| VolumeWanted {
            image: Some((self.image.clone(), "qcow2".into())),
            ..self.wanted(vm)
        };
        let kind = format!("{driver:?} pool on {on}").to_lowercase();
        let first = self.made(&pool, &of_image("first")).await;
        told(&format!("{kind}: the first disk of an image"), &mut [first], "");
        let mut times = Vec::new();
        for run in 0..self.runs {
            let disk = of_image(&format!("vm-{run}"));
            times.push(self.made(&pool, &disk).await);
            self.storage.delete_volume(&pool, &disk.name).await.expect("it is there");
        }
        told(&format!("{kind}: each further one"), &mut times, wanted);
        if driver == PoolDriverKind::Mirrored {
            return;
        }
        let (source, tag) = (self.wanted("first").name, "haven-bench");
        let taken = self.storage.snapshot(&pool, &source, SnapshotStep::Take, tag).await;
        taken.unwrap_or_else(|failure| panic!("{failure}"));
        let mut times = Vec::new();
        for run in 0..self.runs {
            let copy = Some(CopyFrom { name: source.clone(), tag: tag.into() });
            let disk = VolumeWanted { copy, ..self.wanted(&format!("copy-{run}")) };
            times.push(self.made(&pool, &disk).await);
            self.storage.delete_volume(&pool, &disk.name).await.expect("it is there");
        }
        told(&format!("{kind}: a clone of a VM's disk, from its snapshot"), &mut times, wanted);
    }
}

/// An XFS on a loop device beside the rest, as long as this stands.
struct Xfs(PathBuf);

impl Xfs {
    fn new(base: &Path) -> Option<Self> {
        let (disk, at) = (base.join("xfs.img"), base.join("xfs"));
        std::fs::create_dir(&at).ok()?;
        File::create(&disk).ok()?.set_len(24 << 30).ok()?;
        let (disk, text) = (disk.to_str()?, at.to_str()?);
        let made = run("mkfs.xfs", &["-q", disk]) && run("mount", &["-o", "loop", disk, text]);
        made.then_some(Self(at))
    }
}

impl Drop for Xfs {
    fn drop(&mut self) {
        run("umount", &[self.0.to_str().unwrap_or_default()]);
    }
}

#[tokio::main]
async fn main() {
    let runs = std::env::args().filter_map(|arg| arg.parse().ok()).next().unwrap_or(10);
    if !run("qemu-img", &["--version"]) {
        return println!("skipped: needs qemu-img");
    }
    let base = tempfile::tempdir().expect("there is a directory for it");
    let images = ImageStore::new(base.path().join("images"));
    let file = tokio::fs::File::open(image(base.path())).await.expect("it was just made");
    let imported = images.import(file, None).await.unwrap_or_else(|failure| panic!("{failure}"));
    let image = ImageFile { sha256: imported.sha256, size: Bytes(imported.size) };
    let run_dir = base.path().join("vms");
    let storage = FileStorage::new(images, run_dir, Arc::new(Nobody), Targets::none());
    let bench = Bench { storage, image, runs };
    println!("{:<74} {:>9} {:>9} {:>9} runs", "what", "median", "min", "max");
    for driver in [PoolDriverKind::Local, PoolDriverKind::Shared] {
        bench.pool(base.path(), driver, "this file system", "wanted: 300 ms").await;
    }
    bench
        .pool(base.path(), PoolDriverKind::Mirrored, "this file system", "no figure: copied")
        .await;
    let Some(xfs) = Xfs::new(base.path()) else {
        return println!("skipped: needs root, mkfs.xfs and loop devices");
    };
    for driver in [PoolDriverKind::Local, PoolDriverKind::Shared, PoolDriverKind::Mirrored] {
        bench.pool(&xfs.0, driver, "XFS", "wanted: 100 ms").await;
    }
}
