//! Manifests (written next).
