//! Service addresses on the hosts' own network: probing, taking, announcing (RFC 5227 and RFC 826).

use super::driver::{LOOK_AGAIN, NetworkError};
use crate::{
    guard::{Guard, GuardError},
    vm::run_dir,
};
use async_trait::async_trait;
use futures::TryStreamExt;
use ipnet::Ipv4Net;
use rtnetlink::{
    Handle,
    packet_route::{
        address::{AddressAttribute, AddressMessage},
        link::LinkAttribute,
    },
};
use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::{IpAddr, Ipv4Addr},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::Mutex;

/// Holds service addresses.
#[async_trait]
pub trait AddressDriver: Send + Sync {
    /// Who answers for an address on the segment, if anybody does.
    async fn probe(&self, ip: Ipv4Addr) -> Result<Option<[u8; 6]>, NetworkError>;
    /// Holds exactly these; announces those that are new. Each fails by itself. Every [`LOOK_AGAIN`] the machine is
    /// compared, and what somebody else removed is set again.
    async fn hold(&self, wanted: &BTreeSet<Ipv4Addr>) -> Result<(), NetworkError>;
    /// Announces again all that are held.
    async fn announce(&self) -> Result<(), NetworkError>;
    /// For exactly these addresses: what belongs to TCP connections that this machine does not know is passed on to the
    /// host behind it, which held the address until now and knows them.
    async fn pass_on(&self, to: &BTreeMap<Ipv4Addr, Ipv4Addr>) -> Result<(), NetworkError>;
}

/// Addresses of this machine.
pub struct LinuxAddress {
    handle: Handle,
    /// What is held, for the daemon that comes after this one.
    file: PathBuf,
    held: Mutex<Option<Held>>,
    look_again: Duration,
    /// What is passed on; not known before the first time.
    passing: Mutex<Option<BTreeMap<Ipv4Addr, Ipv4Addr>>>,
    /// Takes the addresses from this host at its deadline, whatever this daemon does.
    guard: Option<Arc<dyn Guard>>,
}

/// The addresses that this driver holds.
struct Held {
    /// Those that are set, or may be.
    now: BTreeSet<Ipv4Addr>,
    /// What the file says.
    noted: BTreeSet<Ipv4Addr>,
    /// When the machine was last seen to have them all.
    looked: Option<Instant>,
    /// How often the guard had fired then: each time it takes all addresses away.
    fired: u32,
}

/// A network card with an address in the right subnet.
#[derive(Clone, Copy)]
struct Uplink {
    index: u32,
    mac: [u8; 6],
}

fn failed<E: std::fmt::Display>(what: impl Into<String>) -> impl FnOnce(E) -> NetworkError {
    let what = what.into();
    move |error| NetworkError { what, why: error.to_string() }
}

impl LinuxAddress {
    /// For this network namespace; `file` stands on a tmpfs.
    ///
    /// # Errors
    /// When netlink cannot be used.
    pub fn new(file: PathBuf) -> Result<Self, NetworkError> {
        let (connection, handle, _) =
            rtnetlink::new_connection().map_err(failed("netlink cannot be used"))?;
        tokio::spawn(connection);
        let look_again = LOOK_AGAIN;
        let (held, passing) = (Mutex::default(), Mutex::default());
        Ok(Self { handle, file, held, look_again, passing, guard: None })
    }

    /// Under a guard.
    #[must_use]
    pub fn guarded_by(self, guard: Arc<dyn Guard>) -> Self {
        Self { guard: Some(guard), ..self }
    }

    /// Compares the machine with memory after so long, instead of [`LOOK_AGAIN`].
    #[must_use]
    pub fn looking_every(self, look_again: Duration) -> Self {
        Self { look_again, ..self }
    }

