//! Whether manifests fit together and fit the cluster, before anything is written.

use haven_model::{
    Bytes, HostSpec, MigrationOptions, Name, NetworkSpec, Object, ObjectRef, Placement,
    PoolDriverKind, PoolSpec, Snapshot, VmSpec,
    host::{MIRRORS, POSTCOPY, SHUTS},
    manifest::{Manifest, Problem},
    name::NAME_MAX,
    object::{Kind, Stored},
    service::{FrontendSpec, Protocol, ServiceSpec, Sticky, UpdateSpec},
    vm::{DiskSpec, HangSpec, Isolation, RestartPolicy, Sign},
    volume::{FEWEST_REPLICAS, MOST_REPLICAS},
};
use haven_plan::tolerance::migration::speaks_less;
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Display,
};

/// What a problem is about: a field's name, and what was written there.
pub(super) type Place<'a> = (&'a str, &'a dyn Display);
/// Takes a place, what is wrong and what is right.
pub(super) type Say<'a> = dyn FnMut(Place<'_>, String, &str) + 'a;

/// The cluster as it will be once all of `manifests` are applied.
pub(super) struct After<'a> {
    pub(super) snapshot: &'a Snapshot,
    given: BTreeMap<ObjectRef, &'a Object>,
}

impl After<'_> {
    fn has(&self, kind: Kind, name: &Name) -> bool {
        let reference = ObjectRef::new(kind, name.clone());
        self.given.contains_key(&reference)
            || self.snapshot.object(&reference).is_some_and(|(object, _)| !object.meta().deleting)
    }

    /// All objects of a kind as they will be.
    fn objects(&self, kind: Kind) -> Vec<Object> {
        let given = self.given.iter().filter(|(r, _)| r.kind == kind);
        let stored = self.snapshot.objects(kind).into_iter().map(|(object, _)| object);
        let stays = stored.filter(|object| !self.given.contains_key(&object.reference()));
        given.map(|(_, object)| (*object).clone()).chain(stays).collect()
    }

    fn names(&self, kind: Kind) -> String {
        let mut names: BTreeSet<Name> =
            self.snapshot.objects(kind).into_iter().map(|(o, _)| o.meta().name.clone()).collect();
        names.extend(self.given.keys().filter(|r| r.kind == kind).map(|r| r.name.clone()));
        if names.is_empty() {
            return format!("there is no {kind} yet");
        }
        format!("there are: {}", names.iter().map(Name::as_str).collect::<Vec<_>>().join(", "))
    }

    pub(super) fn pool(&self, name: &Name) -> Option<PoolSpec> {
        match self.given.get(&ObjectRef::new(Kind::Pool, name.clone())) {
            Some(Object::Pool(pool)) => Some(pool.spec.clone()),
            _ => self.snapshot.pools.get(name).map(|pool| pool.spec.clone()),
        }
    }

    fn network(&self, name: &Name) -> Option<NetworkSpec> {
        match self.given.get(&ObjectRef::new(Kind::Network, name.clone())) {
            Some(Object::Network(network)) => Some(network.spec.clone()),
            _ => self.snapshot.networks.get(name).map(|n| n.spec.clone()),
        }
    }

    fn networks(&self) -> Vec<(Name, NetworkSpec)> {
        let mut names: BTreeSet<Name> = self.snapshot.networks.keys().cloned().collect();
        names.extend(self.given.keys().filter(|r| r.kind == Kind::Network).map(|r| r.name.clone()));
        names.into_iter().filter_map(|name| Some((name.clone(), self.network(&name)?))).collect()
    }
}

/// Everything that is wrong.
#[must_use]
pub fn validate(manifests: &[Manifest], snapshot: &Snapshot) -> Vec<Problem> {
    let given = manifests.iter().map(|m| (m.object.reference(), &m.object)).collect();
    let after = After { snapshot, given };
    let mut problems = Vec::new();
    for manifest in manifests {
        let mut say = |(key, value): Place<'_>, message: String, hint: &str| {
            problems.push(manifest.problem_at(key, &value.to_string(), message, hint));
        };
        super::validate_after::check(
            &after.given,
            snapshot,
            &manifest.object.reference(),
            &mut say,
        );
        match &manifest.object {
            Object::Vm(vm) => {
                vm_spec(&after, &vm.spec, &vm.meta.name, &mut say);
                super::validate_snapshots::of_vm(&after, &vm.spec, false, &mut say);
            }
            Object::Service(service) => {
                service_spec(&after, &service.spec, &service.meta.name, &mut say)
            }
            Object::Network(network) => {
                network_spec(&after, &network.spec, &network.meta.name, &mut say)
            }
            Object::Pool(pool) => {
                if !snapshot.pools.contains_key(&pool.meta.name) {
                    mirrored(snapshot, &pool.spec, &mut say);
                }
                super::pools::validate(snapshot, &pool.meta.name, &pool.spec, &mut say);
            }
            Object::Host(host) => of_host(snapshot, host, &mut say),
            Object::Target(target) => super::targets::validate(&target.spec, &mut say),
            // What is written in one is for `super::certificates`.
            Object::Certificate(_) => {}
            Object::Image(image) => {
                if snapshot.images.get(&image.meta.name).is_none_or(|old| old.spec != image.spec) {
                    say(
                        ("name", &image.meta.name),
                        "an image cannot be made by a manifest".into(),
                        "import it with `haven image import`",
                    );
                }
            }
        }
    }
    problems
}

