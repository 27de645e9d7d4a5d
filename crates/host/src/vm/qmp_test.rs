//! The QMP client against a peer that follows a script.

use super::{
    commands,
    qmp::{Qmp, QmpError},
};
use serde_json::{Value, json};
use std::{sync::Arc, time::Duration};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
};

const SOON: Duration = Duration::from_millis(100);
const LONG: Duration = Duration::from_secs(20);

/// The side of QEMU.
struct Peer {
    read: Lines<BufReader<OwnedReadHalf>>,
    write: OwnedWriteHalf,
}

impl Peer {
    fn new(stream: UnixStream) -> Self {
        let (read, write) = stream.into_split();
        Self { read: BufReader::new(read).lines(), write }
    }
    async fn heard(&mut self) -> Value {
        serde_json::from_str(&self.read.next_line().await.unwrap().unwrap()).unwrap()
    }
    async fn says(&mut self, text: &str) {
        self.write.write_all(text.as_bytes()).await.unwrap();
        self.write.write_all(b"\n").await.unwrap();
    }
    async fn answers(&mut self, to: &Value, with: Value) {
        self.says(&json!({ "return": with, "id": to["id"] }).to_string()).await;
    }
}

async fn meet(offers: Value) -> (Arc<Qmp>, Peer, Value) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut peer = Peer::new(theirs);
    let script = async {
        peer.says(&json!({ "QMP": { "version": {}, "capabilities": offers } }).to_string()).await;
        let asked = peer.heard().await;
        peer.answers(&asked, json!({})).await;
        asked
    };
    let (qmp, asked) = tokio::join!(Qmp::over(ours, LONG), script);
    (qmp.unwrap(), peer, asked)
}

#[tokio::test]
async fn out_of_band_is_asked_for_only_where_it_is_offered() {
    let (qmp, mut peer, asked) = meet(json!(["oob", "a-later-one"])).await;
    assert_eq!(asked["execute"], "qmp_capabilities");
    assert_eq!(asked["arguments"]["enable"], json!(["oob"]));
    let instances = json!({ "instances": [{ "type": "chardev", "id": "x" }] });
    let script = async {
        let asked = peer.heard().await;
        peer.answers(&asked, json!({})).await;
        asked
    };
    let (done, asked) = tokio::join!(qmp.call(&commands::YANK, instances.clone(), LONG), script);
    done.unwrap();
    assert_eq!(asked["exec-oob"], "yank");
    assert_eq!(asked["arguments"], instances);

    let (qmp, mut peer, asked) = meet(json!([])).await;
    assert_eq!(asked["arguments"]["enable"], json!([]));
    let script = async {
        let asked = peer.heard().await;
        peer.answers(&asked, json!({})).await;
        asked
    };
    let (done, asked) = tokio::join!(qmp.call(&commands::YANK, instances, LONG), script);
    done.unwrap();
    assert_eq!(asked["execute"], "yank");
}

#[tokio::test]
async fn answers_find_their_callers_in_any_order() {
    let (qmp, mut peer, _) = meet(json!([])).await;
    let script = async {
        let first = peer.heard().await;
        let second = peer.heard().await;
        for asked in [second, first] {
            peer.answers(&asked, json!({ "for": asked["execute"] })).await;
        }
    };
    let (one, two, ()) = tokio::join!(
        qmp.call(&commands::STATUS, json!({}), LONG),
        qmp.call(&commands::CONTINUE, json!({}), LONG),
        script
    );
    assert_eq!(one.unwrap()["for"], "query-status");
    assert_eq!(two.unwrap()["for"], "cont");
}

