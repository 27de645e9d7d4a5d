#!/bin/bash
# Builds the root file system of lab hosts and the tiny guest into the directory $1, once.
# Mirror addresses come from this machine's own apt sources. Needs root, mmdebstrap, busybox-static, cpio, kmod.
set -euo pipefail
out=$1
guest_recipe=$2
say() { printf '  %s\n' "$*"; }

mirror() {
  local found
  found=$(grep -rhsE '^(URIs:|deb )' /etc/apt/sources.list /etc/apt/sources.list.d/ |
    grep -oE 'https?://[^ ]+/debian/?( |$)' | head -1 | tr -d ' ' || true)
  [ -n "$found" ] || { echo "no Debian mirror stands in this machine's apt sources; add one" >&2; exit 1; }
  printf '%s' "${found%/}"
}

mirror=$(mirror)
tmp=$out.tmp.$$
trap 'rm -rf "$tmp"' EXIT
mkdir -p "$tmp"
say "building a Debian 13 root file system from $mirror (a few minutes, once)"
cat > "$tmp/preferences" <<'PIN'
Package: *
Pin: release n=trixie-backports
Pin-Priority: 990

Package: linux-image-* src:linux:any src:linux-signed-amd64:any
Pin: release n=trixie-backports
Pin-Priority: -1
PIN
mmdebstrap --variant=minbase --mode=root --quiet \
  --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
  --dpkgopt='path-exclude=/usr/share/locale/*' --aptopt='Apt::Install-Recommends "false"' \
  --setup-hook="mkdir -p \"\$1/etc/apt/preferences.d\" && cp '$tmp/preferences' \"\$1/etc/apt/preferences.d/haven\"" \
  --include=etcd-server,etcd-client,haproxy,nftables,iproute2,iputils-ping,curl,procps,ca-certificates,kmod \
  --include=qemu-system-x86,qemu-utils,linux-image-cloud-amd64,busybox-static \
  trixie "$tmp/root" \
  "deb $mirror trixie main" "deb $mirror trixie-updates main" "deb $mirror trixie-backports main"
rm -rf "$tmp/root/dev"/* "$tmp/root/var/cache/apt"/* "$tmp/root/var/lib/apt/lists"/*
mkdir -p "$tmp/root"/{srv/shared,run,var/lib/haven,var/log/haven}
say "building the tiny guest"
bash "$guest_recipe" "$tmp/root" "$tmp/tiny"
rm -rf "$tmp/root/boot"/* "$tmp/root/lib/modules" "$tmp/root/usr/lib/modules"
rm -rf "$out"
mv "$tmp" "$out"