/// A copy that goes on alone must not be able to write anything.
fn isolation(after: &After<'_>, spec: &VmSpec, name: &Name, say: &mut Say<'_>) {
    if spec.isolation != Isolation::Keep {
        return;
    }
    let before = after.snapshot.vms.get(name);
    let kept_before = before.is_some_and(|vm| vm.spec.isolation == Isolation::Keep);
    let can_be_shut = |disk: &&DiskSpec| match after.pool(&disk.pool) {
        Some(pool) => matches!(pool.driver, PoolDriverKind::Mirrored | PoolDriverKind::Rbd),
        // Said already.
        None => true,
    };
    let other = spec.disks.iter().find(|disk| !can_be_shut(disk));
    let why = match other {
        Some(disk) => {
            let DiskSpec { name: disk, pool, .. } = disk;
            format!(
                "its disk `{disk}` in the pool `{pool}` cannot be shut to a host that is not heard"
            )
        }
        None if spec.disks.is_empty() => {
            "it has no disk by which its copy there could be shut out".into()
        }
        None => match speaks_less(after.snapshot, SHUTS).filter(|_| !kept_before) {
            Some(host) => format!(
                "{host} has not said that it knows what that is: it runs an older Haven, or has not come up yet"
            ),
            None => return,
        },
    };
    say(
        ("isolation", &"keep"),
        format!("{name} cannot be kept: {why}"),
        "leave `isolation` out, so that it starts elsewhere once nothing of it can run there; or have all its disks in pools that are mirrored or of Ceph's, and all hosts up and upgraded",
    );
}

/// Whether a pool's disks can be on as many hosts as is asked for.
fn mirrored(snapshot: &Snapshot, pool: &PoolSpec, say: &mut Say<'_>) {
    if pool.driver != PoolDriverKind::Mirrored {
        if let Some(replicas) = pool.replicas {
            say(
                ("replicas", &replicas),
                "`replicas` belongs to mirrored pools".into(),
                "leave it out, or write `driver: mirrored`",
            );
        }
        return;
    }
    let copies = u32::try_from(pool.copies()).unwrap_or(u32::MAX);
    if !(FEWEST_REPLICAS..=MOST_REPLICAS).contains(&copies) {
        return say(
            ("replicas", &copies),
            format!("each disk cannot be on {copies} hosts"),
            "write 2 or 3; on one host is `driver: local`",
        );
    }
    let hosts = snapshot.hosts.values().filter(|host| !host.spec.witness).count();
    if hosts < pool.copies() {
        say(
            ("replicas", &copies),
            format!("each disk would be on {copies} hosts, and {hosts} can run VMs"),
            "let another host join first (`haven host invite`), or make a pool with `driver: local`",
        );
    }
    if let Some(host) = speaks_less(snapshot, MIRRORS) {
        say(
            ("driver", &"mirrored"),
            format!(
                "{host} has not said that it knows mirrored pools: it runs an older Haven, or has not come up yet"
            ),
            "wait until all hosts are up and upgraded",
        );
    }
}

/// What of a host was decided when it became part of the cluster.
fn of_host(snapshot: &Snapshot, host: &Stored<HostSpec>, say: &mut Say<'_>) {
    let Some(old) = snapshot.hosts.get(&host.meta.name) else {
        return say(
            ("name", &host.meta.name),
            format!("host `{}` is not part of the cluster", host.meta.name),
            "hosts come with `haven join`; a manifest can only change them",
        );
    };
    if old.spec.address != host.spec.address {
        say(
            ("address", &host.spec.address),
            "the address of a host cannot be changed".into(),
            "remove the host and join it again",
        );
    }
    if old.spec.witness != host.spec.witness {
        say(
            ("witness", &host.spec.witness),
            "a host is made a witness when it becomes part of the cluster".into(),
            "remove the host, and let it in again with `haven witness` or `haven join`",
        );
    }
}

