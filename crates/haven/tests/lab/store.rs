//! A member of the store that no longer runs.

use crate::{faults::undisturbed, lab::Lab, witness::Witness};
use anyhow::{Result, bail};
use haven_lab::drive::Driver;
use haven_model::units::Millis;
use nix::sys::signal::Signal;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(90);

fn voters(lab: &Driver, wanted: (usize, usize)) -> bool {
    lab.overview().is_ok_and(|seen| seen.voters == wanted)
}

fn told(lab: &Driver, words: &str) -> bool {
    lab.overview().is_ok_and(|seen| seen.risks.iter().any(|risk| risk.contains(words)))
}

/// Changes after how long a voter is replaced.
fn replaced_after(lab: &Lab, time: Millis) -> Result<()> {
    let mut item = lab.ask(|client| async move { client.cluster().await })?;
    item.spec.replace_voter_after = time;
    let item = &item;
    lab.ask(|client| async move { client.replace_cluster(item).await }).map(|_| ())
}

/// A member that cannot run is told and goes on once it can; one whose data are gone is replaced by a new one.
pub fn member_broken(lab: &mut Lab, witness: &Witness) -> Result<()> {
    let overview = lab.overview()?;
    let host = overview.hosts.iter().find(|host| !host.roles.iter().any(|role| role == "manager"));
    let Some(host) = host.map(|host| host.name.clone()) else { bail!("every host manages") };
    let run = |args: &[&str]| lab.haven(&[&["lab", "exec", &host, "--"], args].concat());
    let before = witness.newest();
    run(&["mv", "/usr/bin/etcd", "/usr/bin/etcd.away"])?;
    lab.signal(&host, "etcd --name", Signal::SIGKILL)?;
    lab.wait("a member that cannot be started is told", PATIENCE, |lab| {
        voters(lab, (2, 3)) && told(lab, "does not answer (etcd cannot be started")
    })?;
    if lab.overview()?.survivable != 0 {
        bail!("with two of three members no host may be lost, and status says one may");
    }
    run(&["mv", "/usr/bin/etcd.away", "/usr/bin/etcd"])?;
    lab.wait("it votes again", PATIENCE, |lab| voters(lab, (3, 3)))?;
    let usual = lab.ask(|client| async move { client.cluster().await })?.spec.replace_voter_after;
    replaced_after(lab, Millis(10_000))?;
    run(&["rm", "-rf", "/var/lib/haven/etcd"])?;
    lab.signal(&host, "etcd --name", Signal::SIGKILL)?;
    lab.wait("a member without its data is told", PATIENCE, |lab| voters(lab, (2, 3)))?;
    lab.wait("a new member votes in its place", PATIENCE, |lab| voters(lab, (3, 3)))?;
    replaced_after(lab, usual)?;
    for (vm, copy) in witness.newest() {
        if before.get(&vm).is_none_or(|old| old.boot != copy.boot) {
            bail!("{vm} was disturbed by what befell the store");
        }
    }
    Ok(())
}

/// The disk of a member is full: it ends, is told with the reason, and goes on once there is room. Nobody else notices.
pub fn disk_full(lab: &mut Lab, witness: &Witness) -> Result<()> {
    let host = lab.host_of("tick-1")?;
    let run = |script: &str| lab.haven(&["lab", "exec", &host, "--", "sh", "-ec", script]);
    // A small disk under its data, with holes where files were made longer in advance.
    run("pkill -STOP -x etcd; mkdir -p /run/small
        mount -t tmpfs -o size=256m tmpfs /run/small
        cp -a --sparse=always /var/lib/haven/etcd/. /run/small/
        chmod --reference=/var/lib/haven/etcd /run/small; chown --reference=/var/lib/haven/etcd /run/small
        mount --bind /run/small /var/lib/haven/etcd
        dd if=/dev/zero of=/run/small/filler bs=64k 2> /dev/null || true
        pkill -KILL -x etcd")?;
    let result = undisturbed(witness, Duration::from_secs(8)).and_then(|()| {
        lab.wait("a member without room is told", PATIENCE, |lab| {
            voters(lab, (2, 3)) && told(lab, "does not answer (etcd ended")
        })
    });
    run("rm /run/small/filler")?;
    result?;
    lab.wait("it votes again", PATIENCE, |lab| voters(lab, (3, 3)))?;
    // Back to the disk that it had.
    run("pkill -STOP -x etcd; mkdir -p /run/under; mount --bind /var/lib/haven /run/under
        rm -rf /run/under/etcd/*; cp -a --sparse=always /run/small/. /run/under/etcd/
        umount /run/under; umount -l /var/lib/haven/etcd; umount -l /run/small
        pkill -KILL -x etcd")?;
    lab.voting()?;
    undisturbed(witness, Duration::from_secs(4))
}

/// Nobody without a certificate of the cluster speaks to the store, neither as a client nor as a member of it.
pub fn only_the_cluster(lab: &mut Lab, _: &Witness) -> Result<()> {
    let pki = lab.dir.join("hosts/host1/upper/var/lib/haven/pki");
    let file = |name: &str| pki.join(name).display().to_string();
    let (ca, certificate, key) = (file("ca.crt"), file("host.crt"), file("host.key"));
    let curl = |url: &str, options: &[&str]| {
        let args = ["lab", "exec", "client", "--", "curl", "-s", "--max-time", "5", url];
        lab.haven(&[&args[..], options].concat())
    };
    let own = ["--cacert", &ca, "--cert", &certificate, "--key", &key];
    // A member that the case before had filled its disk may just be starting again.
    lab.wait("with the cluster's certificate the store tells its health", PATIENCE, |_| {
        curl("https://10.88.0.1:7379/health", &own).is_ok_and(|health| health.contains("true"))
    })?;
    for port in [7379, 7380] {
        for (scheme, options) in [("http", &[][..]), ("https", &["-k"][..])] {
            let url = format!("{scheme}://10.88.0.1:{port}/health");
            if let Ok(said) = curl(&url, options) {
                bail!("{url} answers who has no certificate: {said}");
            }
        }
    }
    Ok(())
}

/// On five hosts: the vote of a lost host goes to another one, and five vote when a person asks for it.
pub fn five_hosts(lab: &Driver) -> Result<()> {
    lab.haven(&["lab", "down"])?;
    lab.haven(&["lab", "up", "--hosts", "5", "--no-power-control"])?;
    let change = |voters: u32, time: Millis| -> Result<()> {
        let mut item = lab.ask(|client| async move { client.cluster().await })?;
        item.spec.voters = voters;
        item.spec.replace_voter_after = time;
        let item = &item;
        lab.ask(|client| async move { client.replace_cluster(item).await }).map(|_| ())
    };
    change(3, Millis(10_000))?;
    lab.wait("three of five vote", PATIENCE, |lab| voters(lab, (3, 3)))?;
    lab.haven(&["lab", "kill", "host2"])?;
    lab.wait("the vote of a lost host is told", PATIENCE, |lab| voters(lab, (2, 3)))?;
    lab.wait("another host votes in its place", PATIENCE, |lab| voters(lab, (3, 3)))?;
    lab.haven(&["lab", "start", "host2"])?;
    lab.online("host2")?;
    change(5, Millis(600_000))?;
    lab.wait("all five vote", PATIENCE, |lab| voters(lab, (5, 5)))?;
    if lab.overview()?.survivable < 1 {
        bail!("of five voters one may be lost");
    }
    Ok(())
}
