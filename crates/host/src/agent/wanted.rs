//! What the snapshot wants of this host, computed anew each time: VMs, networks, frontends. Pure.

use super::{shares::members, vm_step::Wanted};
use crate::{
    balance::driver::{Check, FrontendMode, FrontendWanted, Identity, Options, TlsWanted},
    network::{
        driver::{LeftAlone, LocalPort, NetworkKind, NetworkWanted, RemotePort},
        uplink::Uplink,
    },
};
use haven_model::{
    FrontendPlacement, Handover, Name, NetworkSpec, ObjectRef, Placement, Snapshot, Versioned,
    network::NetworkKind as Driver,
    object::Kind,
    placement::NicAddress,
    service::{HealthCheck, Protocol, TlsSpec},
};
use haven_store::{
    certificate::{Chain, Key},
    seal::ClusterKey,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr},
};

/// What the store wants of `me` for one VM.
#[must_use]
pub fn vm(snapshot: &Snapshot, me: &Name, vm: &Name) -> Wanted {
    let unreadable = snapshot.unreadable_of(&ObjectRef::new(Kind::Vm, vm.clone())).is_some();
    let Some(placement) = snapshot.placements.get(vm) else {
        return if unreadable { Wanted::Unknown } else { Wanted::NotMine };
    };
    if placement.host != *me {
        return moving(snapshot, me, vm, placement);
    }
    match snapshot.vms.get(vm) {
        None if unreadable => Wanted::Unknown,
        None => Wanted::Delete,
        Some(object) if object.meta.deleting => Wanted::Delete,
        Some(_) if placement.moving_to.as_ref().is_some_and(|to| to.restart) => {
            Wanted::Leave { attempt: placement.revision }
        }
        Some(object) if object.spec.running => {
            Wanted::Run { epoch: placement.epoch, resets: object.spec.resets }
        }
        Some(_) => Wanted::Stop,
    }
}

/// What the store wants of `me` for a VM of another host: to take it, to hand it over, or nothing.
fn moving(snapshot: &Snapshot, me: &Name, vm: &Name, placement: &Versioned<Placement>) -> Wanted {
    // Also one that shall not run any more: the plan takes the attempt back first, so that the change of owner never
    // goes by the word of a process that has ended.
    if placement.moving_to.as_ref().is_some_and(|to| to.host == *me && !to.restart) {
        return Wanted::Receive { epoch: placement.epoch + 1, attempt: placement.revision };
    }
    match &placement.moved_from {
        Some(from)
            if from.host == *me
                && matches!(
                    snapshot.handover(vm, from),
                    Handover::Pending | Handover::Following
                ) =>
        {
            Wanted::HandOver { attempt: from.attempt }
        }
        _ => Wanted::NotMine,
    }
}

/// The VMs that `me` runs, takes or hands over.
pub fn my_vms<'a>(snapshot: &'a Snapshot, me: &'a Name) -> impl Iterator<Item = &'a Name> {
    let mine = move |placement: &Placement| placement.hosts().any(|host| host == me);
    snapshot.placements.iter().filter(move |(_, p)| mine(p)).map(|(vm, _)| vm)
}

fn kind(spec: &NetworkSpec) -> NetworkKind {
    match spec.driver {
        Driver::Overlay => NetworkKind::Overlay {
            vni: spec.vni(),
            subnet: spec.subnet,
            gateway: spec.gateway(),
            gateway_mac: spec.gateway_mac(),
            nat: spec.nat,
        },
        Driver::Bridge => NetworkKind::Bridge {
            uplink_bridge: spec.bridge.clone().unwrap_or_else(|| "br0".into()),
        },
    }
}

/// The networks of this host: all of the cluster, so that it reaches every guest, with a port for each own VM.
#[must_use]
pub fn networks(snapshot: &Snapshot, me: &Name) -> Vec<NetworkWanted> {
    let mut wanted: Vec<(Name, NetworkWanted)> = snapshot
        .networks
        .iter()
        .map(|(name, network)| {
            let spec = &network.spec;
            let network = NetworkWanted {
                name: name.to_string(),
                kind: kind(spec),
                mtu: spec.mtu,
                hosts: snapshot.hosts.values().map(|host| host.spec.address).collect(),
                local: Vec::new(),
                remote: Vec::new(),
            };
            (name.clone(), network)
        })
        .collect();
    for (vm, placement) in &snapshot.placements {
        let at = snapshot.reached_at(vm, placement);
        for (index, nic) in placement.nics.iter().enumerate() {
            let Some((_, network)) = wanted.iter_mut().find(|(name, _)| *name == nic.network)
            else {
                continue;
            };
            add_port(network, snapshot, (me, at), placement, index, nic);
        }
    }
    wanted.into_iter().map(|(_, network)| network).collect()
}