fn largest_host(snapshot: &Snapshot) -> Option<(Bytes, u32)> {
    let runs = |host: &Name| snapshot.hosts.get(host).is_none_or(|host| !host.spec.witness);
    let statuses = || snapshot.host_status.iter().filter(|(host, _)| runs(host));
    let memory = statuses().map(|(host, status)| {
        let reserved = snapshot.hosts.get(host).map_or(0, |h| h.spec.reserved_memory.0);
        status.memory.0.saturating_sub(reserved)
    });
    let cpus = statuses().map(|(_, status)| status.cpus).max()?;
    Some((Bytes::mib(memory.max()? >> 20), cpus))
}

fn sizes(after: &After<'_>, spec: &VmSpec, name: &Name, say: &mut Say<'_>) {
    if let Some((memory, cpus)) = largest_host(after.snapshot) {
        if spec.memory > memory {
            let hint = format!("the largest host has {memory} for VMs");
            say(
                ("memory", &""),
                format!("{name} asks for {} of memory, more than any host has", spec.memory),
                &hint,
            );
        }
        if spec.cpus > cpus {
            say(
                ("cpus", &""),
                format!("{name} asks for {} CPUs, more than any host has", spec.cpus),
                &format!("the largest host has {cpus}"),
            );
        }
    }
    if spec.memory < Bytes::mib(16) {
        say(
            ("memory", &""),
            format!("{} of memory is too little for a VM", spec.memory),
            "give it at least 16MiB",
        );
    }
    if spec.cpus == 0 {
        say(("cpus", &""), "a VM needs at least one CPU".into(), "write `cpus: 1`");
    }
}

fn vm_spec(after: &After<'_>, spec: &VmSpec, name: &Name, say: &mut Say<'_>) {
    sizes(after, spec, name, say);
    isolation(after, spec, name, say);
    let mut missing = |key: &str, kind: Kind, wanted: &Name| {
        if !after.has(kind, wanted) {
            say((key, wanted), format!("{kind} `{wanted}` does not exist"), &after.names(kind));
        }
    };
    if let Some(image) = &spec.image {
        missing("image", Kind::Image, image);
    }
    for disk in &spec.disks {
        missing("pool", Kind::Pool, &disk.pool);
        if let Some(image) = &disk.image {
            missing("image", Kind::Image, image);
        }
        if let Some(backup) = &disk.backup {
            missing("target", Kind::Target, &backup.target);
        }
    }
    if let Some(backup) = &spec.backup {
        missing("to", Kind::Target, &backup.to);
    }
    for nic in &spec.networks {
        missing("network", Kind::Network, &nic.network);
    }
    super::validate_disks::disks(after, spec, name, say);
    super::targets::of_vm(after.snapshot, spec, say);
    addresses(after, spec, name, say);
    hang(spec, say);
    migration(after.snapshot, spec, say);
    let affinity = &spec.affinity;
    let both = affinity.near.iter().any(|(key, value)| affinity.apart.get(key) == Some(value));
    if both {
        say(
            ("apart", &""),
            "`near` and `apart` ask for the opposite of each other".into(),
            "remove one of them",
        );
    }
}

fn addresses(after: &After<'_>, spec: &VmSpec, name: &Name, say: &mut Say<'_>) {
    for nic in &spec.networks {
        let (Some(ip), Some(network)) = (nic.address, after.network(&nic.network)) else {
            continue;
        };
        if !network.subnet.contains(&ip)
            || ip == network.subnet.network()
            || ip == network.subnet.broadcast()
        {
            say(
                ("address", &ip),
                format!("{ip} is not an address of network `{}`", nic.network),
                &format!("its subnet is {}", network.subnet),
            );
        } else if ip == network.gateway() {
            say(
                ("address", &ip),
                format!("{ip} is the gateway of network `{}`", nic.network),
                "choose another address",
            );
        }
        let has = |placement: &Placement| {
            placement.nics.iter().any(|n| n.network == nic.network && n.ip == ip)
        };
        let placed = after.snapshot.placements.iter().find(|(vm, p)| *vm != name && has(p));
        let wishes = |object: &Object| match object {
            Object::Vm(vm) if vm.meta.name != *name && !vm.meta.deleting => {
                let mut nics = vm.spec.networks.iter();
                nics.any(|n| n.network == nic.network && n.address == Some(ip))
                    .then(|| vm.meta.name.clone())
            }
            _ => None,
        };
        let wished = || after.objects(Kind::Vm).iter().find_map(wishes);
        if let Some(other) = placed.map(|(vm, _)| vm.clone()).or_else(wished) {
            say(("address", &ip), format!("{ip} belongs to vm/{other}"), "choose another address");
        }
        let twice =
            spec.networks.iter().filter(|n| n.network == nic.network && n.address == Some(ip));
        if twice.count() > 1 {
            say(
                ("address", &ip),
                format!("{ip} is given to two network cards"),
                "each card has an address of its own",
            );
        }
    }
}

