//! The whole agent of one host over fakes, in virtual time.

use super::fixture::{Fixture, name};
use crate::vm::driver::{Exit, GuestState};
use haven_model::{Bytes, ObjectRef, VmPhase, keys, object::Kind, vm::DiskLimits};
use haven_store::{seal::Plain, testing::Signer};
use serde_json::json;
use std::{sync::atomic::Ordering, time::Duration};

fn key(vm: &str) -> String {
    keys::object(&ObjectRef::new(Kind::Vm, name(vm)))
}

#[tokio::test(start_paused = true)]
async fn old_volumes_are_put_aside_and_never_on_a_doubt() {
    let mut fixture = Fixture::new().await;
    fixture.vm("web", "good", json!({})).await;
    // Of a VM that is gone, of an earlier one of the same name, of one that moved away, of one without a host.
    let [gone, earlier, own] = [
        Fixture::volume("old", "u-old"),
        Fixture::volume("web", "u-earlier"),
        Fixture::volume("web", "u-web"),
    ];
    let [moved, waits] = ["moved", "waits"].map(|vm| Fixture::volume(vm, &format!("u-{vm}")));
    fixture.object(Kind::Vm, "moved", json!({"memory": "64MiB"})).await;
    fixture.place("moved", "good", "host2", 2).await;
    fixture.object(Kind::Vm, "waits", json!({"memory": "64MiB"})).await;
    let all = [&gone, &earlier, &own, &moved, &waits].map(Clone::clone);
    fixture.disks.here.lock().unwrap().extend(all.iter().cloned());
    // A record of a newer version: nothing is known of its uid, so nothing is removed at all.
    fixture.put(&key("newer"), &json!({"version": 2})).await;
    let parts = fixture.start();
    fixture.pass(20).await;
    assert_eq!(*fixture.disks.here.lock().unwrap(), all.iter().cloned().collect());
    let problems = parts.problems.list();
    assert!(problems.iter().any(|p| p.contains("/vm/newer cannot be read")), "{problems:?}");
    fixture.delete(&key("newer")).await;
    fixture.pass(60).await;
    assert_eq!(*fixture.disks.aside.lock().unwrap(), [gone, earlier]);
    assert_eq!(*fixture.disks.here.lock().unwrap(), [own, waits].into_iter().collect());
    assert!(fixture.runs("web"));
    assert_eq!(parts.problems.list(), [""; 0]);
}

#[tokio::test(start_paused = true)]
async fn a_record_that_cannot_be_read_costs_no_volume() {
    let mut fixture = Fixture::new().await;
    fixture.vm("web", "good", json!({})).await;
    fixture.start();
    fixture.pass(5).await;
    let own = Fixture::volume("web", "u-web");
    // To this version it looks as if the VM were gone.
    fixture
        .put(
            &key("web"),
            &json!({"meta": {"name": "web", "uid": "u-web", "generation": 2}, "spec": {"new": 1}}),
        )
        .await;
    fixture.pass(30).await;
    assert!(fixture.disks.here.lock().unwrap().contains(&own));
    assert!(fixture.runs("web"));
    // Nor does it cost the VM when the daemon starts anew and has never read an older one.
    fixture.end().await;
    fixture.start();
    fixture.pass(30).await;
    assert!(fixture.runs("web") && fixture.disks.here.lock().unwrap().contains(&own));
    let told = fixture.told();
    assert!(
        told.iter().any(|p| p.contains("cannot read: 1, the first is spec/vm/web")),
        "{told:?}"
    );
    // Only its end in the store is the end of its volume.
    fixture.put(&key("web"), &json!({"meta": {"name": "web", "uid": "u-web", "generation": 2, "deleting": true}, "spec": {"memory": "64MiB"}})).await;
    fixture.pass(30).await;
    assert!(!fixture.disks.here.lock().unwrap().contains(&own));
}

