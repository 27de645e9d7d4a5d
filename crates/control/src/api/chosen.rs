//! What Haven chooses for an object that is being made, where its manifest leaves it out.

use haven_model::{
    NetworkSpec, Object, Snapshot, VmSpec,
    host::PLUGS,
    vm::{DiskSpec, SLOTS},
};
use haven_plan::tolerance::migration::speaks_less;
use std::collections::BTreeSet;

/// The smallest and the largest VXLAN identifier that is chosen; smaller ones are left to people.
const VNI: std::ops::Range<u32> = 4096..1 << 20;

/// The network identifiers in use.
pub(super) fn vnis(snapshot: &Snapshot) -> BTreeSet<u32> {
    snapshot.networks.values().filter_map(|network| network.spec.vni_in_use()).collect()
}

/// Chooses for a new object; `vnis` are the network identifiers in use, to which its own is added.
pub(super) fn choose(object: &mut Object, vnis: &mut BTreeSet<u32>, snapshot: &Snapshot) {
    match object {
        Object::Network(network) => {
            let name = network.meta.name.to_string();
            vni(&name, &mut network.spec, vnis);
        }
        Object::Vm(vm) => ports(&mut vm.spec, None, snapshot),
        _ => {}
    }
}

/// Chooses ports for the disks that are new; those that were there keep theirs, or have none.
pub(super) fn ports(spec: &mut VmSpec, old: Option<&VmSpec>, snapshot: &Snapshot) {
    let before = |disk: &DiskSpec| old?.disks.iter().find(|one| one.name == disk.name);
    for disk in &mut spec.disks {
        disk.slot = disk.slot.or(before(disk).and_then(|before| before.slot));
    }
    // An older host would plug them in elsewhere.
    if speaks_less(snapshot, PLUGS).is_some() {
        return;
    }
    let mut taken: BTreeSet<u8> = spec.disks.iter().filter_map(|disk| disk.slot).collect();
    let new = |disk: &&mut DiskSpec| disk.slot.is_none() && before(disk).is_none();
    for disk in spec.disks.iter_mut().filter(new) {
        disk.slot = (0..SLOTS).find(|slot| !taken.contains(slot));
        taken.extend(disk.slot);
    }
}

/// The search begins where the name says, so that two networks that are made in the same moment, of which neither
/// knows of the other, do not get the same.
fn vni(name: &str, spec: &mut NetworkSpec, vnis: &mut BTreeSet<u32>) {
    if spec.vni.is_none() && spec.vni_in_use().is_some() {
        let count = VNI.end - VNI.start;
        let start =
            name.bytes().fold(0u32, |sum, byte| sum.wrapping_mul(31).wrapping_add(byte.into()));
        let from = (0..count).map(|i| VNI.start + start.wrapping_add(i) % count);
        spec.vni = from.into_iter().find(|vni| !vnis.contains(vni));
    }
    vnis.extend(spec.vni_in_use());
}

#[cfg(test)]
mod tests {
    use super::vni;
    use haven_model::NetworkSpec;
    use std::collections::BTreeSet;

    #[test]
    fn every_network_gets_an_identifier_of_its_own() {
        let mut used = BTreeSet::new();
        let mut chosen = |name: &str, text: &str| {
            let mut spec: NetworkSpec = serde_json::from_str(text).unwrap();
            vni(name, &mut spec, &mut used);
            spec.vni
        };
        // Small subnets of one range, for which the identifier was once the same.
        let first = chosen("front", r#"{"subnet": "10.0.0.0/25"}"#);
        let same = chosen("front", r#"{"subnet": "10.0.0.128/25"}"#);
        assert!(first.is_some() && same.is_some() && first != same, "{first:?} {same:?}");
        assert_ne!(chosen("back", r#"{"subnet": "10.0.1.0/25"}"#), first);
        assert_eq!(chosen("mine", r#"{"subnet": "10.0.2.0/24", "vni": 7}"#), Some(7));
        assert_eq!(chosen("lan", r#"{"subnet": "10.0.3.0/24", "driver": "bridge"}"#), None);
    }
}
