//! The driver for QEMU where no QEMU is needed: what it takes over from an earlier daemon.

use super::{
    driver::{Accel, VmDriver, VmError, VmLaunch},
    qemu::{QemuConfig, QemuDriver},
    record, run_dir, scan,
};
use crate::guard::fake::{FakeGuard, Rules};
use haven_store::clock::Clock;
use std::{
    os::unix::process::CommandExt,
    process::{Child, Command},
    sync::Arc,
    time::{Duration, Instant},
};

fn launch(vm: &str) -> VmLaunch {
    VmLaunch {
        vm: vm.into(),
        uid: 200_000,
        epoch: 3,
        session: 1,
        cpus: 1,
        memory_bytes: 1 << 26,
        disks: Vec::new(),
        direct_boot: None,
        seed: None,
        nics: Vec::new(),
        accel: Accel::Tcg,
        uuid: "u".into(),
        machine: None,
        incoming: false,
        postcopy: false,
        agent: false,
        ports: false,
        disks_as: String::new(),
    }
}

fn driver(run: &std::path::Path) -> QemuDriver {
    let rules = Rules { compares_sessions: false, takes_addresses: true };
    let clock = Clock::simulated(1.0);
    let guard = FakeGuard::spawn("host1", (Arc::default(), Arc::default()), clock.clone(), rules)
        .handle(clock);
    let config = QemuConfig {
        program: "/nonexistent/qemu".into(),
        run_dir: run.into(),
        log_dir: run.join("log"),
        scopes: false,
    };
    QemuDriver::new(config, guard)
}

/// Ends with the test.
struct Stands(Child);

impl Drop for Stands {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test]
async fn a_record_that_cannot_be_read_hides_no_other_vm_and_is_told() {
    let run = tempfile::tempdir().unwrap();
    let child = Stands(Command::new("sleep").arg("60").spawn().unwrap());
    let pid = i32::try_from(child.0.id()).unwrap();
    let well = run_dir::prepare(run.path(), "well").unwrap();
    record::write(&well, &launch("well"), pid).unwrap();
    let ill = run_dir::prepare(run.path(), "ill").unwrap();
    std::fs::create_dir(ill.join(run_dir::RECORD)).unwrap();
    let driver = driver(run.path());
    let found = driver.list().await.unwrap();
    assert_eq!(
        found.iter().map(|vm| (vm.vm.as_str(), vm.epoch)).collect::<Vec<_>>(),
        [("well", 3)]
    );
    assert_eq!(driver.find("well").await.unwrap().unwrap().pid, pid);
    assert_eq!(driver.find("other").await.unwrap(), None);
    // Whether this one runs is not known: it is neither taken for gone nor started.
    assert!(matches!(driver.find("ill").await, Err(VmError::System { .. })));
    assert!(driver.start(&launch("ill")).await.is_err());
    // All that is known is signalled, and nobody is told that nothing is left.
    assert!(driver.kill_all().is_err());
    driver.kill("well").await.unwrap();
    assert_eq!(driver.list().await.unwrap(), []);
}

#[tokio::test]
async fn nothing_is_started_beside_a_process_that_nothing_names() {
    let run = tempfile::tempdir().unwrap();
    let child = Command::new("sh")
        .arg0("qemu-system-x86_64")
        .args(["-c", "read line", "-name", "guest=web"])
        .stdin(std::process::Stdio::piped())
        .env(scan::DIRECTORY, run.path().join("web"))
        .spawn()
        .unwrap();
    let child = Stands(child);
    let pid = i32::try_from(child.0.id()).unwrap();
    let driver = driver(run.path());
    // Between fork and exec it shows what it was before.
    let until = Instant::now() + Duration::from_secs(5);
    let refused = loop {
        match driver.start(&launch("web")).await.unwrap_err() {
            VmError::NoQemu if Instant::now() < until => {
                tokio::time::sleep(Duration::from_millis(5)).await
            }
            error => break error,
        }
    };
    assert!(
        matches!(refused, VmError::RunsAlready { pid: found, .. } if found == pid),
        "{refused}"
    );
    assert!(matches!(driver.start(&launch("other")).await, Err(VmError::NoQemu)));
}
