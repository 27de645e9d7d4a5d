//! `haven lab …`.

use crate::{
    host_init::{self, DAEMON, GUARD, Layout},
    lab::{Lab, tool},
    power,
};
use anyhow::{Context, Result, bail};
use clap::Subcommand;
use haven_client::Client;
use std::{
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

/// A cluster on this machine.
#[derive(Debug, Subcommand)]
pub enum LabCommand {
    /// Make hosts and a cluster of them
    #[command(after_help = "Examples:\n  haven lab up\n  haven lab up --hosts 5")]
    Up {
        /// How many hosts
        #[arg(long, default_value_t = 3)]
        hosts: u32,
        /// Only switch the hosts on; make no cluster
        #[arg(long)]
        bare: bool,
        /// Do not tell the cluster how to switch hosts off: a lost host is recovered when its lease has expired
        #[arg(long)]
        no_power_control: bool,
    },
    /// End all of it
    #[command(after_help = "Examples:\n  haven lab down")]
    Down,
    /// List the hosts
    #[command(after_help = "Examples:\n  haven lab ls")]
    Ls,
    /// Cut a host's power
    #[command(after_help = "Examples:\n  haven lab kill host2")]
    Kill { host: String },
    /// Switch a host on
    #[command(after_help = "Examples:\n  haven lab start host2")]
    Start { host: String },
    /// Cut a host off the network, wholly or from one other host
    #[command(
        after_help = "Examples:\n  haven lab cut host2\n  haven lab cut host2 --from host1\n  haven lab cut host2 --from host1 --one-way"
    )]
    Cut {
        host: String,
        /// Only from this host
        #[arg(long)]
        from: Option<String>,
        /// Packets of HOST to the other vanish; those back pass
        #[arg(long, requires = "from")]
        one_way: bool,
    },
    /// Mend all cables
    #[command(after_help = "Examples:\n  haven lab heal")]
    Heal,
    /// Stop every process of a host
    #[command(after_help = "Examples:\n  haven lab pause host2")]
    Pause { host: String },
    /// Let a paused host go on
    #[command(after_help = "Examples:\n  haven lab resume host2")]
    Resume { host: String },
    /// Take the watchdogs out, or put them back: they reset a host that was paused for 2 s
    #[command(after_help = "Examples:\n  haven lab watchdog off\n  haven lab watchdog on host2")]
    Watchdog {
        /// `on` or `off`
        #[arg(action = clap::ArgAction::Set, value_parser = clap::builder::BoolishValueParser::new())]
        on: bool,
        /// Only of this host
        host: Option<String>,
    },
    /// A shell in a host, or in the client outside the cluster
    #[command(after_help = "Examples:\n  haven lab shell host1\n  haven lab shell client")]
    Shell { place: String },
    /// Run a command in a host, or in the client outside the cluster
    #[command(after_help = "Examples:\n  haven lab exec client -- curl -s http://10.88.0.100/")]
    Exec {
        place: String,
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    #[command(hide = true)]
    HostInit {
        #[arg(long)]
        lower: PathBuf,
        #[arg(long)]
        host_dir: PathBuf,
        #[arg(long)]
        shared: PathBuf,
        #[arg(long)]
        binaries: PathBuf,
        #[arg(long)]
        name: String,
        #[arg(long)]
        watchdog: Option<PathBuf>,
    },
    #[command(hide = true)]
    PowerApi,
    /// The prefix of this lab's namespaces
    #[command(hide = true)]
    Id,
}

/// Runs it.
///
/// # Errors
/// With a sentence that says what to do.
pub async fn run(command: LabCommand) -> Result<()> {
    if let LabCommand::HostInit { lower, host_dir, shared, binaries, name, watchdog } = command {
        return host_init::run(&Layout { lower, host_dir, shared, binaries, watchdog, name });
    }
    if !nix::unistd::geteuid().is_root() {
        bail!("the lab makes namespaces and needs root; run it with sudo");
    }
    let mut lab = Lab::open()?;
    match command {
        LabCommand::Up { hosts, bare, no_power_control } => {
            lab.state.no_power_control |= no_power_control;
            up(&mut lab, hosts, bare).await
        }
        LabCommand::Down => lab.down(),
        LabCommand::Ls => list(&lab),
        LabCommand::Kill { host } => lab.power_off(&host),
        LabCommand::Start { host } => lab.power_on(&host),
        LabCommand::Cut { host, from, one_way } => cut(&mut lab, &host, from, one_way),
        LabCommand::Heal => {
            lab.state.cuts.clear();
            lab.save()?;
            lab.set_cuts()?;
            lab.hosts()
                .iter()
                .filter(|host| lab.init(host).is_some())
                .try_for_each(|host| lab.set_cable(host, true))
        }
        LabCommand::Pause { host } => lab.set_paused(&host, true),
        LabCommand::Resume { host } => lab.set_paused(&host, false),
        LabCommand::Watchdog { on, host } => {
            let hosts = host.map_or_else(|| lab.hosts(), |host| vec![host]);
            hosts.iter().try_for_each(|host| crate::watchdog::set(&lab, host, on))
        }
        LabCommand::Shell { place } => {
            let error = lab.command(&place, "bash")?.exec();
            Err(error).context("the shell cannot be started")
        }
        LabCommand::Exec { place, command } => {
            let error = lab.command(&place, &command[0])?.args(&command[1..]).exec();
            Err(error).with_context(|| format!("`{}` cannot be started there", command[0]))
        }
        LabCommand::Id => {
            println!("{}", lab.state.id);
            Ok(())
        }
        LabCommand::PowerApi => power::serve(&lab),
        LabCommand::HostInit { .. } => Ok(()),
    }
}

