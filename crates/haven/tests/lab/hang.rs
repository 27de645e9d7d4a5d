//! A guest that hangs while its host and its QEMU are well.

use crate::{lab::Lab, witness::Witness};
use anyhow::{Result, ensure};
use std::time::Duration;

/// A guest that serves for a while after each boot and then hangs, as seen from outside: it answers nothing, and does
/// nothing on its disks and cards.
const HANGS: &str = r#"
kind: VM
name: dozes
image: tiny
memory: 128MiB
networks:
- network: front
check: {mode: http, port: 80, interval: 500ms}
hang: {after: 10s, signs: [check, network]}
userData: |
  #!/bin/sh
  sleep 10
  ip link set eth0 down
"#;

/// It is reset where it is, then ended and tried on another host, and the incident tells it.
pub fn hangs(lab: &mut Lab, _: &Witness) -> Result<()> {
    lab.apply(HANGS, &["--wait"])?;
    let first = lab.host_of("dozes")?;
    let told = |words: &str| {
        lab.haven(&["events", "--limit", "200"]).is_ok_and(|said| said.contains(words))
    };
    let limit = Duration::from_secs(120);
    lab.wait("it is reset", limit, |_| told(&format!("it hung on {first}: for 10s")))?;
    ensure!(lab.host_of("dozes")? == first, "the first time it stays");
    lab.wait("it is tried on another host", limit, |lab| {
        lab.host_of("dozes").is_ok_and(|host| host != first)
    })?;
    ensure!(told("is tried on") && told("because it hung 2 times"), "{}", lab.haven(&["events"])?);
    let incidents = lab.haven(&["incidents"])?;
    ensure!(incidents.contains("dozes keeps failing"), "{incidents}");
    lab.haven(&["vm", "rm", "dozes"])?;
    lab.wait("it is gone", limit, |lab| {
        lab.haven(&["vm", "ls"]).is_ok_and(|list| !list.contains("dozes"))
    })
}
