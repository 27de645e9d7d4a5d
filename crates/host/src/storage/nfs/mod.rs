//! Volumes as files of an NFS server (docs/decisions/0029-filers.md).
//!
//! ```text
//!   this daemon ── NFS version 3, as root ──────┐
//!                                               ├──► the server: one directory, a raw file for each disk
//!   QEMU ── libnfs, as the owner of the file ───┘    its owner: a number that each start draws anew
//! ```
//!
//! QEMU holds no lock over NFS. What is there in its place is the owner of the file: before each start it becomes a number that
//! nobody had, and the new process alone says that it is that one. The server looks at each write who says to write (RFC 1813 has no
//! open files), so whatever an earlier process sent, and whenever it arrives, is refused from then on. A guest that moves live keeps
//! the number, for both processes have the file open then.
//!
//! That is no proof that a host is lost: a server that has a write in its hands may carry it out yet. The proof of the host is what
//! counts, as for a `shared` pool.

pub mod directory;
pub mod node;
pub mod volumes;

#[cfg(test)]
mod nfs_test;
