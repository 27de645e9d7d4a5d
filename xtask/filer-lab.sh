#!/bin/bash
# Real filers for experiments: an NFS server (NFS-Ganesha) in namespace hf-1, and three Gluster servers in hf-1..hf-3; hf-4 is a host
# with clients only. The bridge is in hf-sw, or that of a lab; nothing is attached to the root namespace's network. No systemd.
#   filer-lab.sh up-nfs | up-gluster | down | stop-nfs | start-nfs | away H… | back H… | in N COMMAND… | test
# Needs root, and the packages of xtask/filer-base.sh in the root file system of a Debian 13 that LAB_ROOT names. HAVEN_FILER_LAB sets
# where its state stands. `test` runs the tests of crates/host/src/storage/{nfs,gluster} with them.
set -euo pipefail
here=${HAVEN_FILER_LAB:-/tmp/haven-filer-lab}
lab=$here/lab
# The beginning of the addresses, behind which N comes, and the namespace of an existing bridge br0 to plug into.
net=${HAVEN_FILER_NET:-10.86.8.} switch=${HAVEN_FILER_SWITCH:-}
[ -f "$lab/root" ] && LAB_ROOT=$(cat "$lab/root")
: "${LAB_ROOT:?names the root file system of a Debian 13 with the filers\' programs}"

# Runs a command in namespace N, in the root file system of the lab with /var and /run of its own. The mounts are private to it.
in_ns() {
  local n=$1; shift
  mkdir -p "$lab/h$n"/{run,glusterd,glusterlog,nfs,export,brick}
  exec ip netns exec "hf-$n" unshare -m sh -c '
    root=$1 here=$2 own=$3; shift 3
    mount --make-rprivate /
    mount --bind "$root" "$root"
    mount -t tmpfs tmpfs "$root/tmp"
    mkdir -p "$root/tmp/of"
    mount -t proc proc "$root/proc"; mount --bind /dev "$root/dev"
    mount --bind "$own/run" "$root/run"; mkdir -p "$own/run/gluster" "$own/run/ganesha" "$own/run/rpcbind"
    mount --bind "$own/glusterd" "$root/var/lib/glusterd"; mount --bind "$own/glusterlog" "$root/var/log/glusterfs"
    mount --bind "$own/nfs" "$root/var/lib/nfs"; mkdir -p "$own/nfs/ganesha"
    mount --bind "$here" "$root/tmp/of"
    exec chroot "$root" "$@"' sh "$LAB_ROOT" "$here" "$lab/h$n" "$@"
}
as() { (in_ns "$@"); }
background() { # pid file, output, N, command; exec all the way, so the pid is the daemon's
  local pid=$1 out=$2; shift 2
  (in_ns "$@") </dev/null >>"$out" 2>&1 &
  echo $! > "$pid"
}
until_true() { # seconds, what, command…
  local end=$((SECONDS + $1)) what=$2; shift 2
  until "$@" >/dev/null 2>&1; do
    [ $SECONDS -lt $end ] || { echo "gave up waiting for $what" >&2; exit 1; }
    sleep 0.3
  done
}

network_up() {
  [ ! -e "$lab" ] || { echo "error: it is up, or was not taken down: $0 down" >&2; exit 1; }
  mkdir -p "$lab"
  echo "$LAB_ROOT" > "$lab/root"
  local sw=${switch:-hf-sw} n
  if [ -z "$switch" ]; then
    ip netns add hf-sw
    ip -n hf-sw link add br0 type bridge
    ip -n hf-sw link set br0 up
  fi
  for n in 1 2 3 4; do
    ip netns add hf-$n
    ip -n "$sw" link add f$n type veth peer name eth0 netns hf-$n
    ip -n "$sw" link set f$n master br0 up
    ip -n hf-$n addr add "$net$n/24" dev eth0
    ip -n hf-$n link set eth0 up
    ip -n hf-$n link set lo up
  done
}

ganesha_conf() {
  cat > "$lab/ganesha.conf" <<C
NFS_CORE_PARAM { NFS_Port = 2049; Protocols = 3; MNT_Port = 20048; Enable_NLM = false; Enable_RQUOTA = false; Bind_addr = ${net}1; mount_path_pseudo = false; allow_set_io_flusher_fail = true; }
NFSv4 { Grace_Period = 5; Lease_Lifetime = 5; RecoveryBackend = fs; }
EXPORT { Export_Id = 1; Path = /tmp/of/lab/h1/export; Pseudo = /vm; Access_Type = RW; Squash = No_Root_Squash; SecType = sys; Protocols = 3; FSAL { Name = VFS; } }
EXPORT { Export_Id = 2; Path = /tmp/of/lab/h1/squash; Pseudo = /squash; Access_Type = RW; Squash = Root_Squash; SecType = sys; Protocols = 3; FSAL { Name = VFS; } }
LOG { Default_Log_Level = EVENT; }
C
}

