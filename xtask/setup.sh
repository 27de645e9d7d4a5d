#!/usr/bin/env bash
# Installs what is missing on a Debian 12 or 13 machine, through its own package registries. Sourced by try and check.

say() { printf '\033[1m[%s]\033[0m %s\n' "$(date +%H:%M:%S)" "$*"; }
fail() { printf 'error: %s\n  hint: %s\n' "$1" "$2" >&2; exit 1; }

as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi; }

updated=
# Installs packages. Only their programs are wanted: no daemon of this machine is started.
install_packages() {
  local policy=/usr/sbin/policy-rc.d made= code=0
  say "installing $*"
  [ -n "$updated" ] || as_root apt-get update -qq || return 1
  updated=1
  [ -e $policy ] || { printf '#!/bin/sh\nexit 101\n' | as_root tee $policy > /dev/null; as_root chmod 755 $policy; made=1; }
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" > /dev/null || code=1
  [ -z "$made" ] || as_root rm -f $policy
  return $code
}

candidate() { apt-cache policy "$1" 2> /dev/null | grep -qE 'Candidate: [0-9]'; }

# Rust by rustup where Debian has it (13); Debian 12 has a recent compiler in its security updates, made for browsers.
rust() {
  local version hint="install Rust 1.95 or later (https://www.rust-lang.org/tools/install), then type this again"
  command -v cargo > /dev/null || [ ! -x "$HOME/.cargo/bin/cargo" ] || export PATH="$HOME/.cargo/bin:$PATH"
  if ! command -v cargo > /dev/null; then
    [ -n "$updated" ] || { as_root apt-get update -qq && updated=1; }
    if candidate rustup; then
      { install_packages rustup && rustup toolchain install 1.95.0; } || fail "Rust cannot be installed" "$hint"
    elif candidate rustc-web; then
      install_packages cargo-web rustc-web rustfmt-web rust-web-clippy || fail "Rust cannot be installed" "$hint"
    else
      fail "Rust is missing, and this Debian has neither rustup nor rustc-web" "$hint"
    fi
  fi
  version=$(rustc --version | grep -oE '[0-9]+\.[0-9]+' | head -1)
  [ "$(printf '1.95\n%s\n' "$version" | sort -V | head -1)" = 1.95 ] ||
    fail "this machine's Rust is $version and Haven needs 1.95" "$hint"
}

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
  [ ${#missing[@]} -eq 0 ] || install_packages "${missing[@]}" || fail "packages could not be installed" "read the message above"
  rust
}

# Installs programs of Python's registry in a place of their own, by this machine's own settings of pip; half of one must not
# look like all of it.
in_venv() {
  local venv=$HOME/.cache/haven/$1 program=$2
  shift 2
  [ ! -x "$venv/bin/$program" ] || return 0
  say "installing $program into $venv"
  rm -rf "$venv" && python3 -m venv "$venv" 2> /dev/null ||
    { install_packages python3-venv && rm -rf "$venv" && python3 -m venv "$venv"; } &&
    "$venv/bin/pip" install --quiet "$@" || { rm -rf "$venv"; return 1; }
}

# What only some tests need: programs of others that parts of Haven are tried against. Where one cannot be had, its
# test says `skipped: needs`.
test_programs() {
  local agents=fence-agents package missing=()
  candidate fence-agents-ipmilan && agents=fence-agents-ipmilan
  for package in "$agents" openipmi ipmitool qemu-guest-agent libfaketime; do
    dpkg-query -W -f='${Status}' "$package" 2> /dev/null | grep -q 'ok installed' || missing+=("$package")
  done
  [ ${#missing[@]} -eq 0 ] || install_packages "${missing[@]}" || say "the tests of fence agents, of the guest agent and of clocks that jump will be skipped"
  in_venv sushy-tools sushy-emulator sushy-tools || say "the test of Redfish will be skipped"
  # A server that speaks S3; its extra `server` brings twice as much that is not needed here.
  in_venv moto moto_server moto flask flask-cors PyYAML py-partiql-parser || say "the test of buckets will be skipped"
}
