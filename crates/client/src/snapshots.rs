//! Snapshots of VMs.

use crate::{Client, ClientError, encode};
use haven_model::api::{Applied, CloneAsked, RevertAsked, SnapshotAsked, SnapshotView};

#[expect(clippy::missing_errors_doc, reason = "all methods fail as ClientError says")]
impl Client {
    /// The snapshots of a VM, older ones first.
    pub async fn snapshots(&self, vm: &str) -> Result<Vec<SnapshotView>, ClientError> {
        self.get(&format!("/v1/vms/{}/snapshots", encode(vm))).await
    }

    /// Asks for one.
    pub async fn take_snapshot(
        &self,
        vm: &str,
        asked: &SnapshotAsked,
    ) -> Result<SnapshotView, ClientError> {
        let body = serde_json::to_vec(asked).expect("what is asked for is plain data");
        self.call("POST", &format!("/v1/vms/{}/snapshots", encode(vm)), body).await
    }

    /// Asks for the disks of a VM to be what they were.
    pub async fn revert(
        &self,
        vm: &str,
        name: &str,
        asked: &RevertAsked,
    ) -> Result<SnapshotView, ClientError> {
        let body = serde_json::to_vec(asked).expect("what is asked for is plain data");
        let path = format!("/v1/vms/{}/snapshots/{}/revert", encode(vm), encode(name));
        self.call("POST", &path, body).await
    }

    /// Makes a VM of another one.
    pub async fn clone_vm(
        &self,
        vm: &str,
        asked: &CloneAsked,
    ) -> Result<Vec<Applied>, ClientError> {
        let body = serde_json::to_vec(asked).expect("what is asked for is plain data");
        self.call("POST", &format!("/v1/vms/{}/clone", encode(vm)), body).await
    }

    /// Asks for one to be removed.
    pub async fn remove_snapshot(&self, vm: &str, name: &str) -> Result<SnapshotView, ClientError> {
        let path = format!("/v1/vms/{}/snapshots/{}", encode(vm), encode(name));
        self.call("DELETE", &path, Vec::new()).await
    }
}
