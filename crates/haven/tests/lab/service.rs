//! Services and their addresses.

use crate::{lab::Lab, witness::Witness};
use anyhow::{Result, bail};
use haven_lab::asking::{Asked, Asking, STEADILY, failures};
use nix::sys::signal::Signal;
use std::time::{Duration, Instant};

/// A service whose only member cannot be where its address is.
const FAR: &str = "kind: Service\nname: far\nreplicas: 1\ntemplate:\n  spec:\n    image: tiny\n    memory: 128MiB\n    networks:\n    - network: front\n    affinity:\n      hosts:\n        guests: \"yes\"\ncheck:\n  mode: http\n  port: 80\nfrontend:\n  address: 10.88.0.100\n  port: 80\n  mode: http\n";

pub fn address_moves(lab: &mut Lab, _: &Witness) -> Result<()> {
    lab.label("host3", "guests", "yes")?;
    lab.apply(FAR, &["--wait", "--timeout", "120"])?;
    let holder = lab.overview()?.services.first().map(|s| s.holder.clone()).unwrap_or_default();
    if holder == "host3" || holder.is_empty() {
        bail!("the address should be on a host without the member, and is on `{holder}`");
    }
    let asking = Asking::start(lab, "10.88.0.100:80", STEADILY)?;
    std::thread::sleep(Duration::from_secs(1));
    let killed = Instant::now();
    lab.haven(&["lab", "kill", &holder])?;
    std::thread::sleep(Duration::from_secs(6));
    let asked = asking.end()?;
    lab.haven(&["lab", "start", &holder])?;
    let (before, after): (Vec<Asked>, Vec<Asked>) = asked.iter().partition(|a| a.begin < killed);
    if let Some(bad) = before.iter().find(|a| !a.good && a.end < killed) {
        bail!(
            "a member on another host must be reached as well as one beside the address: {bad:?}"
        );
    }
    // The figure (benches/figures/address.rs) says how long it takes; here it must only come back and stay.
    let settled = killed + Duration::from_secs(4);
    if !after.iter().any(|a| a.good) || after.iter().any(|a| a.begin > settled && !a.good) {
        bail!(
            "4 s after the holder's power cut not every question is answered: {}",
            failures(&asked)
        );
    }
    balancer_comes_back(lab)?;
    outlives_no_lease(lab)?;
    lab.haven(&["delete", "service/far"])?;
    lab.wait("the service is gone", Duration::from_secs(60), |lab| {
        lab.overview().is_ok_and(|overview| overview.services.is_empty())
    })
}

/// An HAProxy that ends is started again.
fn balancer_comes_back(lab: &Lab) -> Result<()> {
    let overview = lab.overview()?;
    let holder = overview.services.first().map(|s| s.holder.clone()).unwrap_or_default();
    let old = lab.signal(&holder, "haproxy -D", Signal::SIGKILL)?;
    lab.wait("HAProxy runs again", Duration::from_secs(5), |lab| {
        let now = lab.pids(&holder, "haproxy -D");
        !now.is_empty() && now.iter().all(|pid| !old.contains(pid))
    })?;
    let asking = Asking::start(lab, "10.88.0.100:80", STEADILY)?;
    std::thread::sleep(Duration::from_secs(2));
    let asked = asking.end()?;
    if asked.iter().rev().take(5).any(|a| !a.good) {
        bail!("questions fail after HAProxy was started again: {}", failures(&asked));
    }
    Ok(())
}