    /// The card on which an address is held, and its name.
    async fn uplink(&self, ip: Ipv4Addr) -> Result<(Uplink, String), NetworkError> {
        let list = || failed::<rtnetlink::Error>("addresses cannot be listed");
        let mut addresses = self.handle.address().get().execute();
        while let Some(found) = addresses.try_next().await.map_err(list())? {
            let length = found.header.prefix_len;
            let near = found.attributes.iter().any(|attribute| match attribute {
                AddressAttribute::Local(IpAddr::V4(own)) if length < 32 => {
                    Ipv4Net::new(*own, length).is_ok_and(|net| net.contains(&ip))
                }
                _ => false,
            });
            if !near {
                continue;
            }
            let index = found.header.index;
            let mut links = self.handle.link().get().match_index(index).execute();
            if let Some(link) = links.try_next().await.map_err(list())? {
                let mac = link.attributes.iter().find_map(|attribute| match attribute {
                    LinkAttribute::Address(mac) => <[u8; 6]>::try_from(mac.as_slice()).ok(),
                    _ => None,
                });
                let name = link.attributes.iter().find_map(|attribute| match attribute {
                    LinkAttribute::IfName(name) => Some(name.clone()),
                    _ => None,
                });
                if let (Some(mac), Some(name)) = (mac, name) {
                    return Ok((Uplink { index, mac }, name));
                }
            }
        }
        Err(NetworkError {
            what: format!("the address {ip} cannot be held here"),
            why: "no network card of this host has an address in its subnet".into(),
        })
    }

    /// The single addresses of this machine: those without a subnet, as service addresses are.
    async fn single(&self) -> Result<BTreeMap<Ipv4Addr, Vec<AddressMessage>>, NetworkError> {
        let mut found: BTreeMap<_, Vec<_>> = BTreeMap::new();
        let mut list = self.handle.address().get().execute();
        let failed = || failed::<rtnetlink::Error>("addresses cannot be listed");
        while let Some(message) = list.try_next().await.map_err(failed())? {
            let own = message.attributes.iter().find_map(|attribute| match attribute {
                AddressAttribute::Local(IpAddr::V4(own)) => Some(*own),
                _ => None,
            });
            if let Some(ip) = own.filter(|_| message.header.prefix_len == 32) {
                found.entry(ip).or_default().push(message);
            }
        }
        Ok(found)
    }

    /// Sets an address that the machine does not have; `labels` are those in use.
    async fn add(&self, ip: Ipv4Addr, labels: &mut BTreeSet<String>) -> Result<(), NetworkError> {
        let (uplink, name) = self.uplink(ip).await?;
        let label = free_label(&name, labels);
        let untaken = || format!("the address {ip} cannot be taken");
        // The guard knows it before it is there, so that it never outlives this host's lease.
        self.have_watched(&label).await.map_err(failed(untaken()))?;
        let mut add = self.handle.address().add(uplink.index, IpAddr::V4(ip), 32).replace();
        add.message_mut().attributes.push(AddressAttribute::Label(label.clone()));
        add.execute().await.map_err(failed(untaken()))?;
        // If the deadline passed in between, the guard found nothing to take away.
        if let Err(error) = self.have_watched(&label).await {
            let there = self.single().await?.remove(&ip).unwrap_or_default();
            self.remove(ip, &there).await?;
            return Err(failed(untaken())(error));
        }
        labels.insert(label);
        announce(uplink, ip);
        Ok(())
    }

    /// Puts a label under the guard's watch. A guard that was just replaced is there again in a moment.
    async fn have_watched(&self, label: &str) -> Result<(), GuardError> {
        let Some(guard) = self.guard.as_ref().filter(|_| label.contains(':')) else {
            return Ok(());
        };
        for _ in 0..GUARD_TRIES {
            match guard.hold(label).await {
                Err(GuardError::Gone(_)) => tokio::time::sleep(GUARD_PAUSE).await,
                done => return done,
            }
        }
        guard.hold(label).await
    }

    async fn remove(&self, ip: Ipv4Addr, found: &[AddressMessage]) -> Result<(), NetworkError> {
        for message in found {
            let del = self.handle.address().del(message.clone()).execute().await;
            del.map_err(failed(format!("the address {ip} cannot be given up")))?;
            if let (Some(guard), Some(label)) = (&self.guard, label_of(message))
                && let Err(error) = guard.release(label).await
            {
                // It would take away what is not there.
                tracing::debug!(%error, label, "the guard was not told that the address is gone");
            }
        }
        Ok(())
    }

    /// Notes which addresses may be set, for the daemon that comes after this one.
    fn note(&self, held: &BTreeSet<Ipv4Addr>) -> Result<(), NetworkError> {
        let text = serde_json::to_vec(held).expect("addresses are plain data");
        run_dir::write(&self.file, &text, None)
            .map_err(failed(format!("{} cannot be written", self.file.display())))
    }

