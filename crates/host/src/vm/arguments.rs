//! The command line of QEMU.

use super::{
    driver::{Accel, VmLaunch},
    qemu_disks, qemu_hot_disks, qemu_mirrors,
};
use crate::storage::rbd;
use serde_json::json;
use std::os::fd::RawFd;

/// What QEMU inherits instead of opening it itself, which it has no right to.
#[derive(Clone, Debug, Default)]
pub struct Descriptors {
    /// The socket that QMP clients connect to.
    pub qmp: RawFd,
    /// The socket of the serial console.
    pub console: RawFd,
    /// Where the console's output goes, too.
    pub log: RawFd,
    /// `/dev/kvm`, for a guest that runs under it.
    pub kvm: Option<RawFd>,
    /// A tap for each network card.
    pub taps: Vec<RawFd>,
    /// Where a guest comes in that runs elsewhere.
    pub incoming: Option<RawFd>,
    /// The socket of the guest agent.
    pub agent: Option<RawFd>,
}

impl Descriptors {
    /// All of them.
    #[must_use]
    pub fn all(&self) -> Vec<RawFd> {
        let mut all = vec![self.qmp, self.console, self.log];
        all.extend(self.kvm);
        all.extend(&self.taps);
        all.extend(self.incoming);
        all.extend(self.agent);
        all
    }
}

/// The arguments of a VM.
#[must_use]
pub fn arguments(launch: &VmLaunch, fds: &Descriptors) -> Vec<String> {
    let mut args: Vec<String> = Vec::new();
    let mut add = |flag: &str, value: String| {
        args.push(flag.to_owned());
        if !value.is_empty() {
            args.push(value);
        }
    };
    add("-name", format!("guest={},process=haven-{},debug-threads=on", launch.vm, launch.vm));
    add("-nodefaults", String::new());
    add("-no-user-config", String::new());
    add("-display", "none".into());
    add("-S", String::new());
    if launch.is_mirrored() {
        // A guest that has powered off is asked whether all replicas have all that it wrote.
        add("-action", "shutdown=pause".into());
    }
    for pair in accelerator(launch.accel, fds.kvm).chunks(2) {
        add(&pair[0], pair[1].clone());
    }
    add("-machine", format!("{},usb=off", launch.machine.as_deref().unwrap_or("q35")));
    if launch.incoming {
        add("-incoming", "defer".into());
    }
    add("-smp", launch.cpus.to_string());
    add("-m", format!("{}B", launch.memory_bytes));
    add("-uuid", launch.uuid.clone());
    add(
        "-sandbox",
        "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny".into(),
    );
    add("-chardev", format!("socket,id=qmp,fd={},server=on,wait=off", fds.qmp));
    add("-qmp", "chardev:qmp".into());
    add("-add-fd", format!("fd={},set=1", fds.log));
    add(
        "-chardev",
        format!(
            "socket,id=console,fd={},server=on,wait=off,logfile=/dev/fdset/1,logappend=on",
            fds.console
        ),
    );
    add("-serial", "chardev:console".into());
    add("-device", "virtio-rng-pci".into());
    devices(launch, fds, &mut add);
    args
}

/// The arguments that choose what runs the guest's instructions; `kvm` is `/dev/kvm`, opened. The probe of KVM uses
/// the same.
#[must_use]
pub fn accelerator(accel: Accel, kvm: Option<RawFd>) -> Vec<String> {
    let texts = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect();
    match (accel, kvm) {
        (Accel::Kvm, Some(fd)) => {
            let set = format!("fd={fd},set=2");
            texts(&["-add-fd", &set, "-accel", "kvm,device=/dev/fdset/2", "-cpu", "host"])
        }
        (Accel::Kvm, None) => texts(&["-accel", "kvm", "-cpu", "host"]),
        (Accel::Tcg, _) => texts(&["-accel", "tcg", "-cpu", "max"]),
    }
}

/// What hangs on the machine: what it boots, disks, the seed, network cards.
fn devices(launch: &VmLaunch, fds: &Descriptors, add: &mut dyn FnMut(&str, String)) {
    if let Some(boot) = &launch.direct_boot {
        add("-kernel", boot.kernel.display().to_string());
        if let Some(initrd) = &boot.initrd {
            add("-initrd", initrd.display().to_string());
        }
        add("-append", boot.cmdline.clone());
    }
    if launch.ports {
        qemu_hot_disks::ports(add);
    }
    for (order, (i, disk)) in (1..).zip(launch.placed()) {
        let node = qemu_hot_disks::node(i, disk);
        let (id, name) = (qemu_disks::device(i), &disk.name);
        let port = disk.slot.map(|slot| format!(",bus={}", qemu_hot_disks::port(slot)));
        let device = format!(
            "virtio-blk-pci,id={id},drive={},serial={name},bootindex={order}{}",
            disk.drive(i),
            port.unwrap_or_default()
        );
        if let Some(file) = &disk.luks {
            add("-object", qemu_hot_disks::key_of(i, file).to_string());
        }
        match &disk.mirror {
            None => {
                if let Some(of) = &disk.rbd {
                    add("-object", rbd::node::secret(&format!("k{i}"), of).to_string());
                }
                add("-blockdev", node.to_string());
                if disk.decrypted_above() {
                    add("-blockdev", qemu_hot_disks::decrypts(i, &format!("d{i}")).to_string());
                }
                let stops = if disk.stops() { ",werror=stop,rerror=stop" } else { "" };
                add("-device", format!("{device}{stops}"));
            }
            Some(mirror) => {
                // One whose guest is to come gets it once that is there.
                if !launch.incoming {
                    add("-object", qemu_mirrors::key(i, mirror));
                }
                for node in qemu_mirrors::nodes(i, disk, mirror) {
                    add("-blockdev", node.to_string());
                }
                // What a replica did not take is kept until it is known how to go on.
                add("-device", format!("{device},werror=stop,rerror=stop"));
            }
        }
    }
    if let Some(seed) = &launch.seed {
        let node = json!({
            "driver": "raw", "node-name": "seed", "read-only": true,
            "file": { "driver": "file", "filename": seed },
        });
        add("-blockdev", node.to_string());
        let port = qemu_hot_disks::seed_port(launch).map(|port| format!(",bus={port}"));
        add(
            "-device",
            format!("virtio-blk-pci,drive=seed,serial=seed{}", port.unwrap_or_default()),
        );
    }
    for (i, (nic, tap)) in launch.nics.iter().zip(&fds.taps).enumerate() {
        add("-netdev", format!("tap,id=n{i},fd={tap}"));
        add("-device", format!("virtio-net-pci,netdev=n{i},mac={},host_mtu={}", nic.mac, nic.mtu));
    }
    if let Some(agent) = fds.agent {
        add("-chardev", format!("socket,id=agent,fd={agent},server=on,wait=off"));
        add("-device", "virtio-serial-pci,id=ports".into());
        add(
            "-device",
            "virtserialport,bus=ports.0,chardev=agent,name=org.qemu.guest_agent.0".into(),
        );
    }
}
