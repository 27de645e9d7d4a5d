//! The task that owns one VM on this host, from the moment it is placed here until nothing of it is left.
//!
//! Each turn: read what is wanted, look at what is seen, ask [`super::vm_step`] for the next step, do it. Only this
//! task starts, stops or cleans this VM here (the guard may kill it at any time).

use super::{
    AgentParts,
    storage::{SeedNic, SeedWanted, StorageFailure, VolumeName, VolumeWanted},
    vm_step::{Seen, Step, Wanted, backoff_ms, next},
    volumes::{self, Known},
    wanted,
};
use crate::{
    health::Target,
    vm::driver::{Accel, DirectBoot, DiskLaunch, Exit, NicLaunch, RunningVm, VmEvent, VmLaunch},
};
use haven_model::{
    ImageSpec, Name, ObjectRef, Placement, PoolDriverKind, PoolSpec, Severity, Snapshot, VmPhase,
    VmSpec, VmStatus, keys,
    object::{Kind, Stored},
    service::Protocol,
    vm::{DiskSpec, RestartPolicy},
};
use haven_store::{
    clock::Mono,
    raw::{Compare, Op},
};
use std::{path::PathBuf, sync::Arc, time::Duration};
use tokio::sync::{broadcast, watch};
use tokio_util::sync::CancellationToken;

/// The net under lost wake-ups.
const NET: Duration = Duration::from_secs(10);
/// How long a start waits for its network.
const NETWORK_PATIENCE: Duration = Duration::from_secs(5);

/// Why a VM could not be started, in words.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct StartFailure(String);

impl StartFailure {
    fn of(error: &dyn std::error::Error) -> Self {
        Self(super::chain(error))
    }
}

struct VmTask {
    parts: Arc<AgentParts>,
    vm: Name,
    networks: watch::Receiver<i64>,
    running: Option<u64>,
    ended: Option<Exit>,
    deleted: bool,
    /// The epoch that `ended`, `restarts` and the pauses are about.
    epoch: u64,
    restarts: u32,
    failures: u32,
    resets: u64,
    not_before: Mono,
    started_ms: Option<i64>,
    ready: Option<bool>,
    ready_ms: Option<i64>,
    /// The last status written, without its times.
    written: Option<VmStatus>,
    /// The last object and placement seen, for cleaning after both are gone.
    last: Option<(Arc<Stored<VmSpec>>, Arc<Placement>)>,
}

/// Owns `vm` until it is not this host's and nothing of it is left here, or until `cancel`.
pub async fn run(
    parts: Arc<AgentParts>,
    vm: Name,
    networks: watch::Receiver<i64>,
    cancel: CancellationToken,
) {
    let now = parts.clock.now();
    let mut events = parts.vms.events();
    let mut task = VmTask {
        running: None,
        parts,
        vm,
        networks,
        ended: None,
        deleted: false,
        epoch: 0,
        restarts: 0,
        failures: 0,
        resets: 0,
        not_before: now,
        started_ms: None,
        ready: None,
        ready_ms: None,
        written: None,
        last: None,
    };
    task.look(&cancel).await;
    task.remember();
    let (mut live, mut session) = (task.parts.live.clone(), task.parts.session.clone());
    let (target, mut health) = super::health_watch::spawn(&task.parts, &cancel);
    while !cancel.is_cancelled() {
        let snapshot = Arc::clone(&live.borrow_and_update());
        session.borrow_and_update();
        let Some(pause) = task.turn(&snapshot).await else {
            return;
        };
        target.send_replace(task.health_target(&snapshot));
        tokio::select! {
            biased;
            () = cancel.cancelled() => {}
            event = events.recv() => task.event(event).await,
            _ = live.changed() => {}
            _ = session.changed() => {}
            _ = health.changed() => {
                let ready = *health.borrow_and_update();
                task.health(ready);
            }
            () = task.parts.clock.sleep(pause) => {}
        }
    }
}

