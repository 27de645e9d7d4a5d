//! Three servers for the install drill: Debian 13 with systemd as their first process, from namespaces over one tree.
//!
//! Unlike a host of the lab a machine has nothing of Haven in it: it gets a package, and everything else is systemd's
//! doing. Its network card is taken out before its power is cut, since a real server's falls silent at once.

use anyhow::{Context, Result, bail};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

/// Where the machines' disks are while the drill runs. Their QEMUs are known by it.
pub const DIR: &str = "/var/lib/haven-install-drill";
/// Where the Debian tree and the tiny guest stay.
const CACHE: &str = "/var/cache/haven-install-drill";
/// The network between the machines, with the client.
const FABRIC: &str = "hvi-fabric";
/// What the tree is made by; another recipe makes another tree.
const RECIPES: [&str; 4] =
    ["xtask/machines/tree.sh", "guests/tiny/build.sh", "guests/tiny/init", "guests/tiny/whoami"];
/// How long a machine may take to be up, or down.
const PATIENCE: Duration = Duration::from_secs(60);

/// What is on, by name; all of it goes with this value.
pub struct Machines(BTreeMap<String, Child>);

/// Runs a program of this machine, and fails with what it said.
pub fn tool(program: &str, args: &[&str]) -> Result<String> {
    said(Command::new(program).args(args))
}

fn said(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output().context("it cannot be started")?;
    let out = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        let error = String::from_utf8_lossy(&output.stderr);
        bail!("{command:?} failed: {}\n{out}", error.trim());
    }
    Ok(out)
}

