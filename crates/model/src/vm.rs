//! Virtual machines.

use crate::{
    backup::{BackupRef, BackupSpec},
    migration::MigrationOptions,
    name::{Name, ObjectRef},
    units::{Bytes, Millis},
    vm_snapshot::{CopyRef, SnapshotSpec},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
};

/// Labels that must all be there.
pub type Selector = BTreeMap<String, String>;

/// A disk of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct DiskSpec {
    /// Unique within the VM.
    pub name: Name,
    /// How large the guest sees it.
    pub size: Bytes,
    /// Where it lives.
    pub pool: Name,
    /// What it is made from; empty when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<Name>,
    /// The disk of a backup that it is made from; empty, or from its image, when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backup: Option<BackupRef>,
    /// The disk of another VM that it is made from, as a snapshot keeps it. Written by `haven vm clone`, gone once it is made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copy_of: Option<Box<CopyRef>>,
    /// The most that its guest may use of it; all that there is when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<DiskLimits>,
    /// The port of the machine that it is plugged into, 0 to 14; chosen by Haven when absent. One that has none, as those that were
    /// there before there were ports, stays as long as its guest's process does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slot: Option<u8>,
    /// Its guest does not see it; what is written on it stays.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub detached: bool,
    /// What is written on it lies encrypted in its pool, under a key that Haven makes for it and that goes with it. It stays as the
    /// disk was made.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub encrypted: bool,
}

impl DiskSpec {
    /// An empty one that its guest sees.
    #[must_use]
    pub fn new(name: Name, size: Bytes, pool: Name) -> Self {
        let (image, backup, copy_of) = (None, None, None);
        let (limits, slot, detached, encrypted) = (None, None, false, false);
        Self { name, size, pool, image, backup, copy_of, limits, slot, detached, encrypted }
    }
}

/// How a disk stands towards the guest of its VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum DiskState {
    /// Its guest sees it.
    Attached,
    /// Its guest does not see it, and will not.
    Detached,
    /// The VM does not run; its guest sees it when it does.
    Off,
    /// It becomes as it is wanted, while the VM runs.
    Changing,
    /// It is as it was when the VM was started; it becomes as it is wanted at the next start.
    NextStart,
}

/// How many ports for disks a machine has.
pub const SLOTS: u8 = 15;

/// The most that a guest may use of a disk, reading and writing together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct DiskLimits {
    /// Requests per second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iops: Option<u64>,
    /// Bytes per second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<Bytes>,
}

/// A network card of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NicSpec {
    /// The network it is plugged into.
    pub network: Name,
    /// A wished address; chosen by Haven when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<Ipv4Addr>,
}

/// What happens when a VM ends by itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum RestartPolicy {
    /// Start it again, whatever the reason, with growing pauses.
    #[default]
    Always,
    /// Start it again unless the guest powered itself off.
    OnFailure,
    /// Leave it.
    Never,
}

/// What may become of a VM whose host is not heard any more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Isolation {
    /// It starts elsewhere once nothing of it can run there.
    #[default]
    Stop,
    /// It starts elsewhere as soon as all its disks are shut to its host, if the cluster's `fencing` has `storage-fenced`. What
    /// runs there goes on, seen by whoever still reaches it, until its host hears of it or its guard ends it; it writes
    /// nothing.
    Keep,
}

impl Isolation {
    fn is_stop(&self) -> bool {
        *self == Self::Stop
    }
}

/// Who gets a host first when there are several, and at all when there is not room for all.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum Priority {
    /// Last.
    Low,
    /// Where nothing is said.
    #[default]
    Normal,
    /// Before what is normal.
    High,
    /// Before all others.
    Critical,
}

impl Priority {
    fn is_normal(&self) -> bool {
        *self == Self::Normal
    }
}

/// How long a VM waits for what it starts after, when it does not say.
pub const DEFAULT_AFTER_TIMEOUT: Millis = Millis(300_000);

/// Since when a VM waits for what it starts after. Written by the manager, gone once the VM has a host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Wait {
    /// Wall clock, milliseconds since 1970.
    pub since_ms: i64,
}

/// What shows that a guest lives.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum Sign {
    /// The QEMU guest agent in it answers.
    Agent,
    /// Its health check passes.
    Check,
    /// It reads or writes a disk.
    Disk,
    /// It sends on a network card.
    Network,
}

