//! What can go wrong, and what people do meanwhile.

use crate::{
    cluster::{Cluster, name},
    net::Controller,
    steps::AtStep,
};
use haven_host::vm::driver::Exit;
use haven_model::{Timers, keys, object::Kind, units::Millis};
use rand::{Rng, rngs::StdRng};
use serde::{Deserialize, Serialize};
use std::{sync::Arc, time::Duration};

/// How long and how often a process ends by [`Fault::Crash`].
const CRASH_S: u64 = 30;
const CRASH_EVERY_MS: u64 = 350;

/// One thing that happens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Fault {
    /// A host loses its power.
    PowerOff(String),
    /// It gets it back.
    PowerOn(String),
    /// Nothing in a host executes any more.
    Pause(String),
    /// It goes on.
    Resume(String),
    /// A daemon is killed; its supervisor starts it again.
    KillDaemon(String),
    /// A daemon hangs: it executes nothing, and its guard, its VMs and its machine go on.
    HangDaemon(String),
    /// It goes on.
    WakeDaemon(String),
    /// A record, such as `spec/vm/db-1`, becomes one that no daemon can read.
    Garble(String),
    /// All of them are again as they were.
    Ungarble,
    /// A host is cut off from every other.
    Isolate(String),
    /// Packets from the first to the second vanish; those back pass.
    Cut(String, String),
    /// They pass again.
    Uncut(String, String),
    /// The uplinks of a host have no link any more; the network between the hosts is another one.
    Unplug(String),
    /// They have it again.
    Plug(String),
    /// All of the network is well, the store as fast as ever, starts work.
    Heal,
    /// The store serves nobody.
    FreezeStore,
    /// It serves again.
    ThawStore,
    /// Requests to the store take so many milliseconds longer, each way.
    SlowStore(u64),
    /// Of a hundred heartbeats so many are lost.
    Lose(u32),
    /// Of a hundred starts of VMs so many fail.
    FailStarts(u32),
    /// Of a hundred calls to the drivers of storage, network and balance so many fail.
    FailDrivers(u32),
    /// Of a hundred guests that are handed over live so many break at the very end.
    BreakCopies(u32),
    /// The process of a VM on a host ends, whether or not it runs the guest.
    KillProcess(String, String),
    /// All that serves replicas on a host ends.
    KillReplicas(String),
    /// On a host a VM's process ends again and again, for half a minute.
    Crash(String, String),
    /// A host's power controller answers no more.
    KillController(String),
    /// A host's power controller takes requests and never answers one.
    HangController(String),
    /// A person stops a VM.
    StopVm(String),
    /// A person starts a VM.
    StartVm(String),
    /// A person takes the last disk of a VM from its guest.
    Detach(String),
    /// A person gives it back.
    Attach(String),
    /// A person takes a snapshot of the mirrored disks of a VM.
    Snapshot(String),
    /// A person stops a VM, goes back to its newest snapshot, and starts it.
    Revert(String),
    /// A person moves a VM live, to this host or to any.
    Migrate(String, Option<String>),
    /// The same, and the guest goes over before all of its memory is there.
    MigrateFirst(String, Option<String>),
    /// Something befalls a host at one step of the next move of a VM.
    AtStep(String, AtStep),
    /// A person takes that back.
    CancelMigration(String),
    /// A person restarts all hosts, one after another.
    RebootAll,
    /// A person drains a host.
    Drain(String),
    /// A person ends that.
    Undrain(String),
    /// A person ends that, and wants back what it moved.
    BringBack(String),
    /// A person deletes a VM.
    DeleteVm(String),
    /// A person wants so many members.
    Scale(String, u32),
    /// A person restarts a service, one member after another.
    Restart(String),
    /// A person changes the cluster's timers; those not given become the defaults.
    Timers(Timers),
}

