//! What users apply as it is, and a disk that outlives its host.

use crate::{lab::Lab, witness::Witness};
use anyhow::{Result, bail};
use std::{path::Path, time::Duration};

const EXAMPLES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../examples");
const PATIENCE: Duration = Duration::from_secs(120);

/// Every example is applied, is unchanged when applied again, and goes.
pub fn examples(lab: &mut Lab, _: &Witness) -> Result<()> {
    lab.haven(&["lab", "exec", "host1", "--", "mkdir", "-p", "/srv/shared/disks"])?;
    lab.haven(&["lab", "exec", "host1", "--", "haven", "pool", "mark", "/srv/shared/disks"])?;
    lab.wait("every image stands on every host", PATIENCE, |lab| {
        let files = |host: &String| {
            let list = lab.haven(&["lab", "exec", host, "--", "ls", "/var/lib/haven/images"]);
            list.map_or(0, |list| list.lines().filter(|name| name.len() == 64).count())
        };
        lab.hosts.iter().all(|host| files(host) >= 2)
    })?;
    let mut files: Vec<_> =
        std::fs::read_dir(EXAMPLES)?.map(|e| e.map(|e| e.path())).collect::<Result<_, _>>()?;
    files.sort();
    for path in files {
        let file = path.display().to_string();
        lab.haven(&["apply", "-f", &file, "--wait", "--timeout", "120"])?;
        let again = lab.haven(&["apply", "-f", &file])?;
        let lines: Vec<&str> = again.lines().filter(|line| !line.ends_with("unchanged")).collect();
        if again.is_empty() || !lines.is_empty() {
            bail!("{file} applied again should change nothing, and: {again}");
        }
        if path.ends_with(Path::new("shared-disk.yaml")) {
            outlives(lab)?;
        }
        // The network of the counting guests has the name of the example's.
        let kept = lab.haven(&["get", "network/front", "-o", "yaml"])?;
        let what: Vec<&str> =
            again.lines().filter_map(|line| line.split_whitespace().next()).collect();
        let going = what.into_iter().filter(|one| *one != "network/front");
        let args: Vec<&str> = ["delete"].into_iter().chain(going).chain(["--wait"]).collect();
        lab.haven(&args)?;
        if lab.haven(&["get", "network/front", "-o", "yaml"])? != kept {
            bail!("deleting other objects changed network/front");
        }
    }
    Ok(())
}

/// The keeper's disk holds on another host what the guest wrote on the first.
fn outlives(lab: &Lab) -> Result<()> {
    let counted = |lab: &haven_lab::drive::Driver, boots: u32| {
        let text = lab.haven(&["vm", "log", "keeper"]).unwrap_or_default();
        text.lines().any(|line| line.trim().ends_with(&format!("boots {boots}")))
    };
    lab.wait("the keeper counts its first boot", PATIENCE, |lab| counted(lab, 1))?;
    lab.wait("the room in its pool is told", PATIENCE, |lab| {
        let said = lab.haven(&["pool", "show", "disks"]).unwrap_or_default();
        said.contains("are free; its volumes take") && said.contains("may take")
    })?;
    let host = lab.host_of("keeper")?;
    lab.haven(&["lab", "kill", &host])?;
    lab.wait("the keeper is on another host", PATIENCE, |lab| {
        lab.host_of("keeper").is_ok_and(|now| now != host)
    })?;
    lab.wait("the keeper finds its disk and counts on", PATIENCE, |lab| counted(lab, 2))?;
    lab.haven(&["lab", "start", &host])?;
    lab.online(&host)
}

/// A disk that is made from an image: with a marker at its beginning and one behind it that the guest counts up.
const DISK: &str = r#"
kind: Pool
name: plain
driver: local
path: /var/lib/haven/plain
---
kind: VM
name: reader
image: tiny
memory: 128MiB
disks:
- name: data
  size: 16MiB
  pool: plain
  image: marked
userData: |
  #!/bin/sh
  for disk in /dev/vd?; do
    if [ "$(head -c 12 $disk)" = marked-image ]; then
      old=$(dd if=$disk bs=512 skip=4096 count=1 2> /dev/null | head -c 4)
      new=$(printf 'n%03d' $((1${old#n} - 1000 + 1)))
      echo "read $(blockdev --getsize64 $disk) $old" > /dev/console
      printf %s "$new" | dd of=$disk bs=512 seek=4096 conv=notrunc 2> /dev/null
      sync
    fi
  done
"#;

/// A guest finds on its disk what the image held, at the size that was asked for, and what it wrote itself when it boots
/// again; another disk of the same image holds nothing of it.
pub fn image_disk(lab: &mut Lab, _: &Witness) -> Result<()> {
    // 4 MiB: the marker, and a counter at 2 MiB.
    let mut image = vec![0; 4 << 20];
    image[..12].copy_from_slice(b"marked-image");
    image[2 << 20..][..4].copy_from_slice(b"n000");
    let file = lab.dir.join("marked.img");
    std::fs::write(&file, image)?;
    let file = file.display().to_string();
    let wrong = "0".repeat(64);
    if lab.haven(&["image", "import", "marked", &file, "--checksum", &wrong]).is_ok() {
        bail!("an image with another checksum than the one given was taken");
    }
    lab.haven(&["image", "import", "marked", &file])?;
    lab.apply(DISK, &["--wait", "--timeout", "120"])?;
    let reads = |lab: &haven_lab::drive::Driver, vm: &str, counter: &str| {
        let text = lab.haven(&["vm", "log", vm]).unwrap_or_default();
        text.lines().any(|line| line.trim().ends_with(&format!("read 16777216 {counter}")))
    };
    lab.wait("the guest reads its image", PATIENCE, |lab| reads(lab, "reader", "n000"))?;
    lab.haven(&["vm", "reset", "reader"])?;
    lab.wait("and then what it wrote", PATIENCE, |lab| reads(lab, "reader", "n001"))?;
    let second = DISK.replace("name: reader", "name: second");
    lab.apply(&second, &["--wait", "--timeout", "120"])?;
    lab.wait("another disk is the image anew", PATIENCE, |lab| reads(lab, "second", "n000"))?;
    lab.haven(&["delete", "vm/reader", "vm/second", "--wait"])?;
    lab.haven(&["delete", "image/marked", "pool/plain", "--wait"]).map(|_| ())
}
