//! Schedules of faults that are made from numbers, against mirrored disks: a real lab whose guests are one boot sector
//! (`guests/scribe`), so that they are up at once and cost no time.
//!
//! ```text
//! cargo test -p haven --test schedules                 the first few
//! cargo test -p haven --test schedules -- 100 300      300 from number 100 on
//! ```
//!
//! After each schedule all that broke is mended. Then all replicas must count again and each guest write on; each is started
//! anew and must find all that it was told to be written; and a comparison must find all replicas the same.
//! At the end a host stays away for so long that what it had is made anew elsewhere.

mod played;
mod rebuilt;

use anyhow::{Context, Result, ensure};
use haven_lab::{
    drive::Driver,
    schedule::Schedule,
    scribes::{Consoles, Judge},
};
use haven_model::{AdmissionPolicy, ProofKind};
use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// VMs, with the number of their replicas. The one that may be kept runs on where it is cut off, until its disks are shut to it.
const VMS: [(&str, u32); 3] = [("two", 2), (KEPT, 2), ("three", 3)];
const KEPT: &str = "kept";
/// The file system of a host's pool has so much room, in MiB.
const ROOM: u32 = 192;
/// As many as the whole of the tests has time for.
const FEW: u64 = 4;

/// The lab, and what its guests say.
pub struct Lab {
    driver: Driver,
    judge: Arc<Mutex<Judge>>,
    /// How often a disk was to be larger, and somebody took that.
    pub grown: AtomicU64,
}

impl std::ops::Deref for Lab {
    type Target = Driver;
    fn deref(&self) -> &Driver {
        &self.driver
    }
}

impl Lab {
    fn new(dir: PathBuf) -> Result<Self> {
        let driver = Driver::new(env!("CARGO_BIN_EXE_haven").into(), dir, 3)?;
        Ok(Self { driver, judge: Arc::default(), grown: AtomicU64::default() })
    }

    /// What the guests have said up to now.
    pub fn judge(&self) -> MutexGuard<'_, Judge> {
        self.judge.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The names of the VMs.
    pub fn vms() -> Vec<String> {
        VMS.iter().map(|(vm, _)| (*vm).to_owned()).collect()
    }

    /// A host's disk, as this machine sees it.
    pub fn disk(&self, host: &str) -> PathBuf {
        self.dir.join(format!("hosts/{host}/disk"))
    }

    /// Hosts with a small disk each, a cluster of them, and its guests.
    fn up(&self) -> Result<()> {
        self.down()?;
        for host in &self.hosts {
            let disk = self.disk(host);
            std::fs::create_dir_all(&disk)?;
            let size = format!("size={ROOM}M");
            run(Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(&disk))?;
        }
        self.haven(&["lab", "up", "--no-power-control"])?;
        // Else a host that is paused for longer is reset; a case of the other lab shows that.
        self.haven(&["lab", "watchdog", "off"])?;
        self.change_cluster(|spec| {
            spec.admission = AdmissionPolicy::Warn;
            spec.fencing =
                vec![ProofKind::PoweredOff, ProofKind::LeaseExpired, ProofKind::StorageFenced];
        })?;
        let image = self.dir.join("scribe.img");
        let build = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../guests/scribe/build.sh");
        run(Command::new(build).arg(&image))?;
        self.haven(&["image", "import", "scribe", &image.display().to_string()])?;
        let pool = |replicas: u32| {
            format!(
                "---\nkind: Pool\nname: pool-{replicas}\ndriver: mirrored\npath: /srv/disk/pool-{replicas}\nreplicas: {replicas}\n"
            )
        };
        let vm = |(vm, replicas): &(&str, u32)| {
            let isolation = if *vm == KEPT { "isolation: keep\n" } else { "" };
            format!(
                "---\nkind: VM\nname: {vm}\nmemory: 32MiB\n{isolation}disks:\n- name: root\n  size: 8MiB\n  pool: pool-{replicas}\n  image: scribe\n"
            )
        };
        let all = [2, 3].map(pool).concat() + &VMS.iter().map(vm).collect::<String>();
        self.apply(&all, &["--wait", "--timeout", "120"])
    }

    fn down(&self) -> Result<()> {
        for host in &self.hosts {
            let disk = self.disk(host);
            if Command::new("mountpoint").arg("-q").arg(&disk).status()?.success() {
                run(Command::new("umount").arg(&disk))?;
            }
        }
        self.haven(&["lab", "down"]).map(drop)
    }

    /// Listens to all consoles until the process ends.
    fn listen(&self) {
        let mut consoles = Consoles::new(self.dir.clone(), self.hosts.clone());
        let judge = Arc::clone(&self.judge);
        std::thread::spawn(move || {
            loop {
                consoles.read(&mut judge.lock().unwrap_or_else(PoisonError::into_inner));
                std::thread::sleep(Duration::from_millis(10));
            }
        });
    }
}

fn run(command: &mut Command) -> Result<()> {
    let output = command.output().with_context(|| format!("{command:?}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?}: {said}");
    Ok(())
}

fn main() -> Result<()> {
    let numbers: Vec<u64> = std::env::args().skip(1).filter_map(|arg| arg.parse().ok()).collect();
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: needs root, to make network namespaces");
        return Ok(());
    }
    let first = numbers.first().copied().unwrap_or(0);
    let count = numbers.get(1).copied().unwrap_or(if numbers.is_empty() { FEW } else { 1 });
    let dir = std::env::var("HAVEN_LAB_DIR").unwrap_or_else(|_| "/tmp/haven-test-lab".into());
    let lab = Lab::new(PathBuf::from(dir))?;
    let begin = Instant::now();
    println!("running 1 test");
    let result = schedules(&lab, first, count);
    if result.is_err() {
        println!("{}", lab.report());
    }
    if std::env::var_os("HAVEN_LAB_KEEP").is_none() {
        lab.down()?;
    }
    let name = "whatever_breaks_no_record_that_was_told_is_lost";
    let took = begin.elapsed().as_secs_f64();
    match &result {
        Ok(()) => println!("test {name} ... ok ({took:.1} s)"),
        Err(why) => println!("test {name} ... FAILED ({took:.1} s): {why:#}"),
    }
    let failed = i32::from(result.is_err());
    println!("test result: {} passed; {failed} failed", 1 - failed);
    std::process::exit(failed);
}

fn schedules(lab: &Lab, first: u64, count: u64) -> Result<()> {
    lab.up()?;
    lab.listen();
    played::settled(lab)?;
    let begin = Instant::now();
    for seed in first..first.saturating_add(count) {
        let schedule = Schedule::of(seed, &lab.hosts, &Lab::vms());
        println!("  {schedule}");
        let begin = Instant::now();
        played::play(lab, &schedule).with_context(|| format!("schedule {seed}"))?;
        println!("    {:.1} s", begin.elapsed().as_secs_f64());
    }
    played::damaged(lab, "three")?;
    rebuilt::elsewhere(lab)?;
    let scribes = Lab::vms().into_iter().map(|vm| lab.judge().of(&vm));
    let (wrote, boots) =
        scribes.fold((0, 0), |(wrote, boots), one| (wrote + one.wrote, boots + one.boots));
    println!(
        "  {count} schedules, {boots} boots that found all of {wrote} records, {} times a disk grew, {:.1} s each",
        lab.grown.load(Ordering::Relaxed),
        begin.elapsed().as_secs_f64() / f64::from(u32::try_from(count.max(1))?)
    );
    Ok(())
}