impl Fault {
    /// Lets it happen.
    pub async fn happen(&self, cluster: &Arc<Cluster>) {
        let net = &cluster.shared.net;
        cluster.shared.judge.note(&format!("FAULT {self:?}"));
        if !matches!(self, Fault::PowerOff(_) | Fault::PowerOn(_)) {
            cluster.shared.judge.disturb();
        }
        match self {
            Fault::PowerOff(host) => cluster.host(host).lock().await.power_off(),
            Fault::PowerOn(host) => cluster.host(host).lock().await.power_on().await,
            Fault::Pause(host) => cluster.pause(host).await,
            Fault::Resume(host) => cluster.resume(host).await,
            Fault::KillDaemon(host) => cluster.restart_daemon(host).await,
            Fault::HangDaemon(host) => cluster.host(host).lock().await.set_daemon_hung(true),
            Fault::WakeDaemon(host) => cluster.host(host).lock().await.set_daemon_hung(false),
            Fault::Garble(path) => cluster.garble(path).await,
            Fault::Ungarble => cluster.ungarble().await,
            Fault::Isolate(host) => net.isolate(host),
            Fault::Cut(from, to) => net.cut(from, to),
            Fault::Uncut(from, to) => net.uncut(from, to),
            Fault::Unplug(host) => net.unplug(host, true),
            Fault::Plug(host) => net.unplug(host, false),
            Fault::Heal => net.heal(),
            Fault::FreezeStore => net.freeze_store(true),
            Fault::ThawStore => net.freeze_store(false),
            Fault::SlowStore(ms) => net.slow_store(Duration::from_millis(*ms)),
            Fault::Lose(percent) => net.lose(*percent),
            Fault::FailStarts(percent) => net.fail_starts(*percent),
            Fault::FailDrivers(percent) => net.fail_drivers(*percent),
            Fault::BreakCopies(percent) => net.break_copies(*percent),
            Fault::KillProcess(vm, host) => cluster.shared.world.end(host, vm, Exit::Crashed),
            Fault::KillReplicas(host) => cluster.shared.world.mirrors.end_serving(host),
            Fault::KillController(host) => net.set_controller(host, Controller::Dead),
            Fault::HangController(host) => net.set_controller(host, Controller::Hung),
            Fault::Crash(vm, host) => {
                let (cluster, vm, host) = (Arc::clone(cluster), vm.clone(), host.clone());
                tokio::spawn(async move {
                    for _ in 0..CRASH_S * 1000 / CRASH_EVERY_MS {
                        tokio::time::sleep(Duration::from_millis(CRASH_EVERY_MS)).await;
                        cluster.shared.world.end(&host, &vm, Exit::Crashed);
                    }
                });
            }
            Fault::AtStep(vm, step) => {
                let (cluster, vm, step) = (Arc::clone(cluster), name(vm), *step);
                tokio::spawn(async move { step.happen(&cluster, &vm).await });
            }
            _ => self.by_a_person(cluster).await,
        }
    }

    async fn by_a_person(&self, cluster: &Arc<Cluster>) {
        let vm = |name: &str| format!("{}{name}", keys::objects(Kind::Vm));
        let service = |name: &str| format!("{}{name}", keys::objects(Kind::Service));
        match self {
            Fault::StopVm(name) => {
                cluster.change(&vm(name), |o| o["spec"]["running"] = false.into()).await;
            }
            Fault::StartVm(name) => {
                cluster.change(&vm(name), |o| o["spec"]["running"] = true.into()).await;
            }
            Fault::Detach(name) | Fault::Attach(name) => {
                let detached = matches!(self, Fault::Detach(_));
                let last = |object: &mut serde_json::Value| {
                    let disks = object.pointer_mut("/spec/disks").and_then(|d| d.as_array_mut());
                    if let Some(disk) = disks.and_then(|disks| disks.last_mut()) {
                        disk["detached"] = detached.into();
                    }
                };
                cluster.change(&vm(name), last).await;
            }
            Fault::Snapshot(name) => cluster.take_snapshot(name).await,
            Fault::Revert(name) => cluster.revert_beside(name),
            Fault::DeleteVm(name) => {
                cluster.change(&vm(name), |o| o["meta"]["deleting"] = true.into()).await;
            }
            Fault::Scale(name, replicas) => {
                let replicas = *replicas;
                let set = |o: &mut serde_json::Value| o["spec"]["replicas"] = replicas.into();
                cluster.change(&service(name), set).await;
            }
            Fault::Restart(name) => {
                let more = |o: &mut serde_json::Value| {
                    let restarts = o["spec"]["restarts"].as_u64().unwrap_or(0) + 1;
                    o["spec"]["restarts"] = restarts.into();
                };
                cluster.change(&service(name), more).await;
            }
            Fault::Timers(timers) => cluster.set_timers(timers).await,
            Fault::Migrate(name, to) => cluster.migrate(name, to.as_deref(), false).await,
            Fault::MigrateFirst(name, to) => cluster.migrate(name, to.as_deref(), true).await,
            Fault::CancelMigration(name) => cluster.cancel_migration(name).await,
            Fault::RebootAll => cluster.reboot_all().await,
            Fault::Drain(host) => cluster.drain(host).await,
            Fault::Undrain(host) => cluster.undrain(host, false).await,
            Fault::BringBack(host) => cluster.undrain(host, true).await,
            _ => {}
        }
    }

