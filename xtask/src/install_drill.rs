//! `docs/guide/install.md`, walked by a stranger: the package on three machines with systemd, a cluster of them, and all
//! that an operator does to the units while VMs run. What must disturb no VM is judged by the VMs' processes, seen from
//! outside.

use crate::{
    drill::{copies, is_root},
    machines::{DIR, Machines, guest, until},
};
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::{
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

const HOSTS: [&str; 3] = ["host1", "host2", "host3"];
const ADDRESS: &str = "http://10.88.0.100/";
/// Until a cluster is whole again: a proof takes 5 s, a guest under emulation 2 to 10 s, the trial of KVM up to 30 s.
const PATIENCE: Duration = Duration::from_secs(120);
/// Longer than a guard's deadline is away: what a daemon that is gone costs shows by then.
const DEADLINE: Duration = Duration::from_secs(6);
/// systemd starts a killed guard again after 50 ms; the rest is this machine's.
const GUARD_BACK_S: f64 = 0.5;

/// Builds the package, makes the machines, walks, and leaves nothing but the cached Debian tree.
pub fn run(release: bool) -> Result<()> {
    ensure!(is_root(), "the install drill needs root; run it with sudo");
    let packages = [package(release, "1")?, package(release, "1+drill")?];
    let mut walk = Walk { machines: Machines::make(&HOSTS)?, passed: 0 };
    let done = walk.all(&packages);
    if done.is_err() {
        walk.tell();
    }
    done
}

/// The package in a revision; the second time nothing is built.
fn package(release: bool, revision: &str) -> Result<PathBuf> {
    let version = format!("{}-{revision}", env!("CARGO_PKG_VERSION"));
    // Not beside each other in `target/debian`, which `cargo deb` empties.
    let file = PathBuf::from(format!("target/install-drill/haven_{version}_amd64.deb"));
    std::fs::create_dir_all("target/install-drill")?;
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(["deb", "-p", "haven", "--quiet", "--deb-version", &version]);
    command.arg("--output").arg(&file);
    if !release {
        command.args(["--profile", "dev"]);
    }
    if revision != "1" {
        command.arg("--no-build");
    }
    if !command.status()?.success() {
        bail!(
            "`cargo deb` failed; if it is missing: cargo install cargo-deb --version 3.7.0 --locked"
        );
    }
    Ok(file)
}

struct Walk {
    machines: Machines,
    passed: u32,
}

impl Walk {
    fn all(&mut self, packages: &[PathBuf; 2]) -> Result<()> {
        self.step("the package installs with all it needs, and its units run", |walk| {
            walk.install(&packages[0])
        })?;
        self.step("a cluster of three, all of them voters", |walk| walk.cluster())?;
        self.step("an image, a service, an answer outside", |walk| walk.service())?;
        let harmless = [
            ("host1", "systemctl restart haven"),
            ("host2", "systemctl kill -s KILL haven"),
            ("host3", "systemctl stop haven && sleep 2 && systemctl start haven"),
            // As needrestart does.
            ("host1", "systemctl restart haven-guard haven"),
        ];
        for (host, script) in harmless {
            self.step(&format!("`{script}` disturbs no VM"), |walk| {
                walk.undisturbed(host, script)
            })?;
        }
        self.step(
            "a guard that is killed again and again is back at once and disturbs no VM",
            |walk| walk.guard(),
        )?;
        self.step("an upgrade, host by host, disturbs no VM", |walk| walk.upgrade(&packages[1]))?;
        self.step("a power cut: the others take over, the host comes back by itself", |walk| {
            walk.lose(|machines, host| machines.power_off(host))
        })?;
        self.step("a shutdown: the same, and no VM is told to have crashed", |walk| {
            walk.lose(|machines, host| {
                println!(
                    "     {host} was down after {:.1} s",
                    machines.shut_down(host)?.as_secs_f64()
                );
                Ok(())
            })
        })?;
        self.step("a purge ends what runs here and leaves /var/lib/haven", |walk| walk.purge())?;
        println!("{} passed, 0 failed: the guide is true", self.passed);
        Ok(())
    }

    fn step(&mut self, what: &str, act: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        let begin = Instant::now();
        act(self).with_context(|| format!("failed: {what}"))?;
        once_each()?;
        println!("ok   {what} ({:.1} s)", begin.elapsed().as_secs_f64());
        self.passed += 1;
        Ok(())
    }

    /// What the machines have to say of a failure.
    fn tell(&self) {
        for host in HOSTS {
            let script = "haven status 2>&1; haven events 2>&1 | tail -8; \
                          journalctl -u haven -u haven-guard --no-pager -n 25";
            if let Ok(said) = self.machines.run(host, script) {
                println!("--- {host}\n{said}");
            }
        }
    }

    fn install(&self, package: &Path) -> Result<()> {
        for host in HOSTS {
            self.machines.put(host, package)?;
        }
        let install = |host: &str| self.machines.run(host, "apt-get install -y /root/haven_*.deb");
        std::thread::scope(|scope| {
            let all = HOSTS.map(|host| scope.spawn(move || install(host)));
            all.into_iter().try_for_each(|one| {
                let said = one.join().expect("an install does not panic")?;
                ensure!(
                    said.contains("haven init --name"),
                    "it does not say what is next:\n{said}"
                );
                Ok(())
            })
        })?;
        for host in HOSTS {
            self.machines.run(host, "systemctl disable --now etcd haproxy")?;
            for verb in ["is-enabled", "is-active"] {
                self.machines.run(host, &format!("systemctl {verb} haven haven-guard"))?;
            }
            let shown = self.machines.run(host, "systemctl show haven")?;
            for wanted in ["KillMode=process", "OOMPolicy=continue", "TasksMax=infinity"] {
                ensure!(shown.lines().any(|line| line == wanted), "{host}: haven has no {wanted}");
            }
        }
        Ok(())
    }

    fn cluster(&self) -> Result<()> {
        let run = |host: &str, script: &str| self.machines.run(host, script);
        run(HOSTS[0], "haven init --name prod --address 10.88.0.1")?;
        for (number, host) in (2..).zip(&HOSTS[1..]) {
            until("the cluster answers", PATIENCE, || run(HOSTS[0], "haven status").map(|_| true))?;
            let token = run(HOSTS[0], "haven host invite")?;
            let join = format!("haven join {} 10.88.0.1 --address 10.88.0.{number}", token.trim());
            run(host, &join)?;
        }
        self.whole(0)
    }

    fn service(&self) -> Result<()> {
        for file in [guest("vmlinuz"), guest("initrd"), "examples/hello.yaml".into()] {
            self.machines.put(HOSTS[0], &file)?;
        }
        self.machines.run(
            HOSTS[0],
            "cd /root && haven image import tiny --kernel vmlinuz --initrd initrd \
             --cmdline 'console=ttyS0 quiet mitigations=off panic=1' && \
             haven apply -f hello.yaml --wait --timeout 300",
        )?;
        self.whole(3)?;
        for host in HOSTS {
            self.scopes(host)?;
        }
        Ok(())
    }

    /// Every VM of a host has a scope, so that nothing done to the daemon's unit reaches it.
    fn scopes(&self, host: &str) -> Result<()> {
        until(&format!("every VM of {host} has its scope"), DEADLINE, || {
            let count = |script: &str| -> Result<usize> {
                Ok(self.machines.run(host, script)?.lines().count())
            };
            let scopes =
                count("systemctl list-units --no-legend --state running 'haven-vm-*.scope'")?;
            Ok(scopes == count("pgrep -f ^/usr/bin/qemu-system || true")?)
        })
    }

    fn status(&self, host: &str) -> Result<Value> {
        Ok(serde_json::from_str(&self.machines.run(host, "haven status --json")?)?)
    }

    /// Waits until every host is online and votes, so many VMs run, and the service answers if there are any.
    fn whole(&self, vms: u64) -> Result<()> {
        until("the cluster is whole", PATIENCE, || {
            let status = self.status(HOSTS[0])?;
            let online = |host: &Value| host["state"].as_str() == Some("online");
            let hosts = status["hosts"].as_array().context("a status has hosts")?;
            Ok(hosts.len() == 3
                && hosts.iter().all(online)
                && status["voters"] == serde_json::json!([3, 3])
                && status["vms"] == serde_json::json!([vms, vms])
                && (vms == 0 || Machines::ask(ADDRESS).is_ok()))
        })
    }

    /// Does something to a host that must leave every VM alone.
    fn undisturbed(&self, host: &str, script: &str) -> Result<()> {
        let before = copies(DIR)?;
        self.machines.run(host, script)?;
        std::thread::sleep(DEADLINE);
        self.whole(3)?;
        let after = copies(DIR)?;
        ensure!(before == after, "the VMs' processes were {before:?} and are {after:?}");
        self.scopes(host)
    }

    /// Six times in a row on each host: systemd, left to its defaults, would give up after five.
    fn guard(&self) -> Result<()> {
        let script = "for _ in 1 2 3 4 5 6; do \
             old=$(systemctl show -P MainPID haven-guard); cut -d' ' -f1 /proc/uptime; kill -9 $old; \
             until new=$(systemctl show -P MainPID haven-guard); [ $new != $old ] && [ $new != 0 ]; do :; done; \
             systemctl show -P ExecMainStartTimestampMonotonic haven-guard; done";
        let before = copies(DIR)?;
        for host in HOSTS {
            let said = self.machines.run(host, script)?;
            let times: Vec<f64> = said.lines().filter_map(|line| line.parse().ok()).collect();
            ensure!(times.len() == 12, "not twelve times: {said}");
            let gone_s = times.chunks(2).map(|pair| pair[1] / 1e6 - pair[0]).fold(0.0, f64::max);
            println!("     the guard of {host} was away for {:.0} ms at most", gone_s * 1e3);
            ensure!(gone_s < GUARD_BACK_S, "{host} was without a guard for {gone_s} s");
        }
        std::thread::sleep(DEADLINE);
        ensure!(before == copies(DIR)?, "a VM's process is another");
        self.whole(3)
    }

    fn upgrade(&self, package: &Path) -> Result<()> {
        for host in HOSTS {
            self.machines.put(host, package)?;
        }
        let name = package.file_name().context("a package has a name")?.display().to_string();
        for host in HOSTS {
            self.undisturbed(host, &format!("apt-get install -y /root/{name}"))?;
            let version = self.machines.run(host, "dpkg-query -W -f '${Version}' haven")?;
            ensure!(name == format!("haven_{version}_amd64.deb"), "{host} still has {version}");
        }
        Ok(())
    }

    /// How many losses a host knows of, with what was done about them.
    fn losses(&self, host: &str) -> Result<usize> {
        let events = self.machines.run(host, "haven events")?;
        Ok(events.lines().filter(|line| line.contains(" is lost")).count())
    }

    /// Loses the host that holds the address, and switches it on again once the others do all its work.
    fn lose(&mut self, lose: impl FnOnce(&mut Machines, &str) -> Result<()>) -> Result<()> {
        let status = self.status(HOSTS[0])?;
        let holder = status["services"][0]["holder"].as_str().context("somebody holds it")?;
        let other = HOSTS.into_iter().find(|host| *host != holder).context("there are others")?;
        let (earlier, before) = (self.losses(other)?, copies(DIR)?);
        let begin = Instant::now();
        lose(&mut self.machines, holder)?;
        until("the others do its work", PATIENCE, || {
            once_each()?;
            Machines::ask(ADDRESS)?;
            Ok(self.status(other)?["vms"] == serde_json::json!([3, 3]) && copies(DIR)?.len() == 3)
        })?;
        let taken_s = begin.elapsed().as_secs_f64();
        self.machines.power_on(holder)?;
        self.whole(3)?;
        let (back_s, after) = (begin.elapsed().as_secs_f64(), copies(DIR)?);
        println!(
            "     {holder}'s work was done elsewhere after {taken_s:.1} s, it was back after {back_s:.1} s"
        );
        let moved = before.iter().filter(|(vm, pids)| after.get(*vm) != Some(*pids)).count();
        ensure!(self.losses(other)? > earlier, "{holder} was not taken for lost");
        ensure!(moved > 0, "no VM of {holder} was started elsewhere: {before:?}, {after:?}");
        let events = self.machines.run(other, "haven events")?;
        ensure!(!events.contains("ended"), "a VM is told to have ended by itself:\n{events}");
        Ok(())
    }

    fn purge(&self) -> Result<()> {
        let status = self.status(HOSTS[0])?;
        let hosts = status["hosts"].as_array().context("a status has hosts")?;
        let busiest = hosts.iter().max_by_key(|host| host["vms"].as_u64());
        let host = busiest.and_then(|host| host["name"].as_str()).context("there is a host")?;
        let said = self.machines.run(host, "apt-get purge -y haven")?;
        ensure!(said.contains("/var/lib/haven is left as it is"), "it does not say so:\n{said}");
        self.machines
            .run(host, "test -e /var/lib/haven/host.json && ! pgrep -f ^/usr/bin/qemu-system")?;
        self.machines.run(host, "! systemctl cat haven haven-guard 2> /dev/null")?;
        until("the others do its work", PATIENCE, || {
            Machines::ask(ADDRESS)?;
            Ok(copies(DIR)?.len() == 3)
        })
    }
}

/// No VM has two processes.
fn once_each() -> Result<()> {
    match copies(DIR)?.into_iter().find(|(_, pids)| pids.len() > 1) {
        Some((vm, pids)) => bail!("{vm} runs {} times: processes {}", pids.len(), pids.join(", ")),
        None => Ok(()),
    }
}
