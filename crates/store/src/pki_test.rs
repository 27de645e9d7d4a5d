//! Tests of [`super::pki`].

use super::pki::{Authority, PkiDir, client_config, fingerprint, request, server_config};
use super::raw::Identity;

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