/// Whether the members of a service can be named after it; if not, what is wrong and what is right.
pub(super) fn names_of_members(
    name: &Name,
    replicas: u32,
    update: &UpdateSpec,
) -> Result<(), (String, String)> {
    // While members are replaced there are up to twice as many, and numbers are used again.
    let most = update.most_members(replicas.max(1)).saturating_mul(2).to_string();
    let longest = NAME_MAX - 1 - most.len();
    if name.as_str().len() <= longest {
        return Ok(());
    }
    Err((
        format!("the name leaves no room for those of {replicas} members"),
        format!(
            "members are called like {name}-{most}; a name has at most {NAME_MAX} characters, so this one at most {longest}"
        ),
    ))
}

/// What is asked for when a guest hangs must be able to be told, and to be done.
/// A host that does not know of it could not read the VM's record any more.
fn migration(snapshot: &Snapshot, spec: &VmSpec, say: &mut Say<'_>) {
    if spec.migration == MigrationOptions::default() {
        return;
    }
    if let Some(host) = speaks_less(snapshot, POSTCOPY) {
        say(
            ("migration", &""),
            format!(
                "{host} has not said that it knows `migration`: it runs an older Haven, or has not come up yet"
            ),
            "leave it out until all hosts are up and upgraded",
        );
    }
}

fn hang(spec: &VmSpec, say: &mut Say<'_>) {
    let Some(hang) = &spec.hang else { return };
    if hang.after < HangSpec::SHORTEST {
        say(
            ("after", &hang.after),
            format!("a guest cannot be told to hang within {}", hang.after),
            &format!(
                "write {} or more: under load a guest is held up for a moment",
                HangSpec::SHORTEST
            ),
        );
    }
    let has = |sign| hang.signs.contains(&sign);
    if !has(Sign::Agent) && !has(Sign::Check) {
        say(
            ("signs", &""),
            "without `agent` or `check` a guest that has nothing to do looks like one that hangs"
                .into(),
            "add one of them to `signs`",
        );
    }
    if has(Sign::Check) && spec.check.is_none() {
        say(
            ("signs", &""),
            "`signs` names the check, and there is none".into(),
            "give a `check`, or take it out of `signs`",
        );
    }
    if spec.restart == RestartPolicy::Never {
        say(
            ("restart", &"never"),
            "`restart: never` and `hang` ask for the opposite of each other".into(),
            "remove one of them",
        );
    }
}

fn service_spec(after: &After<'_>, spec: &ServiceSpec, name: &Name, say: &mut Say<'_>) {
    // The service's check is its members'.
    let mut member = spec.template.spec.clone();
    member.check.clone_from(&spec.check);
    vm_spec(after, &member, name, say);
    super::validate_snapshots::of_vm(after, &member, true, say);
    if let Err((message, hint)) = names_of_members(name, spec.replicas, &spec.update) {
        say(("name", name), message, &hint);
    }
    if spec.replicas > 500 {
        say(
            ("replicas", &spec.replicas),
            format!("{} replicas are too many", spec.replicas),
            "a service has at most 500 members",
        );
    }
    super::validate_update::update(after.snapshot, spec, say);
    if spec.template.spec.networks.iter().any(|nic| nic.address.is_some()) {
        say(
            ("address", &""),
            "the members of a service cannot all have the same address".into(),
            "leave `address` out; Haven chooses",
        );
    }
    frontend(after, spec, name, say);
}

/// The most connections at once that one balancer takes in all.
const MOST_CONNECTIONS: u32 = 4000;

