//! Whether what VMs start after is there, and whether they can start at all: nothing starts after itself.

use super::validate::Say;
use haven_model::{
    ObjectRef, Snapshot,
    object::{Kind, Object},
};
use std::collections::BTreeMap;

/// What something starts after, once all that is given is applied.
fn after<'a>(
    given: &BTreeMap<ObjectRef, &'a Object>,
    snapshot: &'a Snapshot,
    of: &ObjectRef,
) -> &'a [ObjectRef] {
    match given.get(of) {
        Some(Object::Vm(vm)) => return &vm.spec.after,
        Some(Object::Service(service)) => return &service.spec.template.spec.after,
        _ => {}
    }
    let (vm, service) = (snapshot.vms.get(&of.name), snapshot.services.get(&of.name));
    match of.kind {
        Kind::Vm => vm.map_or(&[], |vm| &vm.spec.after),
        Kind::Service => service.map_or(&[], |service| &service.spec.template.spec.after),
        _ => &[],
    }
}

/// Says what is wrong with what one VM, or the members of one service, start after.
pub(super) fn check(
    given: &BTreeMap<ObjectRef, &Object>,
    snapshot: &Snapshot,
    of: &ObjectRef,
    say: &mut Say<'_>,
) {
    let there = |reference: &ObjectRef| {
        given.contains_key(reference)
            || snapshot.object(reference).is_some_and(|(object, _)| !object.meta().deleting)
    };
    for before in after(given, snapshot, of) {
        if !matches!(before.kind, Kind::Vm | Kind::Service) {
            say(
                ("after", before),
                format!("nothing can start after {before}"),
                "name a VM (`vm/NAME`) or a service (`service/NAME`)",
            );
        } else if !there(before) {
            say(
                ("after", before),
                format!("{before} does not exist"),
                "apply it first, or in the same step",
            );
        } else if let Some(round) = way(given, snapshot, before, of) {
            let words: Vec<String> =
                std::iter::once(of).chain(&round).map(ToString::to_string).collect();
            say(
                ("after", before),
                format!("nothing of this could ever start: {}", words.join(" starts after ")),
                "take one of them out of `after`",
            );
        }
    }
}

/// The service that a VM is a member of stands for it, too.
fn owner(snapshot: &Snapshot, of: &ObjectRef) -> Option<ObjectRef> {
    snapshot.vms.get(&of.name).filter(|_| of.kind == Kind::Vm)?.meta.member_of().cloned()
}

/// A way from one to the other, with both ends.
fn way(
    given: &BTreeMap<ObjectRef, &Object>,
    snapshot: &Snapshot,
    from: &ObjectRef,
    to: &ObjectRef,
) -> Option<Vec<ObjectRef>> {
    let mut came: BTreeMap<ObjectRef, Option<ObjectRef>> = BTreeMap::from([(from.clone(), None)]);
    let mut open = vec![from.clone()];
    while let Some(at) = open.pop() {
        if at == *to || owner(snapshot, &at).as_ref() == Some(to) {
            let back = |at: &ObjectRef| came.get(at).cloned().flatten();
            let mut way: Vec<ObjectRef> = std::iter::successors(Some(at), back).collect();
            way.reverse();
            return Some(way);
        }
        for next in after(given, snapshot, &at) {
            if !came.contains_key(next) {
                came.insert(next.clone(), Some(at.clone()));
                open.push(next.clone());
            }
        }
    }
    None
}
