//! Disks of this host that go along with a guest that moves, with QEMU.
//!
//! The taker's QEMU serves its empty disks (NBD) at a socket that only root reaches; the sender's QEMU copies into them,
//! and then whatever its guest writes (a mirror in the background, which no guest waits for). The daemons join the two
//! by mutual TLS. Once the guest is stopped, what is left is sent and flushed; only then may its owner change.
//!
//! After the change the sender's disks are exchanged for those of the taker, before anything else: a sender whose
//! handover breaks runs its guest on by itself for a moment, and what that guest is told to be written must be where its
//! new owner starts it.

use super::{
    commands,
    driver::{VmError, VmLaunch},
    launch::system,
    migration::DisksSent,
    qemu::QemuDriver,
    qmp::{DEADLINE, QmpError},
    run_dir,
};
use haven_model::vm::DiskLimits;
use serde_json::{Value, json};
use std::{path::Path, time::Duration};

/// What a sender's jobs and nodes are called, with the place of their disk.
const OUT: &str = "out-";
/// How long what is left may take once the guest is stopped.
const REST: Duration = Duration::from_secs(5);
/// How long a copy may take to end.
const ENDS: Duration = Duration::from_secs(5);
/// Between two looks.
const LOOK: Duration = Duration::from_millis(5);

/// The name of a disk's device.
pub(super) fn device(place: usize) -> String {
    format!("disk{place}")
}

struct Job {
    id: String,
    status: String,
    error: Option<String>,
    done: u64,
    total: u64,
}

impl Job {
    fn concluded(&self) -> bool {
        self.status == "concluded"
    }
}

/// Reads the answer to [`commands::JOBS`].
fn jobs(answer: &Value) -> Vec<Job> {
    let text = |job: &Value, name: &str| job[name].as_str().map(str::to_owned);
    let all = answer.as_array().into_iter().flatten().map(|job| Job {
        id: text(job, "id").unwrap_or_default(),
        status: text(job, "status").unwrap_or_default(),
        error: text(job, "error"),
        done: job["current-progress"].as_u64().unwrap_or(0),
        total: job["total-progress"].as_u64().unwrap_or(0),
    });
    all.filter(|job| job.id.starts_with(OUT)).collect()
}

/// How far the jobs are; `wanted` is how many there should be.
fn sent(jobs: &[Job], wanted: usize) -> DisksSent {
    let broken = jobs
        .iter()
        .find(|job| job.concluded())
        .map(|job| job.error.clone().unwrap_or_else(|| "the copy was ended".to_owned()));
    let missing = (jobs.len() < wanted).then(|| "QEMU knows of no copy of one".to_owned());
    DisksSent {
        total: jobs.iter().map(|job| job.total).sum(),
        left: jobs.iter().map(|job| job.total.saturating_sub(job.done)).sum(),
        whole: jobs.len() >= wanted && jobs.iter().all(|job| job.status == "ready"),
        broken: broken.or(missing),
    }
}

impl QemuDriver {
    /// Limits a disk; nothing said is no limit.
    pub(super) async fn throttle(
        &self,
        vm: &str,
        place: usize,
        limits: &DiskLimits,
    ) -> Result<(), VmError> {
        // The part of the device that has the disk.
        let at = format!("/machine/peripheral/{}/virtio-backend", device(place));
        let limits = json!({
            "id": at, "iops": limits.iops.unwrap_or(0), "iops_rd": 0, "iops_wr": 0,
            "bps": limits.bandwidth.map_or(0, |bytes| bytes.0), "bps_rd": 0, "bps_wr": 0,
        });
        self.tell(vm, &commands::THROTTLE, limits).await.map(drop)
    }

    /// Lets a process that waits for its guest take the contents of its disks, too.
    pub(super) async fn take_disks(&self, launch: &VmLaunch) -> Result<(), VmError> {
        let places: Vec<usize> = launch.arriving().collect();
        if places.is_empty() {
            return Ok(());
        }
        let vm = launch.vm.as_str();
        let path = self.directory(vm).join(run_dir::DISKS_SOCKET);
        let listener = run_dir::listen(&path)
            .map_err(system(format!("the socket {} cannot be made", path.display())))?;
        let qmp = self.qmp(vm, DEADLINE).await?;
        let name = json!({ "fdname": "disks" });
        qmp.call_with(&commands::TAKE, name, Some(listener), DEADLINE)
            .await
            .map_err(|source| VmError::Qmp { vm: vm.into(), source })?;
        let at = json!({ "addr": { "type": "fd", "data": { "str": "disks" } } });
        self.tell(vm, &commands::SERVE, at).await?;
        for place in places {
            let node = format!("d{place}");
            let export = json!({
                "type": "nbd", "id": format!("in-{node}"), "node-name": node, "name": node, "writable": true,
            });
            self.tell(vm, &commands::EXPORT, export).await?;
        }
        self.takes_disks(vm, Some(path));
        Ok(())
    }

    /// Takes no contents of disks any more, before the guest that came with them runs.
    pub(super) async fn disks_are_here(&self, vm: &str) -> Result<(), VmError> {
        if self.takes_disks(vm, None).is_some() {
            self.tell(vm, &commands::SERVE_NO_MORE, json!({})).await?;
        }
        Ok(())
    }

    pub(super) async fn begin_disks(
        &self,
        vm: &str,
        socket: &Path,
        places: &[usize],
    ) -> Result<(), VmError> {
        // What an earlier attempt has left would be in the way.
        self.drop_disks(vm).await?;
        for place in places {
            let (node, out) = (format!("d{place}"), format!("{OUT}d{place}"));
            let far = json!({
                "driver": "nbd", "node-name": out, "export": node,
                "server": { "type": "unix", "path": socket.display().to_string() },
            });
            self.tell(vm, &commands::ADD_NODE, far).await?;
            let mirror = json!({
                "job-id": out, "device": node, "target": out, "sync": "full", "auto-dismiss": false,
            });
            self.tell(vm, &commands::MIRROR, mirror).await?;
        }
        Ok(())
    }

