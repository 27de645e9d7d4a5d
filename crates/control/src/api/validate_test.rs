//! What people get wrong, and what they are told.

use super::validate::validate;
use haven_model::{Bytes, manifest::parse};
use haven_plan::testing::{World, at, name, stored};

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
fn how_a_vm_moves_is_said_once_every_host_knows_of_it() {
    let text = "kind: VM\nname: db\nmemory: 1GiB\nmigration:\n  postcopy: true\n";
    let told = said(text);
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(told[0].starts_with("host1 has not said that it knows `migration`"), "{told:?}");
    let mut world = World::new(3, Bytes::gib(4));
    world.current();
    let manifests = parse(&[("x.yaml".into(), text.into())]).unwrap();
    assert!(validate(&manifests, &world.snapshot).is_empty());
}

#[test]
fn a_problem_points_at_the_value() {
    let mut world = World::new(3, Bytes::gib(4));
    world.network("front");
    let text = "kind: VM\nname: web\nmemory: 64GiB\nimage: debian\ndisks:\n- name: root\n  pool: fast\n  size: 1GiB\n\
                networks:\n- network: front\n  address: 10.77.0.1\n- network: back\n---\n\
                kind: Network\nname: wide\nmtu: 90000\nsubnet: 10.77.0.0/16\n";
    let manifests = parse(&[("x.yaml".into(), text.into())]).unwrap();
    let place = |p: &haven_model::manifest::Problem| {
        let word = p.message.split('`').nth(1).unwrap_or(&p.message);
        format!("{}:{}:{} {word}", p.file, p.line, p.column)
    };
    let places: Vec<String> = validate(&manifests, &world.snapshot).iter().map(place).collect();
    assert_eq!(
        places,
        [
            "x.yaml:3:9 web asks for 64GiB of memory, more than any host has",
            "x.yaml:4:8 debian",
            "x.yaml:7:9 fast",
            "x.yaml:12:12 back",
            "x.yaml:11:12 front",
            "x.yaml:16:6 an MTU of 90000 does not work",
            "x.yaml:17:9 front",
        ]
    );
}

#[test]
fn a_disk_that_is_there_grows_and_nothing_else() {
    let mut world = World::new(3, Bytes::gib(4));
    for (pool, driver) in [("fast", "local"), ("slow", "local"), ("twins", "mirrored")] {
        let spec = serde_json::json!({"driver": driver, "path": format!("/{pool}")});
        let spec = serde_json::from_value(spec).unwrap();
        world.snapshot.pools.insert(name(pool), at(3, stored(pool, spec)));
    }
    let disks = serde_json::json!({"memory": "64MiB", "disks": [
        {"name": "root", "size": "2GiB", "pool": "fast"}, {"name": "data", "size": "2GiB", "pool": "twins"},
    ]});
    world.vm("db", serde_json::from_value(disks).unwrap());
    let told = |root: &str, data: &str| {
        let text = format!(
            "kind: VM\nname: db\nmemory: 64MiB\ndisks:\n- {{name: root, {root}}}\n- {{name: data, {data}}}\n- {{name: new, size: 1GiB, pool: twins}}\n"
        );
        let manifests = parse(&[("x.yaml".into(), text)]).unwrap();
        let problems = validate(&manifests, &world.snapshot);
        problems.into_iter().map(|p| p.message).collect::<Vec<_>>()
    };
    let same = "size: 2GiB, pool: twins";
    assert_eq!(told("size: 2GiB, pool: fast", same), [""; 0]);
    assert_eq!(told("size: 3GiB, pool: fast", same), [""; 0]);
    let smaller = told("size: 1GiB, pool: fast", same);
    assert_eq!(smaller, ["the disk `root` of db is 2GiB, and cannot be made smaller"]);
    let moved = told("size: 2GiB, pool: slow", same);
    assert_eq!(
        moved,
        ["the disk `root` of db lies in the pool `fast`, and would begin anew, empty"]
    );
    let older = told("size: 2GiB, pool: fast", "size: 3GiB, pool: twins");
    assert!(
        older[0].starts_with("host1 has not said that it can make a mirrored disk larger"),
        "{older:?}"
    );
}

