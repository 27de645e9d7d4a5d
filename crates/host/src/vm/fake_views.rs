//! Views of disks of guests that run nowhere: each disk holds what the test wrote.

use super::{
    driver::VmError,
    fake::FakeVmDriver,
    snapshots::Snapshots,
    views::{DiskView, Extent, View, ViewAsked, Views},
};
use async_trait::async_trait;
use std::{
    collections::BTreeMap,
    io,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

/// What one bit of a mark stands for, bytes.
const GRANULARITY: usize = 65_536;

type Disks = Vec<(String, Vec<u8>)>;

/// What the disks of VMs hold, and held when marks were set.
#[derive(Default)]
pub struct FakeDisks {
    now: Mutex<BTreeMap<String, Held>>,
    /// Nothing that is read comes.
    pub hangs: Arc<AtomicBool>,
}

#[derive(Default)]
struct Held {
    disks: Disks,
    marks: BTreeMap<(String, String), Disks>,
    open: bool,
    opened: u32,
}

impl FakeDisks {
    fn of<T>(&self, vm: &str, change: impl FnOnce(&mut Held) -> T) -> T {
        let mut now = self.now.lock().unwrap_or_else(PoisonError::into_inner);
        change(now.entry(vm.to_owned()).or_default())
    }

    /// Gives a VM disks with this content.
    pub fn put(&self, vm: &str, disks: Disks) {
        self.of(vm, |held| held.disks = disks);
    }

    /// What the disks of a VM hold.
    #[must_use]
    pub fn content(&self, vm: &str) -> Vec<(String, Vec<u8>)> {
        self.of(vm, |held| held.disks.clone())
    }

    /// Its process is another one, which knows of no marks.
    pub fn forget(&self, vm: &str) {
        self.of(vm, |held| held.marks.clear());
    }

    /// Whether a view of them is open.
    #[must_use]
    pub fn is_open(&self, vm: &str) -> bool {
        self.of(vm, |held| held.open)
    }

    /// How often one was opened.
    #[must_use]
    pub fn opened(&self, vm: &str) -> u32 {
        self.of(vm, |held| held.opened)
    }
}

/// A disk as it was, and as it was at a mark before.
struct Copy {
    hangs: Arc<AtomicBool>,
    content: Vec<u8>,
    before: Option<Vec<u8>>,
}

impl Copy {
    fn has_changed(&self, range: std::ops::Range<usize>) -> bool {
        let before = self.before.as_ref();
        before.is_none_or(|before| before.get(range.clone()) != self.content.get(range))
    }
}

#[async_trait]
impl DiskView for Copy {
    fn size(&self) -> u64 {
        self.content.len() as u64
    }
    fn is_marked(&self) -> bool {
        self.before.is_some()
    }
    async fn status(&mut self, offset: u64, length: u32) -> io::Result<Vec<Extent>> {
        let (from, to) = (offset as usize, offset as usize + length as usize);
        let pieces = (from..to).step_by(GRANULARITY).map(|at| {
            let end = to.min(at + GRANULARITY);
            let zero = self.content[at..end].iter().all(|byte| *byte == 0);
            Extent { length: (end - at) as u64, zero, dirty: self.has_changed(at..end) }
        });
        Ok(pieces.collect())
    }
    async fn read(&mut self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        if self.hangs.load(Ordering::Acquire) {
            std::future::pending::<()>().await;
        }
        let from = usize::try_from(offset).map_err(io::Error::other)?;
        let held = self.content.get(from..from + into.len());
        into.copy_from_slice(held.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
    async fn release(&mut self, _: u64, _: u32) -> io::Result<()> {
        Ok(())
    }
}

#[async_trait]
impl Views for FakeVmDriver {
    async fn open_view(&self, vm: &str, asked: &ViewAsked) -> Result<View, VmError> {
        let hangs = &self.world.disks.hangs;
        let mirrored = self.world.mirrors.seen_by(&self.host, vm);
        if let Some(keep) = &asked.keep {
            self.take_snapshot(vm, &keep.disks, &keep.snapshot).await?;
        }
        let frozen = self.world.kept.frozen();
        let disks = self.world.disks.of(vm, |held| {
            let marks = asked.marks.as_ref();
            let since = marks.and_then(|of| Some((of.owner.clone(), of.since.clone()?)));
            let before = since.and_then(|since| held.marks.get(&since).cloned());
            if let Some(of) = marks {
                held.marks.insert((of.owner.clone(), of.mark.clone()), held.disks.clone());
            }
            held.open = true;
            held.opened += 1;
            let disk = |(name, content): &(String, Vec<u8>)| -> (String, Box<dyn DiskView>) {
                let before = before.iter().flatten().find(|(of, _)| of == name);
                let before = before.map(|(_, content)| content.clone());
                let hangs = Arc::clone(hangs);
                (name.clone(), Box::new(Copy { hangs, content: content.clone(), before }))
            };
            let wanted = |(name, _): &&(String, Vec<u8>)| {
                asked.disks.is_empty() || asked.disks.contains(name)
            };
            held.disks.iter().chain(&mirrored).filter(wanted).map(disk).collect()
        });
        Ok(View { frozen, disks })
    }

    async fn close_view(&self, vm: &str) -> Result<(), VmError> {
        self.world.disks.of(vm, |held| held.open = false);
        Ok(())
    }
}