    /// Makes the machine hold exactly `wanted`; each address fails by itself.
    async fn change(
        &self,
        held: &mut Held,
        wanted: &BTreeSet<Ipv4Addr>,
    ) -> Result<(), NetworkError> {
        let mut errors = Vec::new();
        // Before any is set: what a daemon sets and does not note, none would ever remove.
        let may_be_set: BTreeSet<Ipv4Addr> = held.now.union(wanted).copied().collect();
        if may_be_set != held.noted {
            match self.note(&may_be_set) {
                Ok(()) => held.noted = may_be_set,
                Err(error) => errors.push(error),
            }
        }
        let single = self.single().await?;
        let mut labels: BTreeSet<String> =
            single.values().flatten().filter_map(label_of).map(str::to_owned).collect();
        let there = |ip: &Ipv4Addr| single.get(ip).map(Vec::as_slice).unwrap_or_default();
        for ip in held.now.clone().difference(wanted) {
            match self.remove(*ip, there(ip)).await {
                Ok(()) => _ = held.now.remove(ip),
                Err(error) => errors.push(error),
            }
        }
        for ip in wanted {
            let known = held.now.contains(ip);
            if known && let Some(message) = there(ip).first() {
                // One that an earlier daemon set is watched already, unless the guard lost its memory.
                let label = label_of(message).filter(|label| label.contains(':'));
                if let Some(label) = label
                    && let Err(error) = self.have_watched(label).await
                {
                    errors.push(failed(format!("the address {ip} is not guarded"))(error));
                }
                continue;
            }
            if known {
                tracing::warn!(%ip, "somebody removed this service address from the host; it is set again");
            }
            match self.add(*ip, &mut labels).await {
                Ok(()) => _ = held.now.insert(*ip),
                Err(error) => errors.push(error),
            }
        }
        if held.now != held.noted {
            match self.note(&held.now) {
                Ok(()) => held.noted.clone_from(&held.now),
                Err(error) => errors.push(error),
            }
        }
        held.looked = errors.is_empty().then(Instant::now);
        NetworkError::all(errors)
    }
}

#[async_trait]
impl AddressDriver for LinuxAddress {
    async fn probe(&self, ip: Ipv4Addr) -> Result<Option<[u8; 6]>, NetworkError> {
        let (uplink, _) = self.uplink(ip).await?;
        let asked = tokio::task::spawn_blocking(move || probe(uplink, ip)).await;
        asked
            .map_err(failed("the probe ended early"))?
            .map_err(failed(format!("nobody can be asked for {ip}")))
    }

    async fn hold(&self, wanted: &BTreeSet<Ipv4Addr>) -> Result<(), NetworkError> {
        let mut held = self.held.lock().await;
        let held = held.get_or_insert_with(|| {
            let text = std::fs::read(&self.file).unwrap_or_default();
            let now: BTreeSet<Ipv4Addr> = serde_json::from_slice(&text).unwrap_or_default();
            Held { noted: now.clone(), now, looked: None, fired: 0 }
        });
        if let Some(guard) = &self.guard
            && let Ok(status) = guard.status().await
            && status.fired != held.fired
        {
            (held.fired, held.looked) = (status.fired, None);
        }
        let looked = held.looked.is_some_and(|at| at.elapsed() < self.look_again);
        if looked && held.now == *wanted {
            return Ok(());
        }
        self.change(held, wanted).await
    }

    async fn announce(&self) -> Result<(), NetworkError> {
        let held = self.held.lock().await.as_ref().map(|held| held.now.clone()).unwrap_or_default();
        let mut errors = Vec::new();
        for ip in held {
            match self.uplink(ip).await {
                Ok((uplink, _)) => announce(uplink, ip),
                Err(error) => errors.push(error),
            }
        }
        NetworkError::all(errors)
    }

    async fn pass_on(&self, to: &BTreeMap<Ipv4Addr, Ipv4Addr>) -> Result<(), NetworkError> {
        let mut passing = self.passing.lock().await;
        if passing.as_ref() != Some(to) {
            super::firewall::load(&super::firewall::passing(to)).await?;
            *passing = Some(to.clone());
        }
        Ok(())
    }
}

/// Questions to a guard that is not there, and the pause between them.
const GUARD_TRIES: u32 = 3;
const GUARD_PAUSE: Duration = Duration::from_millis(100);
/// The longest label that the kernel keeps, bytes.
const LABEL: usize = 15;

