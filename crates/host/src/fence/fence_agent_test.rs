//! The driver of fence agents against scripts that behave as told; a real agent is asked in `crates/host/tests/fencing.rs`.

use super::{driver::PowerDriver, fence_agent::FenceAgent};
use haven_model::{PowerKind, PowerSpec, PowerState};
use std::{
    process::Command,
    time::{Duration, Instant},
};

/// An agent that keeps the host's power in a file beside it and notes what it was told.
const HOST: &str = r#"#!/bin/sh
dir=$(dirname "$0")
cat > "$dir/last"
cat "$dir/last" >> "$dir/told"
case $(sed -n 's/^action=//p' "$dir/last") in
  status) [ -e "$dir/off" ] && exit 2; exit 0 ;;
  off) touch "$dir/off" ;;
  *) exit 1 ;;
esac
"#;

fn agent(script: &str) -> (tempfile::TempDir, FenceAgent, PowerSpec) {
    let directory = tempfile::tempdir().unwrap();
    let source = directory.path().join("script");
    std::fs::write(&source, script).unwrap();
    // Made by another process: what another test starts meanwhile cannot hold it open for writing.
    let mut install = Command::new("install");
    install.arg("-m755").arg(&source).arg(directory.path().join("fence_test"));
    assert!(install.status().unwrap().success());
    let driver = FenceAgent {
        directory: directory.path().into(),
        run: Duration::from_secs(5),
        settle: Duration::from_millis(200),
        pause: Duration::from_millis(20),
    };
    let power = PowerSpec {
        driver: PowerKind::Agent,
        agent: Some("fence_test".into()),
        address: Some("10.0.0.9".into()),
        user: "lab".into(),
        password: "geheim".into(),
        options: [("lanplus".to_owned(), "1".to_owned())].into(),
        ..PowerSpec::default()
    };
    (directory, driver, power)
}

#[tokio::test]
async fn off_counts_once_status_says_so() {
    let (directory, driver, power) = agent(HOST);
    assert_eq!(driver.state(&power).await.unwrap(), PowerState::On);
    driver.off(&power).await.unwrap();
    assert_eq!(driver.state(&power).await.unwrap(), PowerState::Off);
    let told = std::fs::read_to_string(directory.path().join("told")).unwrap();
    let asks = |action| {
        format!("lanplus=1\nip=10.0.0.9\nusername=lab\npassword=geheim\naction={action}\n")
    };
    assert_eq!(told, ["status", "off", "status", "status"].map(asks).concat());
}

#[tokio::test]
async fn an_agent_that_says_it_switched_off_is_not_believed() {
    let (_directory, driver, power) = agent("#!/bin/sh\nexit 0\n");
    let problem = driver.off(&power).await.unwrap_err();
    assert!(problem.message.contains("and then that the power is on"), "{problem}");
    let (_directory, driver, power) =
        agent("#!/bin/sh\ngrep -q action=status && exit 0\necho 'no such plug' >&2\nexit 1\n");
    let problem = driver.off(&power).await.unwrap_err();
    assert!(
        problem.message.contains("ended with 1 when asked for `off`: no such plug"),
        "{problem}"
    );
}

#[tokio::test]
async fn any_other_end_of_status_is_no_state_and_its_words_are_kept_without_the_password() {
    let script = "#!/bin/sh\ncat >&2\necho 'Unable to connect/login to fencing device'\nexit 1\n";
    let (_directory, driver, power) = agent(script);
    let problem = driver.state(&power).await.unwrap_err();
    let said = "the fence agent fence_test at 10.0.0.9 ended with 1 when asked for `status`: ";
    assert!(problem.message.starts_with(said), "{problem}");
    assert!(problem.message.ends_with("Unable to connect/login to fencing device"), "{problem}");
    assert!(problem.message.contains("password=… action=status"), "{problem}");
    assert!(problem.hint.contains("`power.password`"), "{problem}");
    let (_directory, driver, power) = agent("#!/bin/sh\nkill -9 $$\n");
    assert!(driver.state(&power).await.unwrap_err().message.contains("was killed"));
}

/// Whether a process is there, and no zombie.
fn runs(pid: &str) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !stat.rsplit(')').next().unwrap_or_default().trim().starts_with('Z'))
}

#[tokio::test]
async fn an_agent_that_never_ends_is_killed_with_all_that_it_started() {
    let script = "#!/bin/sh\ntrap '' TERM\nsleep 600 &\necho $! $$ > \"$(dirname \"$0\")/pids\"\nwait\nsleep 600\n";
    let (directory, driver, power) = agent(script);
    let driver = FenceAgent { run: Duration::from_secs(1), ..driver };
    let begin = Instant::now();
    let problem = driver.off(&power).await.unwrap_err();
    assert!(begin.elapsed() < Duration::from_secs(4), "{:?}", begin.elapsed());
    assert!(problem.message.contains("did not end within 1s and was killed"), "{problem}");
    let pids = std::fs::read_to_string(directory.path().join("pids")).unwrap();
    assert_eq!(pids.split_whitespace().count(), 2);
    let until = Instant::now() + Duration::from_secs(5);
    while pids.split_whitespace().any(runs) {
        assert!(Instant::now() < until, "{pids} run on");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn an_agent_that_talks_without_end_is_read_and_not_kept() {
    let script = "#!/bin/sh\nhead -c 3000000 /dev/zero | tr '\\0' x\nexit 1\n";
    let (_directory, driver, power) = agent(script);
    let problem = driver.state(&power).await.unwrap_err();
    assert!(problem.message.len() < 600, "{}", problem.message.len());
}

#[tokio::test]
async fn only_fence_agents_are_run_and_only_with_options_that_are_theirs() {
    let (directory, driver, power) = agent(HOST);
    std::fs::copy(directory.path().join("fence_test"), directory.path().join("sh")).unwrap();
    for bad in ["sh", "../fence_test", "fence_../fence_test", ""] {
        let power = PowerSpec { agent: Some(bad.into()), ..power.clone() };
        let problem = driver.state(&power).await.unwrap_err();
        assert!(problem.message.contains("is no name of a fence agent"), "{problem}");
    }
    let with = |key: &str, value: &str| PowerSpec {
        options: [(key.to_owned(), value.to_owned())].into(),
        ..power.clone()
    };
    for bad in
        [with("action", "on"), with("ipmitool_path", "/bin/sh"), with("lanplus", "1\naction=on")]
    {
        driver.state(&bad).await.unwrap_err();
    }
    assert!(!directory.path().join("told").exists(), "none of them was run");
    let missing = PowerSpec { agent: Some("fence_apc_snmp".into()), ..power };
    let problem = driver.state(&missing).await.unwrap_err();
    assert!(problem.message.starts_with("fence_apc_snmp is not in "), "{problem}");
    assert!(problem.hint.contains("apt install fence-agents-apc-snmp"), "{problem}");
}
