//! The driver of the simulator answers as the real one.

use super::{
    driver::{Accel, Exit, GuestState, Stray, VmDriver, VmError, VmLaunch},
    fake::{FakeVmDriver, World},
};
use crate::guard::fake::{FakeGuard, Rules};
use haven_store::clock::Clock;
use std::{sync::Arc, time::Duration};

/// A launch of nothing in particular.
pub fn launch(vm: &str) -> VmLaunch {
    VmLaunch {
        vm: vm.into(),
        uid: 200_001,
        epoch: 3,
        session: 1,
        cpus: 1,
        memory_bytes: 64 << 20,
        disks: Vec::new(),
        direct_boot: None,
        seed: None,
        nics: Vec::new(),
        accel: Accel::Tcg,
        uuid: "6b1f2a3c-0000-4000-8000-000000000001".into(),
        machine: None,
        incoming: false,
        postcopy: false,
        agent: false,
        ports: false,
        disks_as: String::new(),
    }
}

#[tokio::test(start_paused = true)]
async fn states_and_strays_are_told_as_by_qemu() {
    let (world, clock) = (Arc::new(World::default()), Clock::real());
    let guard = FakeGuard::spawn(
        "host1",
        (Arc::clone(&world), Arc::default()),
        clock.clone(),
        Rules { compares_sessions: true, takes_addresses: true },
    )
    .handle(clock.clone());
    crate::guard::Guard::extend(&*guard, 1, clock.boottime_ns() + 60_000_000_000).await.unwrap();
    let driver = FakeVmDriver {
        host: "host1".into(),
        world: Arc::clone(&world),
        guard,
        start_takes: Duration::ZERO,
        clock,
        copies: Arc::new(super::fake_migration::GoodCopies),
        fails: Arc::new(|| false),
    };
    assert!(matches!(driver.state("web-1").await, Err(VmError::NotHere(_))));
    driver.start(&launch("web-1")).await.unwrap();
    assert!(matches!(driver.start(&launch("web-1")).await, Err(VmError::RunsAlready { .. })));
    assert_eq!(driver.state("web-1").await.unwrap(), GuestState::Running);
    world.set_state("host1", "web-1", GuestState::NotStarted);
    assert_eq!(driver.state("web-1").await.unwrap(), GuestState::NotStarted);
    world.end("host1", "web-1", Exit::Killed);
    driver.start(&launch("web-1")).await.unwrap();
    assert_eq!(driver.state("web-1").await.unwrap(), GuestState::Running);

    let stray = Stray { vm: "web-2".into(), pid: 42, start_time: 7 };
    world.leave_stray("host1", stray.clone());
    assert_eq!(driver.strays().await.unwrap(), std::slice::from_ref(&stray));
    driver.end_stray(&stray).await.unwrap();
    assert_eq!(driver.strays().await.unwrap(), []);
    driver.end_stray(&stray).await.unwrap();
    world.leave_stray("host1", stray);
    world.power_cut("host1");
    assert_eq!(driver.strays().await.unwrap(), []);
    assert!(world.running().is_empty());
}