fn label_of(message: &AddressMessage) -> Option<&str> {
    message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Label(label) => Some(label.as_str()),
        _ => None,
    })
}

/// A label of a card that no address has. The kernel finds an address by it, and asks that it begin with the card's
/// name; a card whose name leaves no room for one (13 letters or more) gives its own, and its addresses are not guarded.
fn free_label(card: &str, taken: &BTreeSet<String>) -> String {
    let label = (0u32..).map(|n| format!("{card}:h{n}")).find(|label| !taken.contains(label));
    let label = label.unwrap_or_default();
    if label.len() > LABEL { card.to_owned() } else { label }
}

const ARP: u16 = 0x0806;
const REQUEST: u16 = 1;
const REPLY: u16 = 2;

/// An Ethernet frame with an ARP packet.
fn frame(
    op: u16,
    mac: [u8; 6],
    sender: Ipv4Addr,
    target_mac: [u8; 6],
    target: Ipv4Addr,
) -> [u8; 42] {
    let mut frame = [0u8; 42];
    frame[0..6].fill(0xff);
    frame[6..12].copy_from_slice(&mac);
    frame[12..14].copy_from_slice(&ARP.to_be_bytes());
    frame[14..20].copy_from_slice(&[0, 1, 8, 0, 6, 4]);
    frame[20..22].copy_from_slice(&op.to_be_bytes());
    frame[22..28].copy_from_slice(&mac);
    frame[28..32].copy_from_slice(&sender.octets());
    frame[32..38].copy_from_slice(&target_mac);
    frame[38..42].copy_from_slice(&target.octets());
    frame
}

fn open(uplink: Uplink) -> io::Result<OwnedFd> {
    // SAFETY: plain system calls with valid arguments; the descriptor is owned at once, so it is closed in any case.
    unsafe {
        let fd = libc::socket(
            libc::AF_PACKET,
            libc::SOCK_RAW | libc::SOCK_CLOEXEC,
            i32::from(ARP.to_be()),
        );
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        let fd = OwnedFd::from_raw_fd(fd);
        let mut address: libc::sockaddr_ll = std::mem::zeroed();
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = ARP.to_be();
        address.sll_ifindex =
            i32::try_from(uplink.index).map_err(|_| io::ErrorKind::InvalidInput)?;
        let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        if libc::bind(fd.as_raw_fd(), (&raw const address).cast(), length) != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(fd)
    }
}

fn send(fd: &OwnedFd, frame: &[u8]) -> io::Result<()> {
    nix::unistd::write(fd, frame).map(|_| ()).map_err(io::Error::from)
}

/// Says three times that this host has the address now, so that switches and neighbours learn it at once.
fn announce(uplink: Uplink, ip: Ipv4Addr) {
    std::thread::spawn(move || {
        let said = open(uplink).and_then(|fd| {
            for pause in [0, 100, 200] {
                std::thread::sleep(Duration::from_millis(pause));
                send(&fd, &frame(REQUEST, uplink.mac, ip, [0; 6], ip))?;
                send(&fd, &frame(REPLY, uplink.mac, ip, uplink.mac, ip))?;
            }
            Ok(())
        });
        if let Err(error) = said {
            tracing::warn!(%ip, %error, "the address could not be announced");
        }
    });
}

/// Asks three times within 150 ms who has the address.
fn probe(uplink: Uplink, ip: Ipv4Addr) -> io::Result<Option<[u8; 6]>> {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use std::os::fd::AsFd;
    let fd = open(uplink)?;
    for _ in 0..3 {
        send(&fd, &frame(REQUEST, uplink.mac, Ipv4Addr::UNSPECIFIED, [0; 6], ip))?;
        let until = Instant::now() + Duration::from_millis(50);
        while let Some(rest) = until.checked_duration_since(Instant::now()) {
            let timeout = PollTimeout::try_from(rest).unwrap_or(PollTimeout::ZERO);
            let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
            if poll(&mut fds, timeout)? == 0 {
                break;
            }
            let mut packet = [0u8; 128];
            let length = nix::unistd::read(&fd, &mut packet)?;
            if length >= 42 && packet[28..32] == ip.octets() && packet[22..28] != uplink.mac {
                let mut mac = [0; 6];
                mac.copy_from_slice(&packet[22..28]);
                return Ok(Some(mac));
            }
        }
    }
    Ok(None)
}