#[tokio::test(start_paused = true)]
async fn a_network_that_cannot_be_made_holds_up_only_its_own_vms() {
    let mut fixture = Fixture::new().await;
    fixture.wires.bad.lock().unwrap().insert("bad".into());
    fixture.vm("web", "good", json!({})).await;
    fixture.vm("db", "bad", json!({})).await;
    let parts = fixture.start();
    fixture.pass(8).await;
    assert!(fixture.runs("web") && !fixture.runs("db"));
    let said = fixture.status("db").unwrap().message;
    let why = "the network `bad` cannot be made on this host: it needs br9: no such bridge";
    assert_eq!(said, format!("waiting for 5 s: {why}"));
    assert_eq!(parts.problems.list(), ["network bad: it needs br9: no such bridge"]);
    fixture.pass(60).await;
    let tries = *fixture.wires.tries.lock().unwrap();
    assert!((8..30).contains(&tries), "tried {tries} times in 68 s");
    fixture.wires.bad.lock().unwrap().clear();
    fixture.pass(11).await;
    assert!(fixture.runs("db"));
    assert_eq!(parts.problems.list(), [""; 0]);
}

#[tokio::test(start_paused = true)]
async fn records_that_cannot_be_read_hold_up_only_what_is_theirs() {
    let mut fixture = Fixture::new().await;
    let new = json!({"meta": {"name": "new", "uid": "u", "generation": 1}, "spec": {"subnet": 7}});
    fixture.put(&keys::object(&ObjectRef::new(Kind::Network, name("new"))), &new).await;
    fixture.vm("web", "new", json!({})).await;
    fixture.put(&keys::placement(&name("lost")), &json!({"host": 7})).await;
    fixture.start();
    fixture.pass(2).await;
    // What is made from now on is made, and runs.
    fixture.object(Kind::Network, "later", json!({"subnet": "10.3.0.0/24"})).await;
    fixture.vm("db", "later", json!({})).await;
    fixture.pass(5).await;
    assert!(fixture.runs("db") && !fixture.runs("web"));
    let said = fixture.status("web").unwrap().message;
    assert!(said.contains("the record of network `new` cannot be read"), "{said}");
    let (wanted, left_alone) = fixture.wires.last.lock().unwrap().clone();
    assert_eq!(
        wanted.iter().map(|n| n.name.as_str()).collect::<Vec<_>>(),
        ["bad", "good", "later"]
    );
    assert_eq!(left_alone.networks, ["new".to_owned()].into());
    assert_eq!(left_alone.taps, ["hv1n0".to_owned()].into());
    assert_eq!(left_alone.known_slots, Some([1].into()));
    // Once it can be read, its VM starts; what was read before and cannot be read now stays as it was.
    fixture.object(Kind::Network, "new", json!({"subnet": "10.4.0.0/24"})).await;
    fixture.put(&keys::object(&ObjectRef::new(Kind::Network, name("later"))), &new).await;
    fixture.delete(&keys::placement(&name("lost"))).await;
    fixture.pass(31).await;
    assert!(fixture.runs("db") && fixture.runs("web"));
    let (wanted, left_alone) = fixture.wires.last.lock().unwrap().clone();
    assert_eq!(wanted.len(), 4);
    assert!(left_alone.is_empty() && left_alone.taps.is_empty(), "{left_alone:?}");
}

#[tokio::test(start_paused = true)]
async fn an_image_is_copied_ahead_only_where_there_is_room_and_a_vm_gets_it_anyway() {
    let mut fixture = Fixture::new().await;
    fixture.disks.keeps_room.store(true, Ordering::Release);
    fixture.object(Kind::Host, "host1", json!({"address": "10.0.0.1"})).await;
    fixture.put(&keys::lease(&name("host1")), &json!({"session": 1, "count": 1})).await;
    let file = json!({"sha256": "ab", "size": "1MiB"});
    fixture.object(Kind::Image, "tiny", json!({"kernel": file})).await;
    fixture.vm("web", "good", json!({"image": "tiny"})).await;
    let parts = fixture.start();
    fixture.pass(8).await;
    assert!(fixture.runs("web"));
    assert_eq!(parts.problems.list(), ["images: a tenth is kept free"]);
    assert_eq!(fixture.told(), ["images: a tenth is kept free"]);
    fixture.disks.keeps_room.store(false, Ordering::Release);
    fixture.pass(11).await;
    assert_eq!(parts.problems.list(), [""; 0]);
}

