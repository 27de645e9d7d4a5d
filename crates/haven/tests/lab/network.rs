//! Guests on an overlay: each other, the world outside, and an address that is not theirs.

use crate::{lab::Lab, witness::Witness};
use anyhow::{Context, Result, bail};
use haven_lab::drive::Driver;
use haven_model::object::Kind;
use std::{
    collections::BTreeSet,
    io::{Read, Write},
    net::{IpAddr, TcpListener},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

/// Guests under emulation, beside other tests.
const PATIENCE: Duration = Duration::from_secs(120);

/// The one that is asked; its address is chosen by Haven.
const ASKED: &str = r#"
kind: VM
name: pair-b
labels: {pair: "yes"}
image: tiny
memory: 128MiB
networks:
- network: front
"#;
/// The one that asks: its neighbour on another host, a server outside the cluster, and, under an address that nobody
/// gave it, the neighbour again.
const ASKING: &str = r#"
kind: VM
name: pair-a
image: tiny
memory: 128MiB
networks:
- network: front
affinity:
  apart: {pair: "yes"}
userData: |
  #!/bin/sh
  say() { echo "$@" > /dev/console; }
  sleep 1
  while true; do
    say "near $(wget -q -T 2 -O - http://NEIGHBOUR/cgi-bin/whoami)"
    say "far $(wget -q -T 2 -O - http://10.88.0.250:8080/)"
    ping -q -c 1 -W 1 NEIGHBOUR > /dev/null && say "true passed"
    ip addr add 10.77.0.99/32 dev eth0
    if ping -q -c 1 -W 1 -I 10.77.0.99 NEIGHBOUR > /dev/null; then say "false passed"; else say "false refused"; fi
    ip addr del 10.77.0.99/32 dev eth0
    usleep 300000
  done
"#;

/// A server in the client's namespace; who asked it.
fn outside(lab: &Lab) -> Result<Arc<Mutex<BTreeSet<IpAddr>>>> {
    let namespace = format!("/var/run/netns/{}-client", lab.haven(&["lab", "id"])?);
    let (made, is_made) = std::sync::mpsc::channel();
    let asked_by = Arc::new(Mutex::new(BTreeSet::new()));
    let told = Arc::clone(&asked_by);
    std::thread::spawn(move || {
        let listen = || -> Result<TcpListener> {
            let file = std::fs::File::open(&namespace).context(namespace)?;
            // Of this thread only.
            nix::sched::setns(file, nix::sched::CloneFlags::CLONE_NEWNET)?;
            Ok(TcpListener::bind("0.0.0.0:8080")?)
        };
        let listener = match listen() {
            Ok(listener) => listener,
            Err(why) => return drop(made.send(Err(why))),
        };
        drop(made.send(Ok(())));
        // Until the test's process ends.
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { continue };
            if let Ok(peer) = stream.peer_addr() {
                told.lock().unwrap_or_else(PoisonError::into_inner).insert(peer.ip());
            }
            let _ = stream.read(&mut [0; 1024]);
            let _ = stream.write_all(b"HTTP/1.0 200 OK\r\n\r\noutside\n");
        }
    });
    is_made.recv()??;
    Ok(asked_by)
}

/// The lines of pair-a's console that begin with a word, without it.
fn said(lab: &Driver, word: &str) -> Vec<String> {
    let text = lab.haven(&["vm", "log", "pair-a"]).unwrap_or_default();
    let lines = text.lines().filter_map(|line| line.trim().strip_prefix(word));
    lines.map(|rest| rest.trim().to_owned()).collect()
}

/// The boots of pair-b that pair-a reached.
fn boots(lab: &Driver) -> BTreeSet<String> {
    let near = said(lab, "near pair-b");
    near.iter().filter_map(|line| line.split_whitespace().nth(1).map(str::to_owned)).collect()
}

fn address_of(lab: &Lab, vm: &str) -> Result<String> {
    let list = lab.ask(|client| async move { client.list(Kind::Vm).await })?;
    let item = list.iter().find(|item| item.object.meta().name.as_str() == vm);
    let address = item.and_then(|item| item.columns.get("addresses")).filter(|a| !a.is_empty());
    address.cloned().with_context(|| format!("{vm} has no address"))
}

pub fn reach(lab: &mut Lab, _: &Witness) -> Result<()> {
    let asked_by = outside(lab)?;
    lab.apply(ASKED, &["--wait", "--timeout", "120"])?;
    let neighbour = address_of(lab, "pair-b")?;
    lab.apply(&ASKING.replace("NEIGHBOUR", &neighbour), &["--wait", "--timeout", "120"])?;
    let (a, b) = (lab.host_of("pair-a")?, lab.host_of("pair-b")?);
    if a == b {
        bail!("pair-a must be on another host than pair-b, and both are on {a}");
    }
    lab.wait("pair-a reaches pair-b", PATIENCE, |lab| boots(lab).len() == 1)?;
    lab.wait("pair-a reaches the world outside", PATIENCE, |lab| {
        said(lab, "far").iter().any(|line| line == "outside")
    })?;
    lab.wait("pair-a's packets pass", PATIENCE, |lab| !said(lab, "true passed").is_empty())?;
    lab.wait("pair-a tried a false address", PATIENCE, |lab| !said(lab, "false").is_empty())?;
    let peers = asked_by.lock().unwrap_or_else(PoisonError::into_inner).clone();
    if peers.iter().any(|peer| peer.to_string().starts_with("10.77.")) {
        bail!("outside its network a guest's address must be its host's, and was {peers:?}");
    }
    lab.haven(&["lab", "kill", &b])?;
    lab.wait("pair-b is on another host", PATIENCE, |lab| {
        lab.host_of("pair-b").is_ok_and(|host| host != b)
    })?;
    lab.wait("pair-a reaches the new copy of pair-b", PATIENCE, |lab| boots(lab).len() == 2)?;
    if address_of(lab, "pair-b")? != neighbour {
        bail!("pair-b must keep {neighbour}, and has {}", address_of(lab, "pair-b")?);
    }
    lab.haven(&["lab", "start", &b])?;
    let tried = said(lab, "false");
    if tried.iter().any(|line| line != "refused") {
        bail!("a guest sent from an address that is not its own: {tried:?}");
    }
    println!("  {} times a false address was refused", tried.len());
    for vm in ["pair-a", "pair-b"] {
        lab.haven(&["vm", "rm", vm, "--wait"])?;
    }
    Ok(())
}
