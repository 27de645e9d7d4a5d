//! Taps: persistent network cards that a QEMU without rights may use.

use std::{fs::File, io, os::fd::AsRawFd};

/// Makes a persistent tap that belongs to a unix user; fine when it exists.
pub fn create(name: &str, owner_uid: u32) -> io::Result<()> {
    let file = File::options().read(true).write(true).open("/dev/net/tun")?;
    // SAFETY: a zeroed ifreq is valid; the name is cut to its field and ends with zero; the ioctls only read it.
    unsafe {
        let mut request: libc::ifreq = std::mem::zeroed();
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes().take(15)) {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as i16;
        let fd = file.as_raw_fd();
        if libc::ioctl(fd, libc::TUNSETIFF as _, &raw mut request) != 0
            || libc::ioctl(fd, libc::TUNSETOWNER as _, libc::c_ulong::from(owner_uid)) != 0
            || libc::ioctl(fd, libc::TUNSETPERSIST as _, 1 as libc::c_ulong) != 0
        {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// How many packets came out of a tap so far: those that its guest has sent.
pub fn sent_by_guest(name: &str) -> io::Result<u64> {
    let text = std::fs::read_to_string(format!("/sys/class/net/{name}/statistics/rx_packets"))?;
    text.trim().parse().map_err(|_| io::ErrorKind::InvalidData.into())
}

/// Sets a card up.
pub fn set_up(name: &str) -> io::Result<()> {
    // SAFETY: a zeroed ifreq is valid; the name is cut to its field and ends with zero; the ioctls read and write only
    // it; the socket is closed.
    unsafe {
        let fd = libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        let mut request: libc::ifreq = std::mem::zeroed();
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes().take(15)) {
            *to = from as libc::c_char;
        }
        let mut done = libc::ioctl(fd, libc::SIOCGIFFLAGS, &raw mut request);
        if done == 0 {
            request.ifr_ifru.ifru_flags |= libc::IFF_UP as i16;
            done = libc::ioctl(fd, libc::SIOCSIFFLAGS, &raw mut request);
        }
        let error = io::Error::last_os_error();
        libc::close(fd);
        if done == 0 { Ok(()) } else { Err(error) }
    }
}
