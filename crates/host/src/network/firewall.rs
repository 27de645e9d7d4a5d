//! The firewall: NAT out, no way from one overlay network into another, and no guest that pretends to be another. One
//! ruleset, replaced atomically by `nft`. Each rule tells whose it is, so that those of a record that cannot be read
//! can be taken over as the kernel has them.

use super::{
    driver::{LeftAlone, NetworkError, NetworkKind, NetworkWanted},
    linux::bridge_name,
};
use std::{collections::BTreeMap, fmt::Write, net::Ipv4Addr, process::Stdio};
use tokio::io::AsyncWriteExt;

/// Rules that are taken over as the kernel has them, a line each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Kept {
    out: String,
    between: String,
    guests: String,
}

/// The whole ruleset for what is wanted.
#[must_use]
pub fn ruleset(wanted: &[NetworkWanted], kept: &Kept) -> String {
    let Kept { out: mut nat, mut between, mut guests } = kept.clone();
    for network in wanted {
        let whose = whose(&network.name);
        if let NetworkKind::Overlay { vni, .. } = &network.kind {
            let bridge = bridge_name(*vni);
            // Every host has an address in every network and forwards; that joins no networks.
            let _ = writeln!(
                between,
                "    iifname \"{bridge}\" oifname \"hvb*\" oifname != \"{bridge}\" drop {whose}"
            );
        }
        if let NetworkKind::Overlay { subnet, nat: true, .. } = &network.kind {
            // What a host asked a guest of this one comes back to it directly, from the guest's own address.
            if !network.hosts.is_empty() {
                let hosts: Vec<String> = network.hosts.iter().map(ToString::to_string).collect();
                let _ = writeln!(
                    nat,
                    "    ip saddr {subnet} ip daddr {{ {} }} return {whose}",
                    hosts.join(", ")
                );
            }
            let _ = writeln!(
                nat,
                "    ip saddr {subnet} ip daddr != {subnet} oifname != \"hvb*\" masquerade {whose}"
            );
        }
        for port in &network.local {
            let tap = &port.tap;
            let mac = port.mac.map(|byte| format!("{byte:02x}")).join(":");
            let _ = writeln!(guests, "    iifname \"{tap}\" ether saddr != {mac} drop");
            if let Some(ip) = port.ip {
                let _ = writeln!(
                    guests,
                    "    iifname \"{tap}\" arp saddr ip != {{ {ip}, 0.0.0.0 }} drop"
                );
                let _ = writeln!(guests, "    iifname \"{tap}\" ip saddr != {ip} drop");
            }
            let _ = writeln!(guests, "    iifname \"{tap}\" udp sport 67 drop");
            let _ = writeln!(guests, "    iifname \"{tap}\" icmpv6 type nd-router-advert drop");
        }
    }
    format!(
        "table ip haven {{}}\ndelete table ip haven\ntable bridge haven {{}}\ndelete table bridge haven\n\
         table ip haven {{\n  chain out {{\n    type nat hook postrouting priority 100;\n{nat}  }}\n  \
         chain between {{\n    type filter hook forward priority 0;\n{between}  }}\n}}\n\
         table bridge haven {{\n  chain guests {{\n    type filter hook prerouting priority -200;\n{guests}  }}\n}}\n"
    )
}

/// The ruleset that passes on what belongs to TCP connections of these addresses that this machine does not know: it took
/// each of them from the host behind it a moment ago. Without it they would be reset.
#[must_use]
pub fn passing(to: &BTreeMap<Ipv4Addr, Ipv4Addr>) -> String {
    let mut rules = String::new();
    for (address, host) in to {
        let unknown = format!("ip daddr {address} tcp flags & syn == 0 ct state != established");
        let _ = writeln!(rules, "    {unknown} dup to {host}\n    {unknown} drop");
    }
    let clear = "table ip haven-passing {}\ndelete table ip haven-passing\n";
    if to.is_empty() {
        return clear.into();
    }
    // Behind the tracking of connections.
    format!(
        "{clear}table ip haven-passing {{\n  chain passing {{\n    type filter hook prerouting priority -150;\n{rules}  }}\n}}\n"
    )
}

/// What a rule of a network carries.
fn whose(network: &str) -> String {
    format!("comment \"network {network}\"")
}

/// The rules that the kernel has for records that cannot be read.
///
/// # Errors
/// When `nft` cannot tell.
pub async fn kept(left_alone: &LeftAlone) -> Result<Kept, NetworkError> {
    let mut kept = Kept::default();
    if left_alone.is_empty() {
        return Ok(kept);
    }
    for family in ["ip", "bridge"] {
        match list(&["list", "table", family, "haven"]).await {
            Ok(listing) => pick(&String::from_utf8_lossy(&listing), left_alone, &mut kept),
            // There are none before the first are loaded.
            Err(error) if error.why.contains("No such file") => {}
            Err(error) => return Err(error),
        }
    }
    Ok(kept)
}

