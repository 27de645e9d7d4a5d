//! The NoCloud seed: a small FAT disk from which cloud-init (or the tiny guest) learns its name, its addresses and
//! what to do at first boot.

use crate::agent::storage::SeedWanted;
use fatfs::{FileSystem, FormatVolumeOptions, FsOptions};
use std::{
    fmt::Write as _,
    io::{Cursor, Write},
};

/// Size of the disk, bytes.
const SIZE: usize = 1 << 20;

/// `meta-data`.
#[must_use]
pub fn meta_data(wanted: &SeedWanted) -> String {
    format!("instance-id: {}\nlocal-hostname: {}\n", wanted.instance_id, wanted.vm)
}

/// `network-config`, version 2.
#[must_use]
pub fn network_config(wanted: &SeedWanted) -> String {
    let mut text = String::from("version: 2\nethernets:\n");
    for (i, nic) in wanted.nics.iter().enumerate() {
        let _ = write!(
            text,
            "  eth{i}:\n    match:\n      macaddress: \"{}\"\n    addresses:\n    - {}\n",
            nic.mac, nic.address
        );
        if i == 0 {
            let _ = write!(text, "    routes:\n    - to: default\n      via: {}\n", nic.gateway);
        }
        if !nic.nameservers.is_empty() {
            text.push_str("    nameservers:\n      addresses:\n");
            for server in &nic.nameservers {
                let _ = writeln!(text, "      - {server}");
            }
        }
    }
    text
}

/// The whole disk.
///
/// # Errors
/// When the user data does not fit.
pub fn image(wanted: &SeedWanted) -> std::io::Result<Vec<u8>> {
    let mut disk = Cursor::new(vec![0u8; SIZE]);
    let options = FormatVolumeOptions::new().volume_label(*b"CIDATA     ");
    fatfs::format_volume(&mut disk, options)?;
    {
        let fs = FileSystem::new(&mut disk, FsOptions::new())?;
        let root = fs.root_dir();
        let user_data =
            if wanted.user_data.is_empty() { "#cloud-config\n" } else { &wanted.user_data };
        for (name, text) in [
            ("meta-data", meta_data(wanted)),
            ("user-data", user_data.to_owned()),
            ("network-config", network_config(wanted)),
        ] {
            root.create_file(name)?.write_all(text.as_bytes())?;
        }
    }
    Ok(disk.into_inner())
}