    /// The hosts that it names.
    #[must_use]
    pub fn hosts(&self) -> Vec<&str> {
        match self {
            Fault::PowerOff(host)
            | Fault::PowerOn(host)
            | Fault::Pause(host)
            | Fault::Resume(host)
            | Fault::KillDaemon(host)
            | Fault::HangDaemon(host)
            | Fault::WakeDaemon(host)
            | Fault::KillController(host)
            | Fault::KillReplicas(host)
            | Fault::Drain(host)
            | Fault::Undrain(host)
            | Fault::BringBack(host)
            | Fault::HangController(host)
            | Fault::Unplug(host)
            | Fault::Plug(host)
            | Fault::Isolate(host) => vec![host],
            Fault::Cut(from, to) | Fault::Uncut(from, to) => vec![from, to],
            Fault::KillProcess(_, host)
            | Fault::Crash(_, host)
            | Fault::Migrate(_, Some(host))
            | Fault::MigrateFirst(_, Some(host)) => vec![host],
            _ => vec![],
        }
    }
}

/// Some sets of timers: the shortest that are allowed, the defaults, and longer ones.
fn timers(which: u8) -> Timers {
    let [lease, guard, renew, manager, heartbeat, suspect, margin] = match which {
        0 => [4600, 4000, 400, 1000, 100, 500, 300],
        1 => return Timers::default(),
        2 => [9000, 7800, 1000, 2500, 400, 1600, 800],
        _ => [20_000, 17_000, 2000, 5000, 1000, 4000, 2000],
    }
    .map(Millis);
    Timers { lease, guard, renew, manager, heartbeat, suspect, margin }
}

/// Something at a step of a move; at random, so that two of them may meet.
fn step(random: &mut StdRng) -> AtStep {
    let mut all: Vec<AtStep> = AtStep::all().collect();
    let step = all.swap_remove(random.random_range(0..all.len()));
    AtStep { after: random.random_range(0..40), ..step }
}

/// A random fault for hosts `host1`…, of which so many run VMs, and the content that [`crate::storm::manifest`] makes.
pub fn random(random: &mut StdRng, (hosts, able): (u8, u8), vms: u32) -> Fault {
    let host = format!("host{}", random.random_range(1..=hosts));
    let other = format!("host{}", random.random_range(1..=hosts));
    let runs = format!("host{}", random.random_range(1..=able));
    let vm = format!("db-{}", random.random_range(1..=vms.max(1)));
    match random.random_range(0..186) {
        0..14 => Fault::PowerOff(host),
        14..24 => Fault::PowerOn(host),
        24..34 => Fault::Pause(host),
        34..41 => Fault::Resume(host),
        41..47 => Fault::KillDaemon(host),
        47..49 => Fault::HangDaemon(host),
        49 => Fault::Garble(format!("{}/vm/{vm}", if host < other { "spec" } else { "placement" })),
        50..58 => Fault::Isolate(host),
        58..67 if host != other => Fault::Cut(host, other),
        58..72 => Fault::Heal,
        72..75 => Fault::FreezeStore,
        75..78 => Fault::ThawStore,
        78..81 => Fault::SlowStore(random.random_range(20..500)),
        81..83 => Fault::Lose(random.random_range(5..60)),
        83 | 84 => Fault::FailStarts(random.random_range(10..80)),
        85 => Fault::FailDrivers(random.random_range(10..80)),
        86 => Fault::KillController(host),
        87 => Fault::HangController(host),
        88..91 => Fault::StopVm(vm),
        91..93 => Fault::StartVm(vm),
        93..95 => Fault::DeleteVm(vm),
        95..97 => Fault::Scale("web".into(), random.random_range(0..6)),
        97 => Fault::Restart("web".into()),
        98..103 => Fault::Migrate(vm, None),
        103..108 => Fault::MigrateFirst(vm, None),
        108..111 => Fault::Migrate(vm, Some(runs)),
        111..113 => Fault::MigrateFirst(vm, Some(runs)),
        113 => Fault::CancelMigration(vm),
        114..116 => Fault::BreakCopies(random.random_range(10..90)),
        116..120 => Fault::KillProcess(vm, host),
        120..126 => Fault::Drain(runs),
        126..129 => Fault::Undrain(runs),
        129..132 => Fault::BringBack(runs),
        132..134 => Fault::Crash(vm, host),
        134..140 => Fault::Unplug(host),
        140..142 => Fault::Plug(host),
        142..144 => Fault::RebootAll,
        144..152 => Fault::AtStep(vm, step(random)),
        152..159 => Fault::KillReplicas(host),
        162..168 => Fault::Detach(vm),
        168..174 => Fault::Attach(vm),
        174..181 => Fault::Snapshot(vm),
        181..186 => Fault::Revert(vm),
        159 => Fault::Garble(format!("volumes/{vm}.data")),
        _ => Fault::Timers(timers(random.random_range(0..4))),
    }
}