impl VmTask {
    /// Finds what runs already. It listens before it looks: an end between the two is seen by one of them.
    async fn look(&mut self, cancel: &CancellationToken) {
        while !cancel.is_cancelled() {
            match self.parts.vms.list().await {
                Ok(list) => {
                    let found = list.iter().find(|vm| vm.vm == self.vm.as_str());
                    self.running = found.map(|vm| vm.epoch);
                    return;
                }
                Err(error) => self.failed("look for", &error),
            }
            self.parts.clock.sleep(Duration::from_millis(500)).await;
        }
    }

    /// Takes over what an earlier daemon wrote of the VM that runs.
    fn remember(&mut self) {
        let live = self.parts.live.borrow();
        let Some(status) = live.vm_status.get(&self.vm) else {
            return;
        };
        if self.running == Some(status.epoch) && status.host == self.parts.me {
            self.epoch = status.epoch;
            self.started_ms = status.started_ms;
            self.restarts = status.restarts;
            self.resets = status.resets;
            self.ready = status.ready;
            self.ready_ms = status.ready_ms;
        }
    }

    /// One turn; how long until the next at the latest, or nothing when the task is over.
    async fn turn(&mut self, snapshot: &Snapshot) -> Option<Duration> {
        let wanted = wanted::vm(snapshot, &self.parts.me, &self.vm);
        if let (Some(object), Some(placement)) =
            (snapshot.vms.get(&self.vm), snapshot.placements.get(&self.vm))
            && placement.host == self.parts.me
        {
            self.last = Some((Arc::clone(&object.value), Arc::clone(&placement.value)));
        }
        self.new_epoch(wanted);
        let policy = snapshot.vms.get(&self.vm).map_or(RestartPolicy::Never, |vm| vm.spec.restart);
        let now = self.parts.clock.now();
        let seen = Seen {
            running: self.running,
            may_start: self.parts.current_session().is_some(),
            ended: self.ended,
            backing_off: now < self.not_before,
            resets: self.resets,
            deleted: self.deleted,
        };
        let step = next(wanted, policy, &seen);
        match step {
            Step::Start => self.start(snapshot).await,
            Step::Stop => self.stop(snapshot).await,
            Step::Kill => self.kill().await,
            Step::Reset => self.reset(snapshot).await,
            Step::Clean => self.clean(snapshot).await,
            Step::LeaveEnded => {
                self.report(snapshot, VmPhase::Stopped, "it ended and its restart policy leaves it")
                    .await
            }
            Step::Settled if matches!(wanted, Wanted::NotMine) => return None,
            Step::Settled => self.settled(snapshot, wanted).await,
            Step::Wait => {}
        }
        let rest = Duration::from_nanos(self.not_before.0.saturating_sub(self.parts.clock.now().0));
        Some(match (rest.is_zero(), step) {
            (true, Step::Kill | Step::Stop | Step::Reset | Step::Clean) => Duration::ZERO,
            (true, _) => NET,
            (false, _) => rest.min(NET),
        })
    }

    fn new_epoch(&mut self, wanted: Wanted) {
        if let Wanted::Run { epoch, resets } = wanted {
            if epoch != self.epoch {
                self.epoch = epoch;
                self.ended = None;
                self.restarts = 0;
                self.failures = 0;
                self.resets = resets;
                self.not_before = self.parts.clock.now();
                self.ready = None;
                self.ready_ms = None;
                self.started_ms = None;
            }
            self.deleted = false;
        } else if matches!(wanted, Wanted::Stop) {
            self.ended = None;
        }
    }

    async fn settled(&mut self, snapshot: &Snapshot, wanted: Wanted) {
        match wanted {
            Wanted::Run { .. } => self.report(snapshot, VmPhase::Running, "").await,
            Wanted::Stop => self.report(snapshot, VmPhase::Stopped, "").await,
            Wanted::Delete => self.report(snapshot, VmPhase::Stopped, "deleted").await,
            Wanted::NotMine => {}
        }
    }

