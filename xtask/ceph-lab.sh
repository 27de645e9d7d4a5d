#!/bin/bash
# A real Ceph for experiments: 3 mons, 1 mgr, 3 OSDs, one set per namespace hx-1..hx-3; hx-4 is a host with clients only.
# The bridge is in hx-sw, or that of a lab; nothing is attached to the root namespace's network. No systemd.
#   ceph-lab.sh up | down | cut N | heal N | in N COMMAND… | test
# Needs root, and ceph-mon, ceph-mgr, ceph-osd, ceph-common and qemu-block-extra on this machine, or in the root file system of a Debian 13
# that LAB_ROOT names. HAVEN_CEPH_LAB sets where its state stands. `test` runs the tests of crates/host/src/storage/rbd with it.
set -euo pipefail
here=${HAVEN_CEPH_LAB:-/tmp/haven-ceph-lab}
lab=$here/lab
# The beginning of the addresses, behind which N comes, and the namespace of an existing bridge br0 to plug into.
net=${HAVEN_CEPH_NET:-10.86.7.} switch=${HAVEN_CEPH_SWITCH:-}
[ -f $lab/root ] && LAB_ROOT=$(cat $lab/root)
LAB_ROOT=${LAB_ROOT-}

# Runs a command in namespace N, in the root file system of the lab. The mounts are private to it.
in_ns() {
  local n=$1; shift
  if [ -z "$LAB_ROOT" ]; then
    exec ip netns exec "hx-$n" env CEPH_CONF=$lab/ceph.conf nice -n 10 "$@"
  fi
  exec ip netns exec "hx-$n" sh -c '
    root=$1 here=$2; shift 2
    mkdir -p "$root$here"
    mount -t proc proc "$root/proc"; mount --bind /dev "$root/dev"; mount --bind "$here" "$root$here"
    exec chroot "$root" env CEPH_CONF='$lab/ceph.conf' nice -n 10 "$@"' sh "$LAB_ROOT" $here "$@"
}
as() { (in_ns "$@"); }
background() { # pid file, then the command; exec all the way, so the pid is the daemon's
  local pid=$1 out=$2; shift 2
  (in_ns "$@") </dev/null >"$out" 2>&1 &
  echo $! > "$pid"
}
since() { echo "$(date +%s.%N) - $t0" | bc | xargs printf '%.1f s'; }
until_true() { # seconds, what, command…
  local end=$((SECONDS + $1)) what=$2; shift 2
  until "$@"; do
    [ $SECONDS -lt $end ] || { echo "gave up waiting for $what" >&2; exit 1; }
    sleep 0.3
  done
}
ceph() { as 1 ceph "$@"; }

network_up() {
  local sw=${switch:-hx-sw}
  if [ -z "$switch" ]; then
    ip netns add hx-sw
    ip -n hx-sw link add br0 type bridge
    ip -n hx-sw link set br0 up
  fi
  for n in 1 2 3 4; do
    ip netns add hx-$n
    ip -n $sw link add p$n type veth peer name eth0 netns hx-$n
    ip -n $sw link set p$n master br0 up
    ip -n hx-$n addr add $net$n/24 dev eth0
    ip -n hx-$n link set eth0 up
    ip -n hx-$n link set lo up
  done
}

