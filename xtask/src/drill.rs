//! The main job, judged from outside: three hosts, a service, a power cut, and a client that never stops asking.

use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

/// How long the cluster has to be whole again: the proof takes 5 s, a guest under emulation boots in 2 to 10 s.
const PATIENCE: Duration = Duration::from_secs(90);
/// The service must answer again after at most so long.
const LONGEST_GAP: Duration = Duration::from_secs(10);

fn haven() -> PathBuf {
    PathBuf::from("target/debug/haven")
}

fn run_haven(args: &[&str]) -> Result<String> {
    // An editor that takes one line out, for `edit`.
    let editor = "sed -i /lease-expired/d";
    let mut command = Command::new(haven());
    let output = command.args(args).env("EDITOR", editor).stdin(Stdio::null()).output()?;
    if !output.status.success() {
        bail!(
            "`haven {}` failed: {}",
            args.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn json(args: &[&str]) -> Result<Value> {
    Ok(serde_json::from_str(&run_haven(args)?)?)
}

/// Runs it; leaves the lab up when `HAVEN_DRILL_KEEP` is set.
pub fn run() -> Result<()> {
    if std::env::var("USER").is_ok_and(|user| user != "root") && !is_root() {
        bail!("the drill needs root; run it with sudo");
    }
    let keep = std::env::var_os("HAVEN_DRILL_KEEP").is_some();
    if !keep {
        run_haven(&["lab", "down"])?;
    }
    let result = drill(keep);
    if !keep {
        run_haven(&["lab", "down"])?;
    }
    result
}

/// Whether this process may make namespaces.
pub fn is_root() -> bool {
    Command::new("id").arg("-u").output().is_ok_and(|o| o.stdout.starts_with(b"0"))
}

/// On a lab of its own it also sets one up twice, and lets only the fence prove a loss: without it, a lease would
/// expire a second later and hide a fence that does not work.
fn drill(yours: bool) -> Result<()> {
    let apply = ["apply", "-f", "examples/hello.yaml", "--wait", "--timeout", "300"];
    print!("{}", run_haven(&["lab", "up", "--hosts", "3"])?);
    print!("{}", run_haven(&apply)?);
    if !yours {
        run_haven(&["lab", "up", "--hosts", "3"])?;
        let again = run_haven(&apply)?;
        if again.lines().any(|line| line.ends_with(" created") || line.ends_with(" changed")) {
            bail!("the second `./try` changed something:\n{again}");
        }
        run_haven(&["edit", "cluster"])?;
    }
    let victim = busiest()?;
    let before = json(&["incidents", "--json"])?.as_array().map_or(0, Vec::len);
    println!("cutting the power of {victim}, which carries most");
    let prober = prober(PATIENCE)?;
    std::thread::sleep(Duration::from_secs(1));
    run_haven(&["lab", "kill", &victim])?;
    let proof = follow(before)?;
    let gap = prober.end()?;
    if !yours && !proof.contains("its power was read as off") {
        bail!("the power was not what proved the loss: {proof}");
    }
    println!("longest gap seen by a client that asked all the time: {} ms", gap.as_millis());
    if gap > LONGEST_GAP {
        bail!("the service did not answer for {} ms", gap.as_millis());
    }
    nothing_runs_twice(&victim)?;
    println!("1 passed, 0 failed: the service answers again and nothing ran twice");
    Ok(())
}

/// The host with most VMs and roles.
fn busiest() -> Result<String> {
    let status = json(&["status", "--json"])?;
    let hosts = status["hosts"].as_array().context("a status has hosts")?;
    let weight = |host: &Value| {
        let roles = host["roles"].as_array().map_or(0, Vec::len);
        (host["vms"].as_u64().unwrap_or(0), roles)
    };
    let most = hosts.iter().max_by_key(|host| weight(host)).context("the cluster has a host")?;
    Ok(most["name"].as_str().unwrap_or_default().to_owned())
}

/// Shows the incident behind `before` as it grows and waits until it is closed, counting every VM's copies all the
/// while. Gives how the loss was proven.
fn follow(before: usize) -> Result<String> {
    let begin = Instant::now();
    let (mut shown, mut proof) = (BTreeSet::new(), String::new());
    loop {
        nothing_runs_twice("")?;
        let incidents = json(&["incidents", "--json"])?;
        let new = incidents.as_array().and_then(|all| all.get(before).cloned()).unwrap_or_default();
        let steps = new["steps"].as_array().map_or(&[][..], Vec::as_slice);
        let time = |step: &Value| step["at_ms"].as_i64().unwrap_or_default();
        if shown.is_empty() && !steps.is_empty() {
            println!("incident {}: {}", new["number"], new["title"].as_str().unwrap_or_default());
        }
        for step in steps.iter().filter(|step| shown.insert(step.to_string())) {
            let (phase, message) = (step["phase"].as_str(), step["message"].as_str());
            let (phase, message) = (phase.unwrap_or_default(), message.unwrap_or_default());
            println!("  +{:6} ms  {phase:<8} {message}", time(step) - time(&steps[0]));
            if phase == "proof" {
                message.clone_into(&mut proof);
            }
        }
        if !new["closed_ms"].is_null() {
            return Ok(proof);
        }
        if begin.elapsed() > PATIENCE {
            bail!(
                "after {} s the incident is not over:\n{}",
                PATIENCE.as_secs(),
                run_haven(&["status"])?
            );
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// The processes of each VM on this machine, whichever host they are in: the witness outside. `place` is a directory
/// that only the hosts in question have mounted.
pub fn copies(place: &str) -> Result<BTreeMap<String, Vec<String>>> {
    let mut copies: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for entry in std::fs::read_dir("/proc")?.flatten() {
        let pid = entry.file_name().to_string_lossy().into_owned();
        let Ok(line) = std::fs::read(entry.path().join("cmdline")) else {
            continue;
        };
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        let program = line.split(' ').next().and_then(|path| path.rsplit('/').next());
        if !program.is_some_and(|program| program.starts_with("qemu-system")) {
            continue;
        }
        let mounts = std::fs::read_to_string(entry.path().join("mountinfo")).unwrap_or_default();
        let guest = line.split("guest=").nth(1).and_then(|rest| rest.split([',', ' ']).next());
        // What tries KVM is no VM.
        if let Some(vm) = guest.filter(|_| mounts.contains(place)) {
            copies.entry(vm.to_owned()).or_default().push(pid);
        }
    }
    Ok(copies)
}

fn nothing_runs_twice(dead: &str) -> Result<()> {
    let lab = std::env::var("HAVEN_LAB_DIR").unwrap_or_else(|_| "/var/lib/haven-lab".into());
    for (vm, pids) in copies(&lab)? {
        if pids.len() > 1 {
            bail!("{vm} runs {} times: processes {}", pids.len(), pids.join(", "));
        }
    }
    if dead.is_empty() || !run_haven(&["vm", "ls"])?.contains(dead) {
        Ok(())
    } else {
        bail!("a VM is still placed on {dead}")
    }
}

struct Prober {
    child: std::process::Child,
}

/// A client outside the cluster that asks every 10 ms with a new connection.
fn prober(limit: Duration) -> Result<Prober> {
    let script = format!(
        "last=$(date +%s%N); worst=0; end=$((last + {}000000000)); \
         while [ ! -e /tmp/haven-drill-stop.$$ ] && [ \"$(date +%s%N)\" -lt $end ]; do \
           if curl -s -f --connect-timeout 0.2 --max-time 0.5 -o /dev/null http://10.88.0.100/; then \
             now=$(date +%s%N); gap=$(( (now - last) / 1000000 )); last=$now; \
             [ $gap -gt $worst ] && worst=$gap; fi; read -r -t 0.01 line && break; done; \
         now=$(date +%s%N); gap=$(( (now - last) / 1000000 )); [ $gap -gt $worst ] && worst=$gap; echo $worst",
        limit.as_secs() + 30
    );
    let child = Command::new(haven())
        .args(["lab", "exec", "client", "--", "bash", "-c", &script])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    Ok(Prober { child })
}

impl Prober {
    fn end(mut self) -> Result<Duration> {
        if let Some(mut stdin) = self.child.stdin.take() {
            std::io::Write::write_all(&mut stdin, b"end\n")?;
        }
        let output = self.child.wait_with_output()?;
        let worst: u64 =
            String::from_utf8_lossy(&output.stdout).trim().parse().context("the prober counts")?;
        Ok(Duration::from_millis(worst))
    }
}
