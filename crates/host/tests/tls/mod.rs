//! TLS at the balancer: a real HAProxy, real handshakes, certificates of an authority made here.

use crate::{Balancer, Guest, LOOPBACK, Manner, free_port, member};
use haven_host::balance::driver::{
    BalanceDriver, FrontendMode, FrontendWanted, Identity, LeftOut, Member, TlsWanted,
};
use haven_model::service::TlsVersion;
use haven_store::{
    certificate::{Chain, Key},
    seal::Plain,
    testing::{Signed, Signer},
};
use http_body_util::{BodyExt, Empty};
use hyper::{Request, body::Bytes};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::{
    ClientConfig, RootCertStore, SupportedProtocolVersion,
    pki_types::{CertificateDer, ServerName, pem::PemObject},
    version::{TLS12, TLS13},
};
use std::{
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    os::unix::fs::PermissionsExt,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::{TlsConnector, client::TlsStream};

type Stream = TlsStream<tokio::net::TcpStream>;

const BOTH: &[&SupportedProtocolVersion] = &[&TLS12, &TLS13];

/// What the agent makes of a certificate that it has opened.
fn identity(signed: &Signed) -> Identity {
    let chain = Chain::read(&signed.leaf).expect("a good chain");
    let key = Key::read(&Plain::new(signed.key.clone())).expect("a good key");
    Identity { chain: chain.pem(), key: key.pem(), fingerprint: chain.fingerprint() }
}

fn wanted_tls(name: &str, identity: Result<Identity, String>) -> Option<TlsWanted> {
    Some(TlsWanted { certificate: name.into(), identity, min_version: TlsVersion::V12 })
}

fn tls(name: &str, signed: &Signed) -> Option<TlsWanted> {
    wanted_tls(name, Ok(identity(signed)))
}

impl Balancer {
    fn over_tls(&self, members: &[Member], tls: Option<TlsWanted>) -> FrontendWanted {
        FrontendWanted { tls, ..self.wanted(members) }
    }

    async fn serves(&self, wanted: &[FrontendWanted]) -> LeftOut {
        self.driver.apply(wanted).await.expect("HAProxy takes it")
    }

    fn address(&self) -> SocketAddr {
        SocketAddr::new(LOOPBACK, self.port)
    }

    /// The files of certificates.
    fn files(&self) -> Vec<PathBuf> {
        let directory = std::fs::read_dir(self.directory.path().join("tls"));
        directory.into_iter().flatten().map(|entry| entry.expect("it is there").path()).collect()
    }
}

/// A client that trusts one authority.
#[derive(Clone)]
struct Client(ClientConfig);

impl Client {
    fn new(ca: &Signer, versions: &[&'static SupportedProtocolVersion]) -> Self {
        let mut roots = RootCertStore::empty();
        let authority = CertificateDer::from_pem_slice(ca.certificate.as_bytes());
        roots.add(authority.expect("PEM")).expect("an authority");
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(versions)
            .expect("versions");
        Self(config.with_root_certificates(roots).with_no_client_auth())
    }

    fn alpn(mut self, protocols: &[&str]) -> Self {
        self.0.alpn_protocols = protocols.iter().map(|p| p.as_bytes().to_vec()).collect();
        self
    }

    async fn connect(&self, address: SocketAddr) -> std::io::Result<Stream> {
        let connect = async {
            let tcp = tokio::net::TcpStream::connect(address).await?;
            let name = ServerName::try_from("shop.test").expect("a name");
            TlsConnector::from(Arc::new(self.0.clone())).connect(name, tcp).await
        };
        tokio::time::timeout(Duration::from_secs(5), connect).await?
    }
}

/// Asks once over HTTP/1.1 and gives head and body; the connection may be used again unless the head says `close`.
async fn ask(stream: &mut Stream) -> std::io::Result<(String, String)> {
    let talk = async {
        stream
            .write_all(b"GET /page HTTP/1.1\r\nhost: shop.test\r\nx-forwarded-proto: http\r\n\r\n")
            .await?;
        let (mut answer, mut piece) = (Vec::new(), [0; 1024]);
        loop {
            let length = stream.read(&mut piece).await?;
            if length == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
            answer.extend_from_slice(&piece[..length]);
            let text = String::from_utf8_lossy(&answer).into_owned();
            let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
            let length: usize = length.and_then(|l| l.parse().ok()).unwrap_or(0);
            if body.len() >= length {
                return Ok((head.to_ascii_lowercase(), body.to_owned()));
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(5), talk).await?
}

/// A guest that answers with the head that it got.
fn echo(number: u8, port: u16) -> Member {
    let ip = Ipv4Addr::new(127, 0, 0, number);
    let listener = TcpListener::bind((ip, port)).expect("the port is free");
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut head = [0; 1024];
            let length = stream.read(&mut head).unwrap_or(0);
            let body = String::from_utf8_lossy(&head[..length]).to_ascii_lowercase();
            let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len());
            let _ = stream.write_all(answer.as_bytes());
        }
    });
    Member { healthy: true, ..member(&format!("web-{number}"), ip, port) }
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_ends_here_for_both_versions_of_http_and_members_are_told() {
    let Some(balancer) = Balancer::new() else { return };
    let (ca, stranger) = (Signer::new("Test authority"), Signer::new("Another"));
    let one = ca.sign("shop.test", 90);
    let members = [echo(20, free_port())];
    let left_out = balancer.serves(&[balancer.over_tls(&members, tls("shop", &one))]).await;
    assert!(left_out.is_empty(), "{left_out:?}");
    let client = Client::new(&ca, BOTH).alpn(&["h2", "http/1.1"]);
    let stream = client.connect(balancer.address()).await.expect("it is who it says it is");
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    let (mut h2, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
            .await
            .expect("HTTP/2");
    let driven = tokio::spawn(connection);
    let request = Request::get("https://shop.test/page").body(Empty::<Bytes>::new());
    let answer = h2.send_request(request.expect("a request")).await.expect("an answer");
    assert_eq!(answer.status(), 200);
    let body = answer.into_body().collect().await.expect("a body").to_bytes();
    let told = String::from_utf8_lossy(&body).into_owned();
    assert!(
        told.starts_with("get /page http/1.1") && told.contains("\r\nx-forwarded-proto: https\r\n"),
        "{told}"
    );
    driven.abort();
    let old = Client::new(&ca, BOTH).alpn(&["http/1.1"]);
    let mut stream = old.connect(balancer.address()).await.expect("HTTP/1.1");
    let (_, told) = ask(&mut stream).await.expect("an answer");
    // What a client says of itself does not count.
    assert!(
        told.contains("x-forwarded-proto: https\r\n") && !told.contains("proto: http\r\n"),
        "{told}"
    );
    let refused = Client::new(&stranger, BOTH).connect(balancer.address()).await;
    assert!(refused.is_err(), "a client that does not know the authority");
    assert!(crate::ask(balancer.address()).is_ok_and(|said| !said.contains("web")), "in the clear");
    // The key lies in one file that root alone reads, and nowhere else.
    let files = balancer.files();
    let mode =
        |path: &PathBuf| std::fs::metadata(path).expect("it is there").permissions().mode() & 0o777;
    assert!(files.len() == 1 && mode(&files[0]) == 0o600, "{files:?}");
    assert_eq!(mode(&balancer.directory.path().join("tls")), 0o700);
    let core = one.key.lines().nth(1).expect("a key has lines").to_owned();
    let holds =
        |path: &PathBuf| std::fs::read_to_string(path).is_ok_and(|text| text.contains(&core));
    assert!(holds(&files[0]));
    let others = std::fs::read_dir(balancer.directory.path()).expect("it is there");
    assert!(!others.flatten().any(|entry| holds(&entry.path())));
}

/// The first bytes of an answer to a client that speaks TLS 1.1 at most.
fn hello_of_tls_1_1(address: SocketAddr) -> Vec<u8> {
    // Random bytes, no session, four suites of that time, no compression.
    let mut hello = vec![3, 2];
    hello.extend([7; 32]);
    hello.extend([0, 0, 8, 0xc0, 0x13, 0xc0, 0x14, 0xc0, 0x09, 0xc0, 0x0a, 1, 0]);
    let length = u8::try_from(hello.len()).expect("it is short");
    let mut record = vec![22, 3, 1, 0, length + 4, 1, 0, 0, length];
    record.extend(hello);
    let mut stream = TcpStream::connect(address).expect("it listens");
    stream.set_read_timeout(Some(Duration::from_secs(5))).expect("a socket");
    stream.write_all(&record).expect("it is taken");
    let mut answer = vec![0; 7];
    let length = stream.read(&mut answer).unwrap_or(0);
    answer.truncate(length);
    answer
}

#[tokio::test(flavor = "multi_thread")]
async fn older_versions_of_tls_are_refused() {
    let Some(balancer) = Balancer::new() else { return };
    let ca = Signer::new("Test authority");
    let one = ca.sign("shop.test", 90);
    let members = [echo(21, free_port())];
    for (min_version, both) in [(TlsVersion::V12, true), (TlsVersion::V13, false)] {
        let wanted = TlsWanted { min_version, ..tls("shop", &one).expect("it is") };
        balancer.serves(&[balancer.over_tls(&members, Some(wanted))]).await;
        let takes = async |version| {
            let client = Client::new(&ca, &[version]);
            let Ok(mut stream) = client.connect(balancer.address()).await else { return false };
            ask(&mut stream).await.is_ok()
        };
        assert_eq!((takes(&TLS12).await, takes(&TLS13).await), (both, true), "{min_version:?}");
        // A fatal alert: protocol_version.
        let said = hello_of_tls_1_1(balancer.address());
        assert!(said.first() == Some(&21) && said.ends_with(&[2, 70]), "{min_version:?}: {said:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_ends_here_in_mode_tcp() {
    let Some(balancer) = Balancer::new() else { return };
    let ca = Signer::new("Test authority");
    let guest = Guest::start(22, free_port(), Manner::SpeaksFirst);
    let members = [Member { healthy: true, ..guest.member.clone() }];
    let mut wanted = balancer.over_tls(&members, tls("shop", &ca.sign("shop.test", 90)));
    wanted.mode = FrontendMode::Tcp;
    wanted.check = None;
    balancer.serves(&[wanted]).await;
    let client = Client::new(&ca, BOTH).alpn(&["h2", "http/1.1"]);
    let mut stream = client.connect(balancer.address()).await.expect("it is who it says it is");
    assert_eq!(stream.get_ref().1.alpn_protocol(), None);
    let mut said = String::new();
    let _ = stream.read_to_string(&mut said).await;
    assert_eq!(said, "220 web-22\n");
}

/// Asks until it is told to stop, over connections that are kept or each time over a new one: how often, and what went
/// wrong.
async fn load(
    client: Client,
    address: SocketAddr,
    kept: bool,
    stop: Arc<AtomicBool>,
) -> (usize, Vec<String>) {
    let (mut asked, mut wrong) = (0, Vec::new());
    let mut held: Option<Stream> = None;
    while !stop.load(Ordering::Relaxed) {
        asked += 1;
        let mut stream = match held.take() {
            Some(stream) => stream,
            None => match client.connect(address).await {
                Ok(stream) => stream,
                Err(error) => {
                    wrong.push(format!("connect: {error}"));
                    continue;
                }
            },
        };
        match ask(&mut stream).await {
            // A connection is over when its last answer says so.
            Ok((head, _)) if head.contains(" 200 ") => {
                held = Some(stream).filter(|_| kept && !head.contains("connection: close"));
            }
            Ok((head, _)) => wrong.push(head),
            Err(error) => wrong.push(format!("ask: {error}")),
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    (asked, wrong)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_certificate_that_is_replaced_under_load_drops_nothing() {
    let Some(balancer) = Balancer::new() else { return };
    let ca = Signer::new("Test authority");
    let members = [echo(23, free_port())];
    let mut signed = ca.sign("shop.test", 90);
    balancer.serves(&[balancer.over_tls(&members, tls("shop", &signed))]).await;
    let (client, address) = (Client::new(&ca, BOTH).alpn(&["http/1.1"]), balancer.address());
    let stop = Arc::new(AtomicBool::new(false));
    let loads: Vec<_> = [true, true, false, false]
        .map(|kept| tokio::spawn(load(client.clone(), address, kept, Arc::clone(&stop))))
        .into();
    for round in 0..5 {
        tokio::time::sleep(Duration::from_millis(400)).await;
        // With a key of its own, and for the key that there is.
        signed = if round % 2 == 0 {
            ca.sign("shop.test", 100 + round)
        } else {
            ca.renew(&signed, "shop.test", 100 + round)
        };
        balancer.serves(&[balancer.over_tls(&members, tls("shop", &signed))]).await;
        let stream = client.connect(address).await.expect("it goes on");
        let shown = &stream.get_ref().1.peer_certificates().expect("it has one")[0];
        let new = CertificateDer::from_pem_slice(signed.leaf.as_bytes()).expect("PEM");
        assert_eq!(*shown, new, "round {round}: who connects now sees the new one");
        assert_eq!(balancer.files().len(), 1, "the old one is gone");
    }
    stop.store(true, Ordering::Relaxed);
    for load in loads {
        let (asked, wrong) = load.await.expect("it ends");
        assert!(asked > 50 && wrong.is_empty(), "{} of {asked}: {wrong:?}", wrong.len());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_that_cannot_be_used_harms_no_other_frontend() {
    let Some(balancer) = Balancer::new() else { return };
    let ca = Signer::new("Test authority");
    let (good, other) = (ca.sign("shop.test", 90), ca.sign("shop.test", 90));
    let members = [echo(24, free_port())];
    let shop = balancer.over_tls(&members, tls("shop", &good));
    let named = |service: &str, identity: Result<Identity, String>| FrontendWanted {
        service: service.into(),
        port: free_port(),
        tls: wanted_tls(service, identity),
        ..shop.clone()
    };
    // One that does not open, one with another's key, and one that only HAProxy finds wrong.
    let crossed = Identity { key: identity(&other).key, ..identity(&good) };
    let broken = Identity { chain: "no PEM\n".into(), ..identity(&other) };
    let bad = [
        named("sealed", Err("it does not open".into())),
        named("crossed", Ok(crossed)),
        named("broken", Ok(broken)),
    ];
    let mut all = bad.to_vec();
    all.insert(1, shop.clone());
    let client = Client::new(&ca, BOTH);
    for _ in 0..2 {
        let left_out = balancer.serves(&all).await;
        let said: Vec<String> = left_out.values().map(ToString::to_string).collect();
        assert_eq!(left_out.keys().collect::<Vec<_>>(), ["broken", "crossed", "sealed"]);
        let begin = "it is not served, for want of the certificate";
        assert_eq!(said[2], format!("{begin} sealed: it does not open"));
        for (said, name) in said.iter().zip(["broken", "crossed"]) {
            assert!(
                said.starts_with(&format!("{begin} {name}: HAProxy does not take it: ")),
                "{said}"
            );
        }
        let mut stream = client.connect(balancer.address()).await.expect("the good one is served");
        assert!(ask(&mut stream).await.is_ok());
        for frontend in &bad {
            assert!(TcpStream::connect((LOOPBACK, frontend.port)).is_err(), "{}", frontend.service);
        }
        assert_eq!(balancer.files().len(), 1, "{:?}", balancer.files());
    }
    // Once it is good it is served, and files go with their frontends.
    let mended = FrontendWanted { tls: tls("sealed", &other), ..bad[0].clone() };
    assert!(balancer.serves(&[shop.clone(), mended.clone()]).await.is_empty());
    assert!(client.connect(SocketAddr::new(LOOPBACK, mended.port)).await.is_ok());
    assert_eq!(balancer.files().len(), 2);
    balancer.serves(&[mended]).await;
    assert_eq!(balancer.files().len(), 1);
    balancer.serves(&[]).await;
    assert_eq!(balancer.files(), [""; 0].map(PathBuf::from));
}
