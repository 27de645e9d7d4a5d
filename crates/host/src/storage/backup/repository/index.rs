//! The list of a disk's chunks: a head, then for each chunk a byte that says whether it is zeros, and its sum; the whole
//! compressed.
//!
//! ```text
//! "HVNINDEX"  format u32  chunk size u32  disk size u64  count u64     little-endian
//! 0, 32 zeros (a chunk of zeros, which is not stored)   or   1, SHA-256
//! ```

use super::{CHUNK, ChunkId, chunks::LEVEL};

/// The chunks of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Index {
    /// Of the disk, in bytes.
    pub size: u64,
    /// In their order; nothing for one of zeros.
    pub chunks: Vec<Option<ChunkId>>,
}

const MAGIC: &[u8; 8] = b"HVNINDEX";
const FORMAT: u32 = 1;
const HEAD: usize = 32;
const ENTRY: usize = 33;

/// The length of the list for a disk of that size.
fn length(size: u64) -> u64 {
    HEAD as u64 + ENTRY as u64 * size.div_ceil(CHUNK)
}

impl Index {
    /// Whether it has as many chunks as a disk of that size.
    #[must_use]
    pub fn fits(&self, size: u64) -> bool {
        self.size == size && self.chunks.len() as u64 == size.div_ceil(CHUNK)
    }

    /// So many bytes are the most that it takes compressed.
    pub(super) fn most(size: u64) -> u64 {
        length(size) + length(size) / 128 + 1024
    }

    /// As it is stored.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut list = Vec::with_capacity(HEAD + ENTRY * self.chunks.len());
        list.extend_from_slice(MAGIC);
        list.extend_from_slice(&FORMAT.to_le_bytes());
        list.extend_from_slice(&(CHUNK as u32).to_le_bytes());
        list.extend_from_slice(&self.size.to_le_bytes());
        list.extend_from_slice(&(self.chunks.len() as u64).to_le_bytes());
        for chunk in &self.chunks {
            list.push(u8::from(chunk.is_some()));
            list.extend_from_slice(&chunk.unwrap_or_default());
        }
        zstd::bulk::compress(&list, LEVEL).expect("a buffer of the right size is given")
    }

    /// From what is stored, for a disk of that size.
    pub(super) fn decode(stored: &[u8], size: u64) -> Result<Self, String> {
        let longest = usize::try_from(length(size)).map_err(|_| "it is too long".to_owned())?;
        let list = zstd::bulk::decompress(stored, longest)
            .map_err(|error| format!("it cannot be decompressed: {error}"))?;
        let (head, entries) =
            list.split_at_checked(HEAD).ok_or_else(|| "it is too short".to_owned())?;
        let number = |at: usize, bytes: usize| {
            head[at..at + bytes].iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte))
        };
        if &head[..8] != MAGIC {
            return Err("it is something else".to_owned());
        }
        let format = number(8, 4);
        if format != u64::from(FORMAT) {
            return Err(format!("its format is {format}, which this version does not know"));
        }
        let (chunk, disk, count) = (number(12, 4), number(16, 8), number(24, 8));
        if (chunk, disk, count) != (CHUNK, size, size.div_ceil(CHUNK)) || list.len() != longest {
            return Err(format!(
                "it is the list of {count} chunks of {chunk} bytes of a disk of {disk} bytes, and not of one of {size} bytes"
            ));
        }
        let chunks = entries.chunks_exact(ENTRY).map(|entry| {
            let id = ChunkId::try_from(&entry[1..]).expect("an entry has 33 bytes");
            match entry[0] {
                0 => Ok(None),
                1 => Ok(Some(id)),
                flag => Err(format!("it has an entry of kind {flag}")),
            }
        });
        Ok(Self { size, chunks: chunks.collect::<Result<_, _>>()? })
    }
}
