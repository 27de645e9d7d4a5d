//! What every list prints, held fast.

use super::*;
use haven_model::{
    Event, Incident, IncidentStep, Name, Object,
    api::{HostLine, Item, Overview, ServiceLine},
    event::{AuditEntry, Severity},
    manifest::parse,
};

fn item(text: &str, state: &str, host: Option<&str>, columns: &[(&str, &str)]) -> Item {
    let mut object = parse(&[("x".into(), text.into())]).unwrap().remove(0).object;
    object.meta_mut().uid = "0198-uid".into();
    object.meta_mut().created_ms = 1_790_000_000_123;
    Item {
        resource_version: 42,
        object,
        state: state.into(),
        host: host.map(|h| Name::new(h).unwrap()),
        columns: columns.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect(),
        warning: String::new(),
    }
}

fn vms() -> Vec<Item> {
    let vm = |name: &str, state: &str, host: Option<&str>, ip: &str| {
        let text = format!("kind: VM\nname: {name}\nlabels:\n  tier: web\nmemory: 128MiB\n");
        let columns = [("memory", "128MiB"), ("cpus", "1"), ("addresses", ip), ("epoch", "3")];
        item(&text, state, host, &columns)
    };
    let mut all =
        vec![vm("hello-1", "ready", Some("host1"), "10.77.0.2"), vm("web", "waiting", None, "")];
    all[0].object.meta_mut().owner = Some("service/hello".parse().unwrap());
    all
}

fn service() -> Item {
    let text = "kind: Service\nname: hello\nreplicas: 3\ntemplate:\n  spec:\n    memory: 128MiB\n";
    let columns = [("address", "10.88.0.100:80"), ("updated", "1/3, 2 going")];
    item(text, "3/3 ready", Some("host1"), &columns)
}

fn hosts() -> Vec<Item> {
    let host = |name: &str, state: &str, more: &str| {
        let text = format!("kind: Host\nname: {name}\naddress: 10.0.0.1\n{more}");
        let columns = [
            ("address", "10.0.0.1"),
            ("version", "0.1.0"),
            ("memory", "2GiB"),
            ("accel", "kvm"),
            ("qemu", "10.0.2"),
            ("problems", ""),
        ];
        item(&text, state, None, &columns)
    };
    vec![host("host1", "online", ""), host("host2", "cordoned", "cordoned: true\n")]
}

fn rest() -> Vec<(&'static str, Vec<Item>)> {
    let network = "kind: Network\nname: front\nsubnet: 10.77.0.0/24\nvni: 7\n";
    let office = "kind: Network\nname: office\ndriver: bridge\nbridge: br0\nsubnet: 10.9.0.0/16\nnat: false\n";
    let pool = "kind: Pool\nname: filer\ndriver: shared\npath: /mnt/filer\n";
    let sum = "a".repeat(64);
    let debian =
        format!("kind: Image\nname: debian\nformat: qcow2\ndisk:\n  sha256: {sum}\n  size: 3MiB\n");
    let tiny = format!(
        "kind: Image\nname: tiny\nkernel:\n  sha256: {sum}\n  size: 100B\ncmdline: quiet\n"
    );
    vec![
        (
            "networks",
            vec![
                item(network, "", None, &[("subnet", "10.77.0.0/24")]),
                item(office, "deleting", None, &[("subnet", "10.9.0.0/16")]),
            ],
        ),
        ("pools", vec![item(pool, "", None, &[("path", "/mnt/filer")])]),
        (
            "images",
            vec![item(&debian, "on 3 hosts", None, &[]), item(&tiny, "on 1 hosts", None, &[])],
        ),
    ]
}

#[test]
fn lists_of_every_kind() {
    let mut text = String::new();
    let mut all = vec![("vms", vms()), ("services", vec![service()]), ("hosts", hosts())];
    all.extend(rest());
    all.push(("nothing", Vec::new()));
    for (title, list) in all {
        for (word, output) in [("", Output::Table), (" -o wide", Output::Wide)] {
            text.push_str(&format!("== {title}{word}\n{}\n", items(&list, output)));
        }
    }
    insta::assert_snapshot!(text);
}