configuration() {
  cat > $lab/ceph.conf <<C
[global]
fsid = $1
mon_initial_members = h1,h2,h3
mon_host = [v2:${net}1:3300/0,v1:${net}1:6789/0] [v2:${net}2:3300/0,v1:${net}2:6789/0] [v2:${net}3:3300/0,v1:${net}3:6789/0]
auth_cluster_required = cephx
auth_service_required = cephx
auth_client_required = cephx
auth_allow_insecure_global_id_reclaim = false
public_network = ${net%.*}.0/24
keyring = $lab/\$name.keyring
run_dir = $lab/run
admin_socket = $lab/run/\$name.\$pid.asok
pid_file = $lab/run/\$name.pid
log_file = $lab/run/\$name.log
mon_cluster_log_file = $lab/run/cluster.log
crash_dir = $lab/run
osd_pool_default_size = 3
osd_pool_default_min_size = 2
osd_pool_default_pg_autoscale_mode = off
mon_allow_pool_delete = true
mon_osd_min_down_reporters = 1
mon_data_avail_warn = 2
mon_data_avail_crit = 1
# A lost host is noticed in seconds; the mons use their own value, so it must stand here.
osd_heartbeat_interval = 1
osd_heartbeat_grace = 4
mon_osd_adjust_heartbeat_grace = false
mon_lease = 2
mon_election_timeout = 3
[mon]
mon_data = $lab/\$id/mon
# A wrong path here turns cephx off silently.
keyring = $lab/\$id/mon/keyring
mon_memory_target = 268435456
[mgr]
mgr_data = $lab/\$id/mgr
mgr_initial_modules = iostat
[osd]
osd_data = $lab/h\$id/osd
osd_objectstore = bluestore
bluestore_block_size = 6442450944
bluestore_cache_autotune = false
bluestore_cache_size = 67108864
osd_memory_target = 939524096
osd_op_num_shards = 2
osd_op_num_threads_per_shard = 1
ms_async_op_threads = 2
C
}

prepare_osd() { # number, key, uuid
  printf '[osd.%s]\n\tkey = %s\n' "$1" "$2" > $lab/osd.$1.keyring
  as "$1" ceph-osd -i "$1" --mkfs --osd-uuid "$3" --osd-objectstore bluestore --keyring $lab/osd.$1.keyring \
    >$lab/run/mkfs.$1.out 2>&1
}
start_osd() {
  background $lab/h$1/osd.pid $lab/run/osd.$1.out "$1" ceph-osd -i "$1" -f --public-addr $net$1 --cluster-addr $net$1 \
    --crush-location "host=h$1 root=default"
}
osds_up() { ceph osd stat | grep -q '3 up'; }
clean() { ceph pg stat | grep -qE '^([0-9]+) pgs: \1 active\+clean;'; }

