//! Runs a test again inside a host of its own: an overlay of the lab's cached root tree, which has the QEMU that Haven
//! is made for, with its own mounts and processes. Nothing of it is left when the test ends.

#![expect(clippy::unwrap_used, reason = "a helper of tests fails as a test does")]

use std::{
    path::{Path, PathBuf},
    process::Command,
};

/// Set for the second run.
const INSIDE: &str = "HAVEN_TEST_INSIDE";

/// The lab's cached tree.
pub fn tree() -> PathBuf {
    let cache = std::env::var("HAVEN_LAB_CACHE").unwrap_or_else(|_| "/var/cache/haven-lab".into());
    Path::new(&cache).join("base")
}

/// What a test lacks outside, if anything.
fn lacks() -> Option<&'static str> {
    if !nix::unistd::geteuid().is_root() {
        return Some("root, for namespaces");
    }
    if !tree().join("root/usr/bin/qemu-system-x86_64").exists() {
        return Some("the lab's root tree with QEMU; `haven lab up` builds it");
    }
    None
}

/// True inside. Outside it runs the calling test inside, passes on its failure, and returns false.
pub fn inside(test: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    if let Some(what) = lacks() {
        println!("skipped: needs {what}");
        return false;
    }
    let script = r#"
set -e
mount -t tmpfs tmpfs "$1"; mkdir "$1/upper" "$1/work" "$1/root"; root=$1/root
mount -t overlay overlay -o "lowerdir=$2/root,upperdir=$1/upper,workdir=$1/work" "$root"
mount -t proc proc "$root/proc"; mount -t sysfs sysfs "$root/sys"; mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
mkdir -p "$root/dev/net"
for device in null zero urandom kvm net/tun; do
  if [ -e /dev/$device ]; then touch "$root/dev/$device"; mount --bind /dev/$device "$root/dev/$device"; fi
done
mkdir -p "$root/run/haven" "$root/tiny" "$root/dev/shm"
mount --bind "$2/tiny" "$root/tiny"
touch "$root/test"; mount --bind "$3" "$root/test"
exec chroot "$root" /test --exact "$4" --nocapture --test-threads=1
"#;
    let mount_point = tempfile::tempdir().unwrap();
    let output = Command::new("unshare")
        .args(["--mount", "--pid", "--net", "--ipc", "--fork", "--kill-child", "--"])
        .args(["sh", "-c", script, "sh"])
        .arg(mount_point.path())
        .arg(tree())
        .arg(std::env::current_exe().unwrap())
        .arg(test)
        .env(INSIDE, "1")
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .env_remove("HAVEN_ACCEL")
        // The one of outside is not there.
        .env_remove("TMPDIR")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    for line in
        said.lines().filter(|line| line.contains("skipped: needs") || line.contains("note: "))
    {
        println!("{line}");
    }
    // Shown only here: what counts passed tests must not count this one twice. A name that no test has would pass.
    assert!(
        output.status.success() && said.contains("1 passed"),
        "inside a host of its own `{test}` failed:\n{said}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    false
}
