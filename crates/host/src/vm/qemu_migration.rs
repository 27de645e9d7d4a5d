//! Moving a guest that runs, with QEMU.
//!
//! QEMU opens no connection between hosts: the sender speaks to a socket of its own host's daemon, the taker reads from
//! a descriptor that it inherited, and the daemons join the two by mutual TLS. So a guest that broke out of QEMU finds
//! neither a network nor a certificate.

use super::{
    commands::{self, Command},
    driver::{GuestState, RunningVm, VmDriver, VmError, VmLaunch},
    launch,
    migration::{Copy, DisksSent, LiveMigration, Transfer},
    page_faults,
    qemu::QemuDriver,
    qmp::{DEADLINE, QmpError},
    record,
};
use async_trait::async_trait;
use haven_model::{
    migration::{MigrationOptions, Progress},
    units::Millis,
};
use serde_json::{Value, json};
use std::{
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::Duration,
};

/// Bytes per second that a copy may take: what the wire gives.
const BANDWIDTH: u64 = 10 << 30;
/// How long a guest may take to run on after its copy was ended.
const RUNS_ON: Duration = Duration::from_secs(5);
/// Between two looks at that.
const LOOK: Duration = Duration::from_millis(10);

fn capabilities(of: &[(&str, bool)]) -> Value {
    let states = of.iter().map(|(name, on)| json!({ "capability": name, "state": on }));
    json!({ "capabilities": states.collect::<Vec<_>>() })
}

/// Reads the answer to [`commands::QUERY_MIGRATE`].
#[must_use]
pub fn transfer(answer: &Value) -> Transfer {
    let copy = match answer["status"].as_str().unwrap_or("none") {
        "none" => Copy::None,
        "pre-switchover" => Copy::Stopped,
        "postcopy-active" => Copy::Following,
        "completed" => Copy::Whole,
        "postcopy-paused" | "postcopy-recover-setup" | "postcopy-recover" => Copy::Torn,
        "failed" | "failing" | "cancelled" | "cancelling" => {
            let said = answer["error-desc"].as_str();
            Copy::Broken(said.unwrap_or("the copy was ended").to_owned())
        }
        _ => Copy::Active,
    };
    let ram = &answer["ram"];
    let figure = |name: &str| ram[name].as_u64().unwrap_or(0);
    let progress = Progress {
        total: figure("total"),
        left: figure("remaining"),
        sent: figure("transferred"),
        // Megabits per second.
        rate: (ram["mbps"].as_f64().unwrap_or(0.0) * 125_000.0) as u64,
        rounds: figure("dirty-sync-count"),
        downtime: answer["downtime"].as_u64().map(Millis),
        ..Progress::default()
    };
    Transfer { copy, progress }
}

impl QemuDriver {
    pub(super) async fn tell(
        &self,
        vm: &str,
        command: &Command,
        arguments: Value,
    ) -> Result<Value, VmError> {
        let qmp = self.qmp(vm, DEADLINE).await?;
        let answer = qmp.call(command, arguments, DEADLINE).await;
        answer.map_err(|source| VmError::Qmp { vm: vm.into(), source })
    }

    /// Makes a process that stands ready to take its guest.
    async fn expect(&self, launch: &VmLaunch, fd: i32) -> Result<(), VmError> {
        let vm = launch.vm.as_str();
        let wanted =
            [("events", true), ("late-block-activate", true), ("postcopy-ram", launch.postcopy)];
        // QEMU takes hold of the kernel's page faults here, and never again.
        let faults =
            if launch.postcopy { Some(page_faults::lend(launch.uid).await?) } else { None };
        self.tell(vm, &commands::MIGRATION_CAPABILITIES, capabilities(&wanted)).await?;
        drop(faults);
        self.take_disks(launch).await?;
        let from = json!({ "uri": format!("fd:{fd}") });
        self.tell(vm, &commands::MIGRATE_INCOMING, from).await.map(|_| ())
    }
}

#[async_trait]
impl LiveMigration for QemuDriver {
    async fn machine(&self, vm: &str) -> Result<String, VmError> {
        let what = json!({ "path": "/machine", "property": "type" });
        let answer = self.tell(vm, &commands::PROPERTY, what).await?;
        let kind = answer.as_str().and_then(|kind| kind.strip_suffix("-machine"));
        kind.map(str::to_owned)
            .ok_or_else(|| VmError::Qmp { vm: vm.into(), source: QmpError::NotQemu })
    }

    async fn start_incoming(&self, launch: &VmLaunch) -> Result<RunningVm, VmError> {
        let (ours, theirs) =
            UnixStream::pair().map_err(launch::system("a way into QEMU cannot be made"))?;
        let fd = std::os::fd::AsRawFd::as_raw_fd(&theirs);
        let running = self.start_process(launch, Some(theirs.into())).await?;
        match self.expect(launch, fd).await {
            Ok(()) => {
                self.keep_way_in(&launch.vm, ours);
                Ok(running)
            }
            Err(error) => {
                self.kill(&launch.vm).await?;
                Err(error)
            }
        }
    }

    fn way_in(&self, vm: &str) -> Option<UnixStream> {
        self.take_way_in(vm)
    }

    async fn let_run(&self, vm: &str) -> Result<(), VmError> {
        self.disks_are_here(vm).await?;
        self.tell(vm, &commands::CONTINUE, json!({})).await.map(|_| ())
    }

