//! What a VM needs before its process is started: its volumes, its image's files, its seed, its networks.
//!
//! Each may wait for a disk, a filer or another host, for long or for ever. So this is a future that can be dropped at
//! any point, and it tells which step it is at.

use super::{
    AgentParts, clients,
    disk_keys::{self, Missing},
    mirrored::{
        Owner,
        open::{Begun, Opening},
    },
    networks::Networks,
    storage::{CopyFrom, SeedNic, SeedWanted, VolumeName, VolumeReady, VolumeWanted},
    volumes::Known,
};
use crate::vm::driver::{Accel, DirectBoot, DiskLaunch, NicLaunch, VmLaunch};
use haven_model::{
    ImageSpec, MigrationOptions, Name, NicAddress, ObjectRef, Placement, PoolDriverKind, PoolSpec,
    Snapshot, VmSpec,
    host::PLUGS,
    image::ImageFile,
    object::{Kind, Stored},
    vm::{DISKS, DiskSpec},
    vm_snapshot::{CopyRef, SnapshotState},
    volume::VolumeRef,
};
use haven_store::seal::Plain;
use std::{collections::BTreeSet, path::PathBuf, sync::Arc, time::Duration};
use tokio::sync::watch;

/// How often it is told how far a disk is that is made from a backup.
const RESTORES: Duration = Duration::from_secs(10);

/// How often it is looked whether a snapshot is taken that a disk is made from, beside each change.
const TAKEN: Duration = Duration::from_secs(10);

/// Why a VM could not be started, in words.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct StartFailure(pub String);

impl StartFailure {
    /// What an error says, with its sources.
    #[must_use]
    pub fn of(error: &dyn std::error::Error) -> Self {
        Self(super::chain(error))
    }
}

/// What is known of the start.
pub struct Preparation<'a> {
    /// What the agent has.
    pub parts: Arc<AgentParts>,
    /// Which VM.
    pub vm: Name,
    /// The store when the start began.
    pub snapshot: &'a Snapshot,
    /// What is wanted of the VM.
    pub object: Arc<Stored<VmSpec>>,
    /// Its owner and its addresses.
    pub placement: Arc<Placement>,
    /// The session in which the start began.
    pub session: u64,
    /// Whether it runs under KVM.
    pub kvm: bool,
    /// How this host's networks stand.
    pub networks: watch::Receiver<Networks>,
    /// Its guest runs elsewhere and moves here.
    pub incoming: Option<Incoming>,
    /// Runs of its mirrored disks that were begun for nothing.
    pub begun: Begun,
}

/// A guest that moves here.
pub struct Incoming {
    /// Under which epoch it will run here.
    pub epoch: u64,
    /// As which machine type.
    pub machine: String,
    /// Whether that has ports for disks.
    pub ports: bool,
    /// How it moves.
    pub options: MigrationOptions,
}

