//! Everything that Haven asks QEMU for and reads from it. A command, an argument, a field or an event that is not in
//! these tables cannot be sent or is not read; `crates/host/tests/qmp_contract.rs` holds the tables against the schema
//! of the real QEMU.

use super::driver::GuestState;
use serde_json::Value;

/// One command of QMP. Only this file makes them.
#[derive(Clone, Copy, Debug)]
pub struct Command {
    name: &'static str,
    arguments: &'static [&'static str],
    reads: &'static [&'static str],
    out_of_band: bool,
}

impl Command {
    /// As QEMU calls it.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        self.name
    }

    /// The arguments that Haven gives.
    #[must_use]
    pub const fn arguments(&self) -> &'static [&'static str] {
        self.arguments
    }

    /// The fields of the answer that Haven reads, of each of its elements if it is a list; `a.b` is a field of a field.
    #[must_use]
    pub const fn reads(&self) -> &'static [&'static str] {
        self.reads
    }

    /// It overtakes commands that hang, where QEMU offers that.
    #[must_use]
    pub const fn out_of_band(&self) -> bool {
        self.out_of_band
    }
}

/// One event that Haven acts upon. Others are handed on and do no harm.
#[derive(Clone, Copy, Debug)]
pub struct Event {
    name: &'static str,
    reads: &'static [&'static str],
}

impl Event {
    /// As QEMU calls it.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        self.name
    }

    /// The fields that Haven reads.
    #[must_use]
    pub const fn reads(&self) -> &'static [&'static str] {
        self.reads
    }
}

