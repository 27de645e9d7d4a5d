//! A lab host goes on, runs commands and loses its power. Needs root and a built lab root file system.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use haven_lab::host_init::{DAEMON, GUARD, Layout};
use haven_lab::machine::Machine;

struct Netns(String);
impl Drop for Netns {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.0]).status();
    }
}

#[test]
fn a_host_loses_its_power_at_once_and_keeps_its_disk() {
    let cache = std::env::var("HAVEN_LAB_CACHE").unwrap_or("/var/cache/haven-lab".into());
    let lower = Path::new(&cache).join("base/root");
    if !nix::unistd::geteuid().is_root() || !lower.join("usr/bin/sleep").exists() {
        println!("skipped: needs root and a lab root file system in {}", lower.display());
        return;
    }
    let netns = Netns(format!("hl{}-1", std::process::id()));
    assert!(Command::new("ip").args(["netns", "add", &netns.0]).status().unwrap().success());
    let dir = tempfile::tempdir().unwrap();
    let binary = PathBuf::from(env!("CARGO_BIN_EXE_haven-lab-probe"));
    let binaries = dir.path().join("bin");
    std::fs::create_dir(&binaries).unwrap();
    for name in [DAEMON, GUARD] {
        std::fs::copy(&binary, binaries.join(name)).unwrap();
    }
    let layout = Layout {
        lower,
        host_dir: dir.path().join("host1"),
        shared: dir.path().join("shared"),
        binaries,
        watchdog: None,
        name: "host1".into(),
    };
    std::fs::create_dir_all(&layout.shared).unwrap();
    let mut host = Machine::power_on(&binary, &netns.0, &layout).unwrap();
    std::thread::sleep(Duration::from_secs(1));
    let mut sleeper = host.command("sleep").arg("1000").spawn().unwrap();
    let seen = host.command("sh").args(["-c", "hostname; touch /var/lib/haven/kept /run/haven/lost; ls /sys/class/net; cat /proc/1/comm"]).output().unwrap();
    let text = String::from_utf8_lossy(&seen.stdout).into_owned();
    assert!(text.starts_with("host1\nlo\n"), "{text} {}", String::from_utf8_lossy(&seen.stderr));
    host.power_off().unwrap();
    assert!(!sleeper.wait().unwrap().success(), "a process outlived the power cut");

    let host = Machine::power_on(&binary, &netns.0, &layout).unwrap();
    std::thread::sleep(Duration::from_secs(1));
    let kept = host.command("test").args(["-e", "/var/lib/haven/kept"]).status().unwrap();
    let lost = host.command("test").args(["-e", "/run/haven/lost"]).status().unwrap();
    assert!(kept.success(), "the disk did not survive");
    assert!(!lost.success(), "/run survived the power cut");
    drop(host);
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.contains(&*dir.path().to_string_lossy()), "a mount is left");
}