    /// Writes the status if it changed, in a transaction that compares the placement: an agent that lost the VM
    /// meanwhile writes nothing. True when the store has it.
    async fn publish(&mut self, snapshot: &Snapshot, phase: VmPhase, message: &str) -> bool {
        let Some(placement) = snapshot.placements.get(&self.vm) else {
            return false;
        };
        let Some(session) = self.parts.current_session() else {
            return false;
        };
        let generation = snapshot.vms.get(&self.vm).map_or(0, |vm| vm.meta.generation);
        let mut status = VmStatus {
            host: self.parts.me.clone(),
            session: session.number,
            epoch: placement.epoch,
            generation,
            phase,
            since_ms: 0,
            started_ms: self.started_ms,
            ready: self.ready,
            ready_ms: self.ready_ms,
            restarts: self.restarts,
            resets: self.resets,
            message: message.to_owned(),
        };
        if self.written.as_ref() == Some(&status) {
            return true;
        }
        let bare = status.clone();
        status.since_ms = (self.parts.wall_ms)();
        let compare = vec![Compare::ModRevision(keys::placement(&self.vm), placement.revision)];
        let value = serde_json::to_vec(&status).expect("a status is plain data");
        match self
            .parts
            .store
            .txn(compare, vec![Op::Put(keys::vm_status(&self.vm), value.into())])
            .await
        {
            Ok(outcome) if outcome.succeeded => {
                self.written = Some(bare);
                true
            }
            Ok(_) => {
                self.written = None;
                false
            }
            Err(error) => {
                tracing::debug!(vm = %self.vm, %error, "its status could not be written");
                self.written = None;
                self.retry_in(Duration::from_millis(200));
                false
            }
        }
    }

    async fn report(&mut self, snapshot: &Snapshot, phase: VmPhase, message: &str) {
        self.publish(snapshot, phase, message).await;
    }

    fn retry_in(&mut self, pause: Duration) {
        self.not_before = self.parts.clock.now().plus(pause);
    }

    async fn start(&mut self, snapshot: &Snapshot) {
        // The whole start belongs to this session; the guard refuses it when another one is open at its end.
        let Some(session) = self.parts.current_session() else { return };
        // Before the transaction, so that nothing of the wait lies between it and the start.
        let Some(kvm) = self.parts.facts.borrow().as_ref().map(|facts| facts.kvm) else {
            return self.retry_in(Duration::from_millis(200));
        };
        // The transaction behind this status is what makes a start and a change of owner exclude each other.
        if !self.publish(snapshot, VmPhase::Starting, "").await {
            self.retry_in(Duration::from_millis(100));
            return;
        }
        let Some((object, placement)) = self.last.clone() else {
            return;
        };
        match self.launch(snapshot, &object, &placement, session.number, kvm).await {
            Ok(running) => {
                self.running = Some(running.epoch);
                self.ended = None;
                self.started_ms = Some((self.parts.wall_ms)());
                self.ready = None;
                self.ready_ms = None;
                self.resets = object.spec.resets;
                self.report(snapshot, VmPhase::Running, "").await;
            }
            Err(failure) => {
                tracing::warn!(vm = %self.vm, why = %failure, "it could not be started");
                self.failures += 1;
                self.retry_in(Duration::from_millis(backoff_ms(self.failures)));
                self.report(snapshot, VmPhase::Failed, &failure.0).await;
            }
        }
    }

    async fn launch(
        &mut self,
        snapshot: &Snapshot,
        object: &Stored<VmSpec>,
        placement: &Placement,
        session: u64,
        kvm: bool,
    ) -> Result<RunningVm, StartFailure> {
        let disks = self.disks(snapshot, &object.meta.uid, &object.spec, placement).await?;
        let direct_boot = self.direct_boot(snapshot, &object.spec).await?;
        let seed = self.seed(snapshot, object, placement).await?;
        self.wait_for_network(snapshot).await?;
        let mtu = |network: &Name| snapshot.networks.get(network).map_or(1450, |n| n.spec.mtu);
        let nics = placement
            .nics
            .iter()
            .enumerate()
            .map(|(i, nic)| NicLaunch {
                tap: placement.tap(i),
                mac: nic.mac.clone(),
                mtu: mtu(&nic.network),
            })
            .collect();
        let launch = VmLaunch {
            vm: self.vm.to_string(),
            uid: placement.unix_uid(),
            epoch: placement.epoch,
            session,
            cpus: object.spec.cpus,
            memory_bytes: object.spec.memory.0,
            disks,
            direct_boot,
            seed: Some(seed),
            nics,
            accel: if kvm { Accel::Kvm } else { Accel::Tcg },
            uuid: object.meta.uid.clone(),
        };
        self.parts.vms.start(&launch).await.map_err(|error| StartFailure::of(&error))
    }