impl Preparation<'_> {
    /// Makes all of it ready; `step` tells what is being done.
    ///
    /// # Errors
    /// A sentence for people.
    pub async fn run(mut self, step: &watch::Sender<String>) -> Result<VmLaunch, StartFailure> {
        self.networks_are_known()?;
        let disks = self.disks(step).await?;
        let direct_boot = self.direct_boot(step).await?;
        let seed = self.seed(step).await?;
        self.wait_for_networks(step).await?;
        let mtu = |network: &Name| self.snapshot.networks.get(network).map_or(1450, |n| n.spec.mtu);
        let nics = self
            .placement
            .nics
            .iter()
            .enumerate()
            .map(|(i, nic)| NicLaunch {
                tap: self.placement.tap(i),
                mac: nic.mac.clone(),
                mtu: mtu(&nic.network),
            })
            .collect();
        Ok(VmLaunch {
            vm: self.vm.to_string(),
            uid: self.placement.unix_uid(),
            epoch: self.incoming.as_ref().map_or(self.placement.epoch, |incoming| incoming.epoch),
            session: self.session,
            cpus: self.object.spec.cpus,
            memory_bytes: self.object.spec.memory.0,
            disks,
            direct_boot,
            seed: Some(seed),
            nics,
            accel: if self.kvm { Accel::Kvm } else { Accel::Tcg },
            uuid: self.object.meta.uid.clone(),
            incoming: self.incoming.is_some(),
            postcopy: self.incoming.as_ref().is_some_and(|incoming| incoming.options.postcopy),
            agent: self.object.spec.has_agent_port(),
            ports: self.has_ports(),
            disks_as: self.object.spec.hardware().remove(DISKS).unwrap_or_default(),
            machine: self.incoming.take().map(|incoming| incoming.machine),
        })
    }

    /// Whether its machine has ports for disks. One that takes a guest is as that which the guest comes from, and a host of an older
    /// version makes none.
    fn has_ports(&self) -> bool {
        match &self.incoming {
            Some(incoming) => incoming.ports,
            None => {
                let slot = |disk: &DiskSpec| disk.slot.is_some();
                self.object.spec.plugged().any(slot) || all_speak(self.snapshot, PLUGS)
            }
        }
    }

    /// What its cards should be plugged into must be known.
    fn networks_are_known(&self) -> Result<(), StartFailure> {
        for NicAddress { network, .. } in &self.placement.nics {
            let object = ObjectRef::new(Kind::Network, network.clone());
            let known = self.snapshot.networks.contains_key(network);
            if !known && self.snapshot.unreadable_of(&object).is_some() {
                return Err(StartFailure(format!(
                    "the record of network `{network}` cannot be read by this host's version of Haven; update this host"
                )));
            }
        }
        Ok(())
    }

    /// Removes a volume of the past, so that nothing of it is beneath what its owner sends.
    async fn make_way(&self, pool: &PoolSpec, name: &VolumeName) -> Result<(), StartFailure> {
        let known = Known::ask(&self.parts, &self.vm).await.map_err(|e| StartFailure::of(&e))?;
        if !known.lets_go(&self.parts.me, &name.vm_uid, false) {
            return Err(StartFailure(format!(
                "the store does not say clearly that another host has the disk `{}`, so what is here of it is kept; update this host if its version is older than the others'",
                name.disk
            )));
        }
        self.parts.storage.delete_volume(pool, name).await.map_err(|e| StartFailure::of(&e))
    }

    /// Makes a volume, and tells how far it is where that takes long.
    async fn volume(
        &self,
        pool: &PoolSpec,
        wanted: &VolumeWanted,
        disk: &DiskSpec,
        step: &watch::Sender<String>,
    ) -> Result<VolumeReady, StartFailure> {
        let made = self.parts.storage.volume(pool, wanted);
        tokio::pin!(made);
        loop {
            tokio::select! {
                biased;
                made = &mut made => return made.map_err(|e| StartFailure::of(&e)),
                () = self.parts.clock.sleep(RESTORES) => {
                    let backup = wanted.backup.as_ref().map(ToString::to_string);
                    let copy = disk.copy_of.as_deref().filter(|_| wanted.copy.is_some());
                    if let Some(of) = backup.or_else(|| copy.map(ToString::to_string)) {
                        step.send_replace(format!(
                            "the disk `{}` is made from the {of}: {} % so far",
                            disk.name,
                            wanted.progress.percent()
                        ));
                    }
                }
            }
        }
    }

    async fn disks(&self, step: &watch::Sender<String>) -> Result<Vec<DiskLaunch>, StartFailure> {
        let mut disks = Vec::new();
        for disk in self.object.spec.plugged() {
            disks.push(self.disk(disk, step).await?);
        }
        Ok(disks)
    }

    /// Makes one of its disks ready.
    ///
    /// # Errors
    /// A sentence for people.
    pub async fn disk(
        &self,
        disk: &DiskSpec,
        step: &watch::Sender<String>,
    ) -> Result<DiskLaunch, StartFailure> {
        let pool = pool_of(self.snapshot, disk)?;
        if pool.driver == PoolDriverKind::Mirrored {
            let launch = self.mirrored(disk, step).await?;
            return Ok(DiskLaunch { slot: disk.slot, ..launch });
        }
        let arrives = self.incoming.is_some() && pool.driver == PoolDriverKind::Local;
        let name = VolumeName {
            vm: self.vm.clone(),
            disk: disk.name.clone(),
            vm_uid: self.object.meta.uid.clone(),
        };
        let copy = match disk.copy_of.as_deref().filter(|_| !arrives) {
            Some(of) => self.copied(disk, of, &pool, &name, step).await?,
            None => None,
        };
        step.send_replace(format!("the disk `{}` in the pool `{}`", disk.name, disk.pool));
        let key = self.key(disk, &pool, &name, arrives).await?;
        let wanted = VolumeWanted {
            name,
            key,
            size_bytes: disk.size.0,
            image: self.first_content(disk, arrives)?,
            backup: disk.backup.clone().filter(|_| !arrives),
            copy,
            progress: Default::default(),
            owner_uid: self.placement.unix_uid(),
        };
        if arrives {
            self.make_way(&pool, &wanted.name).await?;
        }
        if pool.driver == PoolDriverKind::Rbd {
            self.shut_in_ceph(&pool, disk, &wanted, step).await?;
        }
        if matches!(pool.driver, PoolDriverKind::Nfs | PoolDriverKind::Gluster) {
            self.on_filer(&pool, disk, &wanted).await?;
        }
        let ready = self.volume(&pool, &wanted, disk, step).await?;
        let luks = match &wanted.key {
            Some(key) => {
                let (vm, name) = (self.vm.as_str(), &disk.name);
                let storage = &self.parts.storage;
                let file = storage.disk_secret(vm, name, key, wanted.owner_uid).await;
                Some(file.map_err(|e| StartFailure::of(&e))?)
            }
            None => None,
        };
        Ok(DiskLaunch {
            name: disk.name.to_string(),
            path: ready.path,
            format: ready.format,
            read_only: false,
            size_bytes: disk.size.0,
            arrives,
            mirror: None,
            rbd: ready.rbd,
            luks,
            filer: ready.filer,
            slot: disk.slot,
            parked: false,
        })
    }

    /// The key of a disk that is encrypted, made with the disk.
    async fn key(
        &self,
        disk: &DiskSpec,
        pool: &PoolSpec,
        name: &VolumeName,
        arrives: bool,
    ) -> Result<Option<Plain>, StartFailure> {
        if !disk.encrypted {
            return Ok(None);
        }
        if matches!(pool.driver, PoolDriverKind::Rbd | PoolDriverKind::Nfs) {
            return Err(StartFailure(format!(
                "the disk `{}` is to be encrypted, and pools of Ceph clusters and NFS servers do not take that yet; it was not made",
                disk.name
            )));
        }
        let source = disk.copy_of.as_deref();
        let source = source.map(|of| disk_keys::source(&of.vm, &of.disk, &of.vm_uid));
        let there = self.parts.storage.has_volume(pool, name, self.placement.unix_uid()).await;
        let there = there.map_err(|e| StartFailure::of(&e))?.is_some();
        let missing = match &source {
            _ if arrives || there => Missing::Refused,
            Some(source) => Missing::Of(source),
            None => Missing::New,
        };
        let key = disk_keys::key(&self.parts, name, missing).await;
        key.map(Some).map_err(|e| StartFailure::of(&e))
    }

    /// What a disk is made from of another VM, once a snapshot keeps that; nothing when it is made already.
    async fn copied(
        &self,
        disk: &DiskSpec,
        of: &CopyRef,
        pool: &PoolSpec,
        name: &VolumeName,
        step: &watch::Sender<String>,
    ) -> Result<Option<CopyFrom>, StartFailure> {
        let there = self.parts.storage.has_volume(pool, name, self.placement.unix_uid()).await;
        if there.map_err(|e| StartFailure::of(&e))?.is_some() {
            return Ok(None);
        }
        let mut live = self.parts.live.clone();
        loop {
            let now = Arc::clone(&live.borrow_and_update());
            let mut kept = now.vm_snapshots.get(&of.vm_uid).into_iter().flatten();
            let kept = kept.find(|(_, record)| record.id == of.snapshot);
            let waits = match kept {
                Some((_, record)) if record.state == SnapshotState::There => {
                    let (vm, vm_uid) = (of.vm.clone(), of.vm_uid.clone());
                    let name = VolumeName { vm, disk: of.disk.clone(), vm_uid };
                    let in_ceph =
                        (pool.driver == PoolDriverKind::Rbd).then(|| record.tag_in_ceph());
                    let tag = in_ceph.flatten().unwrap_or_else(|| record.tag());
                    return Ok(Some(CopyFrom { name, tag }));
                }
                Some((called, record)) if record.is_due() && record.failed.is_none() => {
                    let why = match record.message.as_str() {
                        "" => String::new(),
                        why => format!(" ({why})"),
                    };
                    format!("the snapshot `{called}` of {} is {}{why}", of.vm, record.state)
                }
                kept => {
                    let why = kept.map_or_else(
                        || "it is not there any more".to_owned(),
                        |(_, record)| record.failed.clone().unwrap_or(record.message.clone()),
                    );
                    return Err(StartFailure(format!(
                        "the disk `{}` cannot be made from the {of}: its snapshot could not be taken, or was removed ({why}); delete this VM, and clone {} again",
                        disk.name, of.vm
                    )));
                }
            };
            step.send_if_modified(|now| std::mem::replace(now, waits.clone()) != waits);
            tokio::select! {
                Ok(()) = live.changed() => {}
                () = self.parts.clock.sleep(TAKEN) => {}
            }
        }
    }

    /// Sees to who has a disk of a filer open before it is opened here. Over NFS what had it open before is shut out: it may have sent
    /// something that is still under way. The process that a guest moves here from has it open, too, and goes on.
    async fn on_filer(
        &self,
        pool: &PoolSpec,
        disk: &DiskSpec,
        wanted: &VolumeWanted,
    ) -> Result<(), StartFailure> {
        let (storage, name) = (&self.parts.storage, &wanted.name);
        if self.incoming.is_some() {
            let there = storage.has_volume(pool, name, wanted.owner_uid).await;
            return match there.map_err(|failure| StartFailure::of(&failure))? {
                Some(_) => Ok(()),
                None => Err(StartFailure(format!(
                    "the disk `{}` of the guest that moves here is not there in the pool `{}` as this host sees it",
                    disk.name, disk.pool
                ))),
            };
        }
        if pool.driver == PoolDriverKind::Nfs {
            let nobody = BTreeSet::new();
            let shut = storage.shut_out(pool, name, &nobody, &nobody).await;
            shut.map_err(|failure| StartFailure::of(&failure))?;
        }
        Ok(())
    }

    /// Shuts a disk in Ceph to all that had it open, before it is opened under this epoch. What had it open may have written
    /// something that is still under way, whatever has become of it. A guest that moves here is the one exception: the process
    /// before has it open, too, and only one of the two runs it.
    async fn shut_in_ceph(
        &self,
        pool: &PoolSpec,
        disk: &DiskSpec,
        wanted: &VolumeWanted,
        step: &watch::Sender<String>,
    ) -> Result<(), StartFailure> {
        step.send_replace(format!("who had the disk `{}` open in Ceph is shut out", disk.name));
        let (uid, epoch) = (&self.object.meta.uid, self.placement.epoch);
        let begun = clients::begin(&self.parts, &self.vm, uid, epoch).await;
        let before = begun.map_err(|error| StartFailure::of(&error))?;
        let storage = &self.parts.storage;
        let is_there = storage.has_volume(pool, &wanted.name, wanted.owner_uid).await;
        let is_there = is_there.map_err(|failure| StartFailure::of(&failure))?.is_some();
        if self.incoming.is_some() || !is_there {
            return Ok(());
        }
        let its = before.open.iter().filter(|one| one.disk == disk.name);
        let its: BTreeSet<String> = its.map(|one| one.client.clone()).collect();
        let shut = if before.is_shut() { its.clone() } else { BTreeSet::new() };
        let done = storage.shut_out(pool, &wanted.name, &its, &shut).await;
        done.map_err(|failure| StartFailure::of(&failure))
    }

    /// The image that a disk is made from, and its format.
    fn first_content(
        &self,
        disk: &DiskSpec,
        arrives: bool,
    ) -> Result<Option<(ImageFile, String)>, StartFailure> {
        // All of it comes from its owner, who may have made it from an image that is another one by now; and what a backup holds is
        // all that there was.
        let Some(name) = disk.image.as_ref().filter(|_| !arrives && disk.backup.is_none()) else {
            return Ok(None);
        };
        let image = image_of(self.snapshot, name)?;
        let file = image.disk.clone().ok_or_else(|| {
            StartFailure(format!(
                "image `{name}` has no disk; disk `{}` cannot be made from it",
                disk.name
            ))
        })?;
        Ok(Some((file, image.format.clone().unwrap_or_else(|| "raw".into()))))
    }

    async fn mirrored(
        &self,
        disk: &DiskSpec,
        step: &watch::Sender<String>,
    ) -> Result<DiskLaunch, StartFailure> {
        let opening = Opening {
            parts: &self.parts,
            of: VolumeRef { vm: self.vm.clone(), disk: disk.name.clone() },
            vm_uid: &self.object.meta.uid,
            owner_uid: self.placement.unix_uid(),
            owner: Owner { epoch: self.placement.epoch, session: self.session },
            step,
            begun: Arc::clone(&self.begun),
        };
        step.send_replace(format!("the disk `{}` in the pool `{}`", disk.name, disk.pool));
        if self.incoming.is_some() { opening.arriving().await } else { opening.run().await }
    }

    async fn direct_boot(
        &self,
        step: &watch::Sender<String>,
    ) -> Result<Option<DirectBoot>, StartFailure> {
        let Some(name) = &self.object.spec.image else {
            return Ok(None);
        };
        let image = image_of(self.snapshot, name)?;
        let Some(kernel) = &image.kernel else {
            return Ok(None);
        };
        let kernel = self.image_file(kernel, step).await?;
        let initrd = match &image.initrd {
            Some(file) => Some(self.image_file(file, step).await?),
            None => None,
        };
        Ok(Some(DirectBoot { kernel, initrd, cmdline: image.cmdline.clone() }))
    }

    async fn image_file(
        &self,
        file: &ImageFile,
        step: &watch::Sender<String>,
    ) -> Result<PathBuf, StartFailure> {
        step.send_replace(format!(
            "the image's file {}",
            &file.sha256[..file.sha256.len().min(12)]
        ));
        self.parts.storage.image_file(file).await.map_err(|e| StartFailure::of(&e))
    }

    async fn seed(&self, step: &watch::Sender<String>) -> Result<PathBuf, StartFailure> {
        let nics = self
            .placement
            .nics
            .iter()
            .filter_map(|nic| {
                let network = &self.snapshot.networks.get(&nic.network)?.spec;
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
            instance_id: self.object.meta.uid.clone(),
            user_data: self.object.spec.user_data.clone().unwrap_or_default(),
            nics,
            owner_uid: self.placement.unix_uid(),
        };
        step.send_replace("its seed".into());
        self.parts.storage.seed(&wanted).await.map_err(|e| StartFailure::of(&e))
    }

    /// Waits for its networks and says what they lack. Networks that it has no card in do not matter to it.
    async fn wait_for_networks(
        &mut self,
        step: &watch::Sender<String>,
    ) -> Result<(), StartFailure> {
        let Some(revision) = self.snapshot.placements.get(&self.vm).map(|p| p.revision) else {
            return Ok(());
        };
        let names: Vec<Name> = self.placement.nics.iter().map(|nic| nic.network.clone()).collect();
        loop {
            let Some(why) = self.networks.borrow_and_update().lacks(revision, &names) else {
                return Ok(());
            };
            step.send_if_modified(|now| std::mem::replace(now, why.clone()) != why);
            let ended = |_| StartFailure("this host's daemon ends".into());
            self.networks.changed().await.map_err(ended)?;
        }
    }
}

fn all_speak(snapshot: &Snapshot, what: u32) -> bool {
    let speaks = |host: &Name| snapshot.host_status.get(host).is_some_and(|h| h.speaks >= what);
    snapshot.hosts.keys().all(speaks)
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
