//! Backups: where they go, when they are made, what each holds, and what is known of the making of one
//! (docs/decisions/0023-backups.md).

use crate::{
    name::Name,
    units::{Bytes, Millis},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, fmt};

/// Where backups go: a directory or a bucket, one of the two.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct TargetSpec {
    /// An absolute path at which every host finds the same file system.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub directory: Option<String>,
    /// A bucket that speaks S3.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub s3: Option<S3Spec>,
}

impl TargetSpec {
    /// Where it is, in words.
    #[must_use]
    pub fn place(&self) -> String {
        match (&self.directory, &self.s3) {
            (Some(directory), _) => directory.clone(),
            (None, Some(s3)) => format!("{}/{}", s3.endpoint, s3.bucket),
            (None, None) => String::new(),
        }
    }
}

/// A bucket that speaks S3.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct S3Spec {
    /// `https://HOST[:PORT]`, without the bucket.
    pub endpoint: String,
    /// The bucket, which is there already.
    pub bucket: String,
    /// What the names of all objects begin with; nothing when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefix: Option<String>,
    /// Its region; many servers take any.
    #[serde(default = "any_region")]
    pub region: String,
    /// The id of the key.
    pub access_key: String,
    /// The key. It stands sealed in the store, and `sealed` is all that is ever shown of it; written so, the one that is
    /// there is kept.
    pub secret_key: String,
    /// The authority of its certificate, PEM; those that the host trusts when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca: Option<String>,
}

fn any_region() -> String {
    "us-east-1".into()
}

/// The key may stand in the clear until it is sealed.
impl fmt::Debug for S3Spec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("S3Spec");
        shown.field("endpoint", &self.endpoint).field("bucket", &self.bucket);
        shown.field("prefix", &self.prefix).field("region", &self.region);
        shown.field("access_key", &self.access_key).finish_non_exhaustive()
    }
}

/// When a VM is backed up by itself, and how long that is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BackupSpec {
    /// Where to.
    pub to: Name,
    /// Between the beginnings of two, at least 1 min.
    #[serde(default = "a_day")]
    pub every: Millis,
    /// Those that are older are removed; never the newest. Kept until somebody removes them when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep: Option<Millis>,
    /// The guest's agent has its file systems frozen for that instant. Its machine gets the port of a guest agent for it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub freeze: bool,
}

impl BackupSpec {
    /// More often is not taken.
    pub const SHORTEST: Millis = Millis(60_000);
}

fn a_day() -> Millis {
    Millis(86_400_000)
}

/// What a backup shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Moment {
    /// The guest's agent had its file systems frozen.
    Frozen,
    /// The guest ran: its disks, all at one instant, as a power cut would have left them.
    Running,
    /// The VM did not run.
    Stopped,
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Frozen => "frozen",
            Self::Running => "running",
            Self::Stopped => "stopped",
        })
    }
}

/// A backup: what stands in its target beside its data, and says what belongs to it. One that is not whole has none.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Backup {
    /// Unique within its VM; later ones sort after earlier ones.
    pub id: String,
    /// Of which VM.
    pub vm: Name,
    /// Told apart from a VM of the same name that was deleted.
    pub vm_uid: String,
    /// The moment that it shows, wall clock, milliseconds since 1970.
    pub at_ms: i64,
    /// When it was whole.
    pub ended_ms: i64,
    /// Who asked for it.
    pub by: String,
    /// What it shows.
    pub moment: Moment,
    /// What notes the changes of its disks since that moment, as long as their process runs.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub mark: String,
    /// The VM's labels and spec at that time, as in the store.
    pub object: serde_json::Value,
    /// The disks, in the order of the spec.
    pub disks: Vec<BackupDisk>,
}

/// A disk in a backup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct BackupDisk {
    /// Unique within the VM.
    pub name: Name,
    /// As the guest sees it.
    pub size: Bytes,
    /// SHA-256 of the list of its chunks as it is stored, lower-case hexadecimal.
    pub index: String,
    /// So much of it is not zeros.
    pub used: Bytes,
    /// So much was read for this backup; less than all where it is known what had changed since the one before.
    pub read: Bytes,
    /// So much was new to the target, compressed.
    pub stored: Bytes,
}

/// The making of a backup. The host of the VM carries it out, whichever that is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct BackupRun {
    /// That of the backup.
    pub id: String,
    /// Of which VM.
    pub vm_uid: String,
    /// Where to.
    pub to: Name,
    /// Who asked for it.
    pub by: String,
    /// When, wall clock, milliseconds since 1970.
    pub at_ms: i64,
    /// So much is read.
    pub done: Bytes,
    /// So much is to be read; nothing before that is known.
    pub total: Bytes,
    /// When the last one that became whole was begun, by target.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub good_ms: BTreeMap<Name, i64>,
    /// How it ended; nothing while it goes on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outcome: Option<TaskOutcome>,
}

impl BackupRun {
    /// One that begins now, after `last` of the same VM.
    #[must_use]
    pub fn new(vm_uid: &str, to: Name, by: String, at_ms: i64, last: Option<&Self>) -> Self {
        let last = last.filter(|last| last.vm_uid == vm_uid);
        Self {
            id: backup_id(at_ms),
            vm_uid: vm_uid.to_owned(),
            to,
            by,
            at_ms,
            done: Bytes(0),
            total: Bytes(0),
            good_ms: last.map(|last| last.good_ms.clone()).unwrap_or_default(),
            outcome: None,
        }
    }

    /// It has ended.
    #[must_use]
    pub fn ended(&self, at_ms: i64, well: bool, message: String) -> Self {
        let mut run = Self { outcome: Some(TaskOutcome { at_ms, well, message }), ..self.clone() };
        if well {
            run.good_ms.insert(run.to.clone(), run.at_ms);
        }
        run
    }
}

/// The id of a backup that begins at this time: later ones sort after earlier ones.
#[must_use]
pub fn backup_id(at_ms: i64) -> String {
    let time = jiff::Timestamp::from_millisecond(at_ms).unwrap_or_default();
    time.strftime("%Y%m%dT%H%M%SZ").to_string()
}

/// The end of long work.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TaskOutcome {
    /// When, wall clock, milliseconds since 1970.
    pub at_ms: i64,
    /// It did what it should.
    pub well: bool,
    /// In words.
    pub message: String,
}

/// Reads all of the backups of a VM in a target again and compares them with their checksums. The first host by name carries
/// it out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Verification {
    /// Its own.
    pub id: String,
    /// Of which VM; of all when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<Name>,
    /// Only this backup; all when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backup: Option<String>,
    /// Who asked for it.
    pub by: String,
    /// When, wall clock, milliseconds since 1970.
    pub at_ms: i64,
    /// So many chunks are read.
    pub done: u64,
    /// So many there are; nothing before that is known.
    pub total: u64,
    /// What is damaged, one sentence each, the first few.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub damaged: Vec<String>,
    /// How it ended; nothing while it goes on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outcome: Option<TaskOutcome>,
}

/// A disk of a backup, from which a disk of a VM is made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BackupRef {
    /// Where it is.
    pub target: Name,
    /// Of which VM.
    pub vm: Name,
    /// Which backup.
    pub id: String,
    /// Which disk of it.
    pub disk: Name,
}

impl fmt::Display for BackupRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "disk `{}` of the backup {} of {} in {}",
            self.disk, self.id, self.vm, self.target
        )
    }
}