/// By what the guests of networks and the addresses of services are reached from outside, where it is not the cluster's
/// own network.
#[must_use]
pub fn uplinks(snapshot: &Snapshot) -> BTreeMap<ObjectRef, Uplink> {
    let networks =
        snapshot.networks.iter().filter_map(|(name, network)| match kind(&network.spec) {
            NetworkKind::Bridge { uplink_bridge } => {
                let network = ObjectRef::new(Kind::Network, name.clone());
                Some((network, Uplink::Bridge(uplink_bridge)))
            }
            NetworkKind::Overlay { .. } => None,
        });
    let services = snapshot.services.iter().filter_map(|(name, service)| {
        let frontend = service.spec.frontend.as_ref().filter(|_| !service.meta.deleting)?;
        let service = ObjectRef::new(Kind::Service, name.clone());
        Some((service, Uplink::Near(frontend.address)))
    });
    networks.chain(services).collect()
}

/// What may be on this host for records that cannot be read.
#[must_use]
pub fn left_alone(snapshot: &Snapshot, me: &Name) -> LeftAlone {
    let unread = |key: &String| Name::new(key.strip_prefix("spec/network/")?).ok();
    // One that was readable before stays as it was read last.
    let unread = snapshot.unreadable.keys().filter_map(unread);
    let networks: BTreeSet<Name> =
        unread.filter(|name| !snapshot.networks.contains_key(name)).collect();
    let placements = || snapshot.placements.values();
    let mine = placements().filter(|placement| placement.hosts().any(|host| host == me));
    let taps = mine.flat_map(|placement| {
        let nics = placement.nics.iter().enumerate();
        let unread = nics.filter(|(_, nic)| networks.contains(&nic.network));
        unread.map(|(index, _)| placement.tap(index))
    });
    let hostless = |placement: &Placement| {
        let host = ObjectRef::new(Kind::Host, placement.host.clone());
        !snapshot.hosts.contains_key(&placement.host) && snapshot.unreadable_of(&host).is_some()
    };
    let in_doubt = snapshot.unreadable_under("placement/vm/").is_some()
        || placements().any(|placement| hostless(placement));
    LeftAlone {
        taps: taps.collect(),
        networks: networks.iter().map(Name::to_string).collect(),
        known_slots: in_doubt.then(|| placements().map(|placement| placement.slot).collect()),
    }
}

/// A guest's card as this host (the first) knows it while the guest is reached at another or at itself (the second).
fn add_port(
    network: &mut NetworkWanted,
    snapshot: &Snapshot,
    (me, at): (&Name, &Name),
    placement: &Placement,
    index: usize,
    nic: &NicAddress,
) {
    let mac = NicAddress::mac_of(nic.ip);
    if placement.hosts().any(|host| host == me) {
        network.local.push(LocalPort {
            tap: placement.tap(index),
            mac,
            ip: Some(nic.ip),
            owner_uid: placement.unix_uid(),
            idle: at != me,
        });
    }
    if at == me {
        return;
    }
    if let Some(host) = snapshot.hosts.get(at) {
        network.remote.push(RemotePort { mac, ip: nic.ip, host: host.spec.address });
    }
}

fn check_of(check: &HealthCheck) -> Check {
    Check {
        mode: mode_of(check.mode),
        port: check.port,
        path: check.path.clone(),
        interval_ms: check.interval.0,
        timeout_ms: check.timeout.0,
    }
}

fn mode_of(protocol: Protocol) -> FrontendMode {
    match protocol {
        Protocol::Http => FrontendMode::Http,
        Protocol::Tcp => FrontendMode::Tcp,
    }
}

/// The certificate of a frontend with its key opened, or why there is none, in words.
fn identity(
    snapshot: &Snapshot,
    secrets: Option<&ClusterKey>,
    name: &Name,
) -> Result<Identity, String> {
    let object = ObjectRef::new(Kind::Certificate, name.clone());
    let missing = || match snapshot.unreadable_of(&object) {
        Some(_) => format!("the record of {object} cannot be read: update this host"),
        None => format!("there is no {object}"),
    };
    let spec = &snapshot.certificates.get(name).ok_or_else(missing)?.spec;
    let lacks = || "this host has no key with which secrets are opened".to_owned();
    let plain = secrets.ok_or_else(lacks)?.open(&object, &spec.key);
    let plain = plain.map_err(|error| error.to_string())?;
    let chain = Chain::read(&spec.chain).map_err(|error| error.to_string())?;
    let key = Key::read(&plain).map_err(|error| error.to_string())?;
    key.belongs_to(&chain).map_err(|error| error.to_string())?;
    Ok(Identity { chain: chain.pem(), key: key.pem(), fingerprint: chain.fingerprint() })
}

