//! The guests' addresses: the wished one, or the first free one of the network.

use crate::work::Work;
use haven_model::{Name, NicAddress, VmSpec};
use std::net::Ipv4Addr;

/// An address for each network card of a VM.
///
/// # Errors
/// A sentence when a network does not exist or has no address left.
pub(crate) fn nics(
    work: &mut Work<'_>,
    vm: &Name,
    spec: &VmSpec,
) -> Result<Vec<NicAddress>, String> {
    let mut nics = Vec::new();
    for nic in &spec.networks {
        let ip = match nic.address {
            Some(ip) => wished(work, vm, &nic.network, ip),
            None => free(work, vm, &nic.network),
        };
        match ip {
            Ok(ip) => nics.push(NicAddress::new(nic.network.clone(), ip)),
            Err(why) => {
                work.taken.give_back(&nics);
                return Err(why);
            }
        }
    }
    Ok(nics)
}

fn wished(
    work: &mut Work<'_>,
    vm: &Name,
    network: &Name,
    ip: Ipv4Addr,
) -> Result<Ipv4Addr, String> {
    match work.taken.hold(network, ip, vm) {
        Ok(()) => Ok(ip),
        Err(other) => Err(format!(
            "waiting: {vm} asks for the address {ip} of network `{network}`, which vm/{other} has; give one of them another"
        )),
    }
}

fn free(work: &mut Work<'_>, vm: &Name, network: &Name) -> Result<Ipv4Addr, String> {
    let Some(object) = work.snapshot.networks.get(network) else {
        return Err(format!("waiting: {vm} needs network `{network}`, which does not exist"));
    };
    let gateway = object.spec.gateway();
    // From .10 on where the subnet is large enough, so that people have a few for themselves.
    let skip = if object.spec.subnet.prefix_len() <= 26 { 9 } else { 0 };
    let found = object
        .spec
        .subnet
        .hosts()
        .skip(skip)
        .find(|ip| *ip != gateway && work.taken.is_free(network, *ip));
    let Some(ip) = found else {
        return Err(format!("waiting: network `{network}` has no free address left for {vm}"));
    };
    work.taken
        .hold(network, ip, vm)
        .map_err(|other| format!("{ip} was free and vm/{other} has it"))?;
    Ok(ip)
}
