//! Keys of encrypted disks, over a store in memory.

use super::{
    AgentParts,
    disk_keys::{Missing, key, source},
    fixture::{Fixture, name},
    storage::VolumeName,
};
use haven_model::keys;
use proptest::prelude::*;
use serde_json::json;
use std::sync::Arc;

fn volume(vm: &str) -> VolumeName {
    source(&name(vm), &name("root"), &format!("u-{vm}"))
}

fn record(fixture: &Fixture, of: &VolumeName) -> Option<serde_json::Value> {
    fixture.peek(&keys::disk_key(&of.vm_uid, &of.disk))
}

/// A host that knows the VMs `web` and `copy`, which do not run.
async fn world() -> (Fixture, Arc<AgentParts>) {
    let mut fixture = Fixture::new().await;
    for vm in ["web", "copy"] {
        fixture.vm(vm, "good", json!({"running": false})).await;
    }
    let parts = fixture.start();
    fixture.pass(2).await;
    (fixture, parts)
}

#[tokio::test(start_paused = true)]
async fn a_key_is_made_once_and_stands_sealed() {
    let (fixture, parts) = world().await;
    let of = volume("web");
    assert!(record(&fixture, &of).is_none());
    // Two at once, as two hosts with a replica of it.
    let (one, two) = tokio::join!(key(&parts, &of, Missing::New), key(&parts, &of, Missing::New));
    let (one, two) = (one.unwrap(), two.unwrap());
    assert_eq!(one, two);
    let kept = record(&fixture, &of).unwrap().to_string();
    assert!(kept.contains("sealed:v1:") && !kept.contains(one.expose()), "{kept}");
    // Another daemon, and another host, has the same; whether the disk is there by now or not.
    for missing in [Missing::Refused, Missing::New] {
        assert_eq!(key(&parts, &of, missing).await.unwrap(), one);
    }
    assert_ne!(key(&parts, &volume("copy"), Missing::New).await.unwrap(), one);
}

#[tokio::test(start_paused = true)]
async fn a_disk_that_is_made_from_another_has_its_key() {
    let (fixture, parts) = world().await;
    let (of, copy) = (volume("web"), volume("copy"));
    let none = key(&parts, &copy, Missing::Of(&of)).await.unwrap_err().what;
    assert!(none.contains("is not in the store") && record(&fixture, &copy).is_none(), "{none}");
    let one = key(&parts, &of, Missing::New).await.unwrap();
    assert_eq!(key(&parts, &copy, Missing::Of(&of)).await.unwrap(), one);
    // Sealed for itself: the source may go.
    assert_ne!(record(&fixture, &of), record(&fixture, &copy));
    fixture.delete(&keys::disk_key("u-web", &name("root"))).await;
    assert_eq!(key(&parts, &copy, Missing::Refused).await.unwrap(), one);
}

#[tokio::test(start_paused = true)]
async fn a_key_that_is_gone_or_damaged_is_told_and_no_other_is_made() {
    let (fixture, parts) = world().await;
    let of = volume("web");
    let said = key(&parts, &of, Missing::Refused).await.unwrap_err().what;
    assert!(
        said.contains("nothing was changed in it") && record(&fixture, &of).is_none(),
        "{said}"
    );
    let (mine, other) = (key(&parts, &of, Missing::New).await.unwrap(), volume("copy"));
    key(&parts, &other, Missing::New).await.unwrap();
    let (good, theirs) = (record(&fixture, &of).unwrap(), record(&fixture, &other).unwrap());
    let at = keys::disk_key(&of.vm_uid, &of.disk);
    for bad in [json!({"sealed": "sealed:v1:AAAA"}), json!({"sealed": "x"}), json!(7), theirs] {
        fixture.put(&at, &bad).await;
        for missing in [Missing::New, Missing::Refused, Missing::Of(&other)] {
            let said = key(&parts, &of, missing).await.unwrap_err().what;
            assert!(said.contains("is damaged") && said.contains(&at), "{said}");
        }
        assert_eq!(record(&fixture, &of).unwrap(), bad, "it was written over");
    }
    fixture.put(&at, &good).await;
    assert_eq!(key(&parts, &of, Missing::Refused).await.unwrap(), mine);
}

#[tokio::test(start_paused = true)]
async fn a_vm_that_is_gone_gets_none() {
    let (fixture, parts) = world().await;
    let gone = source(&name("web"), &name("root"), "u-of-before");
    let said = key(&parts, &gone, Missing::New).await.unwrap_err().what;
    assert!(said.contains("is not known any more") && record(&fixture, &gone).is_none(), "{said}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    /// Whoever asks in whatever order, with whatever is the matter: a disk never has a second key.
    #[test]
    fn a_disk_never_has_a_second_key(asked in prop::collection::vec((0..2usize, 0..4u8), 1..12)) {
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = runtime.enable_all().start_paused(true).build().unwrap();
        runtime.block_on(async {
            let (_fixture, parts) = world().await;
            let both = [volume("web"), volume("copy")];
            let mut first: [Option<String>; 2] = [None, None];
            for (which, how) in asked {
                let missing = match how {
                    0 => Missing::Refused,
                    1 => Missing::Of(&both[1 - which]),
                    _ => Missing::New,
                };
                let Ok(now) = key(&parts, &both[which], missing).await else {
                    assert!(first[which].is_none(), "a key that was there is not any more");
                    continue;
                };
                let now = now.expose().to_owned();
                let known = first[which].get_or_insert_with(|| now.clone());
                assert_eq!(*known, now);
            }
        });
    }
}