#[test]
fn only_a_vm_that_can_be_shut_out_may_be_kept() {
    let mut world = World::new(3, Bytes::gib(4));
    world.current();
    for (pool, driver) in [("fast", "local"), ("twins", "mirrored")] {
        let spec = serde_json::json!({"driver": driver, "path": format!("/{pool}")});
        let spec = serde_json::from_value(spec).unwrap();
        world.snapshot.pools.insert(name(pool), at(3, stored(pool, spec)));
    }
    let told = |world: &World, disks: &str| {
        let text = format!("kind: VM\nname: db\nmemory: 64MiB\nisolation: keep\n{disks}");
        let manifests = parse(&[("x.yaml".into(), text)]).unwrap();
        let problems = validate(&manifests, &world.snapshot);
        problems.into_iter().map(|p| p.message).collect::<Vec<_>>()
    };
    let data = "disks:\n- {name: data, size: 1GiB, pool: twins}\n";
    assert_eq!(told(&world, data), [""; 0]);
    let two = told(&world, &format!("{data}- {{name: tmp, size: 1GiB, pool: fast}}\n"));
    assert_eq!(
        two,
        [
            "db cannot be kept: its disk `tmp` in the pool `fast` cannot be shut to a host that is not heard"
        ]
    );
    let none = told(&world, "");
    assert_eq!(
        none,
        ["db cannot be kept: it has no disk by which its copy there could be shut out"]
    );
    let mut older = (*world.snapshot.host_status["host2"].value).clone();
    older.speaks = haven_model::host::SHUTS - 1;
    world.snapshot.host_status.insert(name("host2"), at(2, older));
    let older = told(&world, data);
    assert!(older[0].contains("host2 has not said that it knows what that is"), "{older:?}");
}

#[test]
fn a_hang_that_cannot_be_told_or_acted_upon_is_refused() {
    let vm = |more: &str| said(&format!("kind: VM\nname: web\nmemory: 64MiB\n{more}\n"));
    assert_eq!(vm("hang: {}"), [""; 0]);
    assert_eq!(vm("check: {port: 80}\nhang: {after: 10s, signs: [check]}"), [""; 0]);
    for (more, words) in [
        ("hang: {after: 9s}", "cannot be told to hang within 9s"),
        ("hang: {signs: [disk, network]}", "looks like one that hangs"),
        ("hang: {signs: [check]}", "names the check, and there is none"),
        ("restart: never\nhang: {}", "ask for the opposite"),
    ] {
        let said = vm(more);
        assert!(said.len() == 1 && said[0].contains(words), "{more}: {said:?}");
    }
    let service = |check: &str| {
        said(&format!(
            "kind: Service\nname: web\nreplicas: 1\n{check}\ntemplate: {{spec: {{memory: 64MiB, hang: {{signs: [check]}}}}}}\n"
        ))
    };
    assert_eq!(service("check: {port: 80}"), [""; 0]);
    assert_eq!(service("labels: {}").len(), 1);
}

#[test]
fn options_of_a_frontend_that_cannot_work_are_refused() {
    let service = |check: u16, frontend: &str| {
        said(&format!(
            "kind: Service\nname: web\nreplicas: 1\ncheck: {{port: {check}}}\n\
             frontend: {{address: 10.88.0.100, port: 80, {frontend}}}\n\
             template: {{spec: {{memory: 64MiB, networks: [{{network: front}}]}}}}\n"
        ))
    };
    let good = "sticky: cookie, maxConnections: 100, proxyProtocol: {send: true}";
    assert_eq!(service(8080, good), [""; 0]);
    for (check, frontend, words) in [
        (80, "mode: tcp, sticky: cookie", "cookies belong to HTTP"),
        (80, "maxConnections: 0", "0 connections cannot be a limit"),
        (80, "maxConnectionsPerMember: 5000", "5000 connections cannot be a limit"),
        (80, "proxyProtocol: {send: true}", "fail a plain check"),
        (8080, "targetPort: 8080, proxyProtocol: {send: true}", "fail a plain check"),
    ] {
        let said = service(check, frontend);
        assert!(said.len() == 1 && said[0].contains(words), "{frontend}: {said:?}");
    }
}

