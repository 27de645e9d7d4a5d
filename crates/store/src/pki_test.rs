//! Tests of [`super::pki`].

use super::pki::{
    Authority, Current, HOST_LIFE, PkiDir, client_config, fingerprint, is_due, request,
    server_config,
};
use super::raw::Identity;
use rustls::{ClientConnection, ServerConnection, pki_types::CertificateDer};
use rustls_pki_types::pem::PemObject;
use std::{io::Write, sync::Arc, time::Duration};

fn identity(authority: &Authority, host: &str) -> Identity {
    let (key, request) = request(host).unwrap();
    let certificate = authority.sign(&request, host, &["10.0.0.1".parse().unwrap()]).unwrap();
    Identity { ca: authority.certificate.clone(), certificate, key }
}

#[test]
fn a_signed_identity_serves_and_connects() {
    let authority = Authority::create("test").unwrap();
    let identity = identity(&authority, "host1");
    server_config(&identity).unwrap();
    client_config(&identity).unwrap();
    assert_eq!(fingerprint(&identity.ca).unwrap().len(), 64);
}

#[test]
fn files_are_private_and_come_back_as_they_were() {
    use std::os::unix::fs::PermissionsExt;
    let directory = tempfile::tempdir().unwrap();
    let authority = Authority::create("test").unwrap();
    let identity = identity(&authority, "host1");
    let pki = PkiDir(directory.path().join("pki"));
    pki.save(&identity, Some(&authority.key)).unwrap();
    assert_eq!(pki.load().unwrap().certificate, identity.certificate);
    assert_eq!(pki.load_authority().unwrap().key, authority.key);
    let mode = std::fs::metadata(pki.key()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

fn now_ms() -> i64 {
    jiff::Timestamp::now().as_millisecond()
}

/// A host in a directory, with a certificate that is good for so long.
fn host(directory: &std::path::Path, life: Duration) -> (PkiDir, Identity) {
    let authority = Authority::create("test").unwrap();
    let (key, request) = request("host1").unwrap();
    let address = [10, 0, 0, 1].into();
    let certificate = authority.sign_for(&request, "host1", &[address], life).unwrap();
    let identity = Identity { ca: authority.certificate.clone(), certificate, key };
    let pki = PkiDir(directory.join("pki"));
    pki.save(&identity, Some(&authority.key)).unwrap();
    (pki, identity)
}

#[test]
fn a_certificate_is_renewed_in_the_last_third_of_its_life_for_the_key_that_is_there() {
    let directory = tempfile::tempdir().unwrap();
    let (pki, old) = host(directory.path(), HOST_LIFE);
    let (now, day) = (now_ms(), 86_400_000);
    let renew = |now| pki.renew("host1", [10, 0, 0, 1].into(), HOST_LIFE, now).unwrap();
    assert!(
        !is_due(&old.certificate, now + 549 * day) && is_due(&old.certificate, now + 551 * day)
    );
    assert!(is_due("damaged", now));
    assert!(renew(now + 549 * day).is_none());
    // What an interrupted renewal left is in nobody's way.
    std::fs::write(directory.path().join("pki/host.crt.new"), "cut off").unwrap();
    let new = renew(now + 551 * day).unwrap();
    assert!(new.certificate != old.certificate && new.key == old.key);
    // Only the certificate was written, so either of the two fits the key, whenever the power goes.
    for certificate in [&old.certificate, &new.certificate] {
        let between = Identity { certificate: certificate.clone(), ..pki.load().unwrap() };
        server_config(&between).unwrap();
    }
    assert_eq!(pki.load().unwrap().certificate, new.certificate);
    std::fs::remove_file(pki.ca_key()).unwrap();
    assert!(pki.renew("host1", [10, 0, 0, 1].into(), HOST_LIFE, now + 2000 * day).is_err());
    assert_eq!(pki.load().unwrap().certificate, new.certificate);
}

/// Brings bytes to and fro until both have said all.
fn exchange(client: &mut ClientConnection, server: &mut ServerConnection) {
    while client.wants_write() || server.wants_write() {
        let mut bytes = Vec::new();
        client.write_tls(&mut bytes).unwrap();
        let mut read = &bytes[..];
        while !read.is_empty() {
            server.read_tls(&mut read).unwrap();
        }
        server.process_new_packets().unwrap();
        let mut bytes = Vec::new();
        server.write_tls(&mut bytes).unwrap();
        let mut read = &bytes[..];
        while !read.is_empty() {
            client.read_tls(&mut read).unwrap();
        }
        client.process_new_packets().unwrap();
    }
}

#[test]
fn a_renewed_certificate_is_used_from_the_next_handshake_on() {
    let directory = tempfile::tempdir().unwrap();
    let (pki, old) = host(directory.path(), Duration::from_secs(600));
    let current = Current::new(&old).unwrap();
    let server = Arc::new(current.server_config().unwrap());
    let client = Arc::new(current.client_config().unwrap());
    let connect = || {
        let name = "haven".try_into().unwrap();
        let mut near = ClientConnection::new(Arc::clone(&client), name).unwrap();
        let mut far = ServerConnection::new(Arc::clone(&server)).unwrap();
        exchange(&mut near, &mut far);
        (near, far)
    };
    let der = |pem: &str| CertificateDer::from_pem_slice(pem.as_bytes()).unwrap();
    // Both sides show it: hosts are clients of each other.
    let shown = |near: &ClientConnection, far: &ServerConnection| {
        let of = |all: Option<&[CertificateDer<'static>]>| all.unwrap()[0].clone();
        (of(near.peer_certificates()), of(far.peer_certificates()))
    };
    let (mut near, mut far) = connect();
    assert_eq!(shown(&near, &far), (der(&old.certificate), der(&old.certificate)));
    let new = pki.renew("host1", [10, 0, 0, 1].into(), HOST_LIFE, now_ms()).unwrap().unwrap();
    current.replace(&new).unwrap();
    // The connection that there is goes on.
    near.writer().write_all(b"still here").unwrap();
    exchange(&mut near, &mut far);
    let mut heard = [0; 10];
    std::io::Read::read_exact(&mut far.reader(), &mut heard).unwrap();
    assert_eq!(&heard, b"still here");
    let fresh = Arc::new(current.client_config().unwrap());
    let mut near = ClientConnection::new(fresh, "haven".try_into().unwrap()).unwrap();
    let mut far = ServerConnection::new(Arc::clone(&server)).unwrap();
    exchange(&mut near, &mut far);
    assert_eq!(shown(&near, &far), (der(&new.certificate), der(&new.certificate)));
    // One that does not fit its key changes nothing.
    let (_, other) = host(&directory.path().join("other"), HOST_LIFE);
    assert!(current.replace(&Identity { key: other.key, ..new }).is_err());
    connect();
}