fn tls(snapshot: &Snapshot, secrets: Option<&ClusterKey>, spec: &TlsSpec) -> TlsWanted {
    TlsWanted {
        certificate: spec.certificate.to_string(),
        identity: identity(snapshot, secrets, &spec.certificate),
        min_version: spec.min_version,
    }
}

/// The frontends that this host must be able to serve: those it holds or may take.
#[must_use]
pub fn frontends(
    snapshot: &Snapshot,
    me: &Name,
    suspected: &BTreeSet<Name>,
    secrets: Option<&ClusterKey>,
) -> Vec<FrontendWanted> {
    let candidate = |service: &Name| {
        snapshot.frontends.get(service).is_some_and(|f| {
            f.holder == *me || f.from.as_ref() == Some(me) || f.candidates.contains(me)
        })
    };
    let Some(source) = snapshot.hosts.get(me).map(|host| IpAddr::V4(host.spec.address)) else {
        return Vec::new();
    };
    snapshot
        .services
        .iter()
        .filter(|(name, _)| candidate(name))
        .filter_map(|(name, service)| {
            let frontend = service.spec.frontend.as_ref()?;
            let port = frontend.target_port.unwrap_or(frontend.port);
            let placement = snapshot.frontends.get(name)?;
            let members = members(snapshot, suspected, name, port, placement);
            Some(FrontendWanted {
                source,
                service: name.to_string(),
                address: IpAddr::V4(frontend.address),
                port: frontend.port,
                mode: mode_of(frontend.mode),
                members,
                check: service.spec.check.as_ref().map(check_of),
                options: Options {
                    sticky: frontend.sticky,
                    max_connections: frontend.max_connections,
                    max_connections_per_member: frontend.max_connections_per_member,
                    proxy_protocol: frontend.proxy_protocol,
                },
                tls: frontend.tls.as_ref().map(|spec| tls(snapshot, secrets, spec)),
            })
        })
        .collect()
}

/// The service addresses that this host has given up by plan: the new holder may not have announced them yet.
pub fn given_up(snapshot: &Snapshot, me: &Name) -> BTreeSet<Ipv4Addr> {
    let given = |placement: &FrontendPlacement| {
        placement.from.as_ref() == Some(me) && placement.holder != *me
    };
    addresses_where(snapshot, given)
}

/// The service addresses that this host has from one that gave them up by plan, each with that host's own address.
pub fn given_by(snapshot: &Snapshot, me: &Name) -> BTreeMap<Ipv4Addr, Ipv4Addr> {
    let mine = snapshot.frontends.iter().filter(|(_, placement)| placement.holder == *me);
    let given = mine.filter_map(|(service, placement)| {
        let from = snapshot.hosts.get(placement.from.as_ref()?)?;
        let frontend = snapshot.services.get(service)?.spec.frontend.as_ref()?;
        Some((frontend.address, from.spec.address))
    });
    given.collect()
}

/// The service addresses that this host holds.
#[must_use]
pub fn addresses(snapshot: &Snapshot, me: &Name) -> BTreeSet<Ipv4Addr> {
    addresses_where(snapshot, |placement| placement.holder == *me)
}

fn addresses_where(
    snapshot: &Snapshot,
    wanted: impl Fn(&FrontendPlacement) -> bool,
) -> BTreeSet<Ipv4Addr> {
    snapshot
        .frontends
        .iter()
        .filter(|(_, placement)| wanted(placement))
        .filter_map(|(service, _)| {
            snapshot.services.get(service)?.spec.frontend.as_ref().map(|f| f.address)
        })
        .collect()
}

/// Whether a start that began for `then` is still wanted.
#[must_use]
pub fn same(then: Wanted, now: Wanted) -> bool {
    match (then, now) {
        (Wanted::Run { epoch: then, .. }, Wanted::Run { epoch: now, .. }) => then == now,
        (Wanted::Receive { .. }, Wanted::Receive { .. }) => then == now,
        _ => false,
    }
}
