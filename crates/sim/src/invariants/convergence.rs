//! Convergence: with everything well again and room enough, all that is wanted runs, once, and the store says so.

use super::Invariant;
use crate::judge::{Facts, Step};
use haven_model::{
    Name, Placement, Snapshot, VmPhase, vm_snapshot::SnapshotState, volume::VolumeRef,
};
use haven_plan::tolerance::recovery::bound_by;

pub(super) struct Convergence;

impl Invariant for Convergence {
    fn check(&mut self, _facts: &Facts, _step: &Step<'_>) -> Result<(), String> {
        Ok(())
    }

    fn at_end(&self, facts: &Facts) -> Result<(), String> {
        converged(facts).map_err(|what| format!("convergence: {what}"))
    }
}

/// Whether nothing is left on a host that is drained: no VM has its place there, and no address.
///
/// # Errors
/// The first thing that is left.
pub(crate) fn drained(facts: &Facts, host: &str) -> Result<(), String> {
    let snapshot = &facts.snapshot;
    // The disk that only this host has goes along with a guest that runs, and with no other.
    let stays = |vm: &Name| {
        let object = snapshot.vms.get(vm).filter(|object| !object.spec.running);
        // A replica that lacks something gets it from a guest that runs, and from nobody else; and those hosts that have all
        // may have no room.
        let few = snapshot.volumes.keys().any(|of| of.vm == *vm);
        object.is_some_and(|object| few || bound_by(snapshot, object).is_some())
    };
    let here = |placement: &Placement| placement.hosts().any(|of| of.as_str() == host);
    let left = snapshot.placements.iter().find(|(vm, p)| here(p) && !stays(vm));
    if let Some((vm, _)) = left {
        return Err(format!("{vm} is left on {host}, which is drained"));
    }
    if let Some((_, vm)) = facts.running.keys().find(|(on, _)| on == host) {
        return Err(format!("{vm} runs on {host}, which is drained"));
    }
    match snapshot.frontends.iter().find(|(_, frontend)| frontend.holder.as_str() == host) {
        Some((service, _)) => Err(format!("the address of {service} is left on {host}")),
        None => Ok(()),
    }
}

/// Whether all snapshots of VMs that run have come to their end, and enough hosts have copies.
fn kept(snapshot: &Snapshot) -> Result<(), String> {
    for (name, vm) in snapshot.vms.iter().filter(|(_, vm)| vm.spec.running) {
        let all = snapshot.vm_snapshots.get(&vm.meta.uid).into_iter().flatten();
        if let Some((called, of)) = all.clone().find(|(_, of)| of.is_due()) {
            return Err(format!("the snapshot {called} of {name} is {}: {}", of.state, of.message));
        }
        for (called, of) in all.filter(|(_, of)| of.state == SnapshotState::There) {
            let few = of.disks.iter().find(|disk| {
                let volume = VolumeRef { vm: name.clone(), disk: disk.name.clone() };
                let volume = snapshot.volumes.get(&volume);
                let replicas = volume.into_iter().flat_map(|volume| volume.replicas.keys());
                replicas.filter(|host| disk.copies.contains(host)).count() < 2
            });
            if let Some(disk) = few {
                return Err(format!(
                    "few hosts have a copy of {} in {called} of {name}",
                    disk.name
                ));
            }
        }
    }
    Ok(())
}

/// Whether all that is wanted is so.
///
/// # Errors
/// The first thing that is not.
pub(crate) fn converged(facts: &Facts) -> Result<(), String> {
    let snapshot = &facts.snapshot;
    for (name, vm) in &snapshot.vms {
        let hosts = facts.executing(name.as_str());
        if vm.meta.deleting {
            return Err(format!("{name} is being deleted and still there"));
        }
        if !vm.spec.running {
            if !hosts.is_empty() {
                return Err(format!("{name} shall not run and runs on {}", hosts.join(" and ")));
            }
            continue;
        }
        let Some(placement) = snapshot.placements.get(name) else {
            return Err(format!("{name} has no host"));
        };
        if placement.moving_to.is_some() || placement.moved_from.is_some() {
            return Err(format!("{name} is still being moved"));
        }
        if hosts != [placement.host.as_str()] {
            return Err(format!("{name} belongs on {} and runs on {hosts:?}", placement.host));
        }
        let told = snapshot.vm_status.get(name).is_some_and(|status| {
            status.phase == VmPhase::Running
                && status.epoch == placement.epoch
                && status.host == placement.host
        });
        if !told {
            return Err(format!("{name} runs and its status does not say so"));
        }
    }
    kept(snapshot)?;
    for (of, volume) in &snapshot.volumes {
        let runs = snapshot.vms.get(&of.vm).is_some_and(|vm| vm.spec.running);
        let copies = snapshot.pools.get(&volume.pool).map_or(0, |pool| pool.spec.copies());
        let counted = volume.counted().count();
        if runs && counted < copies {
            return Err(format!("of the disk {of} {counted} of {copies} replicas count"));
        }
    }
    for (name, service) in &snapshot.services {
        let of_service = |vm: &&_| {
            let vm: &haven_model::object::Stored<haven_model::VmSpec> = vm;
            vm.meta.owner.as_ref().is_some_and(|owner| owner.name == *name)
        };
        let members: Vec<_> = snapshot.vms.values().map(|vm| &**vm).filter(of_service).collect();
        if members.len() != service.spec.replicas as usize {
            return Err(format!(
                "service {name} has {} members of {}",
                members.len(),
                service.spec.replicas
            ));
        }
        for member in members {
            let ready = snapshot.vm_status.get(&member.meta.name).and_then(|status| status.ready);
            if service.spec.check.is_some() && ready != Some(true) {
                return Err(format!("{} of service {name} is not ready", member.meta.name));
            }
        }
        if service.spec.frontend.is_some() && !snapshot.frontends.contains_key(name) {
            return Err(format!("nobody holds the address of service {name}"));
        }
    }
    match snapshot.leases.iter().find(|(_, lease)| lease.closed) {
        Some((host, _)) => Err(format!("{host} has not come back")),
        None => Ok(()),
    }
}
