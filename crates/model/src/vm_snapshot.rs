//! Snapshots of VMs: their disks as they were at one instant, kept in the disks themselves (docs/decisions/0027-snapshots.md).

use crate::{
    backup::Moment,
    name::Name,
    units::{Bytes, Millis},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::fmt;

/// The most that a VM has: each makes its disks a little slower to open.
pub const MOST_SNAPSHOTS: usize = 64;

/// Who asks for those that are taken by themselves.
pub const BY_SCHEDULE: &str = "schedule";

/// When snapshots of a VM are taken by themselves, and how long those are kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SnapshotSpec {
    /// Between two, at least 1 min.
    pub every: Millis,
    /// So many are kept, 1 to 32: older ones are removed when there are more. What people have asked for stays.
    pub keep: u32,
}

impl SnapshotSpec {
    /// More often is not taken.
    pub const SHORTEST: Millis = Millis(60_000);
    /// More are not kept, so that there is room for those that people ask for.
    pub const MOST: u32 = 32;
}

/// A disk in a snapshot of a VM, from which a disk of another VM is made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct CopyRef {
    /// The VM.
    pub vm: Name,
    /// Its uid: a later VM of its name has other disks.
    pub vm_uid: String,
    /// Which disk of it.
    pub disk: Name,
    /// The id of the snapshot.
    pub snapshot: String,
}

impl fmt::Display for CopyRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "disk `{}` of {}", self.disk, self.vm)
    }
}

/// How a snapshot stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum SnapshotState {
    /// It is to be taken.
    Wanted,
    /// It is whole, in all of its disks.
    There,
    /// It could not be taken, and nothing of it is left.
    Failed,
    /// Its disks are being made what they were; until that is done the VM does not start.
    Reverting,
    /// It is being removed.
    Going,
}

impl fmt::Display for SnapshotState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Wanted => "wanted",
            Self::There => "there",
            Self::Failed => "failed",
            Self::Reverting => "reverting",
            Self::Going => "going",
        })
    }
}

/// A disk in a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SnapshotDisk {
    /// Unique within the VM.
    pub name: Name,
    /// Where it lives.
    pub pool: Name,
    /// As the guest saw it.
    pub size: Bytes,
    /// Of a mirrored disk: the hosts that have a whole copy of it as it was. Others with a replica of it fetch one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub copies: Vec<Name>,
}

/// A snapshot of a VM, and what is to be done with it. This record is the task: the host of the VM carries it out, whichever
/// that is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct VmSnapshot {
    /// Its own: what it is called in the disks.
    pub id: String,
    /// Of which VM.
    pub vm: Name,
    /// Who asked for it.
    pub by: String,
    /// When, wall clock, milliseconds since 1970.
    pub at_ms: i64,
    /// Its disks.
    pub disks: Vec<SnapshotDisk>,
    /// How it stands.
    pub state: SnapshotState,
    /// The moment that it shows, wall clock, milliseconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub of_ms: Option<i64>,
    /// What the guest did at that moment.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub moment: Option<Moment>,
    /// While it is reverted to: the disks that are.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub back: Vec<Name>,
    /// When its disks were made what they are in it the last time, wall clock, milliseconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reverted_ms: Option<i64>,
    /// What the copies of its mirrored disks are called, and what it is called in Ceph: another one for each attempt, written before
    /// that begins.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copy: Option<String>,
    /// Why it could not be taken, while what there is of it is being removed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failed: Option<String>,
    /// It was asked for by the schedule of its VM, which removes it again.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub scheduled: bool,
    /// It was taken only for this VM to be made from it, and goes once that is done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub made_for: Option<Name>,
    /// What it waits for, or why something could not be done with it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
}

impl VmSnapshot {
    /// The hosts that have a copy of a mirrored disk as it was.
    #[must_use]
    pub fn copies(&self, disk: &Name) -> &[Name] {
        self.disks.iter().find(|of| of.name == *disk).map_or(&[], |of| &of.copies)
    }

