//! What people get wrong, and what they are told.

use super::validate::validate;
use haven_model::{Bytes, manifest::parse};
use haven_plan::testing::World;

fn said(text: &str) -> Vec<String> {
    let mut world = World::new(3, Bytes::gib(4));
    world.network("front");
    let manifests = parse(&[("x.yaml".into(), text.into())]).unwrap();
    validate(&manifests, &world.snapshot)
        .into_iter()
        .map(|p| format!("{} [{}]", p.message, p.hint))
        .collect()
}

#[test]
fn a_good_manifest_is_taken() {
    assert_eq!(said("kind: VM\nname: web\nmemory: 1GiB\nnetworks: [{network: front}]\n"), [""; 0]);
}

#[test]
fn missing_things_are_named_with_what_there_is() {
    let said =
        said("kind: VM\nname: web\nmemory: 1GiB\nimage: debian\nnetworks: [{network: back}]\n");
    assert_eq!(
        said,
        [
            "image `debian` does not exist [there is no image yet]",
            "network `back` does not exist [there are: front]"
        ]
    );
}

#[test]
fn an_impossible_size_names_the_largest() {
    let said = said("kind: VM\nname: web\nmemory: 64GiB\n");
    assert_eq!(
        said,
        [
            "web asks for 64GiB of memory, more than any host has [the largest host has 4GiB for VMs]"
        ]
    );
}

#[test]
fn a_frontend_must_not_lie_among_the_guests_or_on_a_host() {
    let service = |address: &str| {
        format!(
            "kind: Service\nname: web\nreplicas: 1\ntemplate: {{spec: {{memory: 64MiB, networks: [{{network: front}}]}}}}\nfrontend: {{address: {address}, port: 80}}\n"
        )
    };
    assert!(said(&service("10.77.0.5"))[0].contains("lies in network `front`"));
    assert!(said(&service("10.88.0.1"))[0].contains("is the address of host1"));
    assert!(said(&service("10.88.0.100")).is_empty());
}

#[test]
fn overlapping_subnets_are_refused() {
    assert!(
        said("kind: Network\nname: back\nsubnet: 10.77.0.128/25\n")[0]
            .contains("overlaps 10.77.0.0/24 of network `front`")
    );
}