fn options(spec: &ServiceSpec, frontend: &FrontendSpec, say: &mut Say<'_>) {
    if frontend.sticky == Sticky::Cookie && frontend.mode == Protocol::Tcp {
        say(
            ("sticky", &"cookie"),
            "cookies belong to HTTP, and this frontend has the mode tcp".into(),
            "write `sticky: source`, or `mode: http`",
        );
    }
    let limits = [
        ("maxConnections", frontend.max_connections),
        ("maxConnectionsPerMember", frontend.max_connections_per_member),
    ];
    for (field, limit) in limits {
        if let Some(limit) = limit.filter(|limit| !(1..=MOST_CONNECTIONS).contains(limit)) {
            say(
                (field, &limit),
                format!("{limit} connections cannot be a limit"),
                "write 1 to 4000, or leave it out",
            );
        }
    }
    let checked = spec.check.as_ref().map(|check| check.port);
    let port = frontend.target_port.unwrap_or(frontend.port);
    if frontend.proxy_protocol.send && checked == Some(port) {
        say(
            ("send", &true),
            format!(
                "members that expect the PROXY protocol on port {port} fail a plain check there"
            ),
            "check another port of them, on which they speak without it",
        );
    }
}

fn frontend(after: &After<'_>, spec: &ServiceSpec, name: &Name, say: &mut Say<'_>) {
    let Some(frontend) = &spec.frontend else {
        return;
    };
    if spec.template.spec.networks.is_empty() {
        say(
            ("frontend", &""),
            "a service with a frontend needs members with a network".into(),
            "add `networks` to the template",
        );
    }
    if frontend.port == 0 {
        say(("port", &""), "a frontend needs a port".into(), "write for example `port: 80`");
    }
    options(spec, frontend, say);
    if let Some(tls) = &frontend.tls
        && !after.has(Kind::Certificate, &tls.certificate)
    {
        let name = &tls.certificate;
        let message = format!("certificate `{name}` does not exist");
        say(("certificate", name), message, &after.names(Kind::Certificate));
    }
    let ip = frontend.address;
    for (network, of) in after.networks() {
        if of.subnet.contains(&ip) {
            say(
                ("address", &ip),
                format!("{ip} lies in network `{network}` of the guests"),
                "choose a free address of the hosts' own network",
            );
        }
    }
    if let Some((host, _)) = after.snapshot.hosts.iter().find(|(_, h)| h.spec.address == ip) {
        say(
            ("address", &ip),
            format!("{ip} is the address of {host}"),
            "choose a free address of the hosts' own network",
        );
    }
    let theirs = |object: &Object| match object {
        Object::Service(s) if s.meta.name != *name && !s.meta.deleting => {
            let frontend = s.spec.frontend.as_ref();
            frontend.is_some_and(|f| f.address == ip).then(|| s.meta.name.clone())
        }
        _ => None,
    };
    if let Some(other) = after.objects(Kind::Service).iter().find_map(theirs) {
        say(
            ("address", &ip),
            format!("{ip} is the address of service/{other}"),
            "an address moves from host to host as a whole, so each service has one of its own",
        );
    }
}

fn network_spec(after: &After<'_>, spec: &NetworkSpec, name: &Name, say: &mut Say<'_>) {
    if spec.subnet.prefix_len() > 29 {
        say(
            ("subnet", &""),
            format!("the subnet {} is too small", spec.subnet),
            "use a prefix of at most /29",
        );
    }
    if !(576..=9000).contains(&spec.mtu) {
        say(
            ("mtu", &spec.mtu),
            format!("an MTU of {} does not work", spec.mtu),
            "use 576 to 9000, or leave it out",
        );
    }
    if spec.vni.is_some_and(|vni| vni == 0 || vni >= 1 << 24) {
        say(("vni", &""), "`vni` must be from 1 to 16777215".into(), "leave it out; Haven chooses");
    }
    for (other, theirs) in after.networks() {
        if other != *name && spec.vni.is_some() && spec.vni == theirs.vni_in_use() {
            say(
                ("vni", &""),
                format!("network `{other}` has the `vni` {} already", spec.vni.unwrap_or(0)),
                "leave it out; Haven chooses",
            );
        }
        let overlap = spec.subnet.contains(&theirs.subnet) || theirs.subnet.contains(&spec.subnet);
        if other != *name && overlap {
            say(
                ("subnet", &""),
                format!(
                    "the subnet {} overlaps {} of network `{other}`",
                    spec.subnet, theirs.subnet
                ),
                "choose another subnet",
            );
        }
    }
    let used =
        after.snapshot.placements.values().any(|p| p.nics.iter().any(|nic| nic.network == *name));
    let changed = after
        .snapshot
        .networks
        .get(name)
        .is_some_and(|old| old.spec.subnet != spec.subnet || old.spec.driver != spec.driver);
    if used && changed {
        say(
            ("subnet", &""),
            "the subnet and the driver of a network in use cannot be changed".into(),
            "make a new network under another name",
        );
    }
}
