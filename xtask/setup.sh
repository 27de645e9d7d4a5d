#!/usr/bin/env bash
# Installs what is missing on a Debian 12 or 13 machine, through its own package registries. Sourced by try and check.

say() { printf '\033[1m[%s]\033[0m %s\n' "$(date +%H:%M:%S)" "$*"; }
fail() { printf 'error: %s\n  hint: %s\n' "$1" "$2" >&2; exit 1; }

as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi; }

setup() {
  [ -r /etc/debian_version ] || fail "this is not a Debian system" "use Debian 12 or 13"
  if [ "$(id -u)" != 0 ] && ! sudo -n true 2>/dev/null; then
    fail "namespaces need root" "run this as root, or let sudo work without a password"
  fi
  local wanted=(build-essential cmake pkg-config protobuf-compiler libprotobuf-dev etcd-server etcd-client haproxy nftables
    mmdebstrap busybox-static cpio iproute2 curl kmod xz-utils qemu-utils ca-certificates git)
  local missing=()
  for package in "${wanted[@]}"; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
  done
  if [ ${#missing[@]} -gt 0 ]; then
    say "installing ${missing[*]}"
    as_root apt-get update -qq
    # Only the programs are wanted: no daemon of this machine is started.
    local policy=/usr/sbin/policy-rc.d made=
    [ -e $policy ] || { printf '#!/bin/sh\nexit 101\n' | as_root tee $policy > /dev/null; as_root chmod 755 $policy; made=1; }
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" > /dev/null ||
      { [ -z "$made" ] || as_root rm -f $policy; fail "packages could not be installed" "read the message above"; }
    [ -z "$made" ] || as_root rm -f $policy
  fi
  command -v cargo > /dev/null || [ ! -x "$HOME/.cargo/bin/cargo" ] || export PATH="$HOME/.cargo/bin:$PATH"
  if ! command -v cargo > /dev/null; then
    as_root apt-get install -y -qq --no-install-recommends rustup > /dev/null 2>&1 && rustup toolchain install 1.95.0 ||
      fail "Rust is missing" "install Rust 1.95.0 (on Debian 13: apt install rustup && rustup toolchain install 1.95.0)"
  fi
}