up() {
  [ ! -e $lab ] || { echo "error: it is up, or was not taken down: $0 down" >&2; exit 1; }
  t0=$(date +%s.%N)
  umask 077
  mkdir -p $lab/run
  echo "$LAB_ROOT" > $lab/root
  network_up
  local fsid keys=() uuids=() made=() n
  fsid=$(cat /proc/sys/kernel/random/uuid)
  configuration "$fsid"
  for n in 1 2 3; do mkdir -p $lab/h$n/mon $lab/h$n/osd; done
  mkdir -p $lab/h1/mgr
  # One chroot for all the keys.
  as 1 sh -c "cd $lab
    ceph-authtool --create-keyring mon.keyring --gen-key -n mon. --cap mon 'allow *'
    ceph-authtool --create-keyring client.admin.keyring --gen-key -n client.admin --cap mon 'allow *' --cap osd 'allow *' --cap mgr 'allow *'
    ceph-authtool --create-keyring mgr.h1.keyring --gen-key -n mgr.h1 --cap mon 'allow profile mgr' --cap osd 'allow *'
    ceph-authtool mon.keyring --import-keyring client.admin.keyring
    ceph-authtool mon.keyring --import-keyring mgr.h1.keyring
    for n in 1 2 3; do ceph-authtool --gen-print-key > key.\$n; done
    monmaptool --create --clobber --fsid $fsid --addv h1 '[v2:${net}1:3300,v1:${net}1:6789]' \
      --addv h2 '[v2:${net}2:3300,v1:${net}2:6789]' --addv h3 '[v2:${net}3:3300,v1:${net}3:6789]' monmap" >$lab/run/keys.out
  chmod 600 $lab/*.keyring $lab/key.*
  for n in 1 2 3; do
    as $n ceph-mon --mkfs -i h$n --monmap $lab/monmap --keyring $lab/mon.keyring
    background $lab/h$n/mon.pid $lab/run/mon.$n.out $n ceph-mon -i h$n --public-addr $net$n -f
  done
  ceph --connect-timeout 30 mon stat >/dev/null
  echo "mons: $(since)"
  background $lab/h1/mgr.pid $lab/run/mgr.out 1 ceph-mgr -i h1 -f
  # An OSD can only be made once its key is known to the mons.
  for n in 1 2 3; do
    uuids[n]=$(cat /proc/sys/kernel/random/uuid); keys[n]=$(cat $lab/key.$n)
    echo "{\"cephx_secret\": \"${keys[n]}\"}" | ceph osd new "${uuids[n]}" $n -i - >/dev/null
    prepare_osd $n "${keys[n]}" "${uuids[n]}" &
    made[n]=$!
  done
  for n in 1 2 3; do wait "${made[n]}"; start_osd $n; done
  until_true 60 "three OSDs" osds_up
  echo "osds: $(since)"
  ceph osd pool create vm 16 16 2>/dev/null
  ceph osd pool application enable vm rbd 2>/dev/null
  until_true 60 "clean placement groups" clean
  echo "pool clean: $(since)"
  ceph config set mgr mgr/devicehealth/enable_monitoring false || true
  ceph mgr module disable restful 2>/dev/null || true
  users
  ceph health detail
}

# A user as Haven wants it, one that may do less, and the pool as a test reads it.
users() {
  ceph auth get-or-create client.haven mon 'profile rbd' osd 'profile rbd pool=vm' mgr 'profile rbd pool=vm' >$lab/client.haven.keyring
  ceph auth get-or-create client.poor mon 'allow r' osd 'allow r pool=vm' >$lab/client.poor.keyring
  local key=$(sed -n 's/.*key = //p' $lab/client.haven.keyring) poor=$(sed -n 's/.*key = //p' $lab/client.poor.keyring)
  ceph osd pool create other 1 1 2>/dev/null
  as 1 rbd namespace create vm/one
  printf '{"monitors":["%s1","%s2","%s3"],"user":"haven","key":"%s","pool":"vm"}\n' $net $net $net "$key" >$lab/pool.json
  printf '%s' "$poor" >$lab/poor.key
}

stop() { # pid file
  local pid=$(cat "$1" 2>/dev/null) end=$((SECONDS + 10))
  [ -n "$pid" ] && [ -d /proc/$pid ] && grep -qa '^ceph-\|netns' /proc/$pid/cmdline || return 0
  kill "$pid" 2>/dev/null || true
  while [ -d /proc/$pid ] && [ $SECONDS -lt $end ]; do sleep 0.1; done
  kill -9 "$pid" 2>/dev/null || true
}
down() {
  local file n
  for file in $lab/h*/osd.pid $lab/h*/mgr.pid $lab/h*/mon.pid; do stop "$file" & done
  wait
  for n in 1 2 3 4 sw; do ip netns del hx-$n 2>/dev/null || true; done
  rm -rf $lab
}

verb=${1-}; shift || true
case $verb in
up) up ;;
down) down ;;
cut) ip -n ${switch:-hx-sw} link set p$1 nomaster ;;
heal) ip -n ${switch:-hx-sw} link set p$1 master br0 ;;
in) in_ns "$@" ;;
test)
  cd "$(dirname "$0")/.."
  built=$(cargo test -p haven-host --lib --no-run 2>&1 | sed -n 's/.*(\(target.*\))/\1/p' | head -1)
  # The root file system of the lab may not have this directory.
  cp "$built" $here/tests
  in_ns 4 env HAVEN_RBD_TEST=$lab $here/tests storage::rbd --nocapture --test-threads=1
  ;;
*) sed -n 3p "$0"; exit 2 ;;
esac
