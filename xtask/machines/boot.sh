#!/bin/bash
# Runs in new mount, PID, UTS, IPC and cgroup namespaces: puts the machine $2 together in the directory $1 and becomes
# its systemd. $3 is the Debian tree below it, $4 its address. What a real container manager keeps from a container is
# kept from it too: the parts of /proc and /sys that belong to this whole machine are read only.
set -euo pipefail
machine=$1 name=$2 tree=$3 address=$4
root=$machine/root
mount --make-rprivate /
mkdir -p "$machine/upper" "$machine/work" "$root"
mount -t overlay overlay -o "lowerdir=$tree,upperdir=$machine/upper,workdir=$machine/work" "$root"
mount -t proc proc "$root/proc"
mount --bind "$root/proc/sys" "$root/proc/sys"
mount --bind "$root/proc/sys/net" "$root/proc/sys/net"
mount -o remount,bind,ro "$root/proc/sys"
mount -t sysfs -o ro sysfs "$root/sys"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
mount -t tmpfs -o mode=755 tmpfs "$root/run"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
for device in null zero full random urandom tty kvm net/tun; do
  [ -e "/dev/$device" ] || continue
  mkdir -p "$(dirname "$root/dev/$device")"
  : > "$root/dev/$device"
  mount --bind "/dev/$device" "$root/dev/$device"
done
mkdir "$root/dev/pts" "$root/dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts "$root/dev/pts"
mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
ln -s pts/ptmx "$root/dev/ptmx"
ln -s /proc/self/fd "$root/dev/fd"
: > "$root/dev/console"
hostname "$name"
echo "$name" > "$root/etc/hostname"
echo "127.0.0.1 localhost $name" > "$root/etc/hosts"
sed -i "s/^Address=.*/Address=$address\/24/" "$root/etc/systemd/network/eth0.network"
cd "$root"
mkdir -p .machine
pivot_root . .machine
umount -l /.machine
exec env -i container=haven /lib/systemd/systemd --log-target=console
