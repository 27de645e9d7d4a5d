//! A host's certificate is renewed while etcd runs and while the store is in use.

use haven_store::{
    pki::{self, Authority, HOST_LIFE, PkiDir},
    raw::{EtcdStore, Identity, Op, StoreConfig},
    server::{MemberConfig, command},
};
use rustls::{ClientConnection, pki_types::CertificateDer};
use rustls_pki_types::pem::PemObject;
use std::{
    net::{Ipv4Addr, TcpListener, TcpStream},
    process::Stdio,
    sync::Arc,
    time::{Duration, Instant},
};

const ADDRESS: Ipv4Addr = Ipv4Addr::LOCALHOST;

fn free_port() -> u16 {
    let listener = TcpListener::bind((ADDRESS, 0)).expect("loopback has a free port");
    listener.local_addr().expect("it is bound").port()
}

/// What etcd shows to who connects now.
fn shown(port: u16, identity: &Identity) -> CertificateDer<'static> {
    let config = Arc::new(pki::client_config(identity).expect("they fit together"));
    let name = "localhost".try_into().expect("a good name");
    let mut client = ClientConnection::new(config, name).expect("a good configuration");
    let mut stream = TcpStream::connect((ADDRESS, port)).expect("etcd listens");
    while client.is_handshaking() {
        client.complete_io(&mut stream).expect("a handshake");
    }
    client.peer_certificates().expect("it shows one")[0].clone()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn etcd_and_the_store_take_up_a_renewed_certificate_without_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let pki = PkiDir(directory.path().join("pki"));
    let authority = Authority::create("test").unwrap();
    let (key, request) = pki::request("host1").unwrap();
    let life = Duration::from_secs(8);
    let certificate = authority.sign_for(&request, "host1", &[ADDRESS.into()], life).unwrap();
    let signed = Instant::now();
    let old = Identity { ca: authority.certificate.clone(), certificate, key };
    pki.save(&old, Some(&authority.key)).unwrap();
    let (port, peer) = (free_port(), format!("https://127.0.0.1:{}", free_port()));
    let url = format!("https://127.0.0.1:{port}");
    // The command that a host runs; of a flag that is given twice etcd takes the second.
    let mut command = command(&MemberConfig {
        name: "host1".into(),
        address: ADDRESS,
        data: directory.path().join("data"),
        log: directory.path().join("log"),
        pki: pki.clone(),
        initial_cluster: format!("host1={peer}"),
        existing: false,
    });
    command
        .arg(format!("--listen-client-urls={url}"))
        .arg(format!("--advertise-client-urls={url}"))
        .arg(format!("--listen-peer-urls={peer}"))
        .arg(format!("--initial-advertise-peer-urls={peer}"))
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let Ok(mut etcd) = command.spawn() else {
        println!("skipped: needs etcd");
        return;
    };
    let connect = async |identity: &Identity| {
        let config = StoreConfig { endpoints: vec![url.clone()], tls: Some(identity.clone()) };
        EtcdStore::connect(config).await.unwrap()
    };
    let store = connect(&old).await;
    let put = |value: &'static str| vec![Op::Put("/haven/x".into(), value.into())];
    while store.txn(vec![], put("before")).await.is_err() {
        assert!(signed.elapsed() < Duration::from_secs(6), "etcd does not answer");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // A daemon that has not connected since.
    let idle = connect(&old).await;
    let der = |pem: &str| CertificateDer::from_pem_slice(pem.as_bytes()).unwrap();
    assert_eq!(shown(port, &old), der(&old.certificate));
    let now = jiff::Timestamp::now().as_millisecond();
    let new = pki.renew("host1", ADDRESS.into(), HOST_LIFE, now).unwrap().unwrap();
    assert_eq!(shown(port, &new), der(&new.certificate), "etcd reads its files at each handshake");
    tokio::time::sleep(life.saturating_sub(signed.elapsed()) + Duration::from_secs(1)).await;
    assert!(idle.get("/haven/x").await.is_err(), "what has ended is refused");
    for store in [idle, store] {
        store.show(new.clone()).await.unwrap();
        assert!(store.get("/haven/x").await.unwrap().is_some());
    }
    assert!(matches!(etcd.try_wait(), Ok(None)), "it is the process that was started");
    let _ = etcd.kill().await;
}
