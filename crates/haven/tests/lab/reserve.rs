//! What is kept free for the loss of a host.

use crate::{lab::Lab, witness::Witness};
use anyhow::{Context, Result, ensure};
use haven_model::AdmissionPolicy;
use std::process::Output;

/// One more than three hosts of 2 GiB can lose a host with: each of them has room for one of these.
const ONE_TOO_MANY: &str = r#"
kind: VM
name: large-1
image: tiny
memory: 850MiB
---
kind: VM
name: large-2
image: tiny
memory: 850MiB
---
kind: VM
name: large-3
image: tiny
memory: 850MiB
"#;

fn run(lab: &Lab, args: &[&str]) -> Result<(Option<i32>, String)> {
    let Output { status, stdout, stderr } = lab.command(args).output()?;
    let text = [stdout, stderr].concat();
    Ok((status.code(), String::from_utf8_lossy(&text).into_owned()))
}

/// One VM too many is refused with the arithmetic and changes nothing; by another policy it is told.
pub fn one_too_many(lab: &mut Lab, _: &Witness) -> Result<()> {
    lab.admission(AdmissionPolicy::Refuse)?;
    let result = refused(lab);
    lab.admission(AdmissionPolicy::Warn)?;
    result
}

fn refused(lab: &Lab) -> Result<()> {
    let path = lab.dir.join("too-many.yaml");
    std::fs::write(&path, ONE_TOO_MANY)?;
    let file = path.display().to_string();
    let loses = lab.overview()?.survivable_vms;
    ensure!(loses > 0, "the status says that no host can be lost");
    let (code, said) = run(lab, &["apply", "-f", &file])?;
    ensure!(code == Some(2), "it ended with {code:?}: {said}");
    let words = [
        "nothing was changed: the loss of 1 host would leave VMs without a place: host",
        " finds no place",
    ];
    ensure!(words.iter().all(|words| said.contains(words)), "it said: {said}");
    let large = |text: &str| text.contains("large-");
    ensure!(!large(&lab.haven(&["get", "vms"])?), "some of it was made");
    let two = ONE_TOO_MANY.rsplit_once("---").context("three documents")?.0;
    std::fs::write(&path, two)?;
    let (code, said) = run(lab, &["apply", "-f", &file, "--dry-run"])?;
    ensure!(code == Some(0), "two of them fit, and it ended with {code:?}: {said}");
    std::fs::write(&path, ONE_TOO_MANY)?;
    lab.admission(AdmissionPolicy::Warn)?;
    let (code, said) = run(lab, &["apply", "-f", &file, "--dry-run"])?;
    lab.admission(AdmissionPolicy::Refuse)?;
    ensure!(code == Some(0) && said.contains("warning: the loss of 1 host"), "{code:?}: {said}");
    // One of these fits if the loss of its host leaves an empty one, which the cases before decide; two never do.
    let (code, said) = run(lab, &["vm", "create", "large-4", "--memory", "1400MiB"])?;
    let (code, said) = if code == Some(0) {
        let second = run(lab, &["vm", "create", "large-5", "--memory", "1400MiB"]);
        lab.haven(&["delete", "vm/large-4", "--wait"])?;
        second?
    } else {
        (code, said)
    };
    ensure!(code == Some(2) && said.contains("finds no place"), "{code:?}: {said}");
    Ok(())
}
