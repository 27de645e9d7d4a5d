//! Mirrored disks for the simulator.

use super::{
    driver::VmError,
    fake::FakeVmDriver,
    mirrors::{DiskMirror, Mirrors, ReplicaAt},
};
use async_trait::async_trait;
use haven_model::Name;
use std::collections::BTreeSet;

#[async_trait]
impl Mirrors for FakeVmDriver {
    async fn mirror(
        &self,
        _vm: &str,
        _place: usize,
        _hosts: &BTreeSet<Name>,
    ) -> Result<DiskMirror, VmError> {
        Ok(DiskMirror::default())
    }
    async fn cut(&self, _vm: &str, _place: usize, _host: &Name) -> Result<(), VmError> {
        Ok(())
    }
    async fn note(&self, _vm: &str, _place: usize, _host: &Name) -> Result<(), VmError> {
        Ok(())
    }
    async fn leave_out(&self, _vm: &str, _place: usize, _host: &Name) -> Result<(), VmError> {
        Ok(())
    }
    async fn take_in(&self, _vm: &str, _place: usize, _at: &ReplicaAt) -> Result<(), VmError> {
        Ok(())
    }
    async fn flush_copy(&self, _vm: &str, _place: usize, _host: &Name) -> Result<(), VmError> {
        Ok(())
    }
    async fn settle(&self, _vm: &str, _place: usize, _host: &Name) -> Result<(), VmError> {
        Ok(())
    }
    async fn go_on(&self, _vm: &str) -> Result<(), VmError> {
        Ok(())
    }
    fn ended_whole(&self, _vm: &str, _epoch: u64) -> bool {
        false
    }
    async fn is_stopped(&self, _vm: &str) -> Result<bool, VmError> {
        Ok(false)
    }
}
