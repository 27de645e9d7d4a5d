//! The power drivers against what others wrote: sushy-tools' emulator of a Redfish controller, and `fence_ipmilan`
//! against OpenIPMI's simulator of an IPMI one, both on loopback. `./check` installs them where it can.

use haven_host::fence::{PowerDriver, fence_agent::FenceAgent, redfish::Redfish};
use haven_model::{PowerKind, PowerSpec, PowerState};
use haven_store::{pki::fingerprint, testing::Signer};
use std::{
    net::{TcpListener, UdpSocket},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

/// Ends with the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start(command: &mut Command) -> Running {
    let command = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    Running(command.spawn().expect("it was found"))
}

fn write(path: &Path, text: &str) {
    std::fs::write(path, text).expect("a temporary directory can be written");
}

/// Where `./check` puts it.
fn sushy() -> Option<PathBuf> {
    let home = std::env::var("HOME").unwrap_or_default();
    let bin = Path::new(&home).join(".cache/haven/sushy-tools/bin");
    bin.join("sushy-emulator").exists().then_some(bin)
}

/// `lab` with the password `secret`, as its file of users wants it.
fn htpasswd(bin: &Path) -> String {
    let script =
        "import bcrypt; print('lab:' + bcrypt.hashpw(b'secret', bcrypt.gensalt(4)).decode())";
    let made = Command::new(bin.join("python")).args(["-c", script]).output().expect("its Python");
    String::from_utf8(made.stdout).expect("a line of text")
}

#[tokio::test]
async fn a_redfish_controller_of_others_is_read_and_switched_off() {
    let Some(bin) = sushy() else {
        return println!("skipped: needs sushy-tools (xtask/setup.sh installs it)");
    };
    let directory = tempfile::tempdir().expect("a temporary directory");
    let at = |name: &str| directory.path().join(name).display().to_string();
    let signed = Signer::new("Authority of the controllers").sign("bmc1", 30);
    write(&directory.path().join("cert.pem"), &signed.leaf);
    write(&directory.path().join("key.pem"), &signed.key);
    write(&directory.path().join("users"), &htpasswd(&bin));
    let system = "{'uuid': '27946b59-9e44-4fa7-8e91-f3527a1ef094', 'name': 'fake', 'power_state': 'On', 'nics': []}";
    write(
        &directory.path().join("conf.py"),
        &format!(
            "SUSHY_EMULATOR_AUTH_FILE = {:?}\nSUSHY_EMULATOR_STATE_DIR = {:?}\nSUSHY_EMULATOR_FAKE_SYSTEMS = [{system}]\n",
            at("users"),
            at("")
        ),
    );
    let port = TcpListener::bind("127.0.0.1:0").and_then(|it| it.local_addr()).expect("loopback");
    let mut command = Command::new(bin.join("sushy-emulator"));
    command.args(["--fake", "-i", "127.0.0.1", "-p", &port.port().to_string()]);
    command.args(["--config", &at("conf.py")]);
    command.args(["--ssl-certificate", &at("cert.pem"), "--ssl-key", &at("key.pem")]);
    let _emulator = start(&mut command);
    let power = PowerSpec {
        fingerprint: Some(fingerprint(&signed.leaf).expect("a certificate")),
        ..PowerSpec::redfish(&format!("https://127.0.0.1:{}", port.port()), "lab", "secret")
    };
    let driver = Redfish { settle: Duration::from_secs(30), ..Redfish::default() };
    let until = Instant::now() + Duration::from_secs(60);
    let state = loop {
        match driver.state(&power).await {
            Ok(state) => break state,
            Err(why) => assert!(Instant::now() < until, "{why}"),
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    };
    // Its only system is found by itself.
    assert_eq!(state, PowerState::On);
    let wrong = PowerSpec { password: "wrong".into(), ..power.clone() };
    let why = driver.state(&wrong).await.expect_err("a wrong password");
    assert!(why.message.contains("refuses the user `lab`"), "{why}");
    let other = PowerSpec { fingerprint: Some("0".repeat(64)), ..power.clone() };
    let why = driver.state(&other).await.expect_err("another certificate");
    assert!(why.message.contains("is not trusted"), "{why}");
    let no_system =
        PowerSpec { url: format!("{}/redfish/v1/Systems/none", power.url), ..power.clone() };
    let why = driver.state(&no_system).await.expect_err("no such system");
    assert!(why.message.contains("status 404"), "{why}");
    // It takes the command at once, and some seconds until it is off: taken is not off.
    driver.off(&power).await.expect("it goes off");
    assert_eq!(driver.state(&power).await.expect("it answers"), PowerState::Off);
    driver.off(&power).await.expect("off stays off");
}

/// Chassis power as a file, for the simulator.
const CHASSIS: &str = r#"#!/bin/sh
dir=$(dirname "$0")
shift
while [ $# -gt 1 ]; do
  case "$1 $2" in
    "get power") if [ -e "$dir/off" ]; then echo power:0; else echo power:1; fi; shift 2 ;;
    "set power") if [ "$3" = 0 ]; then touch "$dir/off"; else rm -f "$dir/off"; fi; shift 3 ;;
    *) shift ;;
  esac