macro_rules! commands {
    ($($(#[$doc:meta])* $constant:ident = $name:literal, $arguments:expr, $reads:expr, $oob:literal;)*) => {
        $($(#[$doc])* pub const $constant: Command = Command {
            name: $name,
            arguments: &$arguments,
            reads: &$reads,
            out_of_band: $oob,
        };)*
        /// All of them.
        pub const COMMANDS: &[Command] = &[$($constant),*];
    };
}

commands! {
    /// Leaves the negotiation mode.
    CAPABILITIES = "qmp_capabilities", ["enable"], [], false;
    /// Lets the guest run.
    CONTINUE = "cont", [], [], false;
    /// Holds the guest.
    STOP = "stop", [], [], false;
    /// Does several things to disks at one instant, or none.
    TRANSACTION = "transaction", ["actions"], [], false;
    /// Sets a property of an object of QEMU's.
    SET_PROPERTY = "qom-set", ["path", "property", "value"], [], false;
    /// Limits a disk.
    THROTTLE = "block_set_io_throttle", ["id", "iops", "iops_rd", "iops_wr", "bps", "bps_rd", "bps_wr"], [], false;
    /// What becomes of the process when its guest powers off.
    SET_ACTION = "set-action", ["shutdown"], [], false;
    /// Presses the power button.
    POWERDOWN = "system_powerdown", [], [], false;
    /// Presses the reset button.
    RESET = "system_reset", [], [], false;
    /// What the guest does.
    STATUS = "query-status", [], ["status", "running"], false;
    /// What its disks were asked for.
    BLOCK_STATS = "query-blockstats", [], ["stats.rd_operations", "stats.wr_operations", "stats.flush_operations"], false;
    /// Which ways of moving a guest are used.
    MIGRATION_CAPABILITIES = "migrate-set-capabilities", ["capabilities"], [], false;
    /// The limits of a copy.
    MIGRATION_PARAMETERS = "migrate-set-parameters", ["downtime-limit", "max-bandwidth"], [], false;
    /// Begins to send a guest.
    MIGRATE = "migrate", ["uri"], [], false;
    /// Lets it go over before all of its memory is there.
    MIGRATE_POSTCOPY = "migrate-start-postcopy", [], [], false;
    /// Where a guest comes from.
    MIGRATE_INCOMING = "migrate-incoming", ["uri"], [], false;
    /// Sends what is left.
    MIGRATE_CONTINUE = "migrate-continue", ["state"], [], false;
    /// Ends a copy.
    MIGRATE_CANCEL = "migrate_cancel", [], [], false;
    /// How far a copy is.
    QUERY_MIGRATE = "query-migrate", [], ["status", "ram", "downtime", "error-desc"], false;
    /// Takes the descriptor that comes with it.
    TAKE = "getfd", ["fdname"], [], false;
    /// Serves disks, to who has the key of `tls-creds` if that is given.
    SERVE = "nbd-server-start", ["addr", "tls-creds", "max-connections"], [], false;
    /// Serves no disk any more, and ends who was served.
    SERVE_NO_MORE = "nbd-server-stop", [], [], false;
    /// A disk that is served.
    EXPORT = "block-export-add", ["type", "id", "node-name", "name", "writable", "bitmaps"], [], false;
    /// The disks that are served.
    EXPORTS = "query-block-exports", [], ["id"], false;
    /// Makes an object, a key say.
    ADD_OBJECT = "object-add", ["qom-type", "id", "endpoint", "dir", "username", "format", "file"], [], false;
    /// Removes an object.
    REMOVE_OBJECT = "object-del", ["id"], [], false;
    /// Makes a block node.
    ADD_NODE = "blockdev-add", ["driver", "node-name", "server", "export", "tls-creds", "reconnect-delay", "open-timeout", "size", "read-zeroes", "image", "inject-error", "filename", "discard", "aio", "file", "target", "on-cbw-error", "cbw-timeout", "cache", "read-only", "children", "vote-threshold", "read-pattern", "pool", "namespace", "user", "key-secret", "auth-client-required", "conf", "encrypt", "path", "group"], [], false;
    /// Puts a block node on another one.
    REOPEN = "blockdev-reopen", ["options"], [], false;
    /// Removes a block node.
    REMOVE_NODE = "blockdev-del", ["node-name"], [], false;
    /// Makes a disk larger.
    RESIZE = "block_resize", ["node-name", "size"], [], false;
    /// Plugs a device in.
    ADD_DEVICE = "device_add", ["driver", "bus", "id", "addr", "drive", "serial", "werror", "rerror"], [], false;
    /// Asks the guest to let a device go.
    REMOVE_DEVICE = "device_del", ["id"], [], false;
    /// What is beneath an object of QEMU's.
    BENEATH = "qom-list", ["path"], ["name"], false;
    /// Keeps a copy of a disk.
    MIRROR = "blockdev-mirror", ["job-id", "device", "target", "sync", "auto-dismiss"], [], false;
    /// Long work on disks.
    JOBS = "query-jobs", [], ["id", "status", "current-progress", "total-progress", "error"], false;
    /// Ends a copy of a disk: as it is now, once it is whole, unless `force`.
    END_MIRROR = "block-job-cancel", ["device", "force"], [], false;
    /// Exchanges a disk for its copy, which follows it.
    COMPLETE = "job-complete", ["id"], [], false;
    /// All block nodes.
    NODES = "query-named-block-nodes", ["flat"], ["node-name", "drv", "dirty-bitmaps", "image.virtual-size", "image.snapshots"], false;
    /// A disk keeps a snapshot no more.
    REMOVE_SNAPSHOT = "blockdev-snapshot-delete-internal-sync", ["device", "name"], [], false;
    /// Which node stands on which.
    GRAPH = "x-debug-query-block-graph", [], ["nodes", "edges"], false;
    /// Ends it.
    QUIT = "quit", [], [], false;
    /// Another replica for a disk, or one less.
    CHANGE_CHILD = "x-blockdev-change", ["parent", "child", "node"], [], false;
    /// Notes what is written.
    ADD_BITMAP = "block-dirty-bitmap-add", ["node", "name", "granularity"], [], false;
    /// Forgets it.
    REMOVE_BITMAP = "block-dirty-bitmap-remove", ["node", "name"], [], false;
    /// Copies what a disk holds, or what was noted.
    BACKUP = "blockdev-backup", ["job-id", "device", "target", "sync", "bitmap", "bitmap-mode", "auto-dismiss"], [], false;
    /// Forgets a job that has ended.
    DISMISS = "job-dismiss", ["id"], [], false;
    /// A property of an object of QEMU's.
    PROPERTY = "qom-get", ["path", "property"], [], false;
    /// Ends connections that hang, while a command that waits for them hangs too.
    YANK = "yank", ["instances"], [], true;
    /// The connections that can be ended so.
    YANKS = "query-yank", [], ["node-name"], true;
}

/// Those arguments of [`ADD_DEVICE`] that are properties of the device, a disk. The schema does not name them.
pub const DISK_PROPERTIES: &[&str] = &["addr", "drive", "serial", "werror", "rerror"];
/// The device of a disk.
pub const DISK_DEVICE: &str = "virtio-blk-pci";

/// The guest, or somebody outside, ends the machine.
pub const SHUTDOWN: Event = Event { name: "SHUTDOWN", reads: &["guest", "reason"] };
/// A copy of a guest has come further, on either side.
pub const MIGRATION: Event = Event { name: "MIGRATION", reads: &["status"] };
/// A replica of a disk failed.
pub const REPLICA_FAILED: Event = Event { name: "QUORUM_REPORT_BAD", reads: &["node-name"] };
/// A disk failed.
pub const DISK_FAILED: Event = Event { name: "BLOCK_IO_ERROR", reads: &["action"] };
/// A guest has let a device go.
pub const DEVICE_GONE: Event = Event { name: "DEVICE_DELETED", reads: &["path"] };
/// All of them.
pub const EVENTS: &[Event] = &[SHUTDOWN, MIGRATION, REPLICA_FAILED, DISK_FAILED, DEVICE_GONE];
/// What the guest is called whose disk did not take what was written.
pub const STOPPED_BY_DISK: &str = "io-error";

/// The reason of a [`SHUTDOWN`] that is no power-off.
pub const PANIC: &str = "guest-panic";
/// The capability of the connection that out-of-band commands need.
pub const OUT_OF_BAND: &str = "oob";

/// QEMU's words for what the guest does.
pub const STATES: &[(&str, GuestState)] = &[
    ("running", GuestState::Running),
    ("colo", GuestState::Running),
    ("prelaunch", GuestState::NotStarted),
    ("inmigrate", GuestState::NotStarted),
    ("paused", GuestState::Paused),
    ("suspended", GuestState::Paused),
    ("debug", GuestState::Paused),
    ("finish-migrate", GuestState::Paused),
    ("postmigrate", GuestState::Paused),
    ("save-vm", GuestState::Paused),
    ("restore-vm", GuestState::Paused),
    ("io-error", GuestState::Broken),
    ("internal-error", GuestState::Broken),
    ("guest-panicked", GuestState::Broken),
    ("watchdog", GuestState::Broken),
    ("shutdown", GuestState::Ended),
];

/// Reads the answer to [`STATUS`]. A word of a later QEMU is judged by whether the guest's processors run.
#[must_use]
pub fn guest_state(answer: &Value) -> Option<GuestState> {
    let word = answer["status"].as_str()?;
    let known = STATES.iter().find(|(name, _)| *name == word).map(|(_, state)| *state);
    known.or_else(|| {
        let running = answer["running"].as_bool()?;
        Some(if running { GuestState::Running } else { GuestState::Paused })
    })
}

/// Reads the answer to [`BLOCK_STATS`]: requests of the guest to all its disks so far.
#[must_use]
pub fn disk_requests(answer: &Value) -> u64 {
    let disks = answer.as_array().into_iter().flatten();
    disks
        .flat_map(|disk| {
            ["rd_operations", "wr_operations", "flush_operations"].map(|of| &disk["stats"][of])
        })
        .filter_map(Value::as_u64)
        .sum()
}

/// Whether an event says that the guest powers itself off.
#[must_use]
pub fn powers_off(event: &Value) -> bool {
    let data = &event["data"];
    event["event"] == SHUTDOWN.name && data["guest"] == true && data["reason"] != PANIC
}

#[cfg(test)]
mod tests {
    use super::{disk_requests, guest_state, powers_off};
    use crate::vm::driver::GuestState;
    use serde_json::json;

    #[test]
    fn states_are_told_apart_and_new_words_are_judged_by_running() {
        let state =
            |word: &str, running: bool| guest_state(&json!({ "status": word, "running": running }));
        assert_eq!(state("running", true), Some(GuestState::Running));
        assert_eq!(state("prelaunch", false), Some(GuestState::NotStarted));
        assert_eq!(state("paused", false), Some(GuestState::Paused));
        assert_eq!(state("io-error", false), Some(GuestState::Broken));
        assert_eq!(state("a-word-of-qemu-20", true), Some(GuestState::Running));
        assert_eq!(state("a-word-of-qemu-20", false), Some(GuestState::Paused));
        assert_eq!(guest_state(&json!({})), None);
    }

    #[test]
    fn requests_to_all_disks_are_counted() {
        let stats = |of: u64| json!({ "stats": { "rd_operations": of, "wr_operations": 1, "flush_operations": 1 } });
        assert_eq!(disk_requests(&json!([stats(3), stats(4)])), 11);
        assert_eq!(disk_requests(&json!([])), 0);
    }

    #[test]
    fn only_the_guest_itself_powers_off() {
        let event = |guest: bool, reason: &str| json!({ "event": "SHUTDOWN", "data": { "guest": guest, "reason": reason } });
        assert!(powers_off(&event(true, "guest-shutdown")));
        assert!(!powers_off(&event(true, "guest-panic")));
        assert!(!powers_off(&event(false, "host-signal")));
        assert!(!powers_off(&json!({ "event": "RESET", "data": { "guest": true } })));
    }
}