/// Waits until something holds.
pub fn until(what: &str, limit: Duration, holds: impl Fn() -> Result<bool>) -> Result<()> {
    let begin = Instant::now();
    loop {
        let met = holds();
        if matches!(met, Ok(true)) {
            return Ok(());
        }
        if begin.elapsed() > limit {
            let why = met.err().map(|error| format!(": {error:#}")).unwrap_or_default();
            bail!("{what}: not within {} s{why}", limit.as_secs());
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// The machines' control groups, where the kernel's one hierarchy is mounted.
fn groups() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/mounts")?;
    let mut lines = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let found = lines.find(|fields| fields.get(2) == Some(&"cgroup2"));
    let found = found.context("no cgroup2 is mounted on this machine; systemd needs one")?;
    Ok(Path::new(found[1]).join("haven-install-drill"))
}

/// Builds the tree once per recipe.
fn tree() -> Result<()> {
    let recipe: Result<Vec<String>, _> = RECIPES.iter().map(fs::read_to_string).collect();
    let recipe = recipe.context("run this in the root of Haven's source")?.concat();
    let mark = Path::new(CACHE).join("recipe");
    if fs::read_to_string(&mark).is_ok_and(|built| built == recipe) {
        return Ok(());
    }
    println!("building a Debian 13 with systemd (two minutes, once; it stays in {CACHE})");
    fs::create_dir_all(CACHE)?;
    tool("bash", &[RECIPES[0], &format!("{CACHE}/tree"), RECIPES[1]])?;
    Ok(fs::write(mark, recipe)?)
}

/// The tiny guest's file of that name.
#[must_use]
pub fn guest(file: &str) -> PathBuf {
    Path::new(CACHE).join("tree/tiny").join(file)
}

impl Machines {
    /// Makes the network and switches the machines on, the first with the address 10.88.0.1.
    pub fn make(names: &[&str]) -> Result<Self> {
        clean()?;
        tree()?;
        let mut machines = Self(BTreeMap::new());
        let ip = |args: &str| {
            tool("ip", &[&["-n", FABRIC], &args.split(' ').collect::<Vec<_>>()[..]].concat())
        };
        tool("ip", &["netns", "add", FABRIC])?;
        ip("link add br0 type bridge forward_delay 0")?;
        ip("addr add 10.88.0.254/24 dev br0")?;
        ip("link set br0 up")?;
        for name in names {
            machines.power_on(name)?;
        }
        Ok(machines)
    }

    /// Switches a machine on and waits until its systemd is through.
    pub fn power_on(&mut self, name: &str) -> Result<()> {
        let (netns, port) = (format!("hvi-{name}"), format!("p-{name}"));
        let _ = tool("ip", &["netns", "del", &netns]);
        tool("ip", &["netns", "add", &netns])?;
        let cable = ["-n", FABRIC, "link", "add", &port, "type", "veth", "peer", "name", "eth0"];
        tool("ip", &[&cable[..], &["netns", &netns]].concat())?;
        tool("ip", &["-n", FABRIC, "link", "set", &port, "master", "br0", "up"])?;
        let (group, disk) = (groups()?.join(name), format!("{DIR}/{name}"));
        fs::create_dir_all(&group)?;
        fs::create_dir_all(&disk)?;
        let log = fs::File::create(format!("{disk}/boot.log"))?;
        // In its own control group before it has a namespace of them. It ends with this process.
        let script =
            "echo $$ > \"$0/cgroup.procs\" && exec setpriv --pdeathsig KILL ip netns exec \"$@\"";
        let address = format!("10.88.0.{}", name.trim_start_matches("host"));
        let child = Command::new("bash")
            .args(["-c", script])
            .arg(&group)
            .args([&netns, "unshare", "--mount", "--pid", "--uts", "--ipc", "--cgroup"])
            .args(["--fork", "--kill-child", "bash", "xtask/machines/boot.sh"])
            .args([&disk, name, &format!("{CACHE}/tree/root"), &address])
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        self.0.insert(name.to_owned(), child);
        until(&format!("systemd of {name} is up, see {disk}/boot.log"), PATIENCE, || {
            let state = self.run(name, "systemctl is-system-running || true")?;
            Ok(matches!(state.trim(), "running" | "degraded"))
        })
    }

    /// The machine's first process, as this machine counts.
    fn init(&self, name: &str) -> Result<String> {
        let outer = self.0.get(name).with_context(|| format!("{name} is off"))?.id();
        let children = fs::read_to_string(format!("/proc/{outer}/task/{outer}/children"))?;
        let first = children.split_whitespace().next();
        Ok(first.with_context(|| format!("{name} has no first process"))?.to_owned())
    }

    /// Runs a script as root of a machine, and gives what it said.
    pub fn run(&self, name: &str, script: &str) -> Result<String> {
        let init = self.init(name)?;
        let mut command = Command::new("nsenter");
        command.args(["--net", "--mount", "--pid", "--uts", "--ipc", "--cgroup", "--target"]);
        command.arg(&init).arg(format!("--root=/proc/{init}/root")).args(["env", "-i", "-C", "/"]);
        command.args(["HOME=/root", "PATH=/usr/sbin:/usr/bin", "DEBIAN_FRONTEND=noninteractive"]);
        said(command.args(["bash", "-c", script])).with_context(|| format!("on {name}"))
    }

    /// Copies a file into `/root` of a machine.
    pub fn put(&self, name: &str, file: &Path) -> Result<()> {
        let base = file.file_name().context("a file has a name")?;
        let to = Path::new("/proc").join(self.init(name)?).join("root/root").join(base);
        fs::copy(file, &to).with_context(|| format!("{} cannot be copied", file.display()))?;
        Ok(())
    }

    /// Cuts a machine's power.
    pub fn power_off(&mut self, name: &str) -> Result<()> {
        let init = self.init(name)?;
        tool("ip", &["-n", FABRIC, "link", "del", &format!("p-{name}")])?;
        tool("kill", &["-9", &init])?;
        self.0.remove(name).context("it was on")?.wait()?;
        Ok(())
    }

    /// Shuts a machine down in order, and gives how long it took.
    pub fn shut_down(&mut self, name: &str) -> Result<Duration> {
        let begin = Instant::now();
        self.run(name, "systemctl poweroff")?;
        let mut child = self.0.remove(name).context("it was on")?;
        while child.try_wait()?.is_none() {
            if begin.elapsed() > PATIENCE {
                self.0.insert(name.to_owned(), child);
                bail!("{name} is not down after {} s", PATIENCE.as_secs());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        tool("ip", &["-n", FABRIC, "link", "del", &format!("p-{name}")])?;
        Ok(begin.elapsed())
    }

    /// What a client outside the machines gets from an address.
    pub fn ask(address: &str) -> Result<String> {
        tool("ip", &["netns", "exec", FABRIC, "curl", "-sf", "--max-time", "2", address])
    }
}

impl Drop for Machines {
    fn drop(&mut self) {
        for child in self.0.values_mut() {
            let _ = child.kill();
            let _ = child.wait();
        }
        if let Err(error) = clean() {
            eprintln!("not all of the machines could be removed: {error:#}");
        }
    }
}

/// Removes what this or an interrupted run left.
fn clean() -> Result<()> {
    for line in tool("ip", &["netns", "list"])?.lines() {
        let name = line.split(' ').next().unwrap_or_default();
        if name.starts_with("hvi-") {
            tool("ip", &["netns", "del", name])?;
        }
    }
    let groups = groups()?;
    if groups.exists() {
        let groups = groups.display().to_string();
        // A process that was killed may still be on its way out of its group.
        until("the machines' processes are gone", PATIENCE, || {
            tool("find", &[&groups, "-depth", "-type", "d", "-delete"]).map(|_| true)
        })?;
    }
    if Path::new(DIR).exists() {
        fs::remove_dir_all(DIR).with_context(|| format!("{DIR} cannot be removed"))?;
    }
    Ok(())
}
