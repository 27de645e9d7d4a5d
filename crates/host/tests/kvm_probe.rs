//! The trial of KVM with the real QEMU: its guest boots where guests boot, and a verdict comes in time where not.

mod inside;

use haven_host::vm::{
    driver::Accel,
    kvm::{Kvm, Limits, Trial},
};
use std::time::{Duration, Instant};

fn trial(limits: Limits) -> Trial {
    Trial {
        program: "qemu-system-x86_64".into(),
        qemu: "11.1".into(),
        kernel: Some("/tiny/vmlinuz".into()),
        state: "/tmp/state".into(),
        limits,
    }
}

#[test]
fn the_guest_of_the_trial_boots() {
    if !inside::inside("the_guest_of_the_trial_boots") {
        return;
    }
    // Under emulation, which works everywhere and is slow.
    let patience = Duration::from_secs(150);
    let found = trial(Limits { silence: patience, whole: patience }).boot(Accel::Tcg);
    assert_eq!(found, Kvm::Works);
    // A kernel that is none does not, and QEMU's own words are the reason.
    std::fs::write("/tmp/no-kernel", "nothing").unwrap();
    let mut broken = trial(Limits { silence: patience, whole: patience });
    broken.kernel = Some("/tmp/no-kernel".into());
    let Kvm::Fails(why) = broken.boot(Accel::Tcg) else { panic!("it booted nothing") };
    assert!(why.starts_with("QEMU ended under it: "), "{why}");
}

#[test]
fn kvm_gets_its_verdict_in_time_and_once() {
    if !inside::inside("kvm_gets_its_verdict_in_time_and_once") {
        return;
    }
    if !std::path::Path::new("/dev/kvm").exists() {
        println!("skipped: needs /dev/kvm");
        return;
    }
    let limits = Limits { silence: Duration::from_secs(4), whole: Duration::from_secs(20) };
    let begin = Instant::now();
    let found = trial(limits).verdict();
    assert!(begin.elapsed() < Duration::from_secs(25), "{:?}", begin.elapsed());
    assert!(!matches!(found, Kvm::NotTried(_)), "{found:?}");
    if let Kvm::Fails(why) = &found {
        assert!(!why.contains("ould not open") && !why.contains("ermission"), "{why}");
    }
    let begin = Instant::now();
    assert_eq!(trial(limits).verdict(), found);
    assert!(begin.elapsed() < Duration::from_secs(1));
    println!("note: the verdict here is {found:?}");
}
