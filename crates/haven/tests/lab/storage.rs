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
    let host = lab.host_of("keeper")?;
    lab.haven(&["lab", "kill", &host])?;
    lab.wait("the keeper is on another host", PATIENCE, |lab| {
        lab.host_of("keeper").is_ok_and(|now| now != host)
    })?;
    lab.wait("the keeper finds its disk and counts on", PATIENCE, |lab| counted(lab, 2))?;
    lab.haven(&["lab", "start", &host])?;
    lab.online(&host)
}
