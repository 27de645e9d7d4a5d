//! The store against a real etcd.

mod conformance;
mod etcd;
mod live_copy;
mod renewal;
mod room;