#[test]
fn lists_for_programs() {
    let (yaml, json) = (items(&vms(), Output::Yaml), items(&vms()[..1], Output::Json));
    insta::assert_snapshot!(format!("{yaml}\n{json}"));
    // What `get -o yaml` prints, `apply` reads.
    let again = parse(&[("again".into(), yaml)]).unwrap();
    assert_eq!(again.len(), 2);
    assert!(matches!(again[1].object, Object::Vm(_)));
    assert_eq!(items(&[], Output::Json), "[]\n");
}

#[test]
fn one_object_with_everything_there_is_to_say() {
    let why = ["it runs on host1, because that has most room".to_owned()];
    let mut text = String::new();
    for output in [Output::Table, Output::Wide, Output::Json, Output::Yaml] {
        let one = shown(&service(), &vms()[..1], &why, output);
        text.push_str(&format!("== {output:?}\n{one}\n"));
    }
    for one in hosts()[1..].iter().chain(&vms()[1..]) {
        text.push_str(&format!("== host and vm\n{}\n", shown(one, &[], &[], Output::Table)));
    }
    insta::assert_snapshot!(text);
}

#[test]
fn status_of_a_cluster_with_a_lost_host() {
    let host = |name: &str, state: &str| HostLine {
        name: name.into(),
        address: "10.0.0.1".into(),
        state: state.into(),
        vms: 2,
        memory_used: 400 << 20,
        memory: 1536 << 20,
        roles: vec!["voter".into()],
    };
    let of = Overview {
        cluster: "lab".into(),
        headline: "host2 is lost (lease-expired)".into(),
        hosts: vec![host("host1", "online"), host("host2", "lost (lease-expired)")],
        services: vec![ServiceLine {
            name: "hello".into(),
            ready: 2,
            wanted: 3,
            address: "10.88.0.100:80".into(),
            holder: "host1".into(),
        }],
        voters: (2, 3),
        vms: (2, 3),
        down: vec!["host2 is lost (lease-expired)".into()],
        risks: vec![],
        advice: vec![],
        survivable: 0,
        survivable_vms: 1,
        survivable_store: 0,
        incidents: vec!["incident 1: host2 was lost with 1 VMs".into()],
        revision: 7,
    };
    insta::assert_snapshot!(format!("{}\n{}", overview(&of, false), overview(&of, true)));
}

fn an_incident(number: u64, closed_ms: Option<i64>) -> Incident {
    let step = |at_ms, phase: &str, message: &str| IncidentStep {
        at_ms,
        phase: phase.into(),
        object: "host/host2".parse().unwrap(),
        message: message.into(),
    };
    Incident {
        number,
        title: "host2 was lost with 1 VMs".into(),
        host: Name::new("host2").unwrap(),
        session: 1,
        vm: None,
        waiting_for: closed_ms
            .is_none()
            .then(|| Name::new("hello-1").unwrap())
            .into_iter()
            .collect(),
        steps: vec![
            step(1_790_000_001_000, "failed", "host2 renewed its lease for the last time"),
            step(1_790_000_006_010, "proof", "host2 is proven lost"),
        ],
        closed_ms,
    }
}

#[test]
fn incidents_and_their_timelines() {
    let all = [an_incident(3, Some(1_790_000_009_500)), an_incident(4, None)];
    let mut text = format!("{}\n{}\n", incidents(&all, false), incidents(&all, true));
    for wide in [false, true] {
        all.iter().for_each(|one| text.push_str(&incident(one, wide)));
    }
    insta::assert_snapshot!(text);
}

