//! The firewall: NAT out, no way from one overlay network into another, and no guest that pretends to be another. One ruleset, replaced atomically by `nft`.

use super::{
    driver::{NetworkError, NetworkKind, NetworkWanted},
    linux::bridge_name,
};
use std::{fmt::Write, process::Stdio};
use tokio::io::AsyncWriteExt;

/// The whole ruleset for what is wanted.
#[must_use]
pub fn ruleset(wanted: &[NetworkWanted]) -> String {
    let mut nat = String::new();
    let mut guests = String::new();
    let mut between = String::new();
    for network in wanted {
        if let NetworkKind::Overlay { vni, .. } = &network.kind {
            let bridge = bridge_name(*vni);
            // Every host has an address in every network and forwards; that joins no networks.
            let _ = writeln!(
                between,
                "    iifname \"{bridge}\" oifname \"hvb*\" oifname != \"{bridge}\" drop"
            );
        }
        if let NetworkKind::Overlay { subnet, nat: true, .. } = &network.kind {
            // What a host asked a guest of this one comes back to it directly, from the guest's own address.
            if !network.hosts.is_empty() {
                let hosts: Vec<String> = network.hosts.iter().map(ToString::to_string).collect();
                let _ = writeln!(
                    nat,
                    "    ip saddr {subnet} ip daddr {{ {} }} return",
                    hosts.join(", ")
                );
            }
            let _ = writeln!(
                nat,
                "    ip saddr {subnet} ip daddr != {subnet} oifname != \"hvb*\" masquerade"
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
    let failed =
        |why: String| NetworkError { what: "the firewall rules cannot be listed".into(), why };
    let mut said = Vec::new();
    // Asked for both at once, `nft` finds only the last.
    for family in ["ip", "bridge"] {
        let output = tokio::process::Command::new("nft")
            .args(["-j", "list", "table", family, "haven"])
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .output()
            .await
            .map_err(|error| failed(error.to_string()))?;
        if !output.status.success() {
            return Err(failed(String::from_utf8_lossy(&output.stderr).trim().into()));
        }
        said.extend(output.stdout);
    }
    Ok(said)
}
