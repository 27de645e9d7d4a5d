#!/bin/bash
# Makes the root file system of lab hosts that use filers: a copy of the lab's, with NFS-Ganesha, Gluster and QEMU's driver for NFS, from the
# same sources. It stands beside the lab's own, which is left as it is, and is made anew only when that was. Needs root.
#   filer-base.sh    prints the directory that is to be HAVEN_LAB_CACHE; `skipped: needs nfs-ganesha and glusterfs-server` when the packages cannot be had
set -euo pipefail
cache=${HAVEN_LAB_CACHE:-/var/cache/haven-lab}
base=$cache/base out=$cache/filers
packages='qemu-block-extra nfs-ganesha nfs-ganesha-vfs rpcbind glusterfs-server glusterfs-client attr'
[ -d "$base/root" ] || { echo "skipped: needs nfs-ganesha and glusterfs-server (and $base/root first: run a lab once)" >&2; exit 3; }
wanted=$(cat "$base/recipe"; echo "$packages")
if [ "$(cat "$out/made-of" 2>/dev/null)" != "$wanted" ]; then
  tmp=$out.tmp.$$ root=$out.tmp.$$/base/root
  trap 'umount -l "$root/proc" 2>/dev/null || true; rm -rf "$tmp"' EXIT
  mkdir -p "$tmp"
  cp -a --reflink=auto "$base" "$tmp/base"
  cp /etc/resolv.conf "$root/etc/resolv.conf"
  for file in /etc/apt/apt.conf.d/*proxy*; do [ ! -e "$file" ] || cp "$file" "$root/etc/apt/apt.conf.d/"; done
  printf '#!/bin/sh\nexit 101\n' > "$root/usr/sbin/policy-rc.d"
  chmod 755 "$root/usr/sbin/policy-rc.d"
  mkdir -p "$root/dev" && mknod -m 666 "$root/dev/null" c 1 3 && mknod -m 666 "$root/dev/urandom" c 1 9
  mount -t proc proc "$root/proc"
  inside() { chroot "$root" env DEBIAN_FRONTEND=noninteractive LC_ALL=C "$@"; }
  # shellcheck disable=SC2086
  inside apt-get update -qq >&2 &&
    inside apt-get install -y -qq --no-install-recommends -o Dpkg::Options::=--force-unsafe-io \
      -o Dpkg::Options::=--path-exclude='/usr/share/doc/*' -o Dpkg::Options::=--path-exclude='/usr/share/man/*' $packages >"$tmp/apt.log" 2>&1 ||
    { tail -3 "$tmp/apt.log" >&2 || true; echo "skipped: needs nfs-ganesha and glusterfs-server (its packages cannot be had here)" >&2; exit 3; }
  umount "$root/proc"
  rm -rf "$root/dev"/* "$root/var/cache/apt"/* "$root/var/lib/apt/lists"/* "$root/usr/sbin/policy-rc.d" "$root/boot"/*
  rm -f "$root/etc/resolv.conf"
  [ ! -e "$base/root/etc/resolv.conf" ] || cp -a "$base/root/etc/resolv.conf" "$root/etc/resolv.conf"
  printf '%s\n' "$wanted" > "$tmp/made-of"
  rm -rf "$out"
  mv "$tmp" "$out"
  trap - EXIT
fi
echo "$out"
