//! The network's drivers in a network namespace of their own: what they make, what they bring back, what they keep
//! apart. Needs root and the lab's root tree, else skipped.

#![expect(clippy::unwrap_used, reason = "tests")]

mod inside;

use haven_host::network::{
    address::{AddressDriver, LinuxAddress},
    driver::{LeftAlone, LocalPort, NetworkDriver, NetworkKind, NetworkWanted, RemotePort},
    firewall,
    linux::LinuxNetwork,
    uplink::{LinuxUplinks, Uplink, UplinkDriver},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::Path,
    process::{Child, Command},
    time::Duration,
};

fn sh(script: &str) -> String {
    let output = Command::new("sh").args(["-ec", script]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{script}: {said}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn fails(script: &str) -> bool {
    !Command::new("sh").args(["-ec", script]).output().unwrap().status.success()
}

/// An uplink with the host's address.
fn uplink() {
    sh(
        "ip link set lo up; ip link add up0 type bridge; ip link set up0 up; ip addr add 10.9.0.1/24 dev up0",
    );
}

fn overlay(name: &str, vni: u32, net: u8) -> NetworkWanted {
    NetworkWanted {
        name: name.into(),
        kind: NetworkKind::Overlay {
            vni,
            subnet: format!("10.{net}.0.0/24").parse().unwrap(),
            gateway: Ipv4Addr::new(10, net, 0, 1),
            gateway_mac: [2, 0x68, 10, net, 0, 1],
            nat: true,
        },
        mtu: 1450,
        hosts: vec![Ipv4Addr::new(10, 9, 0, 1)],
        local: Vec::new(),
        remote: Vec::new(),
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

#[test]
fn one_bad_network_leaves_the_others_alone() {
    if !inside::inside("one_bad_network_leaves_the_others_alone") {
        return;
    }
    uplink();
    runtime().block_on(async {
        let driver = LinuxNetwork::new("10.9.0.1".parse().unwrap()).unwrap();
        let mut bad = overlay("bad", 7, 7);
        bad.kind = NetworkKind::Bridge { uplink_bridge: "br9".into() };
        let mut good = overlay("good", 16, 1);
        let (tap, ip) = ("hv3n0".to_owned(), Some(Ipv4Addr::new(10, 1, 0, 9)));
        good.local.push(LocalPort { tap, mac: [2; 6], ip, owner_uid: 200_003, idle: false });
        let failed = driver.apply(&[bad, good], &LeftAlone::default()).await.unwrap();
        assert_eq!(failed.keys().collect::<Vec<_>>(), ["bad"]);
        let said = failed["bad"].to_string();
        assert!(said.contains("needs the bridge br9: this host has no such bridge"), "{said}");
        assert!(sh("ip link show dev hv3n0").contains("master hvb10"));
    });
}

#[test]
fn what_somebody_else_removes_comes_back() {
    if !inside::inside("what_somebody_else_removes_comes_back") {
        return;
    }
    uplink();
    runtime().block_on(async {
        let driver = LinuxNetwork::new("10.9.0.1".parse().unwrap()).unwrap();
        let driver = driver.looking_every(Duration::ZERO);
        let mut network = overlay("net", 16, 1);
        let host = "10.9.0.2".parse().unwrap();
        let ip = Ipv4Addr::new(10, 1, 0, 9);
        network.remote.push(RemotePort { mac: [2, 0x68, 10, 1, 0, 9], ip, host });
        let wanted = [network];
        let apply = async || assert!(driver.apply(&wanted, &LeftAlone::default()).await.unwrap().is_empty());
        apply().await;
        let state = || {
            let fdb = sh("bridge fdb show | grep -i 02:68:0a:01:00:09 | sort");
            let arp = sh("ip neigh show 10.1.0.9 dev hvb10");
            let links = sh("ip -br link show | cut -d' ' -f1 | sort; bridge link show dev hvx10 | grep -o 'master hvb10'");
            let rules = sh("nft list table ip haven; nft list table bridge haven");
            format!("{fdb}\n{arp}\n{links}\n{rules}")
        };
        let whole = state();
        assert!(whole.contains("dst 10.9.0.2") && whole.contains("PERMANENT"), "{whole}");
        for harm in [
            "bridge fdb del 02:68:0a:01:00:09 dev hvx10 self",
            "bridge fdb del 02:68:0a:01:00:09 dev hvx10 master",
            "ip neigh del 10.1.0.9 dev hvb10",
            "ip link set hvx10 nomaster",
            "ip link del hvx10",
            "ip link del hvb10",
            "ip link set hvb10 down",
            "nft delete table ip haven",
            "nft flush table ip haven",
            "nft delete table bridge haven",
            "nft add rule ip haven between accept",
        ] {
            sh(harm);
            apply().await;
            assert_eq!(state(), whole, "after `{harm}`");
        }
        // Nothing is done while nothing is amiss: the rules keep their handles.
        let handles = || sh("nft -a list table ip haven");
        let before = handles();
        let generation = firewall::generation();
        apply().await;
        assert_eq!(handles(), before);
        // Looking costs no process: the kernel tells whether anybody changed anything.
        assert!(generation.is_some() && firewall::generation() == generation, "{generation:?}");
        sh("nft add table ip other");
        assert_ne!(firewall::generation(), generation);
    });
}

#[test]
fn what_is_of_a_record_that_cannot_be_read_stays_and_all_else_goes_on() {
    if !inside::inside("what_is_of_a_record_that_cannot_be_read_stays_and_all_else_goes_on") {
        return;
    }
    uplink();
    let way = |net: u8, last: u8, host: &str| RemotePort {
        mac: [2, 0x68, 10, net, 0, last],
        ip: Ipv4Addr::new(10, net, 0, last),
        host: host.parse().unwrap(),
    };
    let guest = |net: u8, slot: u8| LocalPort {
        tap: format!("hv{slot}n0"),
        mac: [2, 0x68, 10, net, 0, slot],
        ip: Some(Ipv4Addr::new(10, net, 0, slot)),
        owner_uid: 200_000 + u32::from(slot),
        idle: false,
    };
    let with = |name, vni, net, local: &[u8], remote: &[u8]| {
        let mut network = overlay(name, vni, net);
        network.local = local.iter().map(|slot| guest(net, *slot)).collect();
        network.remote = remote.iter().map(|last| way(net, *last, "10.9.0.2")).collect();
        network
    };
    runtime().block_on(async {
        let new = || LinuxNetwork::new("10.9.0.1".parse().unwrap()).unwrap();
        let all =
            [with("red", 16, 1, &[11, 12, 13], &[21, 22, 23]), with("blue", 17, 2, &[14], &[])];
        assert!(new().apply(&all, &LeftAlone::default()).await.unwrap().is_empty());
        let rules = || sh("nft list table ip haven; nft list table bridge haven");
        let before = rules();
        // A new daemon cannot read `blue`, nor the placements of 12 here and 22 elsewhere; 13 and 23 are gone, and a
        // network and a guest are new.
        let driver = new();
        let wanted = [with("red", 16, 1, &[11, 15], &[21]), with("green", 18, 3, &[], &[])];
        let left_alone = LeftAlone {
            networks: ["blue".to_owned()].into(),
            taps: ["hv14n0".to_owned()].into(),
            known_slots: Some([11, 13, 14, 15, 21, 23].into()),
        };
        for _ in 0..2 {
            assert!(driver.apply(&wanted, &left_alone).await.unwrap().is_empty());
            let cards = sh("ip -br link show | cut -d' ' -f1 | grep ^hv | sort | tr '\\n' ' '");
            assert_eq!(cards, "hv11n0 hv12n0 hv14n0 hv15n0 hvb10 hvb11 hvb12 hvx10 hvx11 hvx12 ");
            let now = rules();
            for whose in ["\"hv12n0\"", "\"hv14n0\"", "\"network blue\""] {
                let of = |rules: &str| -> Vec<String> {
                    rules.lines().filter(|line| line.contains(whose)).map(str::to_owned).collect()
                };
                assert!(of(&now).len() >= 3, "{whose}: {now}");
                assert_eq!(of(&now), of(&before), "{whose}");
            }
            assert!(now.contains("hv15n0") && now.contains("network green"), "{now}");
            assert!(!now.contains("hv13n0"), "{now}");
            let ways = sh("bridge fdb show dev hvx10 | grep 'dst 10.9.0.2' | cut -d' ' -f1 | sort");
            assert!(ways.contains("02:68:0a:01:00:16"), "22 is still reached: {ways}");
        }
        // It is found here, and has no way through the tunnel any more; all of it is known again.
        let wanted = [with("red", 16, 1, &[11, 12, 15, 22], &[21])];
        assert!(driver.apply(&wanted, &left_alone).await.unwrap().is_empty());
        let ways = || sh("bridge fdb show dev hvx10 | grep 'dst 10.9.0.2' | cut -d' ' -f1 | sort");
        assert!(!ways().contains("02:68:0a:01:00:16"), "{}", ways());
        assert!(driver.apply(&wanted, &LeftAlone::default()).await.unwrap().is_empty());
        assert_eq!(ways().trim(), "02:68:0a:01:00:15");
        let cards = sh("ip -br link show | cut -d' ' -f1 | grep ^hv | sort | tr '\\n' ' '");
        assert_eq!(cards, "hv11n0 hv12n0 hv15n0 hv22n0 hvb10 hvx10 ");
        assert!(!rules().contains("blue"));
    });
}

#[test]
fn addresses_come_back_go_after_a_crash_and_fail_one_by_one() {
    if !inside::inside("addresses_come_back_go_after_a_crash_and_fail_one_by_one") {
        return;
    }
    uplink();
    let [a, b, c, far] = ["10.9.0.101", "10.9.0.102", "10.9.0.103", "172.16.0.1"]
        .map(|ip| ip.parse::<Ipv4Addr>().unwrap());
    let set = |ips: &[Ipv4Addr]| ips.iter().copied().collect::<BTreeSet<_>>();
    let has = |ip: Ipv4Addr| sh("ip -4 addr show dev up0").contains(&format!("{ip}/32"));
    let file = Path::new("/run/haven/addresses.json");
    let new = || LinuxAddress::new(file.into()).unwrap().looking_every(Duration::ZERO);
    runtime().block_on(async {
        let driver = new();
        // The one that no card of this host leads to comes first or last, and the others are held all the same.
        let said = driver
            .hold(&set(&[a, b, far, "1.2.3.4".parse().unwrap()]))
            .await
            .unwrap_err()
            .to_string();
        assert!(
            said.contains("172.16.0.1 cannot be held") && said.contains("1.2.3.4 cannot"),
            "{said}"
        );
        assert!(has(a) && has(b));
        sh("ip addr del 10.9.0.101/32 dev up0");
        driver.hold(&set(&[a, b])).await.unwrap();
        assert!(has(a), "what somebody else removed is set again");
        // A daemon that is killed while it sets an address has noted it before.
        let all = set(&[a, b, c]);
        assert!(futures::poll!(std::pin::pin!(driver.hold(&all))).is_pending());
        assert!(!has(c) && std::fs::read_to_string(file).unwrap().contains("10.9.0.103"));
        drop(driver);
        sh("ip addr add 10.9.0.103/32 dev up0");
        let next = new();
        next.hold(&set(&[b])).await.unwrap();
        assert!(!has(a) && has(b) && !has(c));
    });
    runtime().block_on(async {
        // The same, in the middle: the note is there before any address is.
        sh("rm /run/haven/addresses.json; mkdir /run/haven/addresses.json");
        let driver = new();
        assert!(driver.hold(&set(&[c])).await.is_err(), "what cannot be noted is told");
        assert!(has(c), "and held nevertheless");
    });
}

/// A guest: a namespace with one card in a bridge of the host.
struct Guest(Child);

impl Guest {
    fn new(name: &str, bridge: &str, ip: &str, gateway: &str) -> Self {
        let child = Command::new("unshare").args(["--net", "sleep", "300"]).spawn().unwrap();
        let pid = child.id();
        // It has its own namespace a moment after it runs.
        sh(&format!(
            "n=0; while [ $(readlink /proc/{pid}/ns/net) = $(readlink /proc/self/ns/net) ]; do sleep 0.02; n=$((n+1)); [ $n -lt 200 ]; done
             ip link add {name} type veth peer name eth0 netns {pid}; ip link set {name} master {bridge} up"
        ));
        let guest = Self(child);
        guest.sh(&format!(
            "ip link set lo up; ip link set eth0 up; ip addr add {ip}/24 dev eth0; ip route add default via {gateway}"
        ));
        guest
    }
    fn inside(&self, script: &str) -> String {
        format!("nsenter --net=/proc/{}/ns/net sh -ec '{script}'", self.0.id())
    }
    fn sh(&self, script: &str) -> String {
        sh(&self.inside(script))
    }
    /// Whether it reaches a listener.
    fn reaches(&self, to: &str) -> bool {
        let (ip, port) = to.split_once(':').unwrap();
        !fails(&self.inside(&format!("timeout 2 bash -c \"exec 3<>/dev/tcp/{ip}/{port}\"")))
    }
    /// Listens on port 80 and answers.
    fn serve(&self) {
        let namespace = std::fs::File::open(format!("/proc/{}/ns/net", self.0.id())).unwrap();
        let (told, ready) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            let listener = TcpListener::bind("0.0.0.0:80").unwrap();
            told.send(()).unwrap();
            for stream in listener.incoming() {
                let _ = stream.unwrap().write_all(b"hello");
            }
        });
        ready.recv().unwrap();
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn no_guest_reaches_another_network_through_its_host() {
    if !inside::inside("no_guest_reaches_another_network_through_its_host") {
        return;
    }
    uplink();
    // Distributions set the strict check for new cards.
    std::fs::write("/proc/sys/net/ipv4/conf/default/rp_filter", "1").unwrap();
    let runtime = runtime();
    let driver = runtime.block_on(async {
        let driver = LinuxNetwork::new("10.9.0.1".parse().unwrap()).unwrap();
        let failed = driver
            .apply(&[overlay("one", 16, 1), overlay("two", 17, 2)], &LeftAlone::default())
            .await
            .unwrap();
        assert!(failed.is_empty(), "{failed:?}");
        driver
    });
    let one = Guest::new("g1", "hvb10", "10.1.0.9", "10.1.0.1");
    let mate = Guest::new("g2", "hvb10", "10.1.0.10", "10.1.0.1");
    let two = Guest::new("g3", "hvb11", "10.2.0.9", "10.2.0.1");
    let world = Guest::new("w1", "up0", "10.9.0.7", "10.9.0.1");
    for guest in [&one, &mate, &two, &world] {
        guest.serve();
    }
    // The world has no way back to the guests but by the host's own address.
    world.sh("ip route del default");
    let asks = |to: &str| {
        let to: SocketAddr = to.parse().unwrap();
        let mut said = String::new();
        TcpStream::connect_timeout(&to, Duration::from_secs(3))
            .unwrap()
            .read_to_string(&mut said)
            .unwrap();
        said
    };
    assert!(one.reaches("10.1.0.10:80"), "its own network");
    assert_eq!((asks("10.1.0.9:80"), asks("10.2.0.9:80")), ("hello".into(), "hello".into()));
    assert!(one.reaches("10.9.0.7:80"), "the world, by NAT");
    assert!(!one.reaches("10.2.0.9:80") && !two.reaches("10.1.0.9:80"), "another network");
    // The larger of the two counts: loose everywhere, though the cards say strict.
    let read = |path: &str| sh(&format!("cat /proc/sys/net/ipv4/conf/{path}/rp_filter"));
    assert_eq!((read("all").trim(), read("hvb10").trim()), ("2", "1"));
    drop(driver);
}

/// A guest's card as its host knows it. The guests here have veth pairs for taps.
fn port(tap: &str, mac: [u8; 6], ip: [u8; 4]) -> LocalPort {
    LocalPort { tap: tap.into(), mac, ip: Some(ip.into()), owner_uid: 200_003, idle: false }
}

fn card(guest: &Guest, mac: [u8; 6]) {
    let mac = mac.map(|byte| format!("{byte:02x}")).join(":");
    guest.sh(&format!("ip link set eth0 address {mac}; ip neigh flush dev eth0"));
}

const LIAR: [u8; 6] = [2, 0x68, 10, 1, 0, 9];
const MATE: [u8; 6] = [2, 0x68, 10, 1, 0, 10];

#[test]
fn no_guest_pretends_to_be_another() {
    if !inside::inside("no_guest_pretends_to_be_another") {
        return;
    }
    uplink();
    let runtime = runtime();
    let driver = LinuxNetworkOf::new(&runtime);
    let mut network = overlay("net", 16, 1);
    driver.apply(&[network.clone()]);
    let liar = Guest::new("hv3n0", "hvb10", "10.1.0.9", "10.1.0.1");
    let mate = Guest::new("hv4n0", "hvb10", "10.1.0.10", "10.1.0.1");
    card(&liar, LIAR);
    card(&mate, MATE);
    network.local = vec![port("hv3n0", LIAR, [10, 1, 0, 9]), port("hv4n0", MATE, [10, 1, 0, 10])];
    driver.apply(&[network.clone()]);
    mate.serve();
    let forget = "ip neigh flush dev eth0";
    let reaches = || {
        liar.sh(forget);
        mate.sh(forget);
        liar.reaches("10.1.0.10:80")
    };
    let known = || mate.sh("ip neigh show 10.1.0.77").contains("lladdr");
    // Each lie is told twice: with the rules, and without them, where it is believed.
    for rules in [true, false] {
        if !rules {
            sh("nft flush table bridge haven");
        }
        assert!(reaches());
        card(&liar, [2, 0x68, 10, 1, 0, 99]);
        assert_eq!(reaches(), !rules, "a false MAC address");
        card(&liar, LIAR);
        liar.sh("ip addr add 10.1.0.77/32 dev eth0; ip route replace 10.1.0.10/32 dev eth0 src 10.1.0.77");
        assert_eq!((reaches(), known()), (!rules, !rules), "a false address in ARP");
        // Nobody has to ask for anybody, so that only the packets themselves lie.
        liar.sh("ip neigh replace 10.1.0.10 lladdr 02:68:0a:01:00:0a dev eth0 nud permanent");
        mate.sh("ip neigh replace 10.1.0.77 lladdr 02:68:0a:01:00:09 dev eth0 nud permanent");
        assert_eq!(liar.reaches("10.1.0.10:80"), !rules, "a false IPv4 address");
        liar.sh("ip neigh del 10.1.0.10 dev eth0; ip route del 10.1.0.10/32; ip addr del 10.1.0.77/32 dev eth0");
        mate.sh("ip neigh del 10.1.0.77 dev eth0");
    }
}

/// The driver, outside of futures.
struct LinuxNetworkOf<'a>(&'a tokio::runtime::Runtime, LinuxNetwork);

impl<'a> LinuxNetworkOf<'a> {
    fn new(runtime: &'a tokio::runtime::Runtime) -> Self {
        let made = runtime.block_on(async { LinuxNetwork::new("10.9.0.1".parse().unwrap()) });
        Self(runtime, made.unwrap())
    }
    fn apply(&self, wanted: &[NetworkWanted]) {
        let failed = self.0.block_on(self.1.apply(wanted, &LeftAlone::default())).unwrap();
        assert!(failed.is_empty(), "{failed:?}");
    }
}

#[test]
fn guests_talk_over_a_bridge_that_the_host_has() {
    if !inside::inside("guests_talk_over_a_bridge_that_the_host_has") {
        return;
    }
    uplink();
    sh("ip link add br9 type bridge; ip link set br9 up");
    let runtime = runtime();
    let driver = LinuxNetworkOf::new(&runtime);
    let guest = Guest::new("hv3n0", "up0", "10.5.0.9", "10.5.0.1");
    let world = Guest::new("w1", "br9", "10.5.0.7", "10.5.0.1");
    card(&guest, LIAR);
    world.serve();
    assert!(!guest.reaches("10.5.0.7:80"), "its card is not there yet");
    let network = NetworkWanted {
        kind: NetworkKind::Bridge { uplink_bridge: "br9".into() },
        local: vec![port("hv3n0", LIAR, [10, 5, 0, 9]), port("hv5n0", MATE, [10, 5, 0, 10])],
        mtu: 1400,
        ..overlay("office", 0, 5)
    };
    driver.apply(std::slice::from_ref(&network));
    let tap = sh("ip -d link show dev hv5n0");
    assert!(tap.contains("master br9") && tap.contains("mtu 1400") && tap.contains("tun"), "{tap}");
    assert!(guest.reaches("10.5.0.7:80"), "the world beside the bridge");
    card(&guest, MATE);
    assert!(!guest.reaches("10.5.0.7:80"), "a false MAC address is stopped here too");
    driver.apply(&[]);
    assert!(fails("ip link show dev hv5n0"), "its taps go with the network");
    assert!(sh("ip link show dev br9").contains("UP"), "the bridge is not Haven's to remove");
}

#[test]
fn an_uplink_without_a_link_is_found_and_told_at_once() {
    if !inside::inside("an_uplink_without_a_link_is_found_and_told_at_once") {
        return;
    }
    sh(
        "ip link set lo up; ip link add br9 type bridge; ip link set br9 up; ip addr add 10.9.0.1/24 dev br9",
    );
    sh(
        "ip link add far type veth peer name eth9; ip link set eth9 master br9 up; ip link set far up",
    );
    sh(
        "ip tuntap add hv3n0 mode tap; ip link set hv3n0 master br9 up; ip link add br8 type bridge",
    );
    runtime().block_on(async {
        let driver = LinuxUplinks::new().unwrap();
        let bridge = |name: &str| Uplink::Bridge(name.to_owned());
        let near = |ip: &str| Uplink::Near(ip.parse().unwrap());
        let wanted =
            [bridge("br8"), bridge("br9"), bridge("br7"), near("10.9.0.100"), near("10.8.0.1")];
        let wanted = BTreeSet::from(wanted);
        let cut = async || driver.cut(&wanted).await.unwrap();
        // A bridge without cards leads nowhere on purpose, and what is not there is told by others.
        assert_eq!(cut().await, BTreeMap::new());
        let told =
            async || tokio::time::timeout(Duration::from_secs(5), driver.changed()).await.is_ok();
        while tokio::time::timeout(Duration::from_millis(300), driver.changed()).await.is_ok() {}
        sh("ip link set far down");
        assert!(told().await, "the kernel tells");
        let why = "eth9 of the bridge br9 has no link".to_owned();
        let expected = BTreeMap::from([(bridge("br9"), why.clone()), (near("10.9.0.100"), why)]);
        assert_eq!(cut().await, expected);
        sh("ip link set far up");
        assert!(told().await, "the kernel tells");
        assert_eq!(cut().await, BTreeMap::new());
    });
}