/// A holder whose daemon is frozen still answers for the address, until its guard takes it away; before that nobody
/// else has it.
fn outlives_no_lease(lab: &Lab) -> Result<()> {
    let holder = |lab: &haven_lab::drive::Driver| {
        let seen = lab.overview();
        seen.ok().and_then(|o| o.services.first().map(|s| s.holder.clone())).unwrap_or_default()
    };
    let has = |lab: &haven_lab::drive::Driver, host: &str| {
        let shown = lab.haven(&["lab", "exec", host, "--", "ip", "-o", "-4", "addr", "show"]);
        shown.is_ok_and(|shown| shown.contains("10.88.0.100/32"))
    };
    for host in ["host1", "host2", "host3"] {
        lab.online(host)?;
    }
    let old = holder(lab);
    if !has(lab, &old) {
        bail!("{old} should hold the address and does not have it");
    }
    lab.signal(&old, "haven daemon", Signal::SIGSTOP)?;
    let others = || lab.hosts.iter().filter(|host| **host != old).find(|host| has(lab, host));
    let until = Instant::now() + Duration::from_secs(20);
    let result = loop {
        // The new one is asked first: in between the old one can only have lost it.
        if let Some(new) = others() {
            let both = has(lab, &old);
            break if both {
                Err(format!("{new} and {old} both have the address"))
            } else {
                Ok(())
            };
        }
        if Instant::now() > until {
            break Err(format!("nobody took the address from {old}"));
        }
    };
    lab.signal(&old, "haven daemon", Signal::SIGCONT)?;
    lab.online(&old)?;
    result.map_err(anyhow::Error::msg)
}

/// Two members, replaced one after the other under load.
const PAIR: &str = "kind: Service\nname: pair\nreplicas: 2\ntemplate:\n  spec:\n    image: tiny\n    memory: 128MiB\n    networks:\n    - network: front\ncheck:\n  mode: http\n  port: 80\nfrontend:\n  address: 10.88.0.101\n  port: 80\n  mode: http\n";

pub fn rolls(lab: &mut Lab, _: &Witness) -> Result<()> {
    lab.apply(PAIR, &["--wait", "--timeout", "120"])?;
    let before = lab.haven(&["vm", "ls"])?;
    let asking = Asking::start(lab, "10.88.0.101:80", STEADILY)?;
    lab.haven(&["service", "restart", "pair", "--wait"])?;
    std::thread::sleep(Duration::from_secs(1));
    let asked = asking.end()?;
    let after = lab.haven(&["vm", "ls"])?;
    let bad = asked.iter().filter(|a| !a.good).count();
    println!("  {} questions during the update, {bad} failed", asked.len());
    if bad > 0 {
        bail!("an update under load lost questions: {}\n{before}\n{after}", failures(&asked));
    }
    lab.haven(&["delete", "service/pair", "--wait"])?;
    Ok(())
}

/// Two members, with an update of this kind. Each version says which it is by its memory.
fn staged(update: &str, memory: u32) -> String {
    format!("{}update: {update}\n", PAIR.replace("128MiB", &format!("{memory}MiB")))
}

/// A canary that goes on by itself, then a switch of all that a person promotes, then the way back; all under load.
pub fn versions(lab: &mut Lab, _: &Witness) -> Result<()> {
    let canary = "{strategy: canary, canary: {members: 1, weight: 20, hold: 5s}}";
    let by_hand = "{strategy: blue-green, promote: manual, keepOld: 20s}";
    lab.apply(&staged(canary, 128), &["--wait", "--timeout", "120"])?;
    let asking = Asking::start(lab, "10.88.0.101:80", STEADILY)?;
    lab.apply(&staged(canary, 136), &[])?;
    shows(lab, "new members get 20 % of the traffic")?;
    lab.apply(&staged(canary, 136), &["--wait", "--timeout", "120"])?;
    lab.apply(&staged(by_hand, 144), &[])?;
    shows(lab, "2 of 2 new members ready")?;
    shows(lab, "new members get 0 % of the traffic")?;
    lab.haven(&["service", "promote", "pair"])?;
    shows(lab, "new members get 100 % of the traffic")?;
    // Back again: the old members are there yet. It waits until those that it left are gone, too.
    lab.apply(&staged(by_hand, 136), &["--wait", "--timeout", "120"])?;
    std::thread::sleep(Duration::from_secs(1));
    let asked = asking.end()?;
    let bad = asked.iter().filter(|a| !a.good).count();
    println!("  {} questions during three updates, {bad} failed", asked.len());
    if bad > 0 {
        bail!("updates under load lost questions: {}", failures(&asked));
    }
    lab.haven(&["delete", "service/pair", "--wait"])?;
    Ok(())
}

fn shows(lab: &Lab, words: &str) -> Result<()> {
    lab.wait(&format!("`haven service show` says {words}"), Duration::from_secs(90), |lab| {
        lab.haven(&["service", "show", "pair"]).is_ok_and(|said| said.contains(words))
    })
}
