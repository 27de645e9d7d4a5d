//! Tests of [`super::seal`].

use super::{
    memory::{Direct, MemoryEtcd},
    pki::{Authority, PkiDir},
    raw::{EtcdStore, Identity, Op},
    seal::{ClusterKey, DiskKeyOf, Plain, SealError, is_sealed, new_disk_key},
};
use base64::{Engine, engine::general_purpose::STANDARD};
use haven_model::{Name, ObjectRef, object::Kind};
use std::sync::Arc;

const SECRET: &str = "correct horse battery staple";

fn of(text: &str) -> ObjectRef {
    text.parse().unwrap()
}

fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

fn key() -> ClusterKey {
    ClusterKey::derive(&Authority::create("test").unwrap()).unwrap()
}

fn sealed(key: &ClusterKey) -> String {
    key.seal(&of("certificate/shop"), &Plain::new(SECRET.into())).unwrap()
}

#[test]
fn what_is_sealed_comes_back_and_never_looks_the_same() {
    let authority = Authority::create("test").unwrap();
    let key = ClusterKey::derive(&authority).unwrap();
    let (first, second) = (sealed(&key), sealed(&key));
    assert!(first.starts_with("sealed:v1:") && is_sealed(&first), "{first}");
    assert_ne!(first, second, "a nonce was used twice");
    // Every host derives the same, however its file breaks the lines.
    let spaced = Authority { key: authority.key.replace('\n', "\r\n"), ..authority.clone() };
    for other in [authority, spaced] {
        let opened = ClusterKey::derive(&other).unwrap().open(&of("certificate/shop"), &first);
        assert_eq!(opened.unwrap().expose(), SECRET);
    }
    let empty = key.seal(&of("host/host1"), &Plain::new(String::new())).unwrap();
    assert_eq!(key.open(&of("host/host1"), &empty).unwrap().expose(), "");
}

#[test]
fn any_changed_bit_is_refused() {
    let key = key();
    let text = sealed(&key);
    let bytes = STANDARD.decode(text.strip_prefix("sealed:v1:").unwrap()).unwrap();
    assert_eq!(bytes.len(), 12 + SECRET.len() + 16);
    let refused = |bytes: &[u8]| {
        let text = format!("sealed:v1:{}", STANDARD.encode(bytes));
        matches!(key.open(&of("certificate/shop"), &text), Err(SealError::Refused { .. }))
    };
    for at in 0..bytes.len() {
        let mut other = bytes.clone();
        other[at] ^= 1;
        assert!(refused(&other), "byte {at}");
    }
    for length in 0..bytes.len() {
        assert!(refused(&bytes[..length]), "cut to {length}");
    }
}

#[test]
fn it_opens_only_in_its_own_place_and_under_its_own_key() {
    let (mine, other) = (key(), key());
    let text = sealed(&mine);
    for place in ["certificate/blog", "certificate/shop2", "host/shop"] {
        let error = mine.open(&of(place), &text).unwrap_err();
        assert!(matches!(error, SealError::Refused { .. }), "{place}: {error}");
        assert!(error.to_string().starts_with(&format!("the secret of {place} does not open")));
    }
    assert!(matches!(other.open(&of("certificate/shop"), &text), Err(SealError::Refused { .. })));
}

#[test]
fn what_is_no_sealed_text_is_told_apart() {
    let key = key();
    let open = |text: &str| key.open(&of("certificate/shop"), text).unwrap_err();
    assert!(matches!(open(SECRET), SealError::NotSealed { .. }));
    assert!(matches!(open("sealed"), SealError::NotSealed { .. }));
    assert!(
        matches!(open("sealed:v2:AAAA"), SealError::Version { version, .. } if version == "v2")
    );
    assert!(matches!(open("sealed:v1:not base64"), SealError::Refused { .. }));
}

#[test]
fn nothing_prints_a_secret_by_accident() {
    let key = key();
    let plain = key.open(&of("certificate/shop"), &sealed(&key)).unwrap();
    assert_eq!(format!("{plain:?} {key:?}"), "Plain(…) ClusterKey(…)");
}