#[test]
fn events_and_the_audit_log() {
    let one = Event {
        id: "0198".into(),
        at_ms: 1_790_000_001_000,
        object: "vm/hello-1".parse().unwrap(),
        severity: Severity::Warning,
        message: "hello-1 is placed on host1".into(),
        by: "manager on host1".into(),
    };
    let entry = AuditEntry {
        id: "0199".into(),
        at_ms: 1_790_000_001_000,
        who: "root on host1".into(),
        from: "local".into(),
        what: "POST /v1/apply".into(),
        outcome: "ok".into(),
    };
    let mut text = String::new();
    for wide in [false, true] {
        text.push_str(&format!("{}{}\n", event_head(wide), event(&one, wide)));
        text.push_str(&format!("{}\n", audit(std::slice::from_ref(&entry), wide)));
    }
    text.push_str(&value(&[&entry], Output::Yaml, |_| String::new()));
    insta::assert_snapshot!(text);
}

fn view(left: &[(&str, Option<&str>, &str)]) -> haven_model::api::DrainView {
    let left = left.iter().map(|(vm, to, why)| haven_model::api::DrainLeft {
        vm: Name::new(*vm).unwrap(),
        to: to.map(|to| Name::new(to).unwrap()),
        why: (*why).into(),
    });
    haven_model::api::DrainView {
        state: "draining".into(),
        drain: Some(haven_model::Drain {
            id: "d".into(),
            by: "alice".into(),
            at_ms: 1,
            drained_ms: None,
            bringing_back: false,
        }),
        left: left.collect(),
        moved: vec![Name::new("web").unwrap()],
        ..Default::default()
    }
}

#[test]
fn a_drain_in_words() {
    let going = view(&[
        ("db", Some("host2"), "db is being moved from host1 to host2: its memory is copied"),
        ("big", None, "waiting: big needs 6GiB"),
    ]);
    assert!(!is_stuck(&going));
    let mut stuck = view(&[("big", None, "waiting: big needs 6GiB")]);
    stuck.addresses = vec!["waiting: 10.88.0.9 stays on host1, which is drained".into()];
    assert!(is_stuck(&stuck));
    let host = Name::new("host1").unwrap();
    let mut over = view(&[]);
    over.resting = vec![Name::new("old").unwrap()];
    over.quorum = Some("host1 runs one of 3 members of the store".into());
    let back = haven_model::api::DrainView { drain: None, ..view(&[]) };
    let told = [
        drain_lines(&going).join("\n"),
        drain_blocks(&stuck),
        drained(&over, &host),
        drained(&back, &host),
    ];
    insta::assert_snapshot!(told.join("\n---\n"));
}

#[test]
fn a_rehearsal_as_a_table_and_step_by_step() {
    use haven_model::api::{Rehearsal, RehearsedStep, RehearsedVm};
    let vm = |vm: &str, to: Option<&str>, after_ms: Option<u64>, why: &str| RehearsedVm {
        vm: Name::new(vm).unwrap(),
        from: Some(Name::new("host1").unwrap()),
        to: to.map(|to| Name::new(to).unwrap()),
        after_ms,
        why: why.into(),
    };
    let step = |after_ms, object: &str, message: &str| RehearsedStep {
        after_ms,
        object: object.parse().unwrap(),
        message: message.into(),
    };
    let told = Rehearsal {
        steps: vec![
            step(1000, "host/host1", "host1 is suspected"),
            step(5050, "vm/web-1", "web-1 restarts on host2 because host1 is lost (lease-expired)"),
        ],
        vms: vec![
            vm("web-1", Some("host2"), Some(7150), ""),
            vm("big", None, None, "waiting: big needs 6GiB, largest free is 2GiB on host2"),
        ],
        ends_after_ms: 7150,
        figures: "nothing was measured here yet".into(),
    };
    let nothing = Rehearsal::default();
    let all = [rehearsal(&told, false), rehearsal(&told, true), rehearsal(&nothing, false)];
    insta::assert_snapshot!(all.join("---\n"));
}

