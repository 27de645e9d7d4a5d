//! A disk of a backup, read here and there.

use super::super::repository::{CHUNK, Index, Repository};
use crate::agent::storage::StorageFailure;
use bytes::Bytes;
use ext4_view::Ext4Read;
use haven_model::{Name, backup::Backup};
use std::{collections::VecDeque, error::Error};
use tokio::runtime::Handle;

/// So many chunks are kept.
const KEPT: usize = 8;

/// A disk, or a part of one. It is read on a thread that may wait.
pub(super) struct Disk {
    repository: Repository,
    index: Index,
    from: u64,
    length: u64,
    /// The last ones that were read, newest last.
    kept: VecDeque<(usize, Bytes)>,
    runtime: Handle,
}

impl Disk {
    /// Opens it.
    pub async fn open(
        repository: &Repository,
        backup: &Backup,
        disk: &Name,
    ) -> Result<Self, StorageFailure> {
        let index = repository.index(backup, disk).await?;
        Ok(Self {
            repository: repository.clone(),
            from: 0,
            length: index.size,
            index,
            kept: VecDeque::new(),
            runtime: Handle::current(),
        })
    }

    /// Only this part of it.
    pub fn within(mut self, from: u64, length: u64) -> Self {
        self.from += from;
        self.length = length.min(self.length.saturating_sub(from));
        self
    }

    /// Bytes.
    pub fn length(&self) -> u64 {
        self.length
    }

    fn chunk(&mut self, number: usize) -> Result<Option<Bytes>, StorageFailure> {
        let Some(Some(id)) = self.index.chunks.get(number) else { return Ok(None) };
        if let Some((_, kept)) = self.kept.iter().find(|(kept, _)| *kept == number) {
            return Ok(Some(kept.clone()));
        }
        let content = self.runtime.block_on(self.repository.get(id))?;
        if self.kept.len() == KEPT {
            self.kept.pop_front();
        }
        self.kept.push_back((number, content.clone()));
        Ok(Some(content))
    }

    /// Reads; what is beyond the end is an error.
    pub fn read_at(
        &mut self,
        at: u64,
        into: &mut [u8],
    ) -> Result<(), Box<dyn Error + Send + Sync>> {
        let end = at.checked_add(into.len() as u64).filter(|end| *end <= self.length);
        end.ok_or_else(|| format!("{} bytes at {at} are beyond its end", into.len()))?;
        let (mut at, mut into) = (self.from + at, into);
        while !into.is_empty() {
            let (number, within) = ((at / CHUNK) as usize, (at % CHUNK) as usize);
            let count = into.len().min(CHUNK as usize - within);
            let (part, rest) = into.split_at_mut(count);
            match self.chunk(number)? {
                None => part.fill(0),
                Some(content) => {
                    let found = content.get(within..within + count);
                    part.copy_from_slice(found.ok_or("a chunk is too short")?);
                }
            }
            at += count as u64;
            into = rest;
        }
        Ok(())
    }
}

impl Ext4Read for Disk {
    fn read(
        &mut self,
        start_byte: u64,
        dst: &mut [u8],
    ) -> Result<(), Box<dyn Error + Send + Sync + 'static>> {
        self.read_at(start_byte, dst)
    }
}