#[test]
fn a_host_without_the_authoritys_key_says_so() {
    let directory = tempfile::tempdir().unwrap();
    let pki = PkiDir(directory.path().join("pki"));
    assert!(matches!(ClusterKey::of_host(&pki), Err(SealError::NoAuthority(_))));
    let ca = Authority::create("test").unwrap();
    let text = sealed(&ClusterKey::derive(&ca).unwrap());
    let own = Identity { ca: ca.certificate.clone(), certificate: "c".into(), key: "k".into() };
    pki.save(&own, Some(&ca.key)).unwrap();
    let opened = ClusterKey::of_host(&pki).unwrap().open(&of("certificate/shop"), &text);
    assert_eq!(opened.unwrap().expose(), SECRET);
    std::fs::write(pki.ca_key(), "nothing").unwrap();
    assert!(matches!(ClusterKey::of_host(&pki), Err(SealError::DamagedAuthority)));
}

#[tokio::test]
async fn the_store_holds_no_plain_text() {
    let etcd = MemoryEtcd::default();
    let store = EtcdStore::over(etcd.channel(Arc::new(Direct))).await.unwrap();
    let text = sealed(&key());
    store.txn(vec![], vec![Op::Put("/haven/x".into(), text.clone().into())]).await.unwrap();
    let value = etcd.peek("/haven/x").unwrap();
    let holds = |word: &[u8]| value.windows(word.len()).any(|at| at == word);
    assert!(holds(text.as_bytes()));
    for word in [SECRET.to_owned(), STANDARD.encode(SECRET), "horse".into()] {
        assert!(!holds(word.as_bytes()), "{word}");
    }
}

#[test]
fn the_key_of_a_disk_opens_for_that_disk_of_that_vm_alone() {
    let key = ClusterKey::derive(&Authority::create("test").unwrap()).unwrap();
    let (db, web, data, logs) = (name("db"), name("web"), name("data"), name("logs"));
    let of = DiskKeyOf { vm: &db, vm_uid: "u1", disk: &data };
    let plain = new_disk_key().unwrap();
    assert!(plain.expose().len() == 64 && plain != new_disk_key().unwrap());
    let sealed = key.seal_disk(&of, &plain).unwrap();
    assert!(!sealed.contains(plain.expose()));
    assert_eq!(key.open_disk(&of, &sealed).unwrap(), plain);
    // A VM of the same name that comes later, another disk, an object: none of them.
    for other in [DiskKeyOf { vm_uid: "u2", ..of }, DiskKeyOf { disk: &logs, ..of }] {
        assert!(key.open_disk(&other, &sealed).is_err(), "{other:?}");
    }
    // What a VM is called may change: its uid tells it.
    assert!(key.open_disk(&DiskKeyOf { vm: &web, ..of }, &sealed).is_ok());
    assert!(key.open(&ObjectRef::new(Kind::Vm, db.clone()), &sealed).is_err());
    let damaged = sealed.replace(&sealed[20..24], "AAAA");
    assert!(key.open_disk(&of, &damaged).unwrap_err().to_string().contains("vm/db"));
    let stranger = ClusterKey::derive(&Authority::create("test").unwrap()).unwrap();
    assert!(stranger.open_disk(&of, &sealed).is_err());
}

#[test]
fn each_volume_has_another_key_in_each_run_and_every_host_the_same() {
    let authority = Authority::create("test").unwrap();
    let (one, other) =
        (ClusterKey::derive(&authority).unwrap(), ClusterKey::derive(&authority).unwrap());
    let key = |of: &ClusterKey, volume: &str, run| {
        of.volume_key(volume, run).unwrap().expose().to_owned()
    };
    let mine = key(&one, "db.data.u1", 3);
    assert!(mine.len() == 64 && mine.bytes().all(|byte| byte.is_ascii_hexdigit()));
    assert_eq!(mine, key(&other, "db.data.u1", 3));
    for (volume, run) in [("db.data.u1", 4), ("db.data.u2", 3), ("db.data.u", 13)] {
        assert_ne!(mine, key(&one, volume, run));
    }
    let stranger = ClusterKey::derive(&Authority::create("test").unwrap()).unwrap();
    assert_ne!(mine, key(&stranger, "db.data.u1", 3));
}
