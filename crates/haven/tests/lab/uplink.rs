//! A host that loses only the cable of its guests' network.

use crate::{
    lab::{HOSTS, Lab},
    witness::Witness,
};
use anyhow::{Context, Result, bail};
use haven_lab::asking::{Asking, STEADILY, failures, longest_gap};
use haven_model::object::Kind;
use std::{
    process::Command,
    time::{Duration, Instant},
};

/// A guest in a bridge of the hosts, and an address of a service in the same network. The service's member is not in
/// it, so that only the address has to move.
const MANIFEST: &str = "kind: Network\nname: lan\ndriver: bridge\nbridge: br9\nsubnet: 10.79.0.0/25\n---\n\
    kind: VM\nname: lan-1\nimage: tiny\nmemory: 128MiB\nnetworks:\n- network: lan\n---\n\
    kind: Service\nname: edge\nreplicas: 1\ntemplate:\n  spec:\n    image: tiny\n    memory: 128MiB\n    networks:\n    - network: front\n\
    check:\n  mode: http\n  port: 80\nfrontend:\n  address: 10.79.0.200\n  port: 80\n  mode: http\n";
/// The host's cable has to be out for a second; the rest is a live move on two busy cores.
const MOVED: Duration = Duration::from_secs(15);
/// So long after a guest runs elsewhere the switch has surely learned it.
const LEARNED: Duration = Duration::from_secs(1);

fn ip(namespace: &str, command: &str) -> Result<()> {
    let args = ["-n", namespace].into_iter().chain(command.split(' '));
    let output = Command::new("ip").args(args).output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    anyhow::ensure!(output.status.success(), "`ip -n {namespace} {command}`: {said}");
    Ok(())
}

/// A second network of the hosts and the client, beside that of the cluster: a switch with a cable to each.
fn lay(id: &str) -> Result<()> {
    let fabric = format!("{id}-fab");
    ip(&fabric, "link add lan type bridge")?;
    ip(&fabric, "link set lan up")?;
    for (host, number) in HOSTS.into_iter().chain(["client"]).zip(1..) {
        let namespace = format!("{id}-{host}");
        let peer = format!("link add lan{number} type veth peer name eth9 netns {namespace}");
        ip(&fabric, &peer)?;
        ip(&fabric, &format!("link set lan{number} master lan up"))?;
        ip(&namespace, "link set eth9 up")?;
        if host == "client" {
            // Within the guests' subnet: they have no gateway there.
            ip(&namespace, "addr add 10.79.0.100/24 dev eth9")?;
        } else {
            ip(&namespace, "link add br9 type bridge")?;
            ip(&namespace, "link set eth9 master br9")?;
            ip(&namespace, "link set br9 up")?;
            ip(&namespace, &format!("addr add 10.79.0.{}/24 dev br9", 240 + number))?;
        }
    }
    Ok(())
}

fn take_up(id: &str) -> Result<()> {
    for host in HOSTS {
        ip(&format!("{id}-{host}"), "link del br9")?;
    }
    for number in 1..=4 {
        ip(&format!("{id}-fab"), &format!("link del lan{number}"))?;
    }
    ip(&format!("{id}-fab"), "link del lan")
}

/// The address of the guest.
fn guest(lab: &Lab) -> Result<String> {
    let list = lab.ask(|client| async move { client.list(Kind::Vm).await })?;
    let item = list.iter().find(|item| item.object.meta().name.as_str() == "lan-1");
    let address = item.and_then(|item| item.columns.get("addresses").cloned());
    address.context("lan-1 has an address")
}

/// The host that holds the service's address.
fn holder(lab: &haven_lab::drive::Driver) -> Result<String> {
    let overview = lab.overview()?;
    let line = overview.services.iter().find(|line| line.name == "edge");
    line.map(|line| line.holder.clone()).context("edge's address has a holder")
}

pub fn cut(lab: &mut Lab, witness: &Witness) -> Result<()> {
    let id = lab.haven(&["lab", "id"])?;
    lay(&id)?;
    witness.moves(true);
    lab.apply(MANIFEST, &["--wait", "--timeout", "120"])?;
    let from = holder(lab)?;
    if lab.host_of("lan-1")? != from {
        lab.haven(&["vm", "migrate", "lan-1", "--to", &from])?;
    }
    let address = guest(lab)?;
    let asking = Asking::start(lab, &format!("{address}:80"), STEADILY)?;
    std::thread::sleep(Duration::from_secs(2));
    let number = HOSTS.iter().position(|host| *host == from).context("a host")? + 1;
    let cable = |to: &str| ip(&format!("{id}-fab"), &format!("link set lan{number} {to}"));
    cable("down")?;
    let begin = Instant::now();
    lab.wait("the guest is elsewhere", MOVED, |lab| {
        lab.host_of("lan-1").is_ok_and(|host| host != from)
    })?;
    lab.wait("the address is elsewhere", MOVED, |lab| {
        holder(lab).is_ok_and(|holder| holder != from)
    })?;
    let there = Instant::now();
    let passed = (there - begin).as_secs_f64();
    println!("  guest and address were elsewhere {passed:.2} s after the cut");
    std::thread::sleep(Duration::from_secs(3));
    let asked = asking.end()?;
    let late = asked.iter().filter(|a| !a.good && a.begin > there + LEARNED).count();
    println!(
        "  the longest time without a good answer was {:.2} s ({})",
        longest_gap(&asked),
        failures(&asked)
    );
    if late > 0 || !asked.iter().any(|a| a.good && a.begin > there + LEARNED) {
        bail!("{late} questions failed where the guest is now: {}", failures(&asked));
    }
    let status = lab.haven(&["status"])?;
    let said = "eth9 of the bridge br9 has no link";
    if !status.contains(said) {
        bail!("`haven status` should say `{said}`, and says: {status}");
    }
    // The address answers outside where it is now.
    let asking = Asking::start(lab, "10.79.0.200:80", STEADILY)?;
    std::thread::sleep(Duration::from_secs(2));
    let asked = asking.end()?;
    if asked.iter().any(|a| !a.good) {
        bail!("the address does not answer on {}: {}", holder(lab)?, failures(&asked));
    }
    let boots = lab.boots_of("lan-1");
    if boots != 1 {
        bail!("the guest booted {boots} times: it was started anew instead of moved");
    }
    cable("up")?;
    lab.wait("nothing is told as cut off", Duration::from_secs(30), |lab| {
        lab.haven(&["status"]).is_ok_and(|status| !status.contains("br9"))
    })?;
    if lab.host_of("lan-1")? == from {
        bail!("it should stay where it is");
    }
    lab.haven(&["delete", "vm/lan-1", "service/edge", "--wait"])?;
    lab.haven(&["delete", "network/lan", "--wait"])?;
    take_up(&id)?;
    crate::moves::alone(lab, witness)
}
