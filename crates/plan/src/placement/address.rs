//! The guests' addresses: the wished one, or the first free one of the network.

use crate::work::Work;
use haven_model::{Name, NicAddress, VmSpec, vm::NicSpec};
use std::{collections::BTreeSet, net::Ipv4Addr};

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

/// The cards that are wanted of a VM now. It keeps the addresses that it has where it may.
///
/// # Errors
/// A sentence when one cannot be given; it then keeps all that it has.
pub(crate) fn renewed(
    work: &mut Work<'_>,
    vm: &Name,
    spec: &VmSpec,
    has: &[NicAddress],
) -> Result<Vec<NicAddress>, String> {
    // One that cannot be read may have the address that this one would get.
    let unread = work.snapshot.unreadable_under("placement/vm/");
    if let Some(key) = unread.or_else(|| work.snapshot.unreadable_under("spec/vm/")) {
        return Err(format!(
            "waiting: {vm} keeps its network cards, because the record {key} cannot be read by this version of Haven; update the managing host"
        ));
    }
    let fixed: BTreeSet<_> = spec.networks.iter().filter_map(|nic| nic.address).collect();
    let mut left: Vec<&NicAddress> = has.iter().filter(|nic| !fixed.contains(&nic.ip)).collect();
    let keeps = spec.networks.iter().map(|nic| {
        let kept = left.iter().position(|has| has.network == nic.network);
        let kept = kept.filter(|_| nic.address.is_none()).map(|index| left.remove(index).ip);
        NicSpec { network: nic.network.clone(), address: nic.address.or(kept) }
    });
    let networks = keeps.collect();
    let wanted = nics(work, vm, &VmSpec { networks, ..spec.clone() });
    if wanted.is_err() {
        for nic in has {
            // Nobody else was given it meanwhile.
            let _ = work.taken.hold(&nic.network, nic.ip, vm);
        }
    }
    wanted
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