#[test]
fn the_balance_of_a_cluster() {
    use haven_model::{
        Pressure, RebalancePolicy,
        api::{Balance, BalancingMove, HostBalance},
    };
    let host = |host: &str, cpu: Option<u32>, after: u32| HostBalance {
        host: Name::new(host).unwrap(),
        cpu,
        cpu_after: cpu.map(|_| after),
        memory: cpu.map(|_| 400),
        memory_after: cpu.map(|_| 300),
        pressure: cpu.map(|cpu| Pressure { cpu: cpu / 3, memory: 0 }),
    };
    let hosts =
        vec![host("host1", Some(900), 500), host("host2", Some(100), 500), host("host3", None, 0)];
    let step = BalancingMove {
        vm: Name::new("mail").unwrap(),
        from: Name::new("host1").unwrap(),
        to: Name::new("host2").unwrap(),
        reason: "mail is to move from host1 to host2 for balance: the CPUs of host1 are 90 % busy"
            .into(),
        gain: 400,
    };
    let uneven = Balance {
        policy: RebalancePolicy::Auto,
        hosts: hosts.clone(),
        moves: vec![step],
        held: Some("nothing is moved for balance while host4 is suspected".into()),
        rests: None,
    };
    let even = Balance { policy: RebalancePolicy::Advise, hosts, ..Balance::default() };
    let off = Balance { policy: RebalancePolicy::Off, ..Balance::default() };
    let all = [balance(&uneven), balance(&even), balance(&off)];
    insta::assert_snapshot!(all.join("---\n"));
}

#[test]
fn work_on_hosts_under_way_stopped_and_over() {
    use haven_model::{Maintenance, api::MaintenanceView};
    let of = |stopped: Option<&str>, ended: bool| -> MaintenanceView {
        let phases = if ended { ["done", "done"] } else { ["working", "waiting"] };
        let turn = |host: &str, phase: &str| serde_json::json!({"host": host, "phase": phase, "sinceMs": 1});
        let of: Maintenance = serde_json::from_value(serde_json::json!({
            "id": "m1", "work": "upgrade", "by": "ann", "atMs": 1, "stopped": stopped,
            "hosts": [turn("host2", phases[0]), turn("host1", phases[1])],
            "endedMs": ended.then_some(9),
        }))
        .unwrap();
        let now = "waiting: the upgrade of host2 is under way: it is drained".to_owned();
        let now = (!ended && stopped.is_none()).then_some(now);
        let drained = if ended { vec![] } else { vec![Name::new("host2").unwrap()] };
        MaintenanceView { maintenance: Some(of), now, drained }
    };
    let all = [
        maintenance(&MaintenanceView::default()),
        maintenance(&of(None, false)),
        maintenance(&of(Some("the upgrade of host2 failed: no space left"), false)),
        maintenance(&of(None, true)),
    ];
    insta::assert_snapshot!(all.join("---\n"));
}

fn a_backup(
    vm: &str,
    id: &str,
    moment: haven_model::backup::Moment,
) -> haven_model::backup::Backup {
    let name = |text: &str| Name::new(text).unwrap();
    let disk = haven_model::backup::BackupDisk {
        name: name("root"),
        size: haven_model::Bytes::gib(20),
        index: String::new(),
        used: haven_model::Bytes(3_500_000_000),
        read: haven_model::Bytes(12 << 20),
        stored: haven_model::Bytes(300_000),
    };
    haven_model::backup::Backup {
        id: id.into(),
        vm: name(vm),
        vm_uid: "u1".into(),
        at_ms: 1_790_000_000_123,
        ended_ms: 1_790_000_004_123,
        by: "schedule".into(),
        moment,
        mark: String::new(),
        object: serde_json::Value::Null,
        disks: vec![disk],
    }
}

