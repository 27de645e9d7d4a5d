//! Brings images to several hosts in the background, one file at a time, so that no recovery waits for a file that
//! stood only on the host that is lost.
//!
//! Which hosts those are follows from the file and the hosts' names alone (the highest of a hash of both), so that all
//! agree without a word, and a host that comes or goes moves few files. A host that starts a VM fetches what it lacks
//! in any case. A copy leaves a tenth of its file system free, which may be the store's too.

use super::{AgentParts, storage::Storage};
use haven_model::{Name, Snapshot, image::ImageFile};
use std::{collections::BTreeSet, sync::Arc, time::Duration};
use tokio_util::sync::CancellationToken;

/// On so many hosts each file stands at least, if there are so many.
pub const COPIES: usize = 3;
/// The pause after a file could not be fetched.
const RETRY: Duration = Duration::from_secs(10);
/// The net under lost wake-ups.
const NET: Duration = Duration::from_secs(60);
/// Under which name this stands among the host's problems.
const PART: &str = "images";

/// Fetches until `cancel`.
pub async fn run(parts: Arc<AgentParts>, cancel: CancellationToken) {
    let mut live = parts.live.clone();
    while !cancel.is_cancelled() {
        let wanted = wanted(&live.borrow_and_update(), &parts.me);
        let pause = bring(&*parts.storage, &parts, &wanted).await;
        let until = parts.clock.now().plus(pause);
        // Most changes are not about images; those cost nothing.
        loop {
            tokio::select! {
                biased;
                () = cancel.cancelled() => return,
                Ok(()) = live.changed() => {
                    if self::wanted(&live.borrow_and_update(), &parts.me) != wanted {
                        break;
                    }
                }
                () = parts.clock.sleep_until(until) => break,
            }
        }
    }
}

/// Fetches what is missing; how long until the next look. A file that cannot be had holds up no other.
async fn bring(storage: &dyn Storage, parts: &AgentParts, wanted: &[ImageFile]) -> Duration {
    let here = if wanted.is_empty() { BTreeSet::new() } else { storage.images().await };
    let mut failed = None;
    for file in wanted.iter().filter(|file| !here.contains(&file.sha256)) {
        failed = storage.copy_image(file).await.err().or(failed);
    }
    if let Some(error) = failed {
        parts.problem(PART, &error);
        return RETRY;
    }
    parts.solved(PART);
    NET
}

/// The files that this host keeps for the cluster, in order.
fn wanted(snapshot: &Snapshot, me: &Name) -> Vec<ImageFile> {
    let images = snapshot.images.values().filter(|image| !image.meta.deleting);
    let mut files: Vec<ImageFile> = images.flat_map(|image| image.spec.files()).cloned().collect();
    files.sort_by(|a, b| a.sha256.cmp(&b.sha256));
    files.dedup();
    files.retain(|file| keepers(snapshot, &file.sha256).contains(&me));
    files
}

/// The hosts that keep a file for the cluster.
fn keepers<'a>(snapshot: &'a Snapshot, sha256: &str) -> Vec<&'a Name> {
    let there = snapshot.hosts.iter().filter(|(name, host)| {
        !host.meta.deleting && !host.spec.witness && snapshot.session_open(name)
    });
    let mut hosts: Vec<&Name> = there.map(|(name, _)| name).collect();
    hosts.sort_by_key(|name| (std::cmp::Reverse(rank(sha256, name.as_str())), *name));
    hosts.truncate(COPIES);
    hosts
}

/// FNV-1a.
fn rank(sha256: &str, host: &str) -> u64 {
    sha256.bytes().chain(host.bytes()).fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::{COPIES, keepers, wanted};
    use haven_model::{Name, Snapshot, keys};
    use serde_json::{Value, json};

    fn put(snapshot: &mut Snapshot, path: &str, value: &Value) {
        snapshot.apply(&format!("{}{path}", keys::ROOT), Some((value.to_string().as_bytes(), 1)));
    }

    fn session(snapshot: &mut Snapshot, host: &str, closed: bool) {
        let lease = json!({"session": 1, "count": 1, "closed": closed});
        put(snapshot, &format!("leases/{host}"), &lease);
    }

    fn object(name: &str, spec: &Value) -> Value {
        json!({"meta": {"name": name, "uid": name, "generation": 1}, "spec": spec})
    }

    #[test]
    fn a_witness_keeps_nothing() {
        let mut snapshot = Snapshot::default();
        for (host, witness) in [("host1", false), ("host2", true)] {
            let spec = json!({"address": "10.0.0.1", "witness": witness});
            put(&mut snapshot, &format!("spec/host/{host}"), &object(host, &spec));
            session(&mut snapshot, host, false);
        }
        assert_eq!(keepers(&snapshot, "0"), [&Name::new("host1").unwrap()]);
    }

    #[test]
    fn every_file_has_three_keepers_and_few_move_when_a_host_is_lost() {
        let mut snapshot = Snapshot::default();
        let hosts: Vec<String> = (1..=8).map(|i| format!("host{i}")).collect();
        for (host, i) in hosts.iter().zip(1..) {
            let spec = object(host, &json!({"address": format!("10.0.0.{i}")}));
            put(&mut snapshot, &format!("spec/host/{host}"), &spec);
            session(&mut snapshot, host, false);
        }
        let files: Vec<String> = (0..100).map(|i| format!("{i:064x}")).collect();
        for file in &files {
            let image = format!("image-{}", &file[60..]);
            let spec = json!({"disk": {"sha256": file, "size": "1MiB"}});
            put(&mut snapshot, &format!("spec/image/{image}"), &object(&image, &spec));
        }
        let names = |snapshot: &Snapshot, file: &str| -> Vec<String> {
            keepers(snapshot, file).into_iter().map(Name::to_string).collect()
        };
        let before: Vec<Vec<String>> = files.iter().map(|file| names(&snapshot, file)).collect();
        assert!(before.iter().all(|hosts| hosts.len() == COPIES));
        let kept = |host: &String| wanted(&snapshot, &Name::new(host).unwrap()).len();
        let kept: Vec<usize> = hosts.iter().map(kept).collect();
        assert_eq!(kept.iter().sum::<usize>(), files.len() * COPIES);
        assert!(kept.iter().all(|count| (15..75).contains(count)), "{kept:?}");
        session(&mut snapshot, "host3", true);
        for (file, before) in files.iter().zip(&before) {
            let now = names(&snapshot, file);
            assert!(now.len() == COPIES && !now.contains(&"host3".to_owned()));
            let left = |host: &&String| *host != "host3";
            let stays = before.iter().filter(left).filter(|host| now.contains(host)).count();
            assert_eq!(
                stays,
                before.iter().filter(left).count(),
                "only the lost host's files move"
            );
        }
    }
}
