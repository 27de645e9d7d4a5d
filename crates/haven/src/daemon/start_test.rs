//! Tests of [`super::start`].

use super::start::{Port, in_background, loaded, next, number, opened};
use haven_host::agent::{HostFacts, Problems};
use haven_model::{Snapshot, keys};
use std::{sync::Arc, time::Duration};
use tokio::{net::TcpListener, sync::watch};

#[tokio::test]
async fn a_look_that_takes_long_keeps_nobody_waiting_and_is_shown_at_its_end() {
    let (finish, finished) = std::sync::mpsc::channel();
    let mut facts = in_background(move || {
        finished.recv_timeout(Duration::from_secs(10)).unwrap();
        HostFacts { kvm: true, ..HostFacts::default() }
    });
    assert!(facts.borrow().is_none());
    finish.send(()).unwrap();
    let shown = facts.wait_for(Option::is_some).await.unwrap();
    assert!(shown.as_ref().unwrap().kvm);
}

#[tokio::test(start_paused = true)]
async fn the_lease_waits_for_the_clusters_timers() {
    let (out, live) = watch::channel(Arc::new(Snapshot::default()));
    let mut waiting = tokio::spawn(loaded(live));
    assert!(tokio::time::timeout(Duration::from_secs(60), &mut waiting).await.is_err());
    out.send_replace(Arc::new(Snapshot { revision: 1, ..Snapshot::default() }));
    let long = Duration::from_secs(60);
    assert!(
        tokio::time::timeout(long, &mut waiting).await.is_err(),
        "a spec that cannot be read has timers that nobody knows"
    );
    let mut read = Snapshot { revision: 2, ..Snapshot::default() };
    read.apply(keys::CLUSTER, Some((br#"{"name": "c"}"#, 2)));
    out.send_replace(Arc::new(read));
    waiting.await.unwrap().unwrap();
}

#[tokio::test]
async fn the_first_number_grows_also_when_the_clock_goes_back() {
    let directory = tempfile::tempdir().unwrap();
    let state = || directory.path().to_owned();
    let year_ms = 1_000 * 86_400 * 365;
    let first = number(state(), 50 * year_ms).await;
    let beats = 10_000_000_000;
    let back = number(state(), year_ms).await;
    assert!(back > first + beats, "{back} after {first}");
    let again = number(state(), year_ms).await;
    assert!(again > back + beats, "{again} after {back}");
    let forward = number(state(), 51 * year_ms).await;
    assert!(forward > again + beats, "{forward} after {again}");
}

#[test]
fn a_damaged_number_does_not_keep_a_daemon_from_starting() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("heartbeat.start");
    std::fs::write(&path, "\0\0").unwrap();
    assert_eq!(next(&path, 7 << 40).unwrap(), 7 << 40);
    assert_eq!(std::fs::read_to_string(&path).unwrap(), (7_u64 << 40).to_string());
}

#[tokio::test]
async fn a_port_in_use_is_told_and_taken_once_it_is_free() {
    let problems = Arc::new(Problems::default());
    let other = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = other.local_addr().unwrap();
    let told = Arc::clone(&problems);
    let listening =
        tokio::spawn(async move { opened(Port::api(address), &told, TcpListener::bind).await });
    let until = std::time::Instant::now() + Duration::from_secs(5);
    while problems.list().is_empty() {
        assert!(std::time::Instant::now() < until, "nothing is told");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let said = problems.list().join("");
    assert!(said.contains(&format!("another program has the port {}", address.port())), "{said}");
    assert!(said.contains("ss -ltnp"), "{said}");
    drop(other);
    let listener = tokio::time::timeout(Duration::from_secs(5), listening).await.unwrap().unwrap();
    assert_eq!(listener.local_addr().unwrap(), address);
    assert_eq!(problems.list(), [""; 0]);
}