#[test]
fn backups_and_how_they_stand_and_what_they_hold() {
    use haven_model::{
        api::{BackupFile, BackupFiles, BackupList, BackupSystem, BackupView},
        backup::{BackupRun, BackupSpec, Moment},
    };
    let name = |text: &str| Name::new(text).unwrap();
    let list = BackupList {
        backups: vec![
            a_backup("db", "20260921T141320Z", Moment::Frozen),
            a_backup("web", "20260922T141320Z", Moment::Stopped),
        ],
        unreadable: Vec::new(),
    };
    insta::assert_snapshot!("backups", backups(&[(name("nas"), list)]));
    let run = |outcome: Option<(bool, &str)>| {
        let mut run = BackupRun::new("u1", name("nas"), "root".into(), 1_790_000_000_123, None);
        (run.total, run.done) = (haven_model::Bytes::gib(20), haven_model::Bytes::gib(5));
        match outcome {
            Some((well, said)) => run.ended(1_790_000_004_123, well, said.into()),
            None => run,
        }
    };
    let spec: BackupSpec =
        serde_json::from_value(serde_json::json!({"to": "nas", "keep": "30d"})).unwrap();
    let view = |vm: &str, spec: Option<BackupSpec>, run: Option<BackupRun>| BackupView {
        vm: name(vm),
        spec,
        run,
    };
    let all = [
        view("db", Some(spec.clone()), Some(run(Some((true, "3.3 GiB in use"))))),
        view("mail", Some(spec), None),
        view("shop", None, Some(run(None))),
        view("web", None, Some(run(Some((false, "its pool is full"))))),
    ];
    insta::assert_snapshot!("backup_status", backup_status(&all));
    let system = |at: &str, holds: &str| BackupSystem {
        at: at.into(),
        holds: holds.into(),
        size: haven_model::Bytes::gib(20),
    };
    let systems = vec![system("root:1:/", "an ext file system"), system("root:2:/", "XFS")];
    let places = BackupFiles { systems, files: Vec::new() };
    insta::assert_snapshot!("backup_places", backup_files(&places));
    let file = |called: &str, kind: &str, leads_to: Option<&str>| BackupFile {
        name: called.into(),
        kind: kind.into(),
        size: haven_model::Bytes(1234),
        mode: 0o100_644,
        uid: 0,
        gid: 42,
        modified_ms: 1_790_000_000_000,
        leads_to: leads_to.map(str::to_owned),
    };
    let files = vec![file("hosts", "file", None), file("mtab", "link", Some("/proc/mounts"))];
    let files = BackupFiles { systems: Vec::new(), files };
    insta::assert_snapshot!("backup_files", backup_files(&files));
}

#[test]
fn snapshots_and_how_they_stand() {
    use haven_model::{api::SnapshotView, vm_snapshot::VmSnapshot};
    let view = |called: &str, more: serde_json::Value, waiting: Option<&str>| {
        let mut record = serde_json::json!({"id": "s", "vm": "db", "by": "root", "atMs": 1_790_000_000_123_i64,
            "disks": [{"name": "root", "pool": "fast", "size": "20GiB"}, {"name": "data", "pool": "filer", "size": "1GiB"}]});
        record.as_object_mut().unwrap().extend(more.as_object().cloned().unwrap());
        let snapshot: VmSnapshot = serde_json::from_value(record).unwrap();
        let waiting = waiting.map(str::to_owned);
        SnapshotView { name: Name::new(called).unwrap(), snapshot, waiting }
    };
    let all = [
        view(
            "old",
            serde_json::json!({"state": "there", "moment": "frozen", "ofMs": 1_790_000_001_000_i64}),
            None,
        ),
        view(
            "used",
            serde_json::json!({"state": "there", "moment": "stopped", "revertedMs": 1_790_000_100_000_i64}),
            None,
        ),
        view("full", serde_json::json!({"state": "failed", "message": "the pool is full"}), None),
        view("next", serde_json::json!({"state": "wanted"}), Some("its host host1 is away")),
        view("hourly", serde_json::json!({"state": "there", "scheduled": true}), None),
        view("for-it", serde_json::json!({"state": "there", "madeFor": "db-test"}), None),
    ];
    insta::assert_snapshot!("snapshots", snapshots(&all));
}