#[test]
fn opposite_wishes_are_refused() {
    let wish = "affinity: {near: {tier: db}, apart: {tier: db}}";
    assert_eq!(
        said(&format!("kind: VM\nname: web\nmemory: 1GiB\n{wish}\n")),
        ["`near` and `apart` ask for the opposite of each other [remove one of them]"]
    );
    let other = wish.replace("apart: {tier: db}", "apart: {tier: web}");
    assert_eq!(said(&format!("kind: VM\nname: web\nmemory: 1GiB\n{other}\n")), [""; 0]);
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

fn service(name: &str, replicas: u32, address: &str, port: u16) -> String {
    format!(
        "kind: Service\nname: {name}\nreplicas: {replicas}\ntemplate: {{spec: {{memory: 64MiB, networks: [{{network: front}}]}}}}\nfrontend: {{address: {address}, port: {port}}}\n---\n"
    )
}

#[test]
fn two_services_never_share_an_address() {
    let both =
        |second: u16| service("a", 1, "10.88.0.100", 80) + &service("b", 1, "10.88.0.100", second);
    for port in [80, 81] {
        let said = said(&both(port));
        assert_eq!(said.len(), 2, "{said:?}");
        assert!(said[0].starts_with("10.88.0.100 is the address of service/b"), "{said:?}");
        assert!(said[0].contains("each service has one of its own"), "{said:?}");
    }
}

#[test]
fn a_service_has_room_for_the_names_of_its_members() {
    let long = "s".repeat(38);
    let told = said(&service(&long, 3, "10.88.0.100", 80));
    assert_eq!(told, [""; 0]);
    let told = said(&service(&long, 12, "10.88.0.100", 80));
    assert!(told[0].starts_with("the name leaves no room for those of 12 members"), "{told:?}");
    assert!(told[0].contains("so this one at most 37"), "{told:?}");
    assert!(!said(&service(&"s".repeat(40), 1, "10.88.0.100", 80)).is_empty());
}

#[test]
fn one_address_is_not_given_to_two_vms() {
    let vm = |name: &str, nics: &str| {
        format!("kind: VM\nname: {name}\nmemory: 64MiB\nnetworks: [{nics}]\n---\n")
    };
    let nic = "{network: front, address: 10.77.0.9}";
    let told = said(&(vm("a", nic) + &vm("b", nic)));
    assert_eq!(told.len(), 2);
    assert!(told[0].starts_with("10.77.0.9 belongs to vm/b"), "{told:?}");
    let told = said(&vm("a", &format!("{nic}, {nic}")));
    assert!(told.iter().any(|one| one.contains("given to two network cards")), "{told:?}");
}

#[test]
fn one_identifier_is_not_given_to_two_networks() {
    let network = |name: &str, subnet: &str| {
        format!("kind: Network\nname: {name}\nsubnet: {subnet}\nvni: 7\n---\n")
    };
    let told = said(&(network("a", "10.78.0.0/24") + &network("b", "10.79.0.0/24")));
    assert_eq!(told.len(), 2);
    assert!(told[0].starts_with("network `b` has the `vni` 7 already"), "{told:?}");
}

#[test]
fn an_update_that_could_never_happen_is_refused() {
    let update = |replicas: u32, spread: bool, update: &str| {
        said(&format!(
            "kind: Service\nname: web\nreplicas: {replicas}\nspread: {{required: {spread}}}\n\
             update: {{{update}}}\ntemplate: {{spec: {{memory: 64MiB}}}}\n"
        ))
    };
    for good in [
        "strategy: rolling, maxSurge: 2",
        "strategy: blue-green, promote: manual, keepOld: 1m, maxSurge: 0",
        "strategy: canary, canary: {members: 2, weight: 25, hold: 5m}",
        "strategy: canary",
    ] {
        assert_eq!(update(3, false, good), [""; 0], "{good}");
    }
    for (bad, words) in [
        ("strategy: canary, canary: {weight: 0}", "cannot get 0 % of the traffic"),
        ("strategy: canary, canary: {weight: 100}", "`strategy: blue-green`"),
        ("strategy: canary, canary: {members: 0}", "a canary needs a member"),
        ("strategy: canary, canary: {members: 4}", "4 new members are more than the 3"),
        (
            "canary: {weight: 10}",
            "`canary` belongs to the strategy canary, and this one is rolling",
        ),
        ("strategy: canary, promote: manual", "`promote` belongs to the strategy blue-green"),
        ("keepOld: 1m", "write `strategy: blue-green`, or remove `keepOld`"),
        ("strategy: canary, maxSurge: 0", "no update could ever happen"),
    ] {
        let said = update(3, false, bad);
        assert!(said.len() == 1 && said[0].contains(words), "{bad}: {said:?}");
    }
    // There are three hosts.
    assert_eq!(update(2, true, "strategy: canary"), [""; 0]);
    let said = update(3, true, "strategy: canary");
    assert!(said[0].contains("they are 4 together, each needs a host of its own, and there are 3"));
    assert!(update(2, true, "strategy: blue-green")[0].contains("they are 4 together"));
    assert_eq!(update(3, true, "strategy: rolling"), [""; 0]);
}

#[test]
fn nothing_starts_after_itself_or_after_what_is_not_there() {
    let vm = |name: &str, after: &str| {
        format!("kind: VM\nname: {name}\nmemory: 1GiB\nafter: [{after}]\n")
    };
    let all = |texts: &[String]| said(&texts.join("---\n"));
    assert_eq!(all(&[vm("app", "vm/db"), vm("db", "")]), [""; 0]);
    assert_eq!(
        all(&[vm("app", "vm/db, pool/fast")]),
        [
            "vm/db does not exist [apply it first, or in the same step]",
            "nothing can start after pool/fast [name a VM (`vm/NAME`) or a service (`service/NAME`)]",
        ]
    );
    assert_eq!(
        all(&[vm("app", "vm/app")]),
        [
            "nothing of this could ever start: vm/app starts after vm/app [take one of them out of `after`]"
        ]
    );
    let service = "kind: Service\nname: web\nreplicas: 1\ntemplate: {spec: {memory: 64MiB, after: [vm/app]}}\n";
    let round = all(&[vm("app", "vm/db"), vm("db", "service/web"), service.into()]);
    assert_eq!(round.len(), 3, "{round:?}");
    assert!(
        round[0].starts_with(
            "nothing of this could ever start: vm/app starts after vm/db starts after service/web starts after vm/app"
        ),
        "{round:?}"
    );
}

/// The place in the file, and what stands in the cluster already counts.
#[test]
fn a_circle_is_found_where_it_is_closed() {
    let mut world = World::new(3, Bytes::gib(4));
    let mut db = haven_plan::testing::vm_spec(Bytes::gib(1));
    db.after = vec!["vm/app".parse().unwrap()];
    world.vm("db", db);
    let text = "kind: VM\nname: app\nmemory: 1GiB\nafter:\n- vm/db\n";
    let manifests = parse(&[("x.yaml".into(), text.into())]).unwrap();
    let problems = validate(&manifests, &world.snapshot);
    assert_eq!(problems.len(), 1);
    assert_eq!((problems[0].line, problems[0].column), (5, 3));
}

#[test]
fn what_was_decided_when_a_host_joined_is_not_changed_by_a_manifest() {
    let host = |name: &str, more: &str| said(&format!("kind: Host\nname: {name}\n{more}\n"));
    assert_eq!(host("host1", "address: 10.88.0.1\ncordoned: true"), [""; 0]);
    for (name, more, words) in [
        ("host1", "address: 10.88.0.9", "the address of a host cannot be changed"),
        ("host1", "address: 10.88.0.1\nwitness: true", "a host is made a witness when it becomes"),
        ("host9", "address: 10.88.0.9", "host `host9` is not part of the cluster"),
    ] {
        let said = host(name, more);
        assert!(said.len() == 1 && said[0].contains(words), "{more}: {said:?}");
    }
}

#[test]
fn a_mirrored_pool_has_as_many_hosts_as_its_disks_need() {
    let pool = |hosts: usize, more: &str| {
        let mut world = World::new(hosts, Bytes::gib(4));
        world.current();
        let text = format!("kind: Pool\nname: disks\npath: /disks\n{more}\n");
        let manifests = parse(&[("x.yaml".into(), text)]).unwrap();
        let said = validate(&manifests, &world.snapshot).into_iter();
        said.map(|p| format!("{} [{}]", p.message, p.hint)).collect::<Vec<_>>()
    };
    assert!(pool(2, "driver: mirrored").is_empty());
    assert!(pool(3, "driver: mirrored\nreplicas: 3").is_empty());
    let said = pool(2, "driver: mirrored\nreplicas: 3");
    assert!(said[0].starts_with("each disk would be on 3 hosts, and 2 can run VMs"), "{said:?}");
    let said = pool(1, "driver: mirrored");
    assert!(said[0].contains("let another host join first"), "{said:?}");
    for (replicas, what) in [(1, "on 1 hosts"), (4, "on 4 hosts")] {
        let said = pool(5, &format!("driver: mirrored\nreplicas: {replicas}"));
        assert!(said[0].contains(what) && said[0].contains("write 2 or 3"), "{said:?}");
    }
    let said = pool(3, "driver: local\nreplicas: 2");
    assert!(said[0].starts_with("`replicas` belongs to mirrored pools"), "{said:?}");
    let older = said_of_older();
    assert!(older[0].contains("has not said that it knows mirrored pools"), "{older:?}");
}

fn said_of_older() -> Vec<String> {
    said("kind: Pool\nname: disks\ndriver: mirrored\npath: /disks\n")
}

#[test]
fn a_disk_in_ceph_is_not_encrypted_without_a_word() {
    let mut world = World::new(2, Bytes::gib(4));
    world.current();
    let spec = serde_json::json!({"driver": "rbd", "rbd": {"monitors": ["10.0.0.1"], "user": "haven", "key": "sealed:v1:x", "pool": "vms"}});
    let spec = serde_json::from_value(spec).unwrap();
    world.snapshot.pools.insert(name("ceph"), at(3, stored("ceph", spec)));
    let told = |more: &str| {
        let text = format!(
            "kind: VM\nname: db\nmemory: 64MiB\ndisks: [{{name: data, size: 1GiB, pool: ceph{more}}}]\n"
        );
        let manifests = parse(&[("x.yaml".into(), text)]).unwrap();
        validate(&manifests, &world.snapshot).into_iter().map(|p| p.message).collect::<Vec<_>>()
    };
    assert_eq!(told(""), [""; 0]);
    let said = told(", encrypted: true");
    assert!(
        said.len() == 1 && said[0].contains("of a Ceph cluster does not take that yet"),
        "{said:?}"
    );
}

#[test]
fn a_disk_is_not_limited_to_nothing() {
    let limits = |limits: &str| {
        said(&format!(
            "kind: Pool\nname: fast\ndriver: local\npath: /fast\n---\nkind: VM\nname: db\nmemory: 64MiB\ndisks: [{{name: data, size: 1GiB, pool: fast, limits: {limits}}}]\n"
        ))
    };
    assert!(limits("{iops: 1, bandwidth: 1MiB}").is_empty());
    let none = limits("{iops: 0}");
    assert!(none[0].starts_with("the disk `data` would take no request at all [leave"), "{none:?}");
    let slow = limits("{bandwidth: 4KiB}");
    assert!(
        slow[0].contains("would stand still for seconds") && slow[0].contains("1MiB"),
        "{slow:?}"
    );
}
