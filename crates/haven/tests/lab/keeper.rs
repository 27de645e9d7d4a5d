//! A guest that keeps records on its disk and finds them again, so that one that is lost is seen.

use crate::lab::{HOSTS, Lab};
use anyhow::Result;

/// Reads what it wrote in earlier lives, and writes a numbered record into each sector from there on, told on its
/// console once its disk has it.
pub const KEEPS: &str = r#"#!/bin/busybox sh
i=$(dd if=/dev/vda bs=512 skip=1 count=4000 2> /dev/null | busybox tr -d '\000' | busybox fold -w 8 |
  busybox awk '$1 + 0 != NR { exit } { n = NR } END { print n + 0 }')
echo "KEEPER-HAS $i" > /dev/console
echo "KEEPER-SECTORS $(cat /sys/class/block/vda/size)" > /dev/console
while :; do
  i=$((i + 1))
  printf '%08d' $i | dd of=/dev/vda bs=512 seek=$i conv=fsync,notrunc 2> /dev/null && echo "KEEPER-WROTE $i" > /dev/console
  sleep 0.05
done
"#;

/// The largest number behind these words on a guest's console, on any host.
pub fn largest(lab: &Lab, vm: &str, words: &str) -> u64 {
    let said = lab.all_said_by(vm);
    let numbers = said.lines().filter_map(|line| {
        let (_, rest) = line.split_once(words)?;
        rest.trim().parse::<u64>().ok()
    });
    numbers.max().unwrap_or(0)
}

/// Forgets what earlier guests of a name said: their numbers are no measure of what the next one writes.
pub fn begin_anew(lab: &Lab, vm: &str) -> Result<()> {
    for host in HOSTS {
        let folder = lab.dir.join(format!("hosts/{host}/upper/var/log/haven/vms"));
        for file in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            if file.file_name().to_string_lossy().starts_with(&format!("{vm}.")) {
                // Not removed: its host would write on in the file that it knows.
                std::fs::File::options().write(true).truncate(true).open(file.path())?;
            }
        }
    }
    Ok(())
}