    /// One that is to be taken of these disks.
    #[must_use]
    pub fn wanted(id: String, vm: Name, by: String, at_ms: i64, disks: Vec<SnapshotDisk>) -> Self {
        Self {
            id,
            vm,
            by,
            at_ms,
            disks,
            state: SnapshotState::Wanted,
            of_ms: None,
            moment: None,
            back: Vec::new(),
            reverted_ms: None,
            copy: None,
            failed: None,
            scheduled: false,
            made_for: None,
            message: String::new(),
        }
    }

    /// Its name in the disks. QEMU takes a number for something else.
    #[must_use]
    pub fn tag(&self) -> String {
        Self::tag_of(&self.id)
    }

    /// The name in the disks of the snapshot with this id.
    #[must_use]
    pub fn tag_of(id: &str) -> String {
        format!("haven-{id}")
    }

    /// Its name in the images of its disks in Ceph, once an attempt has one.
    #[must_use]
    pub fn tag_in_ceph(&self) -> Option<String> {
        self.copy.as_deref().map(Self::tag_of)
    }

    /// What another attempt after the one that was written in this revision of the record is called.
    #[must_use]
    pub fn attempt(&self, revision: i64) -> String {
        format!("{}r{revision}", self.id)
    }

    /// Whether something in a disk has the name of one of its attempts.
    #[must_use]
    pub fn is_attempt(&self, tag: &str) -> bool {
        let number = tag.strip_prefix(&self.tag()).and_then(|rest| rest.strip_prefix('r'));
        number.is_some_and(|number| number.parse::<i64>().is_ok())
    }

    /// Whether its VM's host has something to do about it.
    #[must_use]
    pub fn is_due(&self) -> bool {
        use SnapshotState::{Going, Reverting, Wanted};
        matches!(self.state, Wanted | Reverting | Going)
    }

    /// What it shows, in words.
    #[must_use]
    pub fn shows(&self) -> &'static str {
        match self.moment {
            None => "",
            Some(Moment::Frozen) => "with the file systems of its guest frozen",
            Some(Moment::Running) => "as a power cut would have left it",
            Some(Moment::Stopped) => "of the VM at rest",
        }
    }
}

/// The name of a snapshot that nobody names: when it is asked for.
#[must_use]
pub fn usual_name(at_ms: i64) -> Name {
    let time = jiff::Timestamp::from_millisecond(at_ms).unwrap_or_default();
    Name::new(time.strftime("%Y%m%d-%H%M%S").to_string()).expect("digits and a dash are a name")
}

#[cfg(test)]
mod tests {
    use super::{VmSnapshot, usual_name};
    use crate::{keys, name::Name, snapshot::Snapshot};
    use serde_json::json;

    #[test]
    fn one_that_a_newer_version_wrote_is_read_and_found_by_the_vms_uid() {
        let record = json!({"id": "a1", "vm": "db", "by": "root", "atMs": 5, "state": "wanted", "mood": "good",
            "disks": [{"name": "root", "pool": "fast", "size": "1GiB", "weight": 3}]});
        let key = keys::vm_snapshot("u-1", &Name::new("before").unwrap());
        assert_eq!(key, "/haven/snapshots/u-1/before");
        let mut snapshot = Snapshot::default();
        snapshot.apply(&key, Some((record.to_string().as_bytes(), 7)));
        let of: &VmSnapshot = &snapshot.vm_snapshots["u-1"]["before"];
        assert_eq!((of.tag(), of.is_due(), of.disks.len()), ("haven-a1".into(), true, 1));
        let odd = json!({"id": "a1", "vm": "db", "state": "frozen in time"}).to_string();
        snapshot.apply(&key, Some((odd.as_bytes(), 8)));
        assert!(snapshot.vm_snapshots.is_empty());
        assert_eq!(snapshot.unreadable_under("snapshots/u-1/"), Some("snapshots/u-1/before"));
        snapshot.apply(&key, None);
        assert_eq!(snapshot.unreadable_under("snapshots/u-1/"), None);
    }

    #[test]
    fn the_usual_name_is_the_time() {
        assert_eq!(usual_name(1_790_000_000_123).as_str(), "20260921-141320");
        assert_eq!(usual_name(i64::MIN).as_str(), usual_name(0).as_str());
    }
}