    fn disks_in(&self, vm: &str) -> Option<PathBuf> {
        self.where_disks_come_in(vm)
    }

    async fn send_disks(&self, vm: &str, socket: &Path, places: &[usize]) -> Result<(), VmError> {
        self.begin_disks(vm, socket, places).await
    }

    async fn disks_sent(&self, vm: &str, wanted: usize) -> Result<DisksSent, VmError> {
        self.how_far(vm, wanted).await
    }

    async fn finish_disks(&self, vm: &str) -> Result<(), VmError> {
        self.end_whole(vm).await
    }

    async fn send(
        &self,
        vm: &str,
        socket: &Path,
        options: &MigrationOptions,
    ) -> Result<(), VmError> {
        let enable = [
            ("events", true),
            ("pause-before-switchover", true),
            ("postcopy-ram", options.postcopy),
            // A guest whose memory may follow need not be slowed down.
            ("auto-converge", !options.postcopy),
        ];
        self.tell(vm, &commands::MIGRATION_CAPABILITIES, capabilities(&enable)).await?;
        let limits = json!({ "downtime-limit": options.downtime().0, "max-bandwidth": BANDWIDTH });
        self.tell(vm, &commands::MIGRATION_PARAMETERS, limits).await?;
        let to = json!({ "uri": format!("unix:{}", socket.display()) });
        self.tell(vm, &commands::MIGRATE, to).await.map(|_| ())
    }

    async fn start_postcopy(&self, vm: &str) -> Result<(), VmError> {
        self.tell(vm, &commands::MIGRATE_POSTCOPY, json!({})).await.map(|_| ())
    }

    async fn may_lack_memory(&self, vm: &str) -> bool {
        match record::read(&self.directory(vm)) {
            Ok(Some(record)) => record.launch.incoming && record.launch.postcopy,
            Ok(None) => false,
            Err(error) => {
                tracing::warn!(vm, %error, "its launch record cannot be read, so all of its memory is taken to be here");
                false
            }
        }
    }

    async fn note_whole(&self, vm: &str) {
        if let Err(error) = record::note_whole(&self.directory(vm)) {
            tracing::warn!(vm, %error, "it cannot be noted that all of its memory is here");
        }
    }

    async fn transfer(&self, vm: &str) -> Result<Transfer, VmError> {
        let answer = self.tell(vm, &commands::QUERY_MIGRATE, json!({})).await?;
        Ok(transfer(&answer))
    }

    async fn hand_over(&self, vm: &str) -> Result<(), VmError> {
        self.exchange_disks(vm).await?;
        let state = json!({ "state": "pre-switchover" });
        self.tell(vm, &commands::MIGRATE_CONTINUE, state).await.map(|_| ())
    }

    async fn take_back(&self, vm: &str) -> Result<(), VmError> {
        self.tell(vm, &commands::MIGRATE_CANCEL, json!({})).await?;
        self.drop_disks(vm).await?;
        let until = tokio::time::Instant::now() + RUNS_ON;
        loop {
            let copy = self.transfer(vm).await?.copy;
            let state = self.state(vm).await?;
            if state == GuestState::Running {
                return Ok(());
            }
            // All had been sent before it was told to end: the guest is stopped, and goes on only when told to.
            let ended = !matches!(copy, Copy::Active | Copy::Stopped);
            match state {
                // One of its disks is parked, and whoever did that lets it run.
                GuestState::Paused if ended && self.stands_parked(vm).await? => return Ok(()),
                GuestState::Paused if ended => self.let_run(vm).await?,
                // What holds it up is not the copy: a disk's error, a panic, its own power-off.
                GuestState::Broken | GuestState::Ended if ended => return Ok(()),
                _ => {}
            }
            if tokio::time::Instant::now() >= until {
                let within = RUNS_ON;
                let source = QmpError::Late { command: "migrate_cancel".into(), within };
                return Err(VmError::Qmp { vm: vm.into(), source });
            }
            tokio::time::sleep(LOOK).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Copy, transfer};
    use serde_json::json;

    #[test]
    fn what_qemu_says_of_a_copy_is_read() {
        let of = |status: &str| transfer(&json!({ "status": status })).copy;
        assert_eq!(of("setup"), Copy::Active);
        assert_eq!(of("device"), Copy::Active);
        assert_eq!(of("pre-switchover"), Copy::Stopped);
        assert_eq!(of("completed"), Copy::Whole);
        assert_eq!(of("postcopy-device"), Copy::Active);
        assert_eq!(of("postcopy-active"), Copy::Following);
        assert_eq!(of("postcopy-paused"), Copy::Torn);
        assert!(matches!(of("cancelled"), Copy::Broken(_)));
        assert_eq!(transfer(&json!({})).copy, Copy::None);
        let answer = json!({
            "status": "failed", "error-desc": "no way", "downtime": 19,
            "ram": { "total": 100, "remaining": 40, "transferred": 70, "mbps": 8.0, "dirty-sync-count": 2 },
        });
        let read = transfer(&answer);
        assert_eq!(read.copy, Copy::Broken("no way".into()));
        let progress = read.progress;
        assert_eq!((progress.total, progress.left, progress.sent), (100, 40, 70));
        assert_eq!((progress.rate, progress.rounds), (1_000_000, 2));
        assert_eq!(progress.downtime.map(|d| d.0), Some(19));
    }
}