fn cut(lab: &mut Lab, host: &str, from: Option<String>, one_way: bool) -> Result<()> {
    lab.host(host)?;
    let Some(other) = from else {
        return lab.set_cable(host, false);
    };
    lab.host(&other)?;
    lab.state.cuts.push((host.to_owned(), other.clone()));
    if !one_way {
        lab.state.cuts.push((other, host.to_owned()));
    }
    lab.save()?;
    lab.set_cuts()
}

fn list(lab: &Lab) -> Result<()> {
    for (i, host) in lab.hosts().iter().enumerate() {
        let power = if lab.init(host).is_some() { "on" } else { "off" };
        println!("{host:<8} 10.88.0.{:<4} {power}", i + 1);
    }
    Ok(())
}

/// One step with its time.
fn step<T>(what: &str, run: impl FnOnce() -> Result<T>) -> Result<T> {
    let begin = Instant::now();
    let result = run()?;
    println!("  {what} ({:.1} s)", begin.elapsed().as_secs_f64());
    Ok(result)
}

/// Builds the Debian tree and the guest once per recipe.
fn build_base(lab: &Lab) -> Result<()> {
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
    let status = Command::new("bash")
        .arg(recipes.join("rootfs.sh"))
        .arg(&base)
        .arg(recipes.join("build.sh"))
        .stdin(Stdio::null())
        .status()?;
    if !status.success() {
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

async fn up(lab: &mut Lab, hosts: u32, bare: bool) -> Result<()> {
    if !(1..=9).contains(&hosts) {
        bail!("a lab has 1 to 9 hosts");
    }
    step("root file system and tiny guest", || build_base(lab))?;
    if lab.state.hosts == 0 {
        let binary = lab.dir.join("bin").join(DAEMON);
        std::fs::create_dir_all(lab.dir.join("bin"))?;
        std::fs::create_dir_all(lab.dir.join("shared"))?;
        copy_binaries(&lab.dir.join("bin"))?;
        lab.state.hosts = hosts;
        lab.save()?;
        step("network", || lab.make_network())?;
        let power = Command::new("ip")
            .args(["netns", "exec", &lab.fabric()])
            .arg(&binary)
            .args(["lab", "power-api"])
            .env("HAVEN_LAB_DIR", &lab.dir)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()?;
        lab.state.power = i32::try_from(power.id()).ok();
        lab.save()?;
    }
    for host in lab.hosts() {
        step(&format!("{host} switched on"), || lab.power_on(&host))?;
    }
    if bare {
        return Ok(());
    }
    for (i, host) in lab.hosts().iter().enumerate() {
        if !lab.host_dir(host).join("upper/var/lib/haven/host.json").exists() {
            member(lab, host, i as u32 + 1).await?;
        }
    }
    import(lab).await?;
    vote(lab).await?;
    let sockets: Vec<PathBuf> = lab.hosts().iter().map(|host| lab.socket(host)).collect();
    std::fs::write(
        lab.dir.join("context.json"),
        serde_json::json!({ "sockets": sockets }).to_string(),
    )?;
    println!("  the cluster is up: {} hosts", lab.state.hosts);
    Ok(())
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
                println!("  {wanted} hosts vote ({:.1} s)", begin.elapsed().as_secs_f64());
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

async fn member(lab: &Lab, host: &str, number: u32) -> Result<()> {
    let begin = Instant::now();
    let address = format!("10.88.0.{number}");
    let power = format!("http://{}/redfish/v1/Systems/{host}", power::ADDRESS);
    let mut common = vec!["--address", &address];
    if !lab.state.no_power_control {
        common.extend(["--power-url", &power, "--power-user", "lab", "--power-password", "lab"]);
    }
    if number == 1 {
        inside(lab, host, &[&["init", "--name", "lab"], &common[..]].concat())?;
        answers(&lab.socket(host)).await?;
    } else {
        let secret = Client::local(lab.socket("host1")).invite().await?.secret;
        inside(lab, host, &[&["join", &secret, "10.88.0.1"], &common[..]].concat())?;
        answers(&lab.socket(host)).await?;
    }
    println!("  {host} is part of the cluster ({:.1} s)", begin.elapsed().as_secs_f64());
    Ok(())
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
    println!("  image `tiny` imported");
    Ok(())
}

/// Used by tests: what is left of a lab on this machine.
///
/// # Errors
/// When `ip` cannot be asked.
pub fn leftovers(id: &str) -> Result<Vec<String>> {
    let prefix = format!("{id}-");
    let spaces = tool("ip", &["netns", "list"])?;
    Ok(spaces.lines().filter(|line| line.starts_with(&prefix)).map(str::to_owned).collect())
}
