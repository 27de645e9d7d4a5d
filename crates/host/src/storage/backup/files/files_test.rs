//! Files out of disks that hold real file systems.

use super::{
    super::repository::{CHUNK, Index, Place, Repository},
    At, list, read, systems,
};
use haven_model::{
    Bytes, Name,
    backup::{Backup, BackupDisk, Moment},
};
use std::{path::Path, process::Command, time::Duration};
use tokio::io::AsyncReadExt;

const MIB: usize = 1 << 20;

fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

/// An ext4 of 16 MiB with a few files; nothing where it cannot be made.
fn ext4(directory: &Path) -> Option<Vec<u8>> {
    let (tree, image) = (directory.join("tree"), directory.join("ext4"));
    std::fs::create_dir_all(tree.join("etc/deep")).unwrap();
    std::fs::write(tree.join("etc/hosts"), "127.0.0.1 localhost\n").unwrap();
    std::fs::write(tree.join("etc/deep/large"), vec![7; 6 * MIB]).unwrap();
    std::os::unix::fs::symlink("hosts", tree.join("etc/link")).unwrap();
    std::fs::write(&image, vec![0; 16 * MIB]).unwrap();
    let made =
        Command::new("/usr/sbin/mkfs.ext4").args(["-q", "-d"]).arg(&tree).arg(&image).status();
    match made {
        Ok(status) if status.success() => Some(std::fs::read(&image).unwrap()),
        _ => {
            println!("skipped: needs mkfs.ext4, from the package e2fsprogs");
            None
        }
    }
}

/// A disk with this as its second of two partitions, and in the table of the old kind as its first logical one, too.
fn mbr(system: &[u8]) -> Vec<u8> {
    let mut disk = vec![0; 4 * MIB];
    let mut entry = |sector: usize, i: usize, kind: u8, from: u32, count: u32| {
        let at = sector * 512 + 446 + 16 * i;
        disk[at + 4] = kind;
        disk[at + 8..at + 12].copy_from_slice(&from.to_le_bytes());
        disk[at + 12..at + 16].copy_from_slice(&count.to_le_bytes());
        disk[sector * 512 + 510..sector * 512 + 512].copy_from_slice(&[0x55, 0xaa]);
    };
    let sectors = (system.len() / 512) as u32;
    entry(0, 0, 0x82, 2048, 100);
    entry(0, 1, 0x83, 8192, sectors);
    entry(0, 2, 5, 4096, 4096);
    entry(4096, 0, 0x83, 4096, sectors);
    disk.extend_from_slice(system);
    disk
}

fn gpt(system: &[u8]) -> Vec<u8> {
    let mut disk = vec![0; 4 * MIB];
    disk[450] = 0xee;
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    disk[512..520].copy_from_slice(b"EFI PART");
    disk[584..592].copy_from_slice(&2_u64.to_le_bytes());
    disk[592..596].copy_from_slice(&128_u32.to_le_bytes());
    disk[596..600].copy_from_slice(&128_u32.to_le_bytes());
    let mut entry = |i: usize, from: u64, to: u64| {
        let at = 1024 + 128 * i;
        disk[at] = 1;
        disk[at + 32..at + 40].copy_from_slice(&from.to_le_bytes());
        disk[at + 40..at + 48].copy_from_slice(&to.to_le_bytes());
    };
    entry(0, 8192, 8191 + (system.len() / 512) as u64);
    entry(13, 2048, 2147);
    disk[2048 * 512..2048 * 512 + 4].copy_from_slice(b"XFSB");
    disk.extend_from_slice(system);
    disk
}

/// A backup of these disks.
async fn kept(place: &Path, disks: &[(&str, &[u8])]) -> (Repository, Backup) {
    let repository = Repository::open(&Place::Directory(place.to_owned())).unwrap();
    repository.create(1).await.unwrap();
    let (mut of, mut indexes) = (Vec::new(), Vec::new());
    for (disk, content) in disks {
        let mut index = Index { size: content.len() as u64, chunks: Vec::new() };
        for chunk in content.chunks(CHUNK as usize) {
            index.chunks.push(repository.put(chunk.to_vec().into()).await.unwrap().0);
        }
        let (read, stored, used) = (Bytes(0), Bytes(0), Bytes(0));
        let size = Bytes(content.len() as u64);
        of.push(BackupDisk { name: name(disk), size, index: String::new(), used, read, stored });
        indexes.push((name(disk), index));
    }
    let mut backup = Backup {
        id: "b1".into(),
        vm: name("db"),
        vm_uid: "u1".into(),
        at_ms: 1,
        ended_ms: 2,
        by: "test".into(),
        moment: Moment::Running,
        mark: String::new(),
        object: serde_json::Value::Null,
        disks: of,
    };
    repository.finish(&mut backup, &indexes, None, Duration::ZERO).await.unwrap();
    (repository, backup)
}

