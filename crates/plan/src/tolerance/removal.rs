//! What was deleted goes when nothing of it is left and nothing needs it.

use crate::{
    tolerance::hosts::HostState,
    work::{Work, host_ref, vm_ref},
};
use haven_model::{Action, Handover, Name, ObjectRef, Placement, Snapshot, VmPhase, object::Kind};

/// Removes what can go; says what the rest waits for.
pub(crate) fn plan(work: &mut Work<'_>) {
    let vms: Vec<Name> = deleting(work.snapshot.vms.iter().map(|(n, v)| (n, v.meta.deleting)));
    for vm in vms {
        remove_vm(work, &vm);
    }
    let hosts = deleting(work.snapshot.hosts.iter().map(|(n, v)| (n, v.meta.deleting)));
    for host in hosts {
        remove_host(work, &host);
    }
    let shared: [(Kind, Vec<Name>); 5] = [
        (Kind::Pool, deleting(work.snapshot.pools.iter().map(|(n, v)| (n, v.meta.deleting)))),
        (Kind::Image, deleting(work.snapshot.images.iter().map(|(n, v)| (n, v.meta.deleting)))),
        (Kind::Network, deleting(work.snapshot.networks.iter().map(|(n, v)| (n, v.meta.deleting)))),
        (
            Kind::Certificate,
            deleting(work.snapshot.certificates.iter().map(|(n, v)| (n, v.meta.deleting))),
        ),
        (Kind::Target, deleting(work.snapshot.targets.iter().map(|(n, v)| (n, v.meta.deleting)))),
    ];
    for (kind, names) in shared {
        for name in names {
            remove_shared(work, kind, &name);
        }
    }
}

fn deleting<'a>(objects: impl Iterator<Item = (&'a Name, bool)>) -> Vec<Name> {
    objects.filter(|(_, deleting)| *deleting).map(|(name, _)| name.clone()).collect()
}

fn remove(work: &mut Work<'_>, object: ObjectRef) {
    let Some((_, revision)) = work.snapshot.object(&object) else {
        return;
    };
    let reason = format!("{object} was deleted and nothing of it is left");
    work.act(object.clone(), reason, Action::RemoveObject { object, expected_revision: revision });
}

fn remove_vm(work: &mut Work<'_>, vm: &Name) {
    let Some(placement) = work.snapshot.placements.get(vm) else {
        return remove(work, vm_ref(vm));
    };
    if let Some(from) = &placement.moved_from
        && work.snapshot.handover(vm, from) == Handover::Pending
    {
        let why = format!("{vm} is removed once its copy on {} has ended", from.host);
        return work.wait(vm_ref(vm), why);
    }
    let gone = work.snapshot.vm_status.get(vm).is_some_and(|status| {
        status.epoch == placement.epoch
            && status.phase == VmPhase::Stopped
            && status.message == "deleted"
    });
    let lost = matches!(work.states.get(&placement.host), None | Some(HostState::Lost(_)));
    if gone || lost {
        let why = if gone { "its host has removed it" } else { "its host is lost" };
        let action = Action::ReleaseVm { vm: vm.clone(), expected_revision: placement.revision };
        work.act(vm_ref(vm), format!("{vm} was deleted and {why}"), action);
    } else {
        work.wait(vm_ref(vm), format!("{vm} is being removed by {}", placement.host));
    }
}

fn remove_host(work: &mut Work<'_>, host: &Name) {
    let on = |placement: &Placement| placement.hosts().any(|of| of == host);
    let placed = work.snapshot.placements.values().filter(|placement| on(placement)).count();
    let lives = work.snapshot.session_open(host);
    if placed > 0 {
        work.wait(
            host_ref(host),
            format!("{host} is removed once its {placed} VMs are gone from it"),
        );
    } else if lives {
        work.wait(
            host_ref(host),
            format!("{host} is removed once its daemon was stopped and its lease has ended"),
        );
    } else {
        remove(work, host_ref(host));
    }
}

/// Who uses a pool, an image, a network, a certificate or a target.
#[must_use]
pub fn users(snapshot: &Snapshot, kind: Kind, name: &Name) -> Vec<String> {
    let uses = |spec: &haven_model::VmSpec| match kind {
        Kind::Pool => spec.disks.iter().any(|d| d.pool == *name),
        Kind::Image => {
            spec.image.as_ref() == Some(name)
                || spec.disks.iter().any(|d| d.image.as_ref() == Some(name))
        }
        Kind::Target => {
            spec.backup.as_ref().is_some_and(|backup| backup.to == *name)
                || spec.disks.iter().any(|d| d.backup.as_ref().is_some_and(|b| b.target == *name))
        }
        Kind::Network => spec.networks.iter().any(|n| n.network == *name),
        _ => false,
    };
    let vms = snapshot.vms.iter().filter(|(_, vm)| uses(&vm.spec)).map(|(n, _)| format!("vm/{n}"));
    let services = snapshot
        .services
        .iter()
        .filter(|(_, s)| {
            let certificate = kind == Kind::Certificate && s.spec.certificate() == Some(name);
            certificate || uses(&s.spec.template.spec)
        })
        .map(|(n, _)| format!("service/{n}"));
    vms.chain(services).collect()
}

fn remove_shared(work: &mut Work<'_>, kind: Kind, name: &Name) {
    let object = ObjectRef::new(kind, name.clone());
    let users = users(work.snapshot, kind, name);
    if users.is_empty() {
        remove(work, object);
    } else {
        let why = format!("{object} is removed once nothing uses it: {}", users.join(", "));
        work.wait(object, why);
    }
}
