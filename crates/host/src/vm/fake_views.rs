//! Views of disks of guests that run nowhere: each disk holds what the test wrote.

use super::{
    driver::VmError,
    fake::FakeVmDriver,
    views::{DiskView, Extent, View, ViewAsked, Views},
};
use async_trait::async_trait;
use std::{
    collections::BTreeMap,
    io,
    sync::{Mutex, PoisonError},
};

/// What the disks of VMs hold, and which marks they have.
#[derive(Default)]
pub struct FakeDisks {
    now: Mutex<BTreeMap<String, Held>>,
}

#[derive(Default)]
struct Held {
    disks: Vec<(String, Vec<u8>)>,
    marks: Vec<String>,
    open: bool,
}

impl FakeDisks {
    /// Gives a VM disks with this content.
    pub fn put(&self, vm: &str, disks: Vec<(String, Vec<u8>)>) {
        let mut now = self.now.lock().unwrap_or_else(PoisonError::into_inner);
        now.entry(vm.to_owned()).or_default().disks = disks;
    }

    /// Whether a view of them is open.
    #[must_use]
    pub fn is_open(&self, vm: &str) -> bool {
        let now = self.now.lock().unwrap_or_else(PoisonError::into_inner);
        now.get(vm).is_some_and(|held| held.open)
    }
}

/// A disk as it was.
struct Copy {
    content: Vec<u8>,
}

#[async_trait]
impl DiskView for Copy {
    fn size(&self) -> u64 {
        self.content.len() as u64
    }
    fn is_marked(&self) -> bool {
        false
    }
    async fn status(&mut self, _: u64, length: u32) -> io::Result<Vec<Extent>> {
        Ok(vec![Extent { length: u64::from(length), zero: false, dirty: true }])
    }
    async fn read(&mut self, offset: u64, into: &mut [u8]) -> io::Result<()> {
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
        let mut now = self.world.disks.now.lock().unwrap_or_else(PoisonError::into_inner);
        let held = now.entry(vm.to_owned()).or_default();
        held.marks.push(asked.mark.clone());
        held.open = true;
        let disk = |(name, content): &(String, Vec<u8>)| -> (String, Box<dyn DiskView>) {
            (name.clone(), Box::new(Copy { content: content.clone() }))
        };
        Ok(View { frozen: false, disks: held.disks.iter().map(disk).collect() })
    }

    async fn close_view(&self, vm: &str) -> Result<(), VmError> {
        let mut now = self.world.disks.now.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(held) = now.get_mut(vm) {
            held.open = false;
        }
        Ok(())
    }
}
