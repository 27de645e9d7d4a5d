#!/bin/bash
# Builds the disk image of the scribe: build.sh FILE. Needs binutils.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
as --32 "$here/scribe.S" -o "$tmp/scribe.o"
ld -m elf_i386 -Ttext 0x7c00 --oformat binary -e _start "$tmp/scribe.o" -o "$1"
truncate -s 1M "$1"
