//! What stands on a disk: its partitions, and what each of them holds.
//!
//! MBR with logical partitions, and GPT (UEFI 2.10, chapter 5), both in sectors of 512 bytes.

use super::disk::Disk;
use crate::{agent::storage::StorageFailure, storage::says};

const SECTOR: u64 = 512;
/// What is read.
pub(super) const EXT: &str = "an ext file system";
/// So many partitions are looked at.
const MOST: u32 = 128;

/// A part of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Part {
    /// Its number; nothing where the disk has no partitions.
    pub number: Option<u32>,
    pub from: u64,
    pub length: u64,
    /// In words.
    pub holds: &'static str,
}

fn unread(error: Box<dyn std::error::Error + Send + Sync>) -> StorageFailure {
    says(format!("the disk cannot be read in the backup ({error})"))
}

fn u32_at(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + 4].iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u32_at(bytes, at + 4) << 32 | u32_at(bytes, at)
}

/// What a part holds, by its first bytes.
fn holds(disk: &mut Disk, from: u64, length: u64) -> Result<&'static str, StorageFailure> {
    let mut head = vec![0; 70_000.min(length) as usize];
    disk.read_at(from, &mut head).map_err(unread)?;
    let is = |at: usize, what: &[u8]| head.get(at..at + what.len()) == Some(what);
    Ok(match () {
        () if is(1080, &[0x53, 0xef]) => EXT,
        () if is(0, b"XFSB") => "XFS",
        () if is(0x10040, b"_BHRfS_M") => "btrfs",
        () if is(3, b"NTFS    ") => "NTFS",
        () if is(0, b"LUKS\xba\xbe") => "an encrypted disk (LUKS)",
        () if is(536, b"LVM2 001") => "LVM",
        () if is(54, b"FAT") || is(82, b"FAT32") => "FAT",
        () if is(4086, b"SWAPSPACE2") => "swap",
        () if head.iter().all(|byte| *byte == 0) => "nothing that is known",
        () => "something unknown",
    })
}

/// All parts of a disk; the disk itself where it has no partitions.
pub(super) fn parts(disk: &mut Disk) -> Result<Vec<Part>, StorageFailure> {
    let length = disk.length();
    let whole = |disk: &mut Disk| {
        let holds = holds(disk, 0, length)?;
        Ok(vec![Part { number: None, from: 0, length, holds }])
    };
    if length < 2 * SECTOR {
        return Ok(Vec::new());
    }
    let mut sector = vec![0; SECTOR as usize];
    disk.read_at(0, &mut sector).map_err(unread)?;
    let own = holds(disk, 0, length)?;
    // The first sector of a FAT or NTFS ends as that of a disk with partitions.
    if sector[510..] != [0x55, 0xaa] || ["FAT", "NTFS", EXT].contains(&own) {
        return whole(disk);
    }
    let found = match sector[450] {
        0xee => gpt(disk)?,
        _ => mbr(disk, &sector)?,
    };
    let mut parts = Vec::new();
    for (number, from, size) in found {
        // One that reaches beyond the end is cut.
        let size = size.min(length.saturating_sub(from));
        if size > 0 {
            let holds = holds(disk, from, size)?;
            parts.push(Part { number: Some(number), from, length: size, holds });
        }
    }
    if parts.is_empty() { whole(disk) } else { Ok(parts) }
}

/// Number, beginning and length of each.
type Found = Vec<(u32, u64, u64)>;

fn mbr(disk: &mut Disk, sector: &[u8]) -> Result<Found, StorageFailure> {
    let entry = |sector: &[u8], i: usize| {
        let of = &sector[446 + 16 * i..462 + 16 * i];
        (of[4], u32_at(of, 8) * SECTOR, u32_at(of, 12) * SECTOR)
    };
    let (mut found, mut extended) = (Found::new(), None);
    for i in 0..4 {
        let (kind, from, size) = entry(sector, i);
        match kind {
            0 => {}
            5 | 0xf | 0x85 => extended = Some(from),
            _ => found.push((i as u32 + 1, from, size)),
        }
    }
    // Each logical one has a sector of its own, which leads to the next.
    let Some(base) = extended else { return Ok(found) };
    let (mut at, mut number) = (base, 5);
    while number < MOST && at.saturating_add(SECTOR) <= disk.length() {
        let mut sector = vec![0; SECTOR as usize];
        disk.read_at(at, &mut sector).map_err(unread)?;
        if sector[510..] != [0x55, 0xaa] {
            break;
        }
        let (kind, from, size) = entry(&sector, 0);
        if kind != 0 {
            found.push((number, at.saturating_add(from), size));
        }
        number += 1;
        match entry(&sector, 1) {
            (0, ..) | (_, 0, _) => break,
            (_, next, _) => at = base.saturating_add(next),
        }
    }
    Ok(found)
}

fn gpt(disk: &mut Disk) -> Result<Found, StorageFailure> {
    let mut head = vec![0; SECTOR as usize];
    disk.read_at(SECTOR, &mut head).map_err(unread)?;
    if !head.starts_with(b"EFI PART") {
        return Err(says("the table of partitions of the disk is damaged in the backup"));
    }
    let (at, count, size) = (u64_at(&head, 72), u32_at(&head, 80), u32_at(&head, 84));
    if !(128..=4096).contains(&size) {
        return Err(says("the table of partitions of the disk is damaged in the backup"));
    }
    let mut found = Found::new();
    for i in 0..count.min(u64::from(MOST)) {
        let mut entry = vec![0; size as usize];
        let from = at.saturating_mul(SECTOR).saturating_add(i * size);
        disk.read_at(from, &mut entry).map_err(unread)?;
        if entry[..16].iter().all(|byte| *byte == 0) {
            continue;
        }
        let (first, last) = (u64_at(&entry, 32), u64_at(&entry, 40));
        let sectors = last.saturating_sub(first).saturating_add(1);
        found.push((i as u32 + 1, first.saturating_mul(SECTOR), sectors.saturating_mul(SECTOR)));
    }
    Ok(found)
}