    async fn disks(
        &self,
        snapshot: &Snapshot,
        uid: &str,
        spec: &VmSpec,
        placement: &Placement,
    ) -> Result<Vec<DiskLaunch>, StartFailure> {
        let mut disks = Vec::new();
        for disk in &spec.disks {
            let pool = pool_of(snapshot, disk)?;
            let image = match &disk.image {
                None => None,
                Some(name) => {
                    let image = image_of(snapshot, name)?;
                    let file = image.disk.clone().ok_or_else(|| {
                        StartFailure(format!(
                            "image `{name}` has no disk; disk `{}` cannot be made from it",
                            disk.name
                        ))
                    })?;
                    Some((file, image.format.clone().unwrap_or_else(|| "raw".into())))
                }
            };
            let wanted = VolumeWanted {
                name: VolumeName {
                    vm: self.vm.clone(),
                    disk: disk.name.clone(),
                    vm_uid: uid.to_owned(),
                },
                size_bytes: disk.size.0,
                image,
                owner_uid: placement.unix_uid(),
            };
            let ready = self
                .parts
                .storage
                .volume(&pool, &wanted)
                .await
                .map_err(|e| StartFailure::of(&e))?;
            disks.push(DiskLaunch {
                name: disk.name.to_string(),
                path: ready.path,
                format: ready.format,
                read_only: false,
                size_bytes: disk.size.0,
            });
        }
        Ok(disks)
    }

    async fn direct_boot(
        &self,
        snapshot: &Snapshot,
        spec: &VmSpec,
    ) -> Result<Option<DirectBoot>, StartFailure> {
        let Some(name) = &spec.image else {
            return Ok(None);
        };
        let image = image_of(snapshot, name)?;
        let Some(kernel) = &image.kernel else {
            return Ok(None);
        };
        let kernel = self.image_file(kernel).await?;
        let initrd = match &image.initrd {
            Some(file) => Some(self.image_file(file).await?),
            None => None,
        };
        Ok(Some(DirectBoot { kernel, initrd, cmdline: image.cmdline.clone() }))
    }

    async fn image_file(
        &self,
        file: &haven_model::image::ImageFile,
    ) -> Result<PathBuf, StartFailure> {
        self.parts.storage.image_file(file).await.map_err(|e| StartFailure::of(&e))
    }

    async fn seed(
        &self,
        snapshot: &Snapshot,
        object: &Stored<VmSpec>,
        placement: &Placement,
    ) -> Result<PathBuf, StartFailure> {
        let nics = placement
            .nics
            .iter()
            .filter_map(|nic| {
                let network = &snapshot.networks.get(&nic.network)?.spec;
                Some(SeedNic {
                    mac: nic.mac.clone(),
                    address: ipnet::Ipv4Net::new(nic.ip, network.subnet.prefix_len()).ok()?,
                    gateway: network.gateway(),
                    nameservers: network.nameservers.clone(),
                })
            })
            .collect();
        let wanted = SeedWanted {
            vm: self.vm.to_string(),
            instance_id: object.meta.uid.clone(),
            user_data: object.spec.user_data.clone().unwrap_or_default(),
            nics,
            owner_uid: placement.unix_uid(),
        };
        self.parts.storage.seed(&wanted).await.map_err(|e| StartFailure::of(&e))
    }

