//! Random runs: everything about one, its faults too, is decided by its seed before it begins. So it is a scenario as
//! those in files are, and can be written down, played again with fewer faults, and kept.

use crate::{
    faults::{self, Fault},
    scenario::{Event, Expect, Scenario},
};
use haven_model::{ClusterSpec, ProofKind, RebalancePolicy};
use rand::{Rng, SeedableRng, rngs::StdRng};

/// How long the faults go on, milliseconds.
const LASTS_MS: u64 = 60_000;

/// What is wanted of the cluster: a service behind an address, and single VMs.
#[must_use]
pub fn manifest(replicas: u32, vms: u32, able: u8) -> String {
    let copies = able.min(3);
    let mut text = format!(
        "kind: Pool\nname: scratch\ndriver: local\npath: /local\n---\n\
         kind: Pool\nname: twins\ndriver: mirrored\npath: /twins\n---\n\
         kind: Pool\nname: more\ndriver: mirrored\npath: /more\nreplicas: {copies}\n---\n\
         kind: Network\nname: front\nsubnet: 10.77.0.0/24\n---\n\
         kind: Network\nname: lan\ndriver: bridge\nsubnet: 10.78.0.0/24\n---\n\
         kind: Service\nname: web\nreplicas: {replicas}\n\
         template:\n  spec:\n    memory: 128MiB\n    networks:\n    - network: front\n\
         check:\n  mode: http\n  port: 80\n\
         frontend:\n  address: 10.88.0.100\n  port: 80\n  mode: http\n"
    );
    for i in 1..=vms {
        // Only the first of each pair knows of its wish, and only the second is what it asks about.
        let wish = match i {
            1 => "affinity: {apart: {pair: '2'}}\n",
            3 => "affinity: {near: {pair: '4'}}\n",
            _ => "",
        };
        // One has a disk that only its host has.
        let disk = match i {
            2 => "disks: [{name: data, size: 1GiB, pool: scratch, slot: 0}]\n",
            // Others have one that several hosts have.
            5 => "disks: [{name: data, size: 1GiB, pool: twins, slot: 0}]\nisolation: keep\n",
            6 => {
                "disks: [{name: data, size: 1GiB, pool: more}, {name: log, size: 1GiB, pool: more, slot: 3}]\nisolation: keep\n"
            }
            _ => "",
        };
        let card = if i % 2 == 1 { "networks: [{network: lan}]\n" } else { "" };
        text.push_str(&format!(
            "---\nkind: VM\nname: db-{i}\nlabels: {{pair: '{i}'}}\nmemory: 512MiB\n{card}{disk}{wish}"
        ));
    }
    text
}

/// The run of a seed.
#[must_use]
pub fn of(seed: u64) -> Scenario {
    let mut random = StdRng::seed_from_u64(seed);
    let able: u8 = random.random_range(2..=5);
    // Two hosts alone cannot make up for the loss of each other.
    let witness = able == 2 && random.random_bool(0.7);
    let hosts = able + u8::from(witness);
    let vms = random.random_range(0..=6);
    let watchdog = random.random_bool(0.7);
    let mut scenario = Scenario {
        about: format!("What seed {seed} decides."),
        hosts,
        witness,
        watchdog,
        power_control: random.random_bool(0.6),
        clock_skew_percent: if random.random_bool(0.5) { 1.0 } else { 4.0 },
        manifest: manifest(random.random_range(1..=4), vms, able),
        rebalance: match seed % 3 {
            0 => RebalancePolicy::Auto,
            _ => RebalancePolicy::Advise,
        },
        // In half of them a VM whose disks are shut is not waited for.
        fencing: match seed % 2 {
            0 => ClusterSpec::default().fencing,
            _ => vec![ProofKind::PoweredOff, ProofKind::LeaseExpired, ProofKind::StorageFenced],
        },
        seeds: 1,
        events: Vec::new(),
        lasts: LASTS_MS / 1000,
        mend: true,
        empties: None,
        expect: Expect { converged: true, ..Expect::default() },
    };
    let (mut at, calm) = (0, random.random_range(1..=12));
    loop {
        at += random.random_range(10..1_500 * calm);
        if at >= LASTS_MS {
            break;
        }
        let mut happens = |ms: u64, fault| {
            scenario.events.push(Event { at: ms as f64 / 1000.0, fault });
        };
        let fault = faults::random(&mut random, (hosts, able), vms);
        happens(at, fault.clone());
        // Without a watchdog a paused host that nobody resumes would be off for good in every way but one. A witness has none.
        let last = format!("host{hosts}");
        if let Fault::Pause(host) = fault
            && (!watchdog || witness && host == last)
        {
            happens(at + random.random_range(100..12_000), Fault::Resume(host));
        }
    }
    scenario.events.sort_by(|a, b| a.at.total_cmp(&b.at));
    if able > 2 && random.random_bool(0.5) {
        scenario.empties = Some(format!("host{}", random.random_range(1..=able)));
    }
    scenario
}
