//! `haven lab up`: the Debian tree, the network, the hosts, the cluster; what is there already stays.

use crate::{
    host_init::{DAEMON, GUARD},
    lab::Lab,
    power,
    progress::Progress,
};
use anyhow::{Context, Result, bail};
use haven_client::Client;
use std::{
    io::{BufRead, BufReader},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

/// What builds the hosts' Debian tree, and the guest; kept in the binary so that it works from anywhere.
const RECIPES: [(&str, &str); 4] = [
    ("rootfs.sh", include_str!("../rootfs.sh")),
    ("build.sh", include_str!("../../../guests/tiny/build.sh")),
    ("init", include_str!("../../../guests/tiny/init")),
    ("whoami", include_str!("../../../guests/tiny/whoami")),
];

/// So long may the store take to have its voters.
const VOTERS: Duration = Duration::from_secs(60);
/// The tiny guest's kernel command line.
const CMDLINE: &str = "console=ttyS0 quiet mitigations=off panic=1";

/// Builds the Debian tree and the guest once per recipe.
fn build_base(lab: &Lab, progress: &Progress) -> Result<()> {
    let recipe = RECIPES.iter().map(|(_, text)| *text).collect::<Vec<_>>().join("\n");
    let base = lab.cache.join("base");
    let mark = base.join("recipe");
    if std::fs::read_to_string(&mark).is_ok_and(|built| built == recipe) {
        return Ok(());
    }
    let recipes = lab.cache.join("recipes");
    std::fs::create_dir_all(&recipes)?;
    for (name, text) in RECIPES {
        std::fs::write(recipes.join(name), text)?;
    }
    let mut script = Command::new("bash")
        .arg(recipes.join("rootfs.sh"))
        .arg(&base)
        .arg(recipes.join("build.sh"))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let said = script.stdout.take().context("its output is piped")?;
    for line in BufReader::new(said).lines() {
        progress.say(&line?);
    }
    if !script.wait()?.success() {
        bail!("the lab's root file system could not be built; the message above says why");
    }
    std::fs::write(mark, recipe)?;
    Ok(())
}

/// Puts this program and the guard, which is installed beside it, into a directory.
fn copy_binaries(directory: &Path) -> Result<()> {
    let own = std::env::current_exe()?;
    let guard = own.with_file_name(GUARD);
    std::fs::copy(&own, directory.join(DAEMON))?;
    std::fs::copy(&guard, directory.join(GUARD)).with_context(|| {
        let it = guard.display();
        format!("the guard's program `{it}` cannot be copied; it belongs beside `haven`, `cargo build -p haven` makes both")
    })?;
    Ok(())
}

/// Makes the lab, or what is missing of it: the machine may have been restarted, or an earlier run interrupted.
///
/// # Errors
/// When the lab has another number of hosts, or with what a step said.
pub async fn up(lab: &mut Lab, hosts: Option<u32>, bare: bool) -> Result<()> {
    let there = lab.state.hosts;
    let hosts = hosts.unwrap_or(if there == 0 { 3 } else { there });
    if !(1..=9).contains(&hosts) {
        bail!("a lab has 1 to 9 hosts");
    }
    if there != 0 && there != hosts {
        bail!("a lab of {there} hosts is here already; end it first with `haven lab down`");
    }
    let progress = Progress::new(if bare { 2 + hosts } else { 4 + 2 * hosts });
    progress.step("root file system and tiny guest", || build_base(lab, &progress))?;
    lab.state.hosts = hosts;
    progress.step("network", || network(lab))?;
    for host in lab.hosts() {
        progress.step(&format!("{host} switched on"), || lab.power_on(&host))?;
    }
    if bare {
        return Ok(());
    }
    for (number, host) in (1..).zip(lab.hosts()) {
        let step = progress.begin(&format!("{host} is part of the cluster"));
        if !lab.host_dir(&host).join("upper/var/lib/haven/host.json").exists() {
            member(lab, &host, number).await?;
        }
        answers(&lab.socket(&host)).await?;
        step.end();
    }
    let step = progress.begin("image `tiny` imported");
    import(lab).await?;
    step.end();
    let step = progress.begin(&format!("{} hosts vote", hosts.min(3)));
    vote(lab).await?;
    step.end();
    let sockets: Vec<PathBuf> = lab.hosts().iter().map(|host| lab.socket(host)).collect();
    std::fs::write(
        lab.dir.join("context.json"),
        serde_json::json!({ "sockets": sockets }).to_string(),
    )?;
    progress.say(&format!("  the cluster is up: {hosts} hosts"));
    Ok(())
}

/// The namespaces with their cables, and the API that switches hosts off and on.
fn network(lab: &mut Lab) -> Result<()> {
    if lab.has_network() {
        return Ok(());
    }
    lab.end_everything()?;
    std::fs::create_dir_all(lab.dir.join("bin"))?;
    std::fs::create_dir_all(lab.dir.join("shared"))?;
    copy_binaries(&lab.dir.join("bin"))?;
    lab.save()?;
    lab.make_network()?;
    lab.set_cuts()?;
    let power = Command::new("ip")
        .args(["netns", "exec", &lab.fabric()])
        .arg(lab.dir.join("bin").join(DAEMON))
        .args(["lab", "power-api"])
        .env("HAVEN_LAB_DIR", &lab.dir)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()?;
    lab.state.power = i32::try_from(power.id()).ok();
    lab.save()
}

/// Waits until the store has its voters: a host that is lost before takes the cluster with it.
async fn vote(lab: &Lab) -> Result<()> {
    let wanted = lab.hosts().len().min(3);
    let begin = Instant::now();
    let mut last = (0, 0);
    while begin.elapsed() < VOTERS {
        if let Ok(overview) = Client::local(lab.socket("host1")).status().await {
            last = overview.voters;
            if last.0 >= wanted {
                return Ok(());
            }
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    bail!(
        "only {} of {wanted} hosts vote after {} s; `haven status` says more, and the logs are in hosts/*/upper/var/log/haven",
        last.0,
        VOTERS.as_secs()
    );
}

/// Makes a cluster of the first host; the others join it.
async fn member(lab: &Lab, host: &str, number: u32) -> Result<()> {
    let address = format!("10.88.0.{number}");
    let power = format!("http://{}/redfish/v1/Systems/{host}", power::ADDRESS);
    let mut common = vec!["--address", &address];
    if !lab.state.no_power_control {
        common.extend(["--power-url", &power, "--power-user", "lab", "--power-password", "lab"]);
    }
    if lab.state.witness && number == lab.state.hosts {
        let secret = Client::local(lab.socket("host1")).invite().await?.secret;
        return inside(lab, host, &["witness", &secret, "10.88.0.1", "--address", &address]);
    }
    if number == 1 {
        inside(lab, host, &[&["init", "--name", "lab"], &common[..]].concat())
    } else {
        let secret = Client::local(lab.socket("host1")).invite().await?.secret;
        inside(lab, host, &[&["join", &secret, "10.88.0.1"], &common[..]].concat())
    }
}

fn inside(lab: &Lab, host: &str, args: &[&str]) -> Result<()> {
    let output = lab.command(host, "/usr/bin/haven")?.args(args).output()?;
    if output.status.success() {
        return Ok(());
    }
    bail!("{host}: {}", String::from_utf8_lossy(&output.stderr).trim())
}

async fn answers(socket: &Path) -> Result<()> {
    let until = Instant::now() + Duration::from_secs(60);
    while Instant::now() < until {
        if Client::local(socket.to_owned()).status().await.is_ok() {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    bail!("{} does not answer; read var/log/haven/daemon.log of that host", socket.display())
}

async fn import(lab: &Lab) -> Result<()> {
    let client = Client::local(lab.socket("host1"));
    let there = client.object(&"image/tiny".parse()?).await;
    if there.is_ok() {
        return Ok(());
    }
    let query = format!("cmdline={}", CMDLINE.replace(' ', "%20"));
    for (part, file) in [("kernel", "vmlinuz"), ("initrd", "initrd")] {
        let file = tokio::fs::File::open(lab.cache.join("base/tiny").join(file)).await?;
        client.import("tiny", part, &query, file).await?;
    }
    Ok(())
}