#[tokio::test]
async fn what_it_does_not_know_does_no_harm() {
    let (qmp, mut peer, _) = meet(json!(["oob"])).await;
    let mut events = qmp.events();
    let script = async {
        peer.says(r#"{"event": "NEVER_HEARD_OF", "data": {"deep": [1, {"x": null}]}}"#).await;
        peer.says("this is no JSON").await;
        peer.says(r#"{"neither": "fish nor fowl"}"#).await;
        peer.says(r#"{"return": {}, "id": 4711}"#).await;
        peer.says(r#"{"event": "RESET"}"#).await;
        let asked = peer.heard().await;
        peer.answers(&asked, json!({ "status": "running", "running": true, "new": 1 })).await;
    };
    let (answer, ()) = tokio::join!(qmp.call(&commands::STATUS, json!({}), LONG), script);
    assert_eq!(answer.unwrap()["status"], "running");
    assert_eq!(events.recv().await.unwrap()["event"], "NEVER_HEARD_OF");
    assert_eq!(events.recv().await.unwrap()["event"], "RESET");
}

#[tokio::test]
async fn a_refusal_is_told_in_qemus_words() {
    let (qmp, mut peer, _) = meet(json!([])).await;
    let script = async {
        let asked = peer.heard().await;
        let text = json!({ "error": { "class": "GenericError", "desc": "no, not now" }, "id": asked["id"] });
        peer.says(&text.to_string()).await;
    };
    let (answer, ()) = tokio::join!(qmp.call(&commands::RESET, json!({}), LONG), script);
    assert_eq!(answer.unwrap_err().to_string(), "QEMU refused `system_reset`: no, not now");
}

#[tokio::test]
async fn a_call_ends_by_its_deadline_and_the_late_answer_harms_nobody() {
    let (qmp, mut peer, _) = meet(json!([])).await;
    let late = qmp.call(&commands::STATUS, json!({}), SOON).await.unwrap_err();
    assert!(matches!(late, QmpError::Late { .. }), "{late}");
    let script = async {
        let first = peer.heard().await;
        let second = peer.heard().await;
        peer.answers(&first, json!({ "status": "too late" })).await;
        peer.answers(&second, json!({ "status": "running" })).await;
    };
    let (answer, ()) = tokio::join!(qmp.call(&commands::STATUS, json!({}), LONG), script);
    assert_eq!(answer.unwrap()["status"], "running");
}

#[tokio::test]
async fn an_out_of_band_command_overtakes_a_full_queue() {
    let (qmp, mut peer, _) = meet(json!(["oob"])).await;
    for _ in 0..7 {
        assert!(qmp.call(&commands::STATUS, json!({}), Duration::from_millis(20)).await.is_err());
    }
    // QEMU has seven commands and answers none; the eighth must not be sent, or it would stop reading.
    assert!(qmp.call(&commands::STATUS, json!({}), SOON).await.is_err());
    let script = async {
        let mut held = Vec::new();
        loop {
            let asked = peer.heard().await;
            if asked["exec-oob"] == "yank" {
                peer.answers(&asked, json!({})).await;
                return held;
            }
            held.push(asked);
        }
    };
    let (yanked, held) =
        tokio::join!(qmp.call(&commands::YANK, json!({ "instances": [] }), LONG), script);
    yanked.unwrap();
    assert_eq!(held.len(), 7);
    // One answer, though nobody waits for it any more, makes room for one command.
    peer.answers(&held[0], json!({})).await;
    let script = async {
        let asked = peer.heard().await;
        peer.answers(&asked, json!({})).await;
    };
    let (done, ()) = tokio::join!(qmp.call(&commands::CONTINUE, json!({}), LONG), script);
    done.unwrap();
}

#[tokio::test]
async fn a_peer_that_reads_nothing_does_not_hold_a_caller() {
    let (qmp, _peer, _) = meet(json!(["oob"])).await;
    let long = "x".repeat(4 << 20);
    let arguments = json!({ "instances": [{ "type": "chardev", "id": long }] });
    for _ in 0..3 {
        let late = qmp.call(&commands::YANK, arguments.clone(), SOON).await.unwrap_err();
        assert!(matches!(late, QmpError::Late { .. }), "{late}");
    }
}

#[tokio::test]
async fn the_end_of_the_connection_is_told_to_all() {
    let (qmp, mut peer, _) = meet(json!([])).await;
    let mut events = qmp.events();
    let script = async {
        peer.heard().await;
        drop(peer);
    };
    let (answer, ()) = tokio::join!(qmp.call(&commands::STATUS, json!({}), LONG), script);
    assert!(matches!(answer, Err(QmpError::Closed)));
    assert!(events.recv().await.is_err());
    assert!(qmp.is_closed());
    let again = qmp.call(&commands::STATUS, json!({}), LONG).await;
    assert!(matches!(again, Err(QmpError::Closed)));
    assert!(qmp.events().recv().await.is_err());
}

#[tokio::test]
async fn a_stranger_at_the_socket_is_refused() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut peer = Peer::new(theirs);
    let (met, ()) = tokio::join!(Qmp::over(ours, LONG), peer.says("SSH-2.0-OpenSSH_9.9"));
    assert!(matches!(met, Err(QmpError::NotQemu)));
    let (ours, _silent) = UnixStream::pair().unwrap();
    assert!(matches!(Qmp::over(ours, SOON).await, Err(QmpError::Late { .. })));
}
