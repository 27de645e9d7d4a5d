//! Backups and their targets.

use crate::{Client, ClientError, encode};
use haven_model::{
    api::{Applied, BackupAsked, BackupFiles, BackupList, BackupView, RestoreAsked, VerifyAsked},
    backup::Verification,
};
use tokio::io::AsyncRead;

#[expect(clippy::missing_errors_doc, reason = "all methods fail as ClientError says")]
impl Client {
    /// When VMs are backed up, and how the last backup of each stands.
    pub async fn backups(&self) -> Result<Vec<BackupView>, ClientError> {
        self.get("/v1/backups").await
    }

    /// How the last backup of a VM stands.
    pub async fn backup(&self, vm: &str) -> Result<BackupView, ClientError> {
        self.get(&format!("/v1/vms/{}/backup", encode(vm))).await
    }

    /// Asks for one.
    pub async fn run_backup(
        &self,
        vm: &str,
        asked: &BackupAsked,
    ) -> Result<BackupView, ClientError> {
        let body = serde_json::to_vec(asked).expect("what is asked for is plain data");
        self.call("POST", &format!("/v1/vms/{}/backup", encode(vm)), body).await
    }

    /// Ends one that goes on.
    pub async fn cancel_backup(&self, vm: &str) -> Result<BackupView, ClientError> {
        self.call("DELETE", &format!("/v1/vms/{}/backup", encode(vm)), Vec::new()).await
    }

    /// Makes a target of an empty directory or bucket.
    pub async fn mark_target(&self, target: &str) -> Result<(), ClientError> {
        self.call("POST", &format!("/v1/targets/{}/mark", encode(target)), Vec::new()).await
    }

    /// What a target holds, of one VM or of all.
    pub async fn target_backups(
        &self,
        target: &str,
        vm: Option<&str>,
    ) -> Result<BackupList, ClientError> {
        let of = vm.map_or_else(String::new, |vm| format!("?vm={}", encode(vm)));
        self.get(&format!("/v1/targets/{}/backups{of}", encode(target))).await
    }

    /// What stands at a place of a backup, `DISK[:PARTITION]:/PATH`, or which places there are.
    pub async fn backup_files(
        &self,
        target: &str,
        vm: &str,
        id: &str,
        at: Option<&str>,
    ) -> Result<BackupFiles, ClientError> {
        let (target, vm, id) = (encode(target), encode(vm), encode(id));
        let at = at.map_or_else(String::new, |at| format!("?at={}", encode(at)));
        self.get(&format!("/v1/targets/{target}/backups/{vm}/{id}/files{at}")).await
    }

    /// A file of a backup, as it comes.
    pub async fn backup_file(
        &self,
        target: &str,
        vm: &str,
        id: &str,
        at: &str,
    ) -> Result<impl AsyncRead + Send + Unpin + use<>, ClientError> {
        let (target, vm, id, at) = (encode(target), encode(vm), encode(id), encode(at));
        self.stream(&format!("/v1/targets/{target}/backups/{vm}/{id}/file?at={at}")).await
    }

    /// Removes a backup.
    pub async fn remove_backup(&self, target: &str, vm: &str, id: &str) -> Result<(), ClientError> {
        let (target, vm, id) = (encode(target), encode(vm), encode(id));
        self.call("DELETE", &format!("/v1/targets/{target}/backups/{vm}/{id}"), Vec::new()).await
    }

    /// Asks for backups to be compared with their checksums.
    pub async fn verify_backups(
        &self,
        target: &str,
        asked: &VerifyAsked,
    ) -> Result<Verification, ClientError> {
        let body = serde_json::to_vec(asked).expect("what is asked for is plain data");
        self.call("POST", &format!("/v1/targets/{}/verification", encode(target)), body).await
    }

    /// How that stands.
    pub async fn verification(&self, target: &str) -> Result<Verification, ClientError> {
        self.get(&format!("/v1/targets/{}/verification", encode(target))).await
    }

    /// Ends it.
    pub async fn cancel_verification(&self, target: &str) -> Result<Verification, ClientError> {
        self.call("DELETE", &format!("/v1/targets/{}/verification", encode(target)), Vec::new())
            .await
    }

    /// Makes a VM from a backup.
    pub async fn restore(&self, asked: &RestoreAsked) -> Result<Vec<Applied>, ClientError> {
        let body = serde_json::to_vec(asked).expect("what is asked for is plain data");
        self.call("POST", "/v1/restore", body).await
    }
}