done
"#;

#[tokio::test]
async fn an_ipmi_controller_is_read_and_switched_off_by_its_fence_agent() {
    let simulator = Path::new("/usr/bin/ipmi_sim");
    if !simulator.exists() || !Path::new("/usr/sbin/fence_ipmilan").exists() {
        return println!(
            "skipped: needs fence_ipmilan and ipmi_sim (xtask/setup.sh installs them)"
        );
    }
    let directory = tempfile::tempdir().expect("a temporary directory");
    let at = |name: &str| directory.path().join(name);
    let port = UdpSocket::bind("127.0.0.1:0").and_then(|it| it.local_addr()).expect("loopback");
    let port = port.port();
    write(&at("chassis"), CHASSIS);
    let mode = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(at("chassis"), mode).expect("it is ours");
    let auths = ["callback", "user", "operator", "admin"]
        .map(|role| format!("    allowed_auths_{role} none md2 md5 straight\n"));
    write(
        &at("lan.conf"),
        &format!(
            "name \"bmc\"\nset_working_mc 0x20\n  startlan 1\n    addr 127.0.0.1 {port}\n    priv_limit admin\n{}    \
             guid a123456789abcdefa123456789abcdef\n  endlan\n  chassis_control \"{} 0x20\"\n  \
             user 1 true \"\" \"none\" user 10 none md2 md5 straight\n  \
             user 2 true \"lab\" \"secret\" admin 10 none md2 md5 straight\n",
            auths.concat(),
            at("chassis").display()
        ),
    );
    let mc =
        "mc_setbmc 0x20\nmc_add 0x20 0 no-device-sdrs 0x23 9 8 0x9f 0x1291 0xf02\nmc_enable 0x20\n";
    write(&at("emu"), mc);
    let mut command = Command::new(simulator);
    command.arg("-c").arg(at("lan.conf")).arg("-f").arg(at("emu")).arg("-s").arg(at("state"));
    let _simulator = start(command.arg("-n"));
    let options = [
        ("lanplus", "1".to_owned()),
        ("ipport", port.to_string()),
        ("power_wait", "0".into()),
        // The simulator does not tell which cipher suites it has, and `ipmitool` waits 14 s for that.
        ("cipher", "3".into()),
    ];
    let power = PowerSpec {
        driver: PowerKind::Agent,
        agent: Some("fence_ipmilan".into()),
        address: Some("127.0.0.1".into()),
        user: "lab".into(),
        password: "secret".into(),
        options: options.map(|(key, value)| (key.to_owned(), value)).into(),
        ..PowerSpec::default()
    };
    let driver = FenceAgent::default();
    let until = Instant::now() + Duration::from_secs(60);
    let state = loop {
        match driver.state(&power).await {
            Ok(state) => break state,
            Err(why) => assert!(Instant::now() < until, "{why}"),
        }
    };
    assert_eq!(state, PowerState::On);
    let wrong = PowerSpec { password: "wrong".into(), ..power.clone() };
    let why = driver.state(&wrong).await.expect_err("a wrong password");
    assert!(why.message.contains("ended with 1") && why.hint.contains("`power.password`"), "{why}");
    driver.off(&power).await.expect("it goes off");
    assert!(at("off").exists(), "the simulator's chassis is off");
    assert_eq!(driver.state(&power).await.expect("it answers"), PowerState::Off);
}