/// Picks the rules of such records out of what `nft` lists.
fn pick(listing: &str, left_alone: &LeftAlone, kept: &mut Kept) {
    let mut chain = "";
    for line in listing.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix("chain ") {
            chain = name.trim_end_matches(['{', ' ']);
            continue;
        }
        let card = line.strip_prefix("iifname \"").and_then(|rest| rest.split('"').next());
        let (to, keep) = match chain {
            "out" | "between" => {
                let of = |network: &String| line.ends_with(&whose(network));
                let to = if chain == "out" { &mut kept.out } else { &mut kept.between };
                (to, left_alone.networks.iter().any(of))
            }
            "guests" => (&mut kept.guests, card.is_some_and(|card| left_alone.keeps(card))),
            _ => continue,
        };
        if keep {
            let _ = writeln!(to, "    {line}");
        }
    }
}

/// Loads a ruleset.
///
/// # Errors
/// What `nft` said.
pub async fn load(rules: &str) -> Result<(), NetworkError> {
    let failed =
        |why: String| NetworkError { what: "the firewall rules cannot be loaded".into(), why };
    let mut child = tokio::process::Command::new("nft")
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| {
            failed(format!("nft cannot be started ({error}); install the package nftables"))
        })?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(rules.as_bytes()).await.map_err(|error| failed(error.to_string()))?;
    }
    let output = child.wait_with_output().await.map_err(|error| failed(error.to_string()))?;
    if output.status.success() {
        Ok(())
    } else {
        Err(failed(
            String::from_utf8_lossy(&output.stderr).lines().take(3).collect::<Vec<_>>().join("; "),
        ))
    }
}

/// What the kernel has of the rules, as text that is the same as long as nobody changes them.
///
/// # Errors
/// When they are not there, or `nft` cannot be run.
pub async fn listing() -> Result<Vec<u8>, NetworkError> {
    let mut said = Vec::new();
    // Asked for both at once, `nft` finds only the last.
    for family in ["ip", "bridge"] {
        said.extend(list(&["-j", "list", "table", family, "haven"]).await?);
    }
    Ok(said)
}

/// How often somebody has changed any rules of this network namespace: while it stays, no rules were changed. Asked of
/// the kernel directly, so that it costs no process. Nothing when the kernel does not tell.
#[must_use]
pub fn generation() -> Option<u32> {
    use nix::sys::socket::{self, AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType};
    use std::os::fd::AsRawFd;
    const NFTABLES: u16 = 10 << 8;
    const NEW: u16 = NFTABLES | 15;
    const GET: u16 = NFTABLES | 16;
    let (family, kind) = (AddressFamily::Netlink, SockType::Raw);
    let protocol = SockProtocol::NetlinkNetFilter;
    let wire = socket::socket(family, kind, SockFlag::SOCK_CLOEXEC, protocol).ok()?;
    // A netlink head: length, type, NLM_F_REQUEST, number, sender; then netfilter's: family, version, subject.
    let mut question = Vec::with_capacity(20);
    question.extend(20_u32.to_ne_bytes());
    question.extend(GET.to_ne_bytes());
    question.extend(1_u16.to_ne_bytes());
    question.extend([0; 12]);
    socket::send(wire.as_raw_fd(), &question, MsgFlags::empty()).ok()?;
    let mut answer = [0; 256];
    // The kernel has answered before `send` returns.
    let length = socket::recv(wire.as_raw_fd(), &mut answer, MsgFlags::MSG_DONTWAIT).ok()?;
    let answer = answer.get(..length)?;
    if u16::from_ne_bytes(answer.get(4..6)?.try_into().ok()?) != NEW {
        return None;
    }
    // Attributes: length with head, type, content, room up to a multiple of four. NFTA_GEN_ID is 1.
    let mut rest = answer.get(20..)?;
    while let Some(head) = rest.get(..4) {
        let length = usize::from(u16::from_ne_bytes([head[0], head[1]]));
        if u16::from_ne_bytes([head[2], head[3]]) == 1 {
            return Some(u32::from_be_bytes(rest.get(4..8)?.try_into().ok()?));
        }
        rest = rest.get(length.max(4).next_multiple_of(4)..)?;
    }
    None
}

async fn list(args: &[&str]) -> Result<Vec<u8>, NetworkError> {
    let failed =
        |why: String| NetworkError { what: "the firewall rules cannot be listed".into(), why };
    let output = tokio::process::Command::new("nft")
        .args(args)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await
        .map_err(|error| failed(error.to_string()))?;
    if output.status.success() {
        Ok(output.stdout)
    } else {
        Err(failed(String::from_utf8_lossy(&output.stderr).trim().into()))
    }
}

#[cfg(test)]
mod tests {
    use super::passing;

    #[test]
    fn what_is_passed_on_is_only_of_connections_that_are_not_known() {
        let rules = passing(&[([10, 88, 0, 101].into(), [10, 88, 0, 1].into())].into());
        let unknown = "ip daddr 10.88.0.101 tcp flags & syn == 0 ct state != established";
        assert!(rules.contains(&format!("{unknown} dup to 10.88.0.1\n")), "{rules}");
        assert!(rules.contains(&format!("{unknown} drop\n")), "{rules}");
        let none = passing(&std::collections::BTreeMap::new());
        assert_eq!(none, "table ip haven-passing {}\ndelete table ip haven-passing\n");
    }
}