#[tokio::test(start_paused = true)]
async fn what_was_changed_is_told_and_taken_up_by_a_reset() {
    let mut fixture = Fixture::new().await;
    fixture.put(&keys::lease(&name("host1")), &json!({"session": 1, "count": 1})).await;
    fixture.vm("web", "good", json!({"restart": "never"})).await;
    let parts = fixture.start();
    fixture.pass(5).await;
    let pending = |parts: &super::AgentParts| parts.live.borrow().pending(&name("web"));
    assert!(fixture.runs("web") && pending(&parts).is_empty());
    let spec = |cpus: u32, resets: u64| {
        json!({"memory": "64MiB", "networks": [{"network": "good"}], "cpus": cpus, "restart": "never",
            "resets": resets, "disks": [{"name": "root", "pool": "fast", "size": "1GiB"}]})
    };
    // A reset of what was not changed keeps its process.
    fixture.object(Kind::Vm, "web", spec(1, 1)).await;
    fixture.pass(5).await;
    assert_eq!(fixture.world.starts()["web"], 1);
    fixture.object(Kind::Vm, "web", spec(2, 1)).await;
    fixture.pass(15).await;
    assert_eq!((fixture.world.starts()["web"], pending(&parts)), (1, vec!["cpus".to_owned()]));
    // The next daemon knows it, too.
    fixture.end().await;
    let parts = fixture.start();
    fixture.pass(5).await;
    assert_eq!(pending(&parts), ["cpus"]);
    fixture.object(Kind::Vm, "web", spec(2, 2)).await;
    fixture.pass(5).await;
    assert!(fixture.runs("web") && pending(&parts).is_empty());
    assert_eq!(fixture.world.starts()["web"], 2);
    // Once stopped, it runs with nothing.
    let mut off = spec(3, 2);
    off["running"] = json!(false);
    fixture.object(Kind::Vm, "web", off).await;
    fixture.pass(15).await;
    assert!(!fixture.runs("web") && fixture.status("web").unwrap().started_with.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_start_on_a_hanging_disk_says_so_and_can_be_given_up() {
    let mut fixture = Fixture::new().await;
    fixture.disks.hangs.store(true, Ordering::Release);
    fixture.vm("web", "good", json!({})).await;
    fixture.start();
    fixture.pass(12).await;
    let status = fixture.status("web").unwrap();
    assert_eq!(status.phase, VmPhase::Starting);
    assert_eq!(status.message, "waiting for 5 s: the disk `root` in the pool `fast`");
    // The session ends and another begins: the start begins anew, within the new one.
    fixture.session.send_modify(|session| session.as_mut().unwrap().number = 2);
    fixture.pass(1).await;
    assert_eq!(fixture.status("web").unwrap().session, 2);
    fixture.disks.hangs.store(false, Ordering::Release);
    // Elsewhere it is wanted, and here no more.
    fixture.place("web", "good", "host2", 2).await;
    fixture.pass(1).await;
    assert_eq!(fixture.world.running().len(), 0);
    // Back here, it starts: nothing of the old start stands in its way.
    fixture.place("web", "good", "host1", 3).await;
    fixture.pass(5).await;
    assert_eq!(fixture.world.running_on("host1"), [("web".to_owned(), 3)]);
}

#[tokio::test(start_paused = true)]
async fn a_vm_waits_for_a_full_pool_and_goes_on_by_itself() {
    let mut fixture = Fixture::new().await;
    let full = "the pool /pools/fast is full (1 MiB free, 1 GiB needed)";
    *fixture.disks.refuses.lock().unwrap() = Some(full.into());
    fixture.vm("web", "good", json!({})).await;
    fixture.start();
    fixture.pass(120).await;
    let status = fixture.status("web").unwrap();
    assert_eq!((status.phase, status.message.as_str()), (VmPhase::Failed, full));
    *fixture.disks.refuses.lock().unwrap() = None;
    fixture.pass(31).await;
    assert!(fixture.runs("web"));
}

#[tokio::test(start_paused = true)]
async fn what_an_earlier_daemon_never_let_run_is_started_anew_and_the_others_are_kept() {
    let mut fixture = Fixture::new().await;
    for vm in ["half", "mute", "silent", "well"] {
        fixture.vm(vm, "good", json!({})).await;
    }
    fixture.start();
    fixture.pass(5).await;
    fixture.end().await;
    // One was in the middle of a start, one does not answer and was in the middle of a start, one only does not answer.
    fixture.world.set_state("host1", "half", GuestState::NotStarted);
    for vm in ["mute", "silent"] {
        fixture.world.set_silent("host1", vm);
    }
    for vm in ["half", "mute"] {
        let mut status = fixture.status(vm).unwrap();
        status.phase = VmPhase::Starting;
        fixture.put(&keys::vm_status(&name(vm)), &serde_json::to_value(status).unwrap()).await;
    }
    let before = fixture.world.starts();
    fixture.start();
    fixture.pass(5).await;
    let new = |vm: &str| fixture.world.starts()[vm] - before[vm];
    assert_eq!(["half", "mute", "silent", "well"].map(new), [1, 0, 0, 0]);
    fixture.pass(20).await;
    assert_eq!(["half", "mute", "silent", "well"].map(new), [1, 1, 0, 0]);
    assert_eq!(fixture.world.running().len(), 4);
    let said = fixture.status("silent").unwrap().message;
    assert!(said.contains("did not answer when this host's daemon started"), "{said}");
}

#[tokio::test(start_paused = true)]
async fn a_silent_guest_starts_anew_only_where_memory_of_it_was_yet_to_come() {
    let mut fixture = Fixture::new().await;
    for vm in ["torn", "whole"] {
        fixture.vm(vm, "good", json!({})).await;
    }
    fixture.start();
    fixture.pass(5).await;
    fixture.end().await;
    for vm in ["torn", "whole"] {
        fixture.world.set_silent("host1", vm);
    }
    fixture.world.set_lacking("host1", "torn");
    let before = fixture.world.starts();
    fixture.start();
    // Its move was settled meanwhile, so nothing in the store says that it was moved.
    fixture.pass(10).await;
    let new = |vm: &str| fixture.world.starts()[vm] - before[vm];
    assert_eq!(["torn", "whole"].map(new), [1, 0]);
    assert!(fixture.runs("torn"));
}

/// A host whose daemon has ended, and where `web` runs and answered its check.
async fn answered() -> Fixture {
    let mut fixture = Fixture::new().await;
    let check = json!({"check": {"mode": "tcp", "port": 80}});
    fixture.vm("web", "good", check).await;
    fixture.answers.0.store(true, Ordering::Release);
    fixture.start();
    fixture.pass(10).await;
    assert_eq!(fixture.status("web").unwrap().ready, Some(true));
    fixture.end().await;
    fixture
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_died_while_no_daemon_looked_is_found_ill() {
    let mut fixture = answered().await;
    fixture.start();
    fixture.pass(1).await;
    assert_eq!(fixture.status("web").unwrap().ready, Some(true), "a new daemon alone is no reason");
    fixture.end().await;
    fixture.answers.0.store(false, Ordering::Release);
    fixture.start();
    fixture.pass(60).await;
    assert_eq!(fixture.status("web").unwrap().ready, Some(false));
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_came_from_elsewhere_is_proven_by_its_first_answer() {
    for (answers, ready) in [(true, true), (false, false)] {
        let mut fixture = answered().await;
        let mut came = serde_json::to_value(fixture.status("web").unwrap()).unwrap();
        assert_eq!(came.get("unproven"), None, "it has answered here");
        came["unproven"] = json!(true);
        fixture.put(&keys::vm_status(&name("web")), &came).await;
        fixture.answers.0.store(answers, Ordering::Release);
        fixture.start();
        fixture.pass(60).await;
        let status = fixture.status("web").unwrap();
        assert_eq!((status.ready, status.unproven), (Some(ready), false));
        fixture.end().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_guest_whose_check_was_taken_away_is_waited_for_by_nobody() {
    let mut fixture = answered().await;
    let mut came = serde_json::to_value(fixture.status("web").unwrap()).unwrap();
    came["unproven"] = json!(true);
    fixture.put(&keys::vm_status(&name("web")), &came).await;
    fixture.vm("web", "good", json!({})).await;
    fixture.answers.0.store(false, Ordering::Release);
    fixture.start();
    fixture.pass(5).await;
    assert!(!fixture.status("web").unwrap().unproven);
    assert!(fixture.runs("web"));
    fixture.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_hangs_is_reset_and_the_second_time_ended_and_told() {
    let mut fixture = Fixture::new().await;
    fixture.vm("web", "good", json!({"hang": {"after": "30s"}})).await;
    fixture.vm("calm", "good", json!({})).await;
    fixture.start();
    fixture.pass(10).await;
    for vm in ["web", "calm"] {
        fixture.world.set_hung("host1", vm);
    }
    fixture.pass(20).await;
    assert_eq!(fixture.world.resets(), [], "it may be busy");
    fixture.pass(20).await;
    assert_eq!(
        fixture.world.resets(),
        [("host1".into(), "web".into())],
        "nobody asked for the other"
    );
    let status = fixture.status("web").unwrap();
    assert_eq!((status.phase, status.hung, status.restarts), (VmPhase::Running, 1, 0));
    // It lives again; the count of before is kept, also by the next daemon.
    fixture.pass(120).await;
    fixture.end().await;
    fixture.start();
    fixture.pass(60).await;
    assert_eq!(fixture.status("web").unwrap().hung, 1);
    fixture.world.set_hung("host1", "web");
    let mut waited = 0;
    while fixture.status("web").unwrap().hung < 2 {
        fixture.pass(1).await;
        waited += 1;
    }
    assert!((25..=36).contains(&waited), "{waited}");
    assert_eq!(fixture.world.resets().len(), 1);
    let status = fixture.status("web").unwrap();
    assert_eq!((status.phase, status.hung, status.idle), (VmPhase::Failed, 2, true));
    assert!(status.message.contains("it hung again: for 30s its guest agent did not answer"));
    // The manager has had its time: it is started here once more.
    fixture.pass(10).await;
    assert!(fixture.runs("web"));
    fixture.pass(120).await;
    assert_eq!(fixture.status("web").unwrap().hung, 1, "it runs well");
    fixture.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_is_stopped_or_whose_qemu_is_silent_does_not_hang() {
    let mut fixture = Fixture::new().await;
    for vm in ["paused", "silent"] {
        fixture.vm(vm, "good", json!({"hang": {"after": "30s"}})).await;
    }
    fixture.start();
    fixture.pass(10).await;
    fixture.world.set_hung("host1", "paused");
    fixture.world.set_state("host1", "paused", GuestState::Paused);
    fixture.world.set_silent("host1", "silent");
    fixture.pass(600).await;
    assert_eq!(fixture.world.resets(), []);
    assert!(fixture.runs("paused") && fixture.runs("silent"));
    fixture.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_vm_that_ended_while_no_daemon_looked_follows_its_restart_policy() {
    let mut fixture = Fixture::new().await;
    for (vm, policy) in [("keep", "always"), ("once", "never")] {
        fixture.vm(vm, "good", json!({"restart": policy})).await;
    }
    fixture.start();
    fixture.pass(5).await;
    assert!(fixture.runs("keep") && fixture.runs("once"));
    fixture.end().await;
    for vm in ["keep", "once"] {
        fixture.world.end("host1", vm, Exit::PoweredOff);
    }
    fixture.start();
    fixture.pass(5).await;
    assert!(fixture.runs("keep") && !fixture.runs("once"));
    assert_eq!(fixture.status("keep").unwrap().restarts, 1);
    assert_eq!(fixture.status("once").unwrap().phase, VmPhase::Stopped);
    // Killed in the middle of a reset that began a new process, the daemon leaves nothing undone; nor is an ended VM
    // that is wanted anew left ended.
    let spec = |resets: u64| {
        json!({"memory": "64MiB", "networks": [{"network": "good"}], "restart": "never",
            "resets": resets, "disks": [{"name": "root", "pool": "fast", "size": "1GiB"}]})
    };
    fixture.object(Kind::Vm, "once", spec(1)).await;
    fixture.pass(5).await;
    assert!(fixture.runs("once"));
    fixture.end().await;
    fixture.object(Kind::Vm, "once", spec(2)).await;
    fixture.world.end("host1", "once", Exit::Crashed);
    fixture.start();
    fixture.pass(5).await;
    assert!(fixture.runs("once"));
    assert_eq!(fixture.status("once").unwrap().resets, 2);
    // After a new session everything was ended from outside: that is not their own end.
    fixture.end().await;
    fixture.world.kill_all("host1");
    fixture
        .put(&keys::vm_status(&name("once")), &{
            let mut status = fixture.status("once").unwrap();
            status.phase = VmPhase::Running;
            serde_json::to_value(status).unwrap()
        })
        .await;
    fixture.session.send_modify(|session| session.as_mut().unwrap().number = 2);
    fixture.start();
    fixture.pass(5).await;
    assert!(fixture.runs("once"));
}

#[tokio::test(start_paused = true)]
async fn failures_are_counted_in_a_row_and_whether_anything_is_left_is_told() {
    let mut fixture = Fixture::new().await;
    fixture.vm("web", "good", json!({})).await;
    fixture.start();
    fixture.pass(3).await;
    assert!(fixture.runs("web") && !fixture.status("web").unwrap().idle);
    for failures in 1..=4 {
        fixture.world.end("host1", "web", Exit::Crashed);
        tokio::time::sleep(Duration::from_millis(50)).await;
        let status = fixture.status("web").unwrap();
        assert_eq!((status.phase, status.failures), (VmPhase::Failed, failures));
        assert!(status.idle, "its process has ended, and its pause is not over");
        fixture.pass(10).await;
        let status = fixture.status("web").unwrap();
        assert_eq!((status.phase, status.failures), (VmPhase::Running, failures));
        assert!(!status.idle);
    }
    // It runs well by then: what was before counts no more.
    fixture.pass(75).await;
    assert_eq!(fixture.status("web").unwrap().failures, 0);
    fixture.world.end("host1", "web", Exit::Crashed);
    fixture.pass(3).await;
    let status = fixture.status("web").unwrap();
    assert_eq!((status.failures, status.restarts), (1, 5));
}

#[tokio::test(start_paused = true)]
async fn a_frontend_without_its_certificate_is_told_and_the_others_are_served() {
    let mut fixture = Fixture::new().await;
    fixture.object(Kind::Host, "host1", json!({"address": "10.0.0.1"})).await;
    let holder = json!({"holder": "host1", "epoch": 1, "candidates": []});
    for (service, address, tls) in
        [("blog", "10.0.0.8", json!(null)), ("shop", "10.0.0.9", json!({"certificate": "shop"}))]
    {
        let frontend = json!({"address": address, "port": 443, "tls": tls});
        let spec =
            json!({"replicas": 0, "template": {"spec": {"memory": "64MiB"}}, "frontend": frontend});
        fixture.object(Kind::Service, service, spec).await;
        fixture.put(&keys::frontend(&name(service)), &holder).await;
    }
    let parts = fixture.start();
    fixture.pass(5).await;
    let served = || {
        let served = fixture.balance.0.lock().unwrap();
        served.iter().map(|frontend| frontend.service.clone()).collect::<Vec<_>>()
    };
    assert_eq!(served(), ["blog"]);
    let told = ["frontend shop: certificate shop: there is no certificate/shop"];
    assert_eq!(parts.problems.list(), told);
    assert_eq!(fixture.told(), told, "it stands in the host's status");
    let signed = Signer::new("Test authority").sign("shop.test", 90);
    let plain = Plain::new(signed.key);
    let key = fixture.secrets.seal(&"certificate/shop".parse().unwrap(), &plain).unwrap();
    fixture.object(Kind::Certificate, "shop", json!({"chain": signed.leaf, "key": key})).await;
    fixture.pass(5).await;
    assert_eq!(served(), ["blog", "shop"]);
    assert_eq!(parts.problems.list(), [""; 0]);
}

/// A VM that is to start on another host: it ends, that is said once, and it starts again only if that is taken back.
#[tokio::test(start_paused = true)]
async fn what_is_to_start_elsewhere_ends_says_so_and_comes_back_when_it_is_taken_back() {
    let mut fixture = Fixture::new().await;
    fixture.vm("db", "good", json!({})).await;
    fixture.put(&keys::lease(&name("host1")), &json!({"session": 1, "count": 1})).await;
    fixture.start();
    fixture.pass(5).await;
    assert!(fixture.runs("db"));
    let read = async |fixture: &Fixture, key: String| {
        let record = fixture.store.get(&key).await.unwrap();
        record.map(|record| (serde_json::from_slice(&record.value).unwrap(), record.mod_revision))
    };
    let placement = keys::placement(&name("db"));
    let (mut moving, _): (serde_json::Value, i64) =
        read(&fixture, placement.clone()).await.unwrap();
    moving["movingTo"] = json!({"host": "host2", "migration": "m1", "restart": true});
    fixture.put(&placement, &moving).await;
    fixture.pass(5).await;
    let (_, attempt) = read(&fixture, placement.clone()).await.unwrap();
    assert!(!fixture.runs("db"));
    let word = keys::migration_status(&name("db"), &name("host1"));
    let (said, first) = read(&fixture, word.clone()).await.unwrap();
    assert_eq!((&said["phase"], &said["attempt"]), (&json!("gone"), &json!(attempt)));
    // A daemon that starts anew neither starts it nor says it again.
    fixture.end().await;
    fixture.start();
    fixture.pass(30).await;
    assert!(!fixture.runs("db"));
    assert_eq!(read(&fixture, word).await.unwrap().1, first);
    moving.as_object_mut().unwrap().remove("movingTo");
    fixture.put(&placement, &moving).await;
    fixture.pass(10).await;
    assert!(fixture.runs("db"), "it was taken back");
}

#[tokio::test(start_paused = true)]
async fn limits_of_a_disk_are_taken_up_at_once_and_by_each_process_anew() {
    let mut fixture = Fixture::new().await;
    let disk = |limits: serde_json::Value| {
        let disk = json!({"name": "root", "pool": "fast", "size": "1GiB", "limits": limits});
        json!({"disks": [disk]})
    };
    fixture.vm("web", "good", disk(json!({"iops": 100}))).await;
    let parts = fixture.start();
    fixture.pass(5).await;
    let told = |fixture: &Fixture| fixture.world.limits("host1", "web", 0);
    assert_eq!(told(&fixture).unwrap().iops, Some(100));
    let runs_since = fixture.status("web").unwrap().started_ms;
    fixture.vm("web", "good", disk(json!({"iops": 200, "bandwidth": "50MiB"}))).await;
    fixture.pass(5).await;
    let now = told(&fixture).unwrap();
    assert_eq!((now.iops, now.bandwidth), (Some(200), Some(Bytes::mib(50))));
    assert!(parts.live.borrow().pending(&name("web")).is_empty(), "it is not for its next start");
    assert_eq!(fixture.status("web").unwrap().started_ms, runs_since);
    fixture.vm("web", "good", disk(json!(null))).await;
    fixture.pass(5).await;
    assert_eq!(told(&fixture), Some(DiskLimits::default()), "none any more");
}
