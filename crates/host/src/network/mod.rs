//! Networks of this host (DESIGN.md section 8).
//!
//! ```text
//!   guest ── tap hv<slot>n<i> ── bridge hvb<vni> (gateway address, the same on every host)
//!                                     └── hvx<vni>: VXLAN, unicast, entries from the store
//! ```
//!
//! What it promises: guests reach each other across hosts and keep their address wherever they run; a guest cannot
//! send from an address that is not its own; broadcasts never cross hosts, because every host answers ARP from what
//! the store says. Rejected: flooding with learning (a stale entry would send a moved guest's packets to its old
//! host), and Open vSwitch (a second database beside the store).

pub mod address;
pub mod driver;
pub mod fake;
pub mod firewall;
pub mod linux;
pub mod machine;
pub(crate) mod tap;
pub mod uplink;
