#!/bin/bash
# Builds into the directory $1, once: `root`, a Debian 13 server with systemd, and `tiny`, the guest that the recipe $2
# makes of it. Mirror addresses come from this machine's own apt sources. What the package needs is fetched beforehand,
# so that the machines install it without a network. Needs root, mmdebstrap, cpio.
set -euo pipefail
out=$1 guest_recipe=$2

mirror() {
  local found
  found=$(grep -rhsE '^(URIs:|deb )' /etc/apt/sources.list /etc/apt/sources.list.d/ |
    grep -oE 'https?://[^ ]+/debian/?( |$)' | head -1 | tr -d ' ' || true)
  [ -n "$found" ] || { echo "no Debian mirror stands in this machine's apt sources; add one" >&2; exit 1; }
  printf '%s' "${found%/}"
}

mirror=$(mirror)
tmp=$out.tmp.$$
trap 'umount "$tmp/root/proc" 2> /dev/null || true; rm -rf "$tmp"' EXIT
mkdir -p "$tmp"
mmdebstrap --variant=minbase --mode=root --quiet --dpkgopt=force-unsafe-io \
  --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
  --aptopt='Acquire::Languages "none"' \
  --include=systemd,systemd-sysv,dbus,iproute2,iputils-ping,procps,curl,ca-certificates \
  --include=linux-image-cloud-amd64,busybox-static,kmod \
  trixie "$tmp/root" "deb $mirror trixie main" "deb $mirror trixie-updates main"
bash "$guest_recipe" "$tmp/root" "$tmp/tiny"
cp /etc/resolv.conf "$tmp/root/etc/resolv.conf"
mount -t proc proc "$tmp/root/proc"
chroot "$tmp/root" apt-get -qq update
# With what they recommend, as a person installs them.
chroot "$tmp/root" apt-get -qq install --download-only \
  etcd-server haproxy iproute2 nftables openssl qemu-system-x86 qemu-utils > /dev/null
umount "$tmp/root/proc"
rm -f "$tmp/root/etc/resolv.conf"
cat > "$tmp/root/etc/systemd/network/eth0.network" <<'NETWORK'
[Match]
Name=eth0
[Network]
Address=ADDRESS/24
Gateway=10.88.0.254
LinkLocalAddressing=no
NETWORK
# No module is loaded, no terminal is there, and nothing else may hold apt's lock.
chroot "$tmp/root" systemctl -q mask systemd-modules-load.service console-getty.service apt-daily.timer apt-daily-upgrade.timer
chroot "$tmp/root" systemctl -q enable systemd-networkd.service
rm -rf "$out"
mv "$tmp" "$out"
