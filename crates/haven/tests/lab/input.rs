//! What a host lacks: said in one sentence with what to do, and taken up by itself once it is there.

use crate::{lab::Lab, witness::Witness};
use anyhow::{Result, bail};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(60);

/// A VM that can only be on the host with this label.
const PINNED: &str = r#"
kind: VM
name: pinned
image: tiny
memory: 128MiB
affinity:
  hosts: {lacks: "yes"}
"#;

/// Waits until `haven explain` says these words of an object.
fn explained(lab: &Lab, object: &str, words: &str) -> Result<()> {
    let until = Instant::now() + PATIENCE;
    loop {
        let said = lab.haven(&["explain", object])?;
        if said.contains(words) {
            return Ok(());
        }
        if Instant::now() > until {
            bail!("`haven explain {object}` should say `{words}`, and says:\n{said}");
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

pub fn no_qemu(lab: &mut Lab, _: &Witness) -> Result<()> {
    let (program, away) = ("/usr/bin/qemu-system-x86_64", "/usr/bin/qemu-away");
    lab.label("host3", "lacks", "yes")?;
    lab.haven(&["lab", "exec", "host3", "--", "mv", program, away])?;
    lab.apply(PINNED, &[])?;
    let words = "QEMU is not installed on this host; install the package qemu-system-x86";
    let said = explained(lab, "vm/pinned", words);
    lab.haven(&["lab", "exec", "host3", "--", "mv", away, program])?;
    said?;
    // A person does nothing more than what was said.
    lab.apply(PINNED, &["--wait", "--timeout", "120"])?;
    lab.haven(&["vm", "rm", "pinned", "--wait"])?;
    Ok(())
}