/// When a guest counts as hung. It is reset then; the second time it is ended and tried on another host, once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HangSpec {
    /// When it gave no sign of life for so long, at least 10 s. One whose agent or check never answered since it was
    /// started is booting, or has none, and is left alone.
    #[serde(default = "a_minute")]
    pub after: Millis,
    /// What counts as a sign of life; the agent or the check must be among them.
    #[serde(default = "all_but_the_check")]
    pub signs: BTreeSet<Sign>,
}

impl HangSpec {
    /// Shorter is not taken: a host under load holds a guest up for a moment.
    pub const SHORTEST: Millis = Millis(10_000);
}

fn a_minute() -> Millis {
    Millis(60_000)
}

fn all_but_the_check() -> BTreeSet<Sign> {
    [Sign::Agent, Sign::Disk, Sign::Network].into()
}

/// Where a VM may and should run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub struct AffinitySpec {
    /// Only on hosts with these labels.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub hosts: Selector,
    /// On the same host as VMs with these labels.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub near: Selector,
    /// Never on the same host as VMs with these labels.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub apart: Selector,
    /// When true, `near` and `apart` are wishes that may be broken; the plan then says so.
    pub soft: bool,
}

/// What is wanted of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct VmSpec {
    /// Virtual CPUs.
    #[serde(default = "one")]
    pub cpus: u32,
    /// Memory.
    pub memory: Bytes,
    /// What it boots when the image carries a kernel of its own; disks name their image themselves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<Name>,
    /// Its disks, in the order the guest sees them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<DiskSpec>,
    /// Its network cards, in the order the guest sees them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub networks: Vec<NicSpec>,
    /// Handed to cloud-init at first boot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_data: Option<String>,
    /// What happens when it ends by itself.
    #[serde(default)]
    pub restart: RestartPolicy,
    /// Where it may run.
    #[serde(default, skip_serializing_if = "is_default")]
    pub affinity: AffinitySpec,
    /// Who gets a host first, when it is started and after a host is lost.
    #[serde(default, skip_serializing_if = "Priority::is_normal")]
    pub priority: Priority,
    /// VMs and services that must be ready before it is started on a host: `vm/NAME` or `service/NAME`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub after: Vec<ObjectRef>,
    /// It is started without them after so long; 5 min when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after_timeout: Option<Millis>,
    /// Whether it should run at all.
    #[serde(default = "yes")]
    pub running: bool,
    /// How long the guest gets to shut down.
    #[serde(default = "default_grace")]
    pub stop_grace: Millis,
    /// Counts requested resets: an agent that sees a higher number than it has carried out resets the VM.
    #[serde(default)]
    pub resets: u64,
    /// How its health is known; given by the service for a member.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub check: Option<crate::service::HealthCheck>,
    /// What is done when its guest hangs; nothing when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hang: Option<HangSpec>,
    /// How it is moved live, unless a move is asked for otherwise.
    #[serde(default, skip_serializing_if = "is_default")]
    pub migration: MigrationOptions,
    /// When it is backed up by itself; never when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backup: Option<BackupSpec>,
    /// When a snapshot of it is taken by itself; never when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<SnapshotSpec>,
    /// What may become of it when its host is not heard any more.
    #[serde(default, skip_serializing_if = "Isolation::is_stop")]
    pub isolation: Isolation,
}

impl VmSpec {
    /// What its guest sees beside its network cards, as a fingerprint of each part: what a change of a running VM
    /// changes only when its process starts anew. Its cards stand in its placement.
    #[must_use]
    pub fn hardware(&self) -> BTreeMap<String, String> {
        // What a guest may use of a disk is taken up at once; what it was made from is past.
        let bare = |disk: &DiskSpec| DiskSpec {
            limits: None,
            backup: None,
            copy_of: None,
            ..disk.clone()
        };
        let disks: Vec<DiskSpec> = self.plugged().map(bare).collect();
        let parts = serde_json::json!({
            "cpus": self.cpus,
            "memory": self.memory,
            "image": self.image,
            "disks": disks,
            "userData": self.user_data,
        });
        let parts = parts.as_object().into_iter().flatten();
        let print = |part: &serde_json::Value| format!("{:08x}", fnv1a(&part.to_string()) as u32);
        // Named only where it is there, so that nothing changed for what was started before there was any.
        let agent = self.has_agent_port().then(|| (AGENT.to_owned(), print(&true.into())));
        parts.map(|(name, part)| (name.clone(), print(part))).chain(agent).collect()
    }

    /// The disks that its guest sees.
    pub fn plugged(&self) -> impl Iterator<Item = &DiskSpec> {
        self.disks.iter().filter(|disk| !disk.detached)
    }