    async fn disk_jobs(&self, vm: &str) -> Result<Vec<Job>, VmError> {
        Ok(jobs(&self.tell(vm, &commands::JOBS, json!({})).await?))
    }

    pub(super) async fn how_far(&self, vm: &str, wanted: usize) -> Result<DisksSent, VmError> {
        Ok(sent(&self.disk_jobs(vm).await?, wanted))
    }

    /// Waits until all jobs are as wanted, or have failed.
    async fn jobs_until(
        &self,
        vm: &str,
        within: Duration,
        wanted: impl Fn(&Job) -> bool,
    ) -> Result<Vec<Job>, VmError> {
        let until = tokio::time::Instant::now() + within;
        loop {
            let now = self.disk_jobs(vm).await?;
            if now.iter().all(|job| job.concluded() || wanted(job)) {
                return Ok(now);
            }
            if tokio::time::Instant::now() >= until {
                let source = QmpError::Late { command: commands::MIRROR.name().into(), within };
                return Err(VmError::Qmp { vm: vm.into(), source });
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Forgets jobs that have ended; an error of one is told.
    async fn dismiss(&self, vm: &str, ended: Vec<Job>) -> Result<(), VmError> {
        let mut broken = None;
        for job in ended {
            self.tell(vm, &commands::DISMISS, json!({ "id": job.id })).await?;
            broken = broken.or(job.error);
        }
        broken.map_or(Ok(()), |said| {
            let source = QmpError::Refused { command: commands::MIRROR.name().into(), said };
            Err(VmError::Qmp { vm: vm.into(), source })
        })
    }

    /// Ends the copies of disks whose guest is stopped: all that it has written is flushed on the other side.
    pub(super) async fn end_whole(&self, vm: &str) -> Result<(), VmError> {
        for job in self.disk_jobs(vm).await?.iter().filter(|job| !job.concluded()) {
            let end = json!({ "device": job.id, "force": false });
            self.tell(vm, &commands::END_MIRROR, end).await?;
        }
        let ended = self.jobs_until(vm, REST, |_| false).await?;
        self.dismiss(vm, ended).await
    }

    /// Exchanges the disks of a stopped guest for those of the taker, which hold the same.
    pub(super) async fn exchange_disks(&self, vm: &str) -> Result<(), VmError> {
        for out in self.out_nodes(vm).await? {
            let node = out.trim_start_matches(OUT);
            // Nothing is copied: only what is written from now on would be.
            let mirror = json!({
                "job-id": out, "device": node, "target": out, "sync": "none", "auto-dismiss": false,
            });
            self.tell(vm, &commands::MIRROR, mirror).await?;
        }
        let ready = self.jobs_until(vm, REST, |job| job.status == "ready").await?;
        for job in ready.iter().filter(|job| !job.concluded()) {
            self.tell(vm, &commands::COMPLETE, json!({ "id": job.id })).await?;
        }
        let ended = self.jobs_until(vm, REST, |_| false).await?;
        self.dismiss(vm, ended).await
    }

    /// Ends all copies of disks as they are; returns when nothing is left of them.
    pub(super) async fn drop_disks(&self, vm: &str) -> Result<(), VmError> {
        for job in self.disk_jobs(vm).await?.iter().filter(|job| !job.concluded()) {
            let end = json!({ "device": job.id, "force": true });
            self.tell(vm, &commands::END_MIRROR, end).await?;
        }
        let ended = self.jobs_until(vm, ENDS, |_| false).await?;
        // That they are not whole is what was wanted.
        let _ = self.dismiss(vm, ended).await;
        for node in self.out_nodes(vm).await? {
            self.tell(vm, &commands::REMOVE_NODE, json!({ "node-name": node })).await?;
        }
        Ok(())
    }

    /// The nodes by which a sender reaches the taker's disks.
    async fn out_nodes(&self, vm: &str) -> Result<Vec<String>, VmError> {
        let answer = self.tell(vm, &commands::NODES, json!({ "flat": true })).await?;
        let nodes = answer.as_array().into_iter().flatten();
        let names = nodes.filter_map(|node| node["node-name"].as_str());
        Ok(names.filter(|name| name.starts_with(OUT)).map(str::to_owned).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::{jobs, sent};
    use serde_json::json;

    #[test]
    fn what_qemu_says_of_disks_that_go_along_is_read() {
        let job = |id: &str, status: &str, done: u64| json!({ "id": id, "status": status, "current-progress": done, "total-progress": 100 });
        let of = |list: &[serde_json::Value]| sent(&jobs(&json!(list)), 2);
        let both = of(&[
            job("out-d0", "running", 40),
            job("out-d1", "ready", 100),
            job("x", "running", 0),
        ]);
        assert_eq!((both.total, both.left, both.whole), (200, 60, false));
        assert_eq!(both.broken, None);
        assert!(of(&[job("out-d0", "ready", 100), job("out-d1", "ready", 100)]).whole);
        assert!(of(&[job("out-d0", "ready", 100)]).broken.is_some(), "one is gone");
        let mut failed = job("out-d1", "concluded", 50);
        failed["error"] = json!("no space");
        let broken = of(&[job("out-d0", "ready", 100), failed]);
        assert_eq!((broken.broken.as_deref(), broken.whole), (Some("no space"), false));
    }
}
