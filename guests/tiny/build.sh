#!/bin/bash
# Builds the tiny guest: Debian's cloud kernel ($2/vmlinuz) and a busybox initramfs ($2/initrd) from the root file
# system $1, which has the packages linux-image-cloud-amd64, kmod and busybox-static.
set -euo pipefail
root=$1 out=$2
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$out/tree"/{bin,dev,proc,sys,seed,www/cgi-bin,lib/modules,etc}
cp "$root"/boot/vmlinuz-* "$out/vmlinuz"
version=$(ls "$root/usr/lib/modules" | head -1)
cp "$root/usr/bin/busybox" "$out/tree/bin/busybox"
for module in virtio_pci virtio_net virtio_blk virtio_console virtio_rng vfat nls_cp437 nls_ascii nls_iso8859-1 nls_utf8 button evdev; do
  chroot "$root" /sbin/modprobe --show-depends -S "$version" "$module" 2>/dev/null || true
done | awk '/insmod/ {print $2}' | awk '!seen[$0]++' > "$out/modules"
: > "$out/tree/modules"
while read -r module; do
  name=$(basename "$module")
  case $name in
    *.xz) xz -dc "$root$module" > "$out/tree/lib/modules/${name%.xz}"; name=${name%.xz} ;;
    *) cp "$root$module" "$out/tree/lib/modules/" ;;
  esac
  echo "/lib/modules/$name" >> "$out/tree/modules"
done < "$out/modules"
cp "$here/init" "$out/tree/init"
cp "$here/whoami" "$out/tree/www/cgi-bin/whoami"
chmod +x "$out/tree/init" "$out/tree/www/cgi-bin/whoami"
(cd "$out/tree" && find . | cpio -o -H newc --quiet | gzip -1) > "$out/initrd"
rm -rf "$out/tree" "$out/modules"