#[test]
fn a_place_is_a_disk_a_partition_and_a_path() {
    let at = At::parse("root:1:/etc").unwrap();
    assert_eq!((at.disk.as_str(), at.partition, at.path.as_str()), ("root", Some(1), "/etc"));
    let at = At::parse("data:/a:/b").unwrap();
    assert_eq!((at.disk.as_str(), at.partition, at.path.as_str()), ("data", None, "/a:/b"));
    for wrong in ["", "/etc", "root", "root:etc", "root:x:/etc", "ROOT:/etc", "root:1:2:/"] {
        let said = At::parse(wrong).unwrap_err().to_string();
        assert!(said.contains("write DISK:/PATH"), "{wrong}: {said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn files_are_found_on_disks_with_and_without_partitions() {
    let directory = tempfile::tempdir().unwrap();
    let Some(system) = ext4(directory.path()) else { return };
    let (old, new) = (mbr(&system), gpt(&system));
    let disks = [("bare", &system[..]), ("old", &old[..]), ("new", &new[..]), ("none", &[0; MIB])];
    let place = directory.path().join("place");
    std::fs::create_dir(&place).unwrap();
    let (repository, backup) = kept(&place, &disks).await;
    let found = systems(&repository, &backup).await.unwrap();
    let said: Vec<String> = found.iter().map(|one| format!("{} {}", one.at, one.holds)).collect();
    let ext = "an ext file system";
    assert_eq!(
        said,
        [
            format!("bare:/ {ext}"),
            "old:1:/ nothing that is known".into(),
            format!("old:2:/ {ext}"),
            format!("old:5:/ {ext}"),
            format!("new:1:/ {ext}"),
            "new:14:/ XFS".into(),
            "none:/ nothing that is known".into(),
        ]
    );
    for at in ["bare:/etc", "old:2:/etc", "old:5:/etc", "new:/etc"] {
        let files = list(&repository, &backup, At::parse(at).unwrap()).await.unwrap();
        let said: Vec<String> =
            files.iter().map(|f| format!("{} {} {}", f.kind, f.name, f.size.0)).collect();
        assert_eq!(said[1..], ["file hosts 20", "link link 5"], "{at}");
        assert_eq!(files[2].leads_to.as_deref(), Some("hosts"));
        let path = format!("{at}/deep/large");
        let (length, mut file) =
            read(&repository, &backup, At::parse(&path).unwrap()).await.unwrap();
        let mut content = Vec::new();
        file.read_to_end(&mut content).await.unwrap();
        assert!(length == 6 * MIB as u64 && content == vec![7; 6 * MIB], "{at}");
    }
    let (_, mut file) =
        read(&repository, &backup, At::parse("bare:/etc/link").unwrap()).await.unwrap();
    let mut content = String::new();
    file.read_to_string(&mut content).await.unwrap();
    assert_eq!(content, "127.0.0.1 localhost\n");
    let refused = [
        ("bare:/etc", "/etc cannot be read in the backup (path is a directory)"),
        ("bare:/nothing", "/nothing cannot be read in the backup"),
        ("old:/etc/hosts", "has several partitions with files"),
        ("old:9:/x", "has no such partition"),
        ("new:14:/x", "stands on XFS, of which Haven reads no single files"),
        ("none:/x", "stands on nothing that is known"),
        ("other:/x", "has no disk `other`"),
    ];
    for (at, why) in refused {
        let said = read(&repository, &backup, At::parse(at).unwrap()).await.err().unwrap();
        assert!(said.to_string().contains(why), "{at}: {said}");
    }
}

/// What a guest left on its disk may be anything.
#[tokio::test(flavor = "multi_thread")]
async fn whatever_stands_on_a_disk_is_told_or_refused() {
    let directory = tempfile::tempdir().unwrap();
    let Some(system) = ext4(directory.path()) else { return };
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    for round in 0..20 {
        let mut disk = if round % 2 == 0 { mbr(&system) } else { gpt(&system) };
        for _ in 0..200 {
            let at = match random() % 3 {
                0 => random() % 4096,
                1 => (4 * MIB) as u64 + random() % 200_000,
                _ => random() % disk.len() as u64,
            };
            disk[at as usize] = random() as u8;
        }
        disk[510..512].copy_from_slice(&[0x55, 0xaa]);
        let place = directory.path().join(format!("place{round}"));
        std::fs::create_dir(&place).unwrap();
        let (repository, backup) = kept(&place, &[("root", &disk)]).await;
        let found = systems(&repository, &backup).await.unwrap_or_default();
        for one in found {
            let at = At::parse(&format!("{}etc", one.at)).unwrap();
            let _ = list(&repository, &backup, at).await;
            let at = At::parse(&format!("{}etc/deep/large", one.at)).unwrap();
            if let Ok((_, mut file)) = read(&repository, &backup, at).await {
                let mut content = Vec::new();
                file.read_to_end(&mut content).await.unwrap();
            }
        }
    }
}