start_nfs() {
  background "$lab/rpcbind.pid" "$lab/rpcbind.out" 1 rpcbind -f -w -h "${net}1"
  sleep 0.5
  background "$lab/ganesha.pid" "$lab/ganesha.out" 1 ganesha.nfsd -F -L /tmp/of/lab/ganesha.log -f /tmp/of/lab/ganesha.conf -p /run/ganesha.pid -N NIV_EVENT
  until_true 30 "an NFS server" as 1 rpcinfo -T tcp "${net}1" 100003 3
  until_true 30 "its mount service" as 1 rpcinfo -T tcp "${net}1" 100005 3
}
stop_nfs() {
  stop "$lab/ganesha.pid" 9
  stop "$lab/rpcbind.pid" 9
}

up_nfs() {
  network_up
  mkdir -p "$lab/h1/export/disks" "$lab/h1/export/full" "$lab/h1/export/closed" "$lab/h1/squash/disks"
  chmod 711 "$lab/h1/export/disks"; chmod 700 "$lab/h1/export/closed"; chmod 777 "$lab/h1/squash/disks"
  echo foreign > "$lab/h1/export/full/foreign"
  ganesha_conf
  start_nfs
}

up_gluster() {
  network_up
  local n
  for n in 1 2 3; do
    mkdir -p "$lab/h$n/glusterd"
    cp -a "$LAB_ROOT/var/lib/glusterd/." "$lab/h$n/glusterd/"
    start_gluster $n
  done
  for n in 1 2 3; do until_true 30 "the Gluster server $n" as $n gluster pool list; done
  as 1 gluster --mode=script peer probe "${net}2"
  as 1 gluster --mode=script peer probe "${net}3"
  until_true 30 "three Gluster servers" sh -c "[ \$('$0' in 1 gluster pool list | grep -c Connected) = 3 ]"
  local brick=/tmp/of/lab
  as 1 gluster --mode=script volume create vm replica 3 "${net}1:$brick/h1/brick/b" "${net}2:$brick/h2/brick/b" "${net}3:$brick/h3/brick/b" force
  as 1 gluster volume set vm group virt
  as 1 gluster volume set vm network.ping-timeout 5
  as 1 gluster volume set vm server.tcp-user-timeout 5
  as 1 gluster volume start vm
  # shellcheck disable=SC2016
  until_true 30 "a volume that is written" as 4 sh -c 'mkdir -p /tmp/m; glusterfs --volfile-server=$0 --volfile-id=vm /tmp/m && mkdir -p /tmp/m/full && echo foreign > /tmp/m/full/foreign; r=$?; umount /tmp/m; exit $r' "${net}1"
}
start_gluster() { background "$lab/h$1/glusterd.pid" "$lab/glusterd.$1.out" "$1" glusterd -N; }

stop() { # pid file, signal
  local pid end=$((SECONDS + 10))
  pid=$(cat "$1" 2>/dev/null) || return 0
  [ -n "$pid" ] && [ -d "/proc/$pid" ] && grep -qa 'ganesha\|rpcbind\|gluster\|netns' "/proc/$pid/cmdline" || return 0
  kill "-$2" "$pid" 2>/dev/null || true
  while [ -d "/proc/$pid" ] && [ $SECONDS -lt $end ]; do sleep 0.1; done
  kill -9 "$pid" 2>/dev/null || true
}
down() {
  local n pid
  stop_nfs
  # Bricks and what heals them are no children of this: whatever runs in these namespaces is of this lab.
  for n in 1 2 3 4; do
    for pid in $(ip netns pids hf-$n 2>/dev/null); do kill -9 "$pid" 2>/dev/null || true; done
  done
  for n in 1 2 3 4; do ip netns del hf-$n 2>/dev/null || true; done
  [ -n "$switch" ] || ip netns del hf-sw 2>/dev/null || true
  rm -rf "$lab"
}

verb=${1-}; shift || true
case $verb in
up-nfs) up_nfs ;;
up-gluster) up_gluster ;;
stop-nfs) stop_nfs ;;
start-nfs) start_nfs ;;
start-gluster) start_gluster "$1" ;;
down) down ;;
# Nothing comes back from the servers to the hosts with these last numbers of their addresses; they see each other.
away) for n in 1 2 3; do for h; do ip -n hf-$n route add blackhole "${net%.*}.$h"; done; done ;;
back) for n in 1 2 3; do for h; do ip -n hf-$n route del blackhole "${net%.*}.$h"; done; done ;;
in) in_ns "$@" ;;
test) # what: nfs or gluster
  cd "$(dirname "$0")/.."
  built=$(cargo test -p haven-host --lib --no-run 2>&1 | sed -n 's/.*(\(target.*\))/\1/p' | head -1)
  cp "$built" "$here/tests"
  in_ns 4 env HAVEN_FILER_TEST="${net}1" HAVEN_FILER_EXPORT=/tmp/of/lab/h1/export /tmp/of/tests "storage::${1:-nfs}" --nocapture --test-threads=1
  ;;
*) sed -n 4p "$0"; exit 2 ;;
esac
