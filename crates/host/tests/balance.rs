//! The balancer's driver with a real HAProxy on loopback.

mod tls;

use haven_host::balance::{
    driver::{BalanceDriver, Check, FrontendMode, FrontendWanted, Member, MemberState, Options},
    haproxy::HaproxyDriver,
};
use haven_model::service::{ProxyProtocol, Sticky};
use std::{
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// A HAProxy with a directory and a port of its own; ended with the test.
struct Balancer {
    driver: HaproxyDriver,
    directory: tempfile::TempDir,
    port: u16,
}

impl Balancer {
    /// None, with a word about it, where there is no HAProxy.
    fn new() -> Option<Self> {
        if std::process::Command::new("haproxy").arg("-v").output().is_err() {
            println!("skipped: needs haproxy");
            return None;
        }
        let directory = tempfile::tempdir().expect("a directory can be made");
        let driver = HaproxyDriver::new(directory.path().to_owned());
        Some(Self { driver, directory, port: free_port() })
    }

    fn wanted(&self, members: &[Member]) -> FrontendWanted {
        FrontendWanted {
            source: LOOPBACK,
            service: "web".into(),
            address: LOOPBACK,
            port: self.port,
            mode: FrontendMode::Http,
            members: members.to_vec(),
            check: Some(Check {
                mode: FrontendMode::Http,
                port: members.first().map_or(9, |m| m.port),
                path: "/".into(),
                interval_ms: 500,
                timeout_ms: 500,
            }),
            options: Options::default(),
            tls: None,
        }
    }

    async fn apply(&self, members: &[Member]) {
        self.driver.apply(&[self.wanted(members)]).await.expect("HAProxy takes it");
    }

    /// Who answered, or how it failed.
    fn ask(&self) -> String {
        ask(SocketAddr::new(LOOPBACK, self.port)).unwrap_or_else(|error| error.to_string())
    }

    fn pid(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("pid")).expect("HAProxy runs")
    }

    async fn until(&self, what: &str, holds: impl Fn(&str) -> bool) {
        let begin = Instant::now();
        loop {
            let said = self.ask();
            if holds(&said) {
                return;
            }
            assert!(begin.elapsed() < Duration::from_secs(10), "{what}; the last answer: {said}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

impl Drop for Balancer {
    fn drop(&mut self) {
        let pid = std::fs::read_to_string(self.directory.path().join("pid")).unwrap_or_default();
        if let Ok(pid) = pid.trim().parse() {
            let pid = nix::unistd::Pid::from_raw(pid);
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
        }
    }
}

fn free_port() -> u16 {
    let listener = TcpListener::bind((LOOPBACK, 0)).expect("a port is free");
    listener.local_addr().expect("it has an address").port()
}

/// The body of a good answer; otherwise its first line.
fn ask(address: SocketAddr) -> std::io::Result<String> {
    request(address, "GET")
}

fn request(address: SocketAddr, method: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(1))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.write_all(format!("{method} /page HTTP/1.0\r\nContent-Length: 0\r\n\r\n").as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let first = head.lines().next().unwrap_or_default();
    Ok(if first.contains(" 200 ") { body.into() } else { first.into() })
}

/// What a guest does with its work.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Manner {
    Answers,
    /// It takes questions, passes checks, and never answers.
    Hangs,
    /// It answers questions, and no check finds it well.
    FailsChecks,
    /// It speaks first and knows nothing of HTTP, as a mail server does.
    SpeaksFirst,
}

/// A guest's web server, on an address of its own. All guests of a service have the same port.
struct Guest {
    member: Member,
    open: Arc<AtomicBool>,
}

impl Guest {
    /// It answers its name.
    fn start(number: u8, port: u16, manner: Manner) -> Self {
        let ip = Ipv4Addr::new(127, 0, 0, number);
        let listener = TcpListener::bind((ip, port)).expect("the port is free");
        let open = Arc::new(AtomicBool::new(true));
        let (name, told) = (format!("web-{number}"), Arc::clone(&open));
        std::thread::spawn(move || {
            let mut held = Vec::new();
            for stream in listener.incoming() {
                if !told.load(Ordering::Relaxed) {
                    return;
                }
                let Ok(mut stream) = stream else { return };
                if manner == Manner::SpeaksFirst {
                    let _ = stream.write_all(format!("220 web-{number}\n").as_bytes());
                    continue;
                }
                let mut request = [0; 512];
                let length = stream.read(&mut request).unwrap_or(0);
                let check = !request[..length].windows(5).any(|at| at == b"/page");
                if manner == Manner::Hangs && !check {
                    held.push(stream);
                    continue;
                }
                let ill = manner == Manner::FailsChecks && check;
                let status = if ill { "503 Busy" } else { "200 OK" };
                let answer = format!("HTTP/1.0 {status}\r\nconnection: close\r\n\r\nweb-{number}");
                let _ = stream.write_all(answer.as_bytes());
            }
        });
        Self { member: member(&name, ip, port), open }
    }

    fn in_state(&self, state: MemberState) -> Member {
        Member { state, ..self.member.clone() }
    }

    /// Its port is closed, as of a guest that boots.
    fn close(self) -> Member {
        self.open.store(false, Ordering::Relaxed);
        let _ = TcpStream::connect((self.member.ip, self.member.port));
        self.member
    }
}

fn member(name: &str, ip: Ipv4Addr, port: u16) -> Member {
    Member {
        name: name.into(),
        ip: ip.into(),
        port,
        state: MemberState::Ready,
        healthy: false,
        weight: 100,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_member_gets_its_share_and_one_that_is_down_or_drains_nothing() {
    let Some(balancer) = Balancer::new() else { return };
    let port = free_port();
    let (a, b) = (Guest::start(2, port, Manner::Answers), Guest::start(3, port, Manner::Answers));
    let said = |n: usize| (0..n).map(|_| balancer.ask()).collect::<Vec<_>>();
    balancer.apply(&[a.member.clone(), b.member.clone()]).await;
    let both = said(20);
    assert_eq!(both.iter().filter(|name| *name == "web-2").count(), 10, "{both:?}");
    assert_eq!(both.iter().filter(|name| *name == "web-3").count(), 10, "{both:?}");
    for state in [MemberState::Down, MemberState::Drain] {
        balancer.apply(&[a.in_state(state), b.member.clone()]).await;
        assert_eq!(said(10), vec!["web-3"; 10], "{state:?}");
    }
    balancer.apply(&[a.member.clone(), b.in_state(MemberState::Down)]).await;
    assert_eq!(said(10), vec!["web-2"; 10]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_its_own_host_found_healthy_is_used_at_once() {
    let Some(balancer) = Balancer::new() else { return };
    let port = free_port();
    let booting = Guest::start(4, port, Manner::Answers).close();
    balancer.apply(std::slice::from_ref(&booting)).await;
    balancer.until("HAProxy's own checks take it out", |said| said.contains("503")).await;
    // Right after one of HAProxy's checks has failed, so that its next is as far away as it can be.
    let guest = Guest::start(4, port, Manner::Answers);
    let healthy = Member { healthy: true, ..guest.member.clone() };
    balancer.apply(&[healthy]).await;
    assert_eq!(balancer.ask(), "web-4");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_waits_for_a_lost_member_is_told_and_nothing_is_done_twice() {
    let Some(balancer) = Balancer::new() else { return };
    let port = free_port();
    let (lost, other) =
        (Guest::start(5, port, Manner::Hangs), Guest::start(6, port, Manner::Answers));
    balancer.apply(&[lost.member.clone(), other.in_state(MemberState::Down)]).await;
    let address = SocketAddr::new(LOOPBACK, balancer.port);
    let waiting = ["GET", "POST"]
        .map(|method| std::thread::spawn(move || (request(address, method), Instant::now())));
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!waiting.iter().any(std::thread::JoinHandle::is_finished), "the member hangs");
    let begin = Instant::now();
    balancer.apply(&[lost.in_state(MemberState::Down), other.member.clone()]).await;
    assert_eq!(balancer.ask(), "web-6", "the next goes to the other at once");
    let ended = tokio::task::spawn_blocking(|| waiting.map(|one| one.join().unwrap()));
    let [(get, got), (post, posted)] = ended.await.unwrap();
    for end in [got, posted] {
        assert!(end - begin < Duration::from_secs(2), "told after {:?}", end - begin);
    }
    assert_eq!(get.unwrap(), "web-6", "a page is fetched elsewhere");
    let post = post.unwrap_or_else(|error| error.to_string());
    assert!(!post.contains("web"), "a change may have been made, so it is not made again: {post}");
}

#[tokio::test(flavor = "multi_thread")]
async fn members_that_no_check_finds_well_are_asked_rather_than_none() {
    let Some(balancer) = Balancer::new() else { return };
    let port = free_port();
    let ill = Guest::start(9, port, Manner::FailsChecks);
    let well = Guest::start(10, port, Manner::Answers);
    balancer.apply(&[ill.member.clone(), well.member.clone()]).await;
    // Beside one that is well it gets nothing, once it was checked.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    for _ in 0..10 {
        assert_eq!(balancer.ask(), "web-10");
    }
    let lost = Member { state: MemberState::Down, ..well.member.clone() };
    balancer.apply(&[ill.member.clone(), lost.clone()]).await;
    for _ in 0..10 {
        assert_eq!(balancer.ask(), "web-9", "it is the only one that is left");
    }
    // What Haven knows to be down is never asked, nor what drains.
    let drained = Member { state: MemberState::Drain, ..ill.member.clone() };
    balancer.apply(&[drained, lost]).await;
    assert!(balancer.ask().contains("503"), "{}", balancer.ask());
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_of_mode_tcp_are_passed_on_and_only_to_members_that_take_them() {
    let Some(balancer) = Balancer::new() else { return };
    let port = free_port();
    let speaks = |number| Guest::start(number, port, Manner::SpeaksFirst);
    let (a, b) = (speaks(11), speaks(12));
    let mut wanted = balancer.wanted(&[a.member.clone(), b.member.clone()]);
    wanted.mode = FrontendMode::Tcp;
    wanted.check.as_mut().unwrap().mode = FrontendMode::Tcp;
    balancer.driver.apply(&[wanted.clone()]).await.unwrap();
    // Nothing is sent: whoever waits for a question hears nothing.
    let hear = || {
        let address = SocketAddr::new(LOOPBACK, balancer.port);
        let mut said = String::new();
        let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(1)).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let _ = stream.read_to_string(&mut said);
        said
    };
    let heard = |n: usize| (0..n).map(|_| hear()).collect::<Vec<_>>();
    let both = heard(10);
    for name in ["220 web-11\n", "220 web-12\n"] {
        assert_eq!(both.iter().filter(|said| *said == name).count(), 5, "{both:?}");
    }
    b.close();
    // Two checks are missed, half a second apart.
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(heard(10), vec!["220 web-11\n"; 10]);
    wanted.members[0].state = MemberState::Down;
    balancer.driver.apply(&[wanted]).await.unwrap();
    assert_eq!(heard(2), vec![""; 2], "nobody is left");
}

/// An answer's head and body.
fn talk(address: SocketAddr, said: &str) -> (String, String) {
    let mut answer = String::new();
    let mut talk = || {
        let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(1))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        stream.write_all(said.as_bytes())?;
        stream.read_to_string(&mut answer)
    };
    talk().expect("an answer");
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    (head.to_owned(), body.to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_stays_with_its_member_until_that_one_leaves() {
    let Some(balancer) = Balancer::new() else { return };
    let port = free_port();
    let (a, b) = (Guest::start(13, port, Manner::Answers), Guest::start(14, port, Manner::Answers));
    let address = SocketAddr::new(LOOPBACK, balancer.port);
    let wanted = |members: [Member; 2], sticky| {
        let options = Options { sticky, ..Options::default() };
        FrontendWanted { options, ..balancer.wanted(&members) }
    };
    let both = || [a.member.clone(), b.member.clone()];
    balancer.driver.apply(&[wanted(both(), Sticky::Cookie)]).await.unwrap();
    let with = |cookie: &str| talk(address, &format!("GET /page HTTP/1.0\r\n{cookie}\r\n"));
    for name in ["web-13", "web-14"] {
        let cookie = format!("Cookie: HAVEN={name}\r\n");
        let said: Vec<String> = (0..6).map(|_| with(&cookie).1).collect();
        assert_eq!(said, vec![name; 6]);
    }
    let (head, first) = with("");
    assert!(head.contains(&format!("set-cookie: HAVEN={first}; ")), "{head}");
    // It drains: whoever has its cookie goes to the other and stays there.
    let leaving = [a.in_state(MemberState::Drain), b.member.clone()];
    balancer.driver.apply(&[wanted(leaving, Sticky::Cookie)]).await.unwrap();
    let (head, other) = with("Cookie: HAVEN=web-13\r\n");
    assert!(other == "web-14" && head.contains("set-cookie: HAVEN=web-14; "), "{head}");
    // By address, all questions of this client go to one member, and to the other when that one is gone.
    balancer.driver.apply(&[wanted(both(), Sticky::Source)]).await.unwrap();
    let mine = with("").1;
    assert_eq!((0..6).map(|_| with("").1).collect::<Vec<_>>(), vec![mine.clone(); 6]);
    let gone = both().map(|member| Member {
        state: if member.name == mine { MemberState::Down } else { MemberState::Ready },
        ..member
    });
    balancer.driver.apply(&[wanted(gone, Sticky::Source)]).await.unwrap();
    let (_, next) = with("");
    assert!(next != mine && next.starts_with("web-1"), "{next}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_comes_beyond_the_limits_waits() {
    let Some(balancer) = Balancer::new() else { return };
    let (ip, port) = (Ipv4Addr::new(127, 0, 0, 15), free_port());
    let guest = TcpListener::bind((ip, port)).unwrap();
    guest.set_nonblocking(true).unwrap();
    // Whoever comes to the guest within so long.
    let comes = |within: Duration| {
        let begin = Instant::now();
        loop {
            if let Ok((stream, _)) = guest.accept() {
                return Some(stream);
            }
            if begin.elapsed() > within {
                return None;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    };
    let answer = |mut stream: TcpStream| {
        stream.set_nonblocking(false).unwrap();
        let mut question = [0; 512];
        assert!(stream.read(&mut question).unwrap() > 0);
        stream.write_all(b"HTTP/1.0 200 OK\r\n\r\nheard").unwrap();
    };
    let frontend = Options { max_connections: Some(1), ..Options::default() };
    let member = Options { max_connections_per_member: Some(1), ..Options::default() };
    for options in [frontend, member] {
        let members = [Member { healthy: true, ..self::member("web-15", ip, port) }];
        let wanted = FrontendWanted { options, check: None, ..balancer.wanted(&members) };
        balancer.driver.apply(&[wanted]).await.unwrap();
        let address = SocketAddr::new(LOOPBACK, balancer.port);
        let ask = || std::thread::spawn(move || talk(address, "GET /page HTTP/1.0\r\n\r\n").1);
        let clients = [ask(), ask()];
        let first = comes(Duration::from_secs(5)).expect("one is taken");
        let none = comes(Duration::from_millis(500)).is_none();
        assert!(none, "{options:?}: there is no room for a second");
        answer(first);
        answer(comes(Duration::from_secs(5)).expect("there is room now"));
        for client in clients {
            assert_eq!(client.join().unwrap(), "heard", "{options:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_clients_address_is_passed_on_by_the_proxy_protocol() {
    let Some(balancer) = Balancer::new() else { return };
    let port = free_port();
    let ip = Ipv4Addr::new(127, 0, 0, 16);
    let guest = TcpListener::bind((ip, port)).unwrap();
    let members = [Member { healthy: true, ..member("web-16", ip, port) }];
    let options = Options {
        proxy_protocol: ProxyProtocol { accept: true, send: true },
        ..Options::default()
    };
    let wanted = FrontendWanted { options, check: None, ..balancer.wanted(&members) };
    balancer.driver.apply(&[wanted]).await.unwrap();
    let heard = std::thread::spawn(move || {
        let (mut stream, _) = guest.accept().unwrap();
        let mut bytes = [0; 512];
        let length = stream.read(&mut bytes).unwrap();
        stream.write_all(b"HTTP/1.0 200 OK\r\n\r\nheard").unwrap();
        bytes[..length].to_vec()
    });
    let address = SocketAddr::new(LOOPBACK, balancer.port);
    let said = "PROXY TCP4 192.0.2.7 127.0.0.1 5555 80\r\nGET /page HTTP/1.0\r\n\r\n";
    assert_eq!(talk(address, said).1, "heard");
    let heard = heard.join().unwrap();
    assert!(heard.starts_with(b"\r\n\r\n\0\r\nQUIT\n\x21\x11"), "{heard:?}");
    assert_eq!(&heard[16..20], [192, 0, 2, 7]);
    // Who does not speak it is not taken for somebody.
    let mut plain = TcpStream::connect(address).unwrap();
    plain.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    plain.write_all(b"GET /page HTTP/1.0\r\n\r\n").unwrap();
    let mut answer = String::new();
    let _ = plain.read_to_string(&mut answer);
    assert!(!answer.contains("200"), "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_configuration_drops_no_question() {
    let Some(balancer) = Balancer::new() else { return };
    let port = free_port();
    let guest = Guest::start(7, port, Manner::Answers);
    balancer.apply(std::slice::from_ref(&guest.member)).await;
    let (address, stop) =
        (SocketAddr::new(LOOPBACK, balancer.port), Arc::new(AtomicBool::new(false)));
    let told = Arc::clone(&stop);
    let asking = std::thread::spawn(move || {
        let mut said = Vec::new();
        while !told.load(Ordering::Relaxed) {
            said.push(ask(address).unwrap_or_else(|error| error.to_string()));
        }
        said
    });
    for more in 0..4 {
        let mut wanted = vec![balancer.wanted(std::slice::from_ref(&guest.member))];
        for _ in 0..more {
            let mut other = balancer.wanted(std::slice::from_ref(&guest.member));
            other.port = free_port();
            other.service = format!("other-{}", wanted.len());
            wanted.push(other);
        }
        balancer.driver.apply(&wanted).await.unwrap();
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    stop.store(true, Ordering::Relaxed);
    let said = tokio::task::spawn_blocking(|| asking.join().unwrap()).await.unwrap();
    let bad: Vec<&String> = said.iter().filter(|answer| *answer != "web-7").collect();
    assert!(said.len() > 50 && bad.is_empty(), "{} of {}: {bad:?}", bad.len(), said.len());
}

/// Questions, one after another, until told to stop.
fn asking(address: SocketAddr) -> impl FnOnce() -> Vec<String> + Send + 'static {
    let stop = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&stop);
    let clients: Vec<_> = (0..4)
        .map(|_| {
            let told = Arc::clone(&told);
            std::thread::spawn(move || {
                let mut said = Vec::new();
                while !told.load(Ordering::Relaxed) {
                    said.push(ask(address).unwrap_or_else(|error| error.to_string()));
                }
                said
            })
        })
        .collect();
    move || {
        stop.store(true, Ordering::Relaxed);
        clients.into_iter().flat_map(|client| client.join().expect("a client ends")).collect()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn traffic_is_split_by_weight_without_a_reload() {
    let Some(balancer) = Balancer::new() else { return };
    let port = free_port();
    let guests = [17, 18, 19, 20].map(|number| Guest::start(number, port, Manner::Answers));
    let members = |weights: [u32; 4]| {
        let weighed = guests.iter().zip(weights);
        let member = |(guest, weight): (&Guest, u32)| Member { weight, ..guest.member.clone() };
        weighed.map(member).collect::<Vec<_>>()
    };
    let share = |n: usize| {
        let new = (0..n).filter(|_| balancer.ask() == "web-20").count();
        100.0 * new as f64 / n as f64
    };
    balancer.apply(&members([100; 4])).await;
    assert!((share(100) - 25.0).abs() < 2.0);
    let pid = balancer.pid();
    // As three old members and a new one with 10 %.
    balancer.apply(&members([256, 256, 256, 85])).await;
    let got = share(1000);
    assert!((6.0..=14.0).contains(&got), "{got} % of 1,000 instead of 10");
    balancer.apply(&members([1, 1, 1, 256])).await;
    let got = share(500);
    assert!((96.0..=100.0).contains(&got), "{got} % of 500 instead of 98.8");
    assert_eq!(balancer.pid(), pid, "it was not started anew");
    // A weight holds for the one that takes a slot over, and after a reload.
    let mut next = members([256, 256, 256, 85]);
    next.remove(0);
    balancer.apply(&next).await;
    balancer.apply(&members([256, 256, 256, 85])).await;
    assert_eq!(balancer.pid(), pid);
    let mut reloaded = balancer.wanted(&members([256, 256, 256, 85]));
    reloaded.options.max_connections = Some(1000);
    balancer.driver.apply(&[reloaded]).await.unwrap();
    assert_ne!(balancer.pid(), pid);
    let got = share(500);
    assert!((6.0..=14.0).contains(&got), "{got} % of 500 after a reload");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_switch_from_all_old_members_to_all_new_ones_loses_no_question() {
    let Some(balancer) = Balancer::new() else { return };
    let port = free_port();
    let blue = [21, 22, 23].map(|number| Guest::start(number, port, Manner::Answers));
    let green = [24, 25, 26].map(|number| Guest::start(number, port, Manner::Answers));
    let members = |blue_state: MemberState, green_state: MemberState| {
        let blue = blue.iter().map(|guest| guest.in_state(blue_state));
        let green = green.iter().map(|guest| guest.in_state(green_state));
        blue.chain(green).map(|member| Member { healthy: true, ..member }).collect::<Vec<_>>()
    };
    let (ready, drain) = (MemberState::Ready, MemberState::Drain);
    balancer.apply(&members(ready, drain)).await;
    let pid = balancer.pid();
    let is_green = |said: &str| ["web-24", "web-25", "web-26"].contains(&said);
    for _ in 0..20 {
        assert!(!is_green(&balancer.ask()), "the new ones get nothing yet");
    }
    let end = asking(SocketAddr::new(LOOPBACK, balancer.port));
    for round in 0..10 {
        tokio::time::sleep(Duration::from_millis(150)).await;
        let (blue, green) = if round % 2 == 0 { (drain, ready) } else { (ready, drain) };
        balancer.apply(&members(blue, green)).await;
        for _ in 0..5 {
            assert_eq!(is_green(&balancer.ask()), green == ready, "all traffic at once");
        }
    }
    let said = tokio::task::spawn_blocking(end).await.unwrap();
    let bad: Vec<&String> = said.iter().filter(|answer| !answer.starts_with("web-2")).collect();
    assert!(said.len() > 500 && bad.is_empty(), "{} of {}: {bad:?}", bad.len(), said.len());
    assert_eq!(balancer.pid(), pid, "it was not started anew");
    // Those that get nothing are not asked either when no check finds the others well.
    let last = members(ready, drain);
    for guest in blue {
        guest.close();
    }
    balancer.apply(&last).await;
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert!(!is_green(&balancer.ask()), "{}", balancer.ask());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_configuration_says_why() {
    let Some(balancer) = Balancer::new() else { return };
    let mut wanted = balancer.wanted(&[]);
    // An address that this machine does not have; hosts of a cluster may bind such ones, this namespace may not.
    wanted.address = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
    let nonlocal = std::fs::read_to_string("/proc/sys/net/ipv4/ip_nonlocal_bind");
    if nonlocal.is_ok_and(|value| value.trim() == "1") {
        println!("skipped: needs net.ipv4.ip_nonlocal_bind = 0");
        return;
    }
    let error = balancer.driver.apply(&[wanted]).await.unwrap_err();
    assert!(error.why.contains("192.0.2.1"), "{error}");
}
