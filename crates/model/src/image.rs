//! Images: what disks are made from and what small guests boot directly.

use crate::units::Bytes;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A file of an image, kept by its content on every host that needed it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ImageFile {
    /// SHA-256 of the content, lower-case hexadecimal.
    pub sha256: String,
    /// Length of the content.
    pub size: Bytes,
}

/// What an image consists of: a disk, or a kernel to boot directly, or both.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ImageSpec {
    /// The disk, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<ImageFile>,
    /// Format of the disk as QEMU names it: `qcow2`, `raw`, `vmdk`, `vhdx`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<String>,
    /// Kernel for direct boot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<ImageFile>,
    /// Initial file system for direct boot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd: Option<ImageFile>,
    /// Kernel command line for direct boot.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub cmdline: String,
}

impl ImageSpec {
    /// Every file of the image.
    pub fn files(&self) -> impl Iterator<Item = &ImageFile> {
        [&self.disk, &self.kernel, &self.initrd].into_iter().flatten()
    }
}