    /// Whether its machine has the port of a guest agent.
    #[must_use]
    pub fn has_agent_port(&self) -> bool {
        self.hang.as_ref().is_some_and(|hang| hang.signs.contains(&Sign::Agent))
            || self.backup.as_ref().is_some_and(|backup| backup.freeze)
    }
}

/// The part of [`VmSpec::hardware`] that is the port of a guest agent.
pub const AGENT: &str = "agent";
/// The part of [`VmSpec::hardware`] that is its disks.
pub const DISKS: &str = "disks";

/// A number for a text, the same wherever it is computed (FNV-1a).
#[must_use]
pub fn fnv1a(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// What is to be said of a running VM of whose spec these parts were changed since it started.
#[must_use]
pub fn pending_words(vm: &Name, parts: &[String]) -> String {
    format!(
        "{vm} was changed ({}): that takes effect at its next start; run `haven vm reset {vm}`, or stop and start it",
        parts.join(", ")
    )
}

fn one() -> u32 {
    1
}
fn yes() -> bool {
    true
}
fn default_grace() -> Millis {
    Millis(10_000)
}
#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it with a reference")]
fn is_zero(number: &u32) -> bool {
    *number == 0
}
fn is_default<T: Default + PartialEq>(part: &T) -> bool {
    *part == T::default()
}

/// What an agent sees of a VM of its host.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum VmPhase {
    /// Volumes and networks are made ready.
    Preparing,
    /// QEMU is being started.
    Starting,
    /// The guest runs.
    Running,
    /// The guest was asked to end.
    Stopping,
    /// It does not run.
    Stopped,
    /// It does not run, and not because it was told to; `message` says why.
    Failed,
}

impl VmPhase {
    /// Lower case, as printed.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            VmPhase::Preparing => "preparing",
            VmPhase::Starting => "starting",
            VmPhase::Running => "running",
            VmPhase::Stopping => "stopping",
            VmPhase::Stopped => "stopped",
            VmPhase::Failed => "failed",
        }
    }
}

/// A VM that failed so often in a row keeps failing: it is tried on another host, once, and told of.
pub const KEEPS_FAILING: u32 = 5;
/// A guest that hung so often in a row on one host is tried on another one.
pub const KEEPS_HANGING: u32 = 2;
/// One that has run for so long, and passes its health check if it has one, runs well.
pub const RUNS_WELL: Millis = Millis(60_000);

/// What an agent reports of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct VmStatus {
    /// The reporting host.
    pub host: Name,
    /// The session of that host.
    pub session: u64,
    /// The epoch it acts under.
    pub epoch: u64,
    /// The generation of the spec that runs.
    pub generation: u64,
    /// What is seen.
    pub phase: VmPhase,
    /// Since when, wall clock, milliseconds since 1970.
    pub since_ms: i64,
    /// When QEMU of this epoch last started running, wall clock, milliseconds since 1970.
    #[serde(default)]
    pub started_ms: Option<i64>,
    /// Whether its health check passes; absent when it has none or no answer yet.
    #[serde(default)]
    pub ready: Option<bool>,
    /// When it first passed its check after it started, wall clock, milliseconds since 1970.
    #[serde(default)]
    pub ready_ms: Option<i64>,
    /// Since when it passes its check without a break, wall clock, milliseconds since 1970; absent while it does not.
    #[serde(default)]
    pub ready_since_ms: Option<i64>,
    /// It came here by a live migration and has not answered its check here yet: what is said of its health is what the
    /// host before knew.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unproven: bool,
    /// How often it ended by itself under this epoch.
    #[serde(default)]
    pub restarts: u32,
    /// How often in a row it ended by itself or could not be started, under this epoch, since it last ran well.
    #[serde(default)]
    pub failures: u32,
    /// How often in a row its guest was found hung, under this epoch.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub hung: u32,
    /// Its guest agent or its health check has answered since its guest booted; told where [`VmSpec::hang`] asks for it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub heard: bool,
    /// It is known that no process of it is there. Before the next one is started the store says otherwise.
    #[serde(default)]
    pub idle: bool,
    /// [`VmSpec::hardware`] of the spec that its process was started with; empty while none runs.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub started_with: BTreeMap<String, String>,
    /// Its host is about to give its process the disks that are wanted by now; what keeps it from that is in the message.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub disks_change: bool,
    /// Its process has ports into which disks are plugged while its guest runs.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub ports: bool,
    /// Resets carried out.
    #[serde(default)]
    pub resets: u64,
    /// In words, when there is something to say.
    #[serde(default)]
    pub message: String,
}
