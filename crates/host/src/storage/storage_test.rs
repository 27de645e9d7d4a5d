//! Tests of images and seeds.

use super::{images::ImageStore, seed};
use crate::agent::storage::{SeedNic, SeedWanted};

fn wanted() -> SeedWanted {
    SeedWanted {
        vm: "web-1".into(),
        instance_id: "i-1".into(),
        user_data: "#!/bin/sh\necho hello\n".into(),
        nics: vec![SeedNic {
            mac: "02:68:0a:4d:00:0a".into(),
            address: "10.77.0.10/24".parse().unwrap(),
            gateway: "10.77.0.1".parse().unwrap(),
            nameservers: vec!["10.0.0.53".parse().unwrap()],
        }],
        owner_uid: 200_000,
    }
}

#[test]
fn the_seed_holds_what_the_guest_needs() {
    use std::io::{Cursor, Read};
    let disk = seed::image(&wanted()).unwrap();
    let fs = fatfs::FileSystem::new(Cursor::new(disk), fatfs::FsOptions::new()).unwrap();
    assert_eq!(fs.volume_label(), "CIDATA");
    let mut text = String::new();
    fs.root_dir().open_file("network-config").unwrap().read_to_string(&mut text).unwrap();
    assert!(text.contains("- 10.77.0.10/24") && text.contains("via: 10.77.0.1"), "{text}");
    text.clear();
    fs.root_dir().open_file("meta-data").unwrap().read_to_string(&mut text).unwrap();
    assert!(text.contains("local-hostname: web-1"));
}

#[tokio::test]
async fn an_image_with_a_wrong_sum_is_refused_and_leaves_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let store = ImageStore::new(directory.path().into());
    let error = store.import(&b"abc"[..], Some("00")).await.unwrap_err();
    assert!(error.what.contains("checksum"), "{error}");
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    let imported = store.import(&b"abc"[..], None).await.unwrap();
    assert_eq!(imported.size, 3);
    assert!(imported.sha256.starts_with("ba7816bf"));
    assert_eq!(store.list().len(), 1);
}
