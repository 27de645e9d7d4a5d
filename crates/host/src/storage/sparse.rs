//! What a guest sees of an encrypted disk that is nothing but LUKS, told apart from what it has never written.
//!
//! QEMU calls all of such a disk data: where nothing was written yet it reads as noise. The file beneath has holes there, since
//! neither discarding nor writing zeros ever makes one again. So what is a hole now was one at every moment before, also at that of
//! the view: it reads as zeros here, and neither a backup nor its target gets the noise.

use super::mirrored::pieces::{data_from, hole_from};
use crate::vm::views::{DiskView, Extent};
use async_trait::async_trait;
use haven_model::volume::LUKS_HEAD_BYTES;
use std::{fs::File, fs::OpenOptions, io, os::unix::fs::OpenOptionsExt, path::Path};

/// A view of a disk, with the file of this host that it lies in.
pub struct Sparse {
    view: Box<dyn DiskView>,
    file: File,
}

impl Sparse {
    /// Opens the file to look for its holes; nobody's locks mind that.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn new(view: Box<dyn DiskView>, file: &Path) -> io::Result<Self> {
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
        let file = OpenOptions::new().read(true).custom_flags(flags).open(file)?;
        Ok(Self { view, file })
    }
}

/// The same extents with what lies in holes of the file called zeros.
fn with_holes(file: &File, offset: u64, extents: Vec<Extent>) -> Vec<Extent> {
    let (mut told, mut at) = (Vec::new(), offset + LUKS_HEAD_BYTES);
    for extent in extents {
        let end = at + extent.length;
        while at < end {
            let data = data_from(file, at).unwrap_or(end).min(end);
            if data > at {
                told.push(Extent { length: data - at, zero: true, ..extent });
            }
            let hole = if data < end { hole_from(file, data).clamp(data + 1, end) } else { end };
            if hole > data {
                told.push(Extent { length: hole - data, ..extent });
            }
            at = hole;
        }
    }
    told
}

#[async_trait]
impl DiskView for Sparse {
    fn size(&self) -> u64 {
        self.view.size()
    }
    fn is_marked(&self) -> bool {
        self.view.is_marked()
    }
    async fn status(&mut self, offset: u64, length: u32) -> io::Result<Vec<Extent>> {
        let extents = self.view.status(offset, length).await?;
        let file = self.file.try_clone()?;
        let look = tokio::task::spawn_blocking(move || with_holes(&file, offset, extents));
        look.await.map_err(io::Error::other)
    }
    async fn read(&mut self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.view.read(offset, into).await
    }
    async fn release(&mut self, offset: u64, length: u32) -> io::Result<()> {
        self.view.release(offset, length).await
    }
}

#[cfg(test)]
mod tests {
    use super::{Extent, with_holes};
    use haven_model::volume::LUKS_HEAD_BYTES;
    use std::{fs::File, os::unix::fs::FileExt};

    #[test]
    fn what_was_never_written_reads_as_zeros() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.raw");
        let file = File::create_new(&path).unwrap();
        const MIB: u64 = 1 << 20;
        file.set_len(LUKS_HEAD_BYTES + 16 * MIB).unwrap();
        file.write_all_at(&[1; 4096], 0).unwrap();
        file.write_all_at(&vec![1; MIB as usize], LUKS_HEAD_BYTES + 4 * MIB).unwrap();
        let file = File::open(&path).unwrap();
        let all = |length, dirty| Extent { length, zero: false, dirty };
        let told = with_holes(&file, 0, vec![all(4 * MIB, false), all(12 * MIB, true)]);
        let is = |length, zero, dirty| Extent { length, zero, dirty };
        let parts = [is(4 * MIB, true, false), is(MIB, false, true), is(11 * MIB, true, true)];
        assert_eq!(told, parts);
        let told = with_holes(&file, 4 * MIB + 4096, vec![all(8192, true)]);
        assert_eq!(told, [is(8192, false, true)]);
        let sum: u64 =
            with_holes(&file, 3 * MIB, vec![all(13 * MIB, true)]).iter().map(|e| e.length).sum();
        assert_eq!(sum, 13 * MIB);
    }
}
