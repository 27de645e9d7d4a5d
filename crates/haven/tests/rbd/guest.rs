//! The guest of tests of pools: what it writes, and what it found of that when it was started anew.

use anyhow::{Result, ensure};
use haven_lab::drive::Driver;
use std::time::Duration;

/// The VM.
pub const VM: &str = "scribe";
/// How long anything may take.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// Reads what it wrote in earlier lives, and writes a numbered record into each sector from there on, told on its console once its
/// disk has it. What it sees of other disks it tells as well.
pub const KEEPS: &str = r#"#!/bin/busybox sh
i=$(dd if=/dev/vda bs=512 skip=1 count=8000 2> /dev/null | busybox tr -d '\000' | busybox fold -w 8 |
  busybox awk '$1 + 0 != NR { exit } { n = NR } END { print n + 0 }')
echo "KEEPER-HAS $i" > /dev/console
seen=
while :; do
  i=$((i + 1))
  printf '%08d' $i | dd of=/dev/vda bs=512 seek=$i conv=fsync,notrunc 2> /dev/null && echo "KEEPER-WROTE $i" > /dev/console
  now="$(cat /sys/class/block/vd*/size | busybox tr '\n' ' ')"
  [ "$now" = "$seen" ] || echo "KEEPER-DISKS $now" > /dev/console
  seen=$now
  sleep 0.05
done
"#;

/// All that a guest has said on its console, on one host or on all.
pub fn said(lab: &Driver, vm: &str, host: Option<&str>) -> String {
    let hosts = lab.hosts.iter().filter(|name| host.is_none_or(|host| host == *name));
    let logs = hosts
        .map(|host| lab.dir.join(format!("hosts/{host}/upper/var/log/haven/vms/{vm}.console.log")));
    let texts = logs.filter_map(|log| std::fs::read(log).ok());
    let whole = |said: Vec<u8>| {
        let end = said.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        String::from_utf8_lossy(&said[..end]).into_owned()
    };
    texts.map(whole).collect()
}

/// The largest number behind these words in a text.
pub fn largest_in(text: &str, words: &str) -> u64 {
    let numbers =
        text.lines().filter_map(|line| line.split_once(words)?.1.trim().parse::<u64>().ok());
    numbers.max().unwrap_or(0)
}

/// The same in all that the VM has said.
pub fn largest(lab: &Driver, words: &str) -> u64 {
    largest_in(&said(lab, VM, None), words)
}

/// How often it was started.
pub fn boots(lab: &Driver) -> usize {
    said(lab, VM, None).matches("KEEPER-HAS").count()
}

/// It goes on writing.
pub fn writes_on(lab: &Driver) -> Result<()> {
    let then = largest(lab, "KEEPER-WROTE");
    lab.wait("it writes on", PATIENCE, |lab| largest(lab, "KEEPER-WROTE") > then + 5)
}

/// It was started anew since, and has all that it was told to be written before that.
pub fn has_all(lab: &Driver, before: usize) -> Result<()> {
    lab.wait("it reads its disk anew", PATIENCE, |lab| boots(lab) > before)?;
    let has = largest(lab, "KEEPER-HAS");
    // On whichever host it was told: none of those before may be larger.
    let told = lab.hosts.iter().map(|host| {
        let said = said(lab, VM, Some(host));
        let last = format!("KEEPER-HAS {has}\r");
        let before = said.rsplit_once(&last).map_or(said.as_str(), |(before, _)| before);
        match said.contains(&last) {
            true => largest_in(before, "KEEPER-WROTE"),
            false => largest_in(&said, "KEEPER-WROTE"),
        }
    });
    let wrote = told.max().unwrap_or(0);
    println!("  told as written: {wrote}, found on the disk afterwards: {has}");
    ensure!(wrote > 0 && has >= wrote, "{} records are lost", wrote - has);
    writes_on(lab)
}
