//! The real guard process, told by the real client, over processes that stand for VMs.

use haven_host::guard::{
    Guard, GuardError, Registration, START_MARGIN_NS, boottime_ns, client::GuardClient,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{
    io::Read,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

const MS: u64 = 1_000_000;
const SESSION: u64 = 3;

fn start_of(vm: &str, pid: i32) -> Registration<'_> {
    Registration { vm, pid, session: SESSION, tap: "" }
}

/// A guard in a directory of its own; all that it made ends with it.
struct Rig {
    dir: PathBuf,
    guard: Child,
    client: GuardClient,
    vms: Vec<Child>,
}

fn start(dir: &Path, watchdog: Option<&Path>) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_haven-guard"));
    command.env("HAVEN_RUN_DIR", dir).stdin(Stdio::null());
    match watchdog {
        Some(path) => command.env("HAVEN_WATCHDOG", path),
        None => command.env_remove("HAVEN_WATCHDOG"),
    };
    command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("a part of the test works")
}

impl Rig {
    async fn new(name: &str, watchdog: Option<&Path>) -> Self {
        let dir = PathBuf::from(format!("/dev/shm/haven-guard-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("a part of the test works");
        let guard = start(&dir, watchdog);
        let client = GuardClient::new(dir.join("guard.sock"));
        let rig = Self { dir, guard, client, vms: Vec::new() };
        rig.answers().await;
        rig
    }

    async fn answers(&self) {
        let until = Instant::now() + Duration::from_secs(5);
        while self.client.status().await.is_err() {
            assert!(Instant::now() < until, "the guard does not answer");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// A process that stands for a VM, under the guard's watch.
    async fn vm(&mut self, name: &str) -> usize {
        let child = Command::new("sleep").arg("60").spawn().expect("a part of the test works");
        let pid = i32::try_from(child.id()).expect("a part of the test works");
        self.vms.push(child);
        self.client.register(&start_of(name, pid)).await.expect("a part of the test works");
        self.vms.len() - 1
    }

    fn lives(&mut self, vm: usize) -> bool {
        self.vms[vm].try_wait().expect("a part of the test works").is_none()
    }

    /// Waits for the end of a VM; when that was seen, `CLOCK_BOOTTIME` ns.
    async fn ended(&mut self, vm: usize, limit: Duration) -> u64 {
        let until = Instant::now() + limit;
        while self.lives(vm) {
            assert!(Instant::now() < until, "the VM was not ended");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        boottime_ns()
    }

    fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.guard.id()).expect("a process id is small");
        kill(Pid::from_raw(pid), signal).expect("the guard is this test's child");
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        for child in self.vms.iter_mut().chain([&mut self.guard]) {
            let _ = child.kill();
            let _ = child.wait();
        }
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

#[tokio::test]
async fn at_the_deadline_every_process_ends_within_50_ms() {
    let mut late = Vec::new();
    let mut rig = Rig::new("deadline", None).await;
    for _ in 0..10 {
        let deadline = boottime_ns() + START_MARGIN_NS + 100 * MS;
        rig.client.extend(SESSION, deadline).await.unwrap();
        let vms = [rig.vm("web-1").await, rig.vm("web-2").await];
        tokio::time::sleep(Duration::from_nanos(deadline - boottime_ns() - 20 * MS)).await;
        let early = vms.map(|vm| !rig.lives(vm));
        assert!(early == [false; 2] || boottime_ns() >= deadline, "ended before the deadline");
        for vm in vms {
            late.push((rig.ended(vm, Duration::from_secs(2)).await - deadline) / 1_000);
        }
    }
    late.sort_unstable();
    println!("ended after the deadline: median {} us, max {} us", late[late.len() / 2], late[19]);
    assert!(late[19] < 50_000, "{late:?} us");
    assert_eq!(rig.client.status().await.unwrap().fired, 10);
}

/// A process's scheduling policy and real-time priority, and what it maps that could be paged out.
fn standing(pid: u32) -> ((u32, u32), Vec<String>) {
    let read = |what: &str| {
        std::fs::read_to_string(format!("/proc/{pid}/{what}")).expect("the process runs")
    };
    let (stat, maps) = (read("stat"), read("smaps"));
    // What follows the name begins with the third field.
    let after = stat.rsplit_once(") ").expect("a name in parentheses").1;
    let fields: Vec<&str> = after.split_whitespace().collect();
    let number = |field: usize| fields[field - 3].parse().expect("a number");
    let (mut loose, mut mapping) = (Vec::new(), "");
    for line in maps.lines() {
        match line.strip_prefix("VmFlags:") {
            // The kernel's own pages (vdso, vvar) are never paged out, and a guard page is never there.
            Some(flags) if !mapping.ends_with(']') || mapping.ends_with("[heap]") => {
                let has = |flag: &str| flags.split_whitespace().any(|f| f == flag);
                if has("rd") && !has("lo") {
                    loose.push(mapping.to_owned());
                }
            }
            None if line.split(' ').next().is_some_and(|word| !word.ends_with(':')) => {
                mapping = line;
            }
            _ => {}
        }
    }
    ((number(41), number(40)), loose)
}

#[tokio::test]
async fn it_is_never_paged_out_and_runs_before_everything_else() {
    let allowed = Command::new("chrt").args(["-f", "50", "true"]).output();
    if !nix::unistd::geteuid().is_root() || !allowed.is_ok_and(|output| output.status.success()) {
        println!("skipped: needs root and a kernel that lets it schedule in real time");
        return;
    }
    assert!(!standing(std::process::id()).1.is_empty(), "this test itself is not locked");
    let mut rig = Rig::new("standing", None).await;
    rig.client.extend(SESSION, boottime_ns() + 60_000 * MS).await.unwrap();
    let fifo = u32::try_from(nix::libc::SCHED_FIFO).unwrap();
    for _ in 0..2 {
        let (scheduling, loose) = standing(rig.guard.id());
        assert_eq!(scheduling, (fifo, 50));
        assert!(loose.is_empty(), "not locked: {loose:#?}");
        // Also what it takes later.
        rig.vm("web-1").await;
    }
}

fn ip(args: &str) -> String {
    let output = Command::new("ip").args(args.split(' ')).output().expect("ip is there");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "ip {args}: {said}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A network namespace, gone with the test.
struct Namespace(String);

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.0]).status();
    }
}

#[tokio::test]
async fn at_the_deadline_its_addresses_and_no_others_go_and_the_card_stays() {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: needs root, to make network namespaces");
        return;
    }
    let name = format!("hv-guard-{}", std::process::id());
    let _namespace = Namespace(name.clone());
    ip(&format!("netns add {name}"));
    for line in [
        "link add d0 type bridge",
        "link set d0 up",
        "addr add 10.9.0.1/24 dev d0",
        "addr add 10.9.0.7/32 dev d0 label d0:h0",
        "addr add 10.9.0.8/32 dev d0 label d0:h1",
        "addr add 10.9.0.9/32 dev d0 label d0:h2",
    ] {
        ip(&format!("-n {name} {line}"));
    }
    let has = || -> Vec<bool> {
        let shown = ip(&format!("-n {name} -o -4 addr show dev d0"));
        ["10.9.0.1/24", "10.9.0.7/32", "10.9.0.8/32", "10.9.0.9/32"]
            .map(|address| shown.contains(address))
            .to_vec()
    };
    let mut rig = Rig::new("addresses", None).await;
    let _ = rig.guard.kill();
    let _ = rig.guard.wait();
    let mut command = Command::new("ip");
    command.args(["netns", "exec", &name, env!("CARGO_BIN_EXE_haven-guard")]);
    command.env("HAVEN_RUN_DIR", &rig.dir).env_remove("HAVEN_WATCHDOG");
    rig.guard =
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    rig.answers().await;
    let extend = async || {
        let deadline = boottime_ns() + START_MARGIN_NS + 200 * MS;
        rig.client.extend(SESSION, deadline).await.unwrap();
        deadline
    };
    assert!(matches!(rig.client.hold("d0:h0").await, Err(GuardError::Refused { .. })), "too late");
    extend().await;
    for wrong in ["d0", "d0:", ":h0", ""] {
        let refused = rig.client.hold(wrong).await;
        assert!(matches!(refused, Err(GuardError::Refused { .. })), "{wrong}: {refused:?}");
    }
    for label in ["d0:h0", "d0:h1", "d0:h1", "d0:h2"] {
        rig.client.hold(label).await.unwrap();
    }
    rig.client.release("d0:h2").await.unwrap();
    let deadline = extend().await;
    tokio::time::sleep(Duration::from_nanos(deadline - boottime_ns() - 100 * MS)).await;
    assert!(has() == [true; 4] || boottime_ns() >= deadline, "taken before the deadline");
    tokio::time::sleep(Duration::from_millis(150)).await;
    assert_eq!(has(), [true, false, false, true]);
    assert_eq!(rig.client.status().await.unwrap().fired, 1);
    let shown = ip(&format!("-n {name} link show dev d0"));
    assert!(shown.contains(",UP"), "the card is down: {shown}");
    // What it let go it has forgotten, so that the next deadline is only that of what comes then.
    extend().await;
    tokio::time::sleep(Duration::from_nanos(START_MARGIN_NS + 300 * MS)).await;
    assert_eq!(rig.client.status().await.unwrap().fired, 1);
}

#[tokio::test]
async fn a_paused_guard_acts_within_50_ms_of_waking() {
    let mut rig = Rig::new("paused", None).await;
    let deadline = boottime_ns() + START_MARGIN_NS + 100 * MS;
    rig.client.extend(SESSION, deadline).await.unwrap();
    let vm = rig.vm("web-1").await;
    rig.signal(Signal::SIGSTOP);
    tokio::time::sleep(Duration::from_nanos(START_MARGIN_NS + 500 * MS)).await;
    assert!(rig.lives(vm), "nobody could have ended it");
    let woken = boottime_ns();
    rig.signal(Signal::SIGCONT);
    let late = rig.ended(vm, Duration::from_secs(2)).await - woken;
    println!("ended after waking: {} us", late / 1_000);
    assert!(late < 50 * MS, "{late} ns");
}

#[tokio::test]
async fn a_guard_that_is_killed_and_started_again_keeps_deadline_and_processes() {
    let mut rig = Rig::new("killed", None).await;
    let deadline = boottime_ns() + START_MARGIN_NS + 600 * MS;
    rig.client.extend(SESSION, deadline).await.unwrap();
    let vm = rig.vm("web-1").await;
    rig.signal(Signal::SIGKILL);
    rig.guard.wait().unwrap();
    rig.guard = start(&rig.dir, None);
    rig.answers().await;
    let status = rig.client.status().await.unwrap();
    assert_eq!((status.deadline_ns, status.live), (deadline, 1));
    let ended = rig.ended(vm, Duration::from_secs(3)).await;
    assert!(ended >= deadline, "it was ended too early");
    assert!(ended - deadline < 50 * MS, "{} ns late", ended - deadline);
}

#[tokio::test]
async fn no_process_is_taken_with_less_than_the_margin_left_nor_after_its_end() {
    let mut rig = Rig::new("refused", None).await;
    rig.client.extend(SESSION, boottime_ns() + START_MARGIN_NS - 100 * MS).await.unwrap();
    let own = i32::try_from(std::process::id()).unwrap();
    let error = rig.client.register(&start_of("web-1", own)).await.unwrap_err();
    assert!(matches!(error, GuardError::Refused { .. }), "{error}");
    assert_eq!(rig.client.status().await.unwrap().live, 0, "what was refused is not killed later");
    rig.client.extend(SESSION, boottime_ns() + 4_000 * MS).await.unwrap();
    let vm = rig.vm("web-1").await;
    rig.vms[vm].kill().unwrap();
    rig.vms[vm].wait().unwrap();
    let gone = i32::try_from(rig.vms[vm].id()).unwrap();
    let error = rig.client.register(&start_of("web-2", gone)).await.unwrap_err();
    assert!(error.to_string().contains("ended already"), "{error}");
    assert_eq!(rig.client.status().await.unwrap().live, 0);
}

#[tokio::test]
async fn a_start_that_began_in_an_earlier_session_is_refused() {
    let rig = Rig::new("session", None).await;
    rig.client.extend(SESSION, boottime_ns() + 4_000 * MS).await.unwrap();
    let own = i32::try_from(std::process::id()).unwrap();
    let late = Registration { session: SESSION - 1, ..start_of("web-1", own) };
    let error = rig.client.register(&late).await.unwrap_err();
    assert!(error.to_string().contains("earlier session"), "{error}");
    assert_eq!(rig.client.status().await.unwrap().live, 0);
}

#[tokio::test]
async fn a_deadline_never_moves_back_nor_further_than_ten_seconds() {
    let rig = Rig::new("bounds", None).await;
    let far = boottime_ns() + 3_600_000 * MS;
    rig.client.extend(SESSION, far).await.unwrap();
    let deadline = rig.client.status().await.unwrap().deadline_ns;
    assert!(deadline < boottime_ns() + 10_000 * MS);
    rig.client.extend(SESSION, deadline - 1).await.unwrap();
    assert_eq!(rig.client.status().await.unwrap().deadline_ns, deadline);
}

#[tokio::test]
async fn one_guard_runs_on_a_host() {
    let rig = Rig::new("two", None).await;
    let mut second = start(&rig.dir, None);
    assert!(!second.wait().unwrap().success(), "a second guard must not take over");
    rig.client.status().await.unwrap();
}

#[tokio::test]
async fn told_to_end_it_stays_until_its_last_vm_has_ended() {
    let mut rig = Rig::new("sigterm", None).await;
    rig.client.extend(SESSION, boottime_ns() + START_MARGIN_NS + 500 * MS).await.unwrap();
    let vm = rig.vm("web-1").await;
    rig.signal(Signal::SIGTERM);
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(rig.guard.try_wait().unwrap().is_none(), "it left a VM unguarded");
    rig.ended(vm, Duration::from_secs(3)).await;
    let until = Instant::now() + Duration::from_secs(2);
    while rig.guard.try_wait().unwrap().is_none() {
        assert!(Instant::now() < until, "it did not end");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_silent_guard_delays_nobody_and_can_be_replaced() {
    let mut rig = Rig::new("silent", None).await;
    rig.client.extend(SESSION, boottime_ns() + 4_000 * MS).await.unwrap();
    rig.signal(Signal::SIGSTOP);
    let begin = Instant::now();
    let own = i32::try_from(std::process::id()).unwrap();
    let many = async {
        let start = start_of("web-1", own);
        let registers = (0..8).map(|_| rig.client.register(&start));
        futures::future::join_all(registers).await
    };
    let extend = async {
        tokio::time::sleep(Duration::from_millis(10)).await;
        let result = rig.client.extend(SESSION, boottime_ns() + 4_400 * MS).await;
        (result, begin.elapsed())
    };
    let (_, (result, took)) =
        tokio::join!(tokio::time::timeout(Duration::from_millis(1_200), many), extend);
    assert!(result.is_err(), "a frozen guard accepts nothing");
    assert!(took < Duration::from_millis(900), "it waited {took:?} behind others");
    rig.client.replace().await;
    rig.guard.wait().unwrap();
    rig.guard = start(&rig.dir, None);
    rig.answers().await;
    rig.client.extend(SESSION, boottime_ns() + 4_400 * MS).await.unwrap();
}

#[tokio::test]
async fn the_watchdog_is_fed_only_while_its_reset_would_come_in_time() {
    let path = PathBuf::from(format!("/dev/shm/haven-watchdog-{}", std::process::id()));
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    // The reader is there first, as the lab's supervisor is.
    let mut fed = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(nix::libc::O_NONBLOCK)
        .open(&path)
        .unwrap();
    let mut rig = Rig::new("watchdog", Some(&path)).await;
    std::fs::remove_file(&path).unwrap();
    let deadline = boottime_ns() + 3_000 * MS;
    rig.client.extend(SESSION, deadline).await.unwrap();
    let vm = rig.vm("web-1").await;
    let (mut feeds, mut last) = (0, 0);
    while boottime_ns() < deadline - 20 * MS {
        let mut bytes = [0; 64];
        let count = fed.read(&mut bytes).unwrap_or(0);
        assert!(!bytes[..count].contains(&b'V'), "it was disarmed");
        if count > 0 {
            feeds += count;
            last = boottime_ns();
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(feeds >= 4, "fed {feeds} times");
    // Reset 2 s after the last feed is no later than 0.4 s after the deadline.
    assert!(last + 2_000 * MS <= deadline + 450 * MS, "the last feed came too late");
    rig.ended(vm, Duration::from_secs(2)).await;
    rig.signal(Signal::SIGTERM);
    rig.guard.wait().unwrap();
    let mut bytes = [0; 64];
    let count = fed.read(&mut bytes).unwrap_or(0);
    assert!(bytes[..count].ends_with(b"V"), "an orderly end disarms it");
}