    async fn wait_for_network(&mut self, snapshot: &Snapshot) -> Result<(), StartFailure> {
        let Some(revision) = snapshot.placements.get(&self.vm).map(|p| p.revision) else {
            return Ok(());
        };
        let ready = self.networks.wait_for(|applied| *applied >= revision);
        tokio::select! {
            biased;
            _ = ready => Ok(()),
            () = self.parts.clock.sleep(NETWORK_PATIENCE) => Err(StartFailure(
                "the network of this host is not ready; `haven host show` tells what is wrong with it".into(),
            )),
        }
    }

    async fn stop(&mut self, snapshot: &Snapshot) {
        self.report(snapshot, VmPhase::Stopping, "").await;
        let grace = self
            .last
            .as_ref()
            .map_or(Duration::from_secs(10), |(o, _)| o.spec.stop_grace.duration());
        match self.parts.vms.stop(self.vm.as_str(), grace).await {
            Ok(()) => self.gone(snapshot, "").await,
            Err(error) => self.failed("stop", &error),
        }
    }

    async fn kill(&mut self) {
        match self.parts.vms.kill(self.vm.as_str()).await {
            Ok(()) => {
                self.running = None;
                self.written = None;
            }
            Err(error) => self.failed("kill", &error),
        }
    }

    async fn gone(&mut self, snapshot: &Snapshot, message: &str) {
        self.running = None;
        self.started_ms = None;
        self.ready = None;
        self.ready_ms = None;
        self.report(snapshot, VmPhase::Stopped, message).await;
    }

    fn failed(&mut self, what: &str, error: &dyn std::error::Error) {
        tracing::error!(vm = %self.vm, why = super::chain(error), "could not {what} it; trying again");
        self.retry_in(Duration::from_millis(500));
    }

    async fn reset(&mut self, snapshot: &Snapshot) {
        let wanted = snapshot.vms.get(&self.vm).map_or(self.resets, |vm| vm.spec.resets);
        match self.parts.vms.reset(self.vm.as_str()).await {
            Ok(()) => {
                self.resets = wanted;
                self.report(snapshot, VmPhase::Running, "reset").await;
            }
            Err(error) => self.failed("reset", &error),
        }
    }

    /// Removes what this host has of it, as far as the store lets go of it.
    async fn clean(&mut self, snapshot: &Snapshot) {
        let known = match Known::ask(&self.parts, &self.vm).await {
            Ok(known) => known,
            Err(error) => return self.failed("ask the store for", &error),
        };
        match self.volumes(snapshot).await {
            Ok(volumes) => {
                for (pool, name) in volumes {
                    let everywhere = pool.driver == PoolDriverKind::Shared;
                    if !known.lets_go(&self.parts.me, &name.vm_uid, everywhere) {
                        continue;
                    }
                    if let Err(error) = self.parts.storage.delete_volume(&pool, &name).await {
                        return self.failed("remove a volume of", &error);
                    }
                }
            }
            Err(error) => return self.failed("look for volumes of", &error),
        }
        if let Err(error) = self.parts.storage.forget(self.vm.as_str()).await {
            return self.failed("clean up after", &error);
        }
        self.deleted = true;
        self.retry_in(Duration::from_millis(1));
    }

    /// All its volumes that this host can reach: those in local pools, of whatever VM of its name, and the shared ones.
    async fn volumes(
        &self,
        snapshot: &Snapshot,
    ) -> Result<Vec<(PoolSpec, VolumeName)>, StorageFailure> {
        let mut all = Vec::new();
        for pool in volumes::local_pools(snapshot) {
            let here = self.parts.storage.volumes(pool).await?;
            let its = here.into_iter().filter(|name| name.vm == self.vm);
            all.extend(its.map(|name| (pool.clone(), name)));
        }
        let Some((object, _)) = &self.last else { return Ok(all) };
        for disk in &object.spec.disks {
            let pool = snapshot.pools.get(&disk.pool).map(|pool| &pool.spec);
            let Some(pool) = pool.filter(|pool| pool.driver == PoolDriverKind::Shared) else {
                continue;
            };
            let (vm, disk) = (self.vm.clone(), disk.name.clone());
            all.push((pool.clone(), VolumeName { vm, disk, vm_uid: object.meta.uid.clone() }));
        }
        Ok(all)
    }

    async fn event(&mut self, event: Result<VmEvent, broadcast::error::RecvError>) {
        match event {
            Ok(VmEvent::Exited { vm, epoch, how }) if vm == self.vm.as_str() => {
                self.exited(epoch, how).await;
            }
            Ok(_) => {}
            Err(_) => self.resync().await,
        }
    }

    /// Events were lost: asks the driver what runs.
    async fn resync(&mut self) {
        if let Ok(list) = self.parts.vms.list().await {
            let running = list.iter().find(|vm| vm.vm == self.vm.as_str()).map(|vm| vm.epoch);
            if self.running.is_some() && running.is_none() {
                self.exited(self.epoch, Exit::Crashed).await;
            }
            self.running = running;
        }
        self.parts.clock.sleep(Duration::from_millis(50)).await;
    }

    async fn exited(&mut self, epoch: u64, how: Exit) {
        if self.running != Some(epoch) {
            return;
        }
        self.running = None;
        self.ready = None;
        self.ready_ms = None;
        self.written = None;
        let live = Arc::clone(&self.parts.live.borrow());
        let wanted = wanted::vm(&live, &self.parts.me, &self.vm);
        if !matches!(wanted, Wanted::Run { epoch: wanted, .. } if wanted == epoch) {
            return;
        }
        self.ended = Some(how);
        self.restarts += 1;
        self.failures += 1;
        self.retry_in(Duration::from_millis(backoff_ms(self.failures - 1)));
        let what = match how {
            Exit::PoweredOff => "the guest powered itself off",
            Exit::Crashed => "its process ended unexpectedly",
            Exit::Killed => "its process was killed",
        };
        let event = self.parts.event(
            &ObjectRef::new(Kind::Vm, self.vm.clone()),
            Severity::Warning,
            format!("{what} on {} (restart {})", self.parts.me, self.restarts),
        );
        if self.parts.current_session().is_some()
            && let Err(error) = self.parts.store.txn(vec![], vec![event]).await
        {
            tracing::debug!(%error, "an event could not be written");
        }
        self.report(&live, VmPhase::Failed, what).await;
    }

    /// What the health check asks while the guest runs.
    fn health_target(&self, snapshot: &Snapshot) -> Option<Target> {
        self.running?;
        let check = snapshot.vms.get(&self.vm)?.spec.check.as_ref()?;
        let ip = snapshot.placements.get(&self.vm)?.nics.first()?.ip;
        Some(Target {
            address: std::net::SocketAddr::new(ip.into(), check.port),
            http_path: (check.mode == Protocol::Http).then(|| check.path.clone()),
            interval: check.interval.duration(),
            timeout: check.timeout.duration(),
        })
    }

    fn health(&mut self, ready: Option<bool>) {
        if self.running.is_none() || ready == self.ready {
            return;
        }
        self.ready = ready;
        if ready == Some(true) {
            self.failures = 0;
            self.ready_ms.get_or_insert((self.parts.wall_ms)());
        }
    }
}

fn pool_of(snapshot: &Snapshot, disk: &DiskSpec) -> Result<PoolSpec, StartFailure> {
    let pool = snapshot.pools.get(&disk.pool);
    pool.map(|pool| pool.spec.clone()).ok_or_else(|| {
        StartFailure(format!(
            "pool `{}` of disk `{}` does not exist; apply it first",
            disk.pool, disk.name
        ))
    })
}

fn image_of(snapshot: &Snapshot, name: &Name) -> Result<ImageSpec, StartFailure> {
    let image = snapshot.images.get(name);
    image.map(|image| image.spec.clone()).ok_or_else(|| {
        StartFailure(format!(
            "image `{name}` does not exist; import it with `haven image import {name} FILE`"
        ))
    })
}
