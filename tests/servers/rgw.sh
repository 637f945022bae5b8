#!/usr/bin/env bash
# A Ceph RGW of one node for tests: monitor, OSD that keeps its objects in memory, S3 gateway; loopback only, no root.
#   rgw.sh up DIR PORT MON_PORT OWNER_PID   starts all three and makes the user testkey / testsecret123; DIR is made
#                                 anew; what is still running when the process OWNER_PID is gone is ended
#   rgw.sh gateway DIR PORT       starts the gateway again, after it was killed
#   rgw.sh down DIR               ends them by the pids noted in DIR, and removes DIR
# Needs, on Debian and Ubuntu: apt-get install --no-install-recommends radosgw ceph-mon ceph-osd ceph-common curl
set -euo pipefail
command=$1 dir=$2 port=${3:-} mon_port=${4:-} owner=${5:-}
export CEPH_CONF=$dir/ceph.conf CEPH_ARGS=

wait_for() {  # SECONDS COMMAND...: until the command succeeds
    local tries=$(($1 * 5)); shift
    for ((i = 0; i < tries; i++)); do
        "$@" && return
        [[ -d $dir ]] || break  # `down` came in between
        sleep 0.2
    done
    echo "error: timed out waiting for: $*; the logs are in $dir/log" >&2
    return 1
}
is_up() { timeout 5 ceph osd stat 2>/dev/null | grep -q '1 up'; }
answers() { curl -s -o /dev/null "http://127.0.0.1:$port/"; }
start() {  # NAME COMMAND...: in a session of its own, so that a Ctrl-C of the tests leaves it to `down`
    local name=$1; shift
    setsid nohup "$@" >"$dir/log/$name.out" 2>&1 </dev/null &
    echo $! >"$dir/run/$name.pid"
}
gateway() {
    start rgw radosgw -f -n client.admin --keyring "$dir/keyring"
    wait_for 90 answers
}

up() {
    rm -rf "$dir"; mkdir -p "$dir"/{mon,osd,run,log,rgw}
    setsid nohup "$0" outlive "$dir" "" "" "$owner" >/dev/null 2>&1 </dev/null &
    local fsid; fsid=$(cat /proc/sys/kernel/random/uuid)
    # cephx, as radosgw loops without it; no `public bind addr`, which makes the monitor ignore its port.
    cat >"$CEPH_CONF" <<CONF
[global]
fsid = $fsid
mon host = [v2:127.0.0.1:$mon_port/0]
public network = 127.0.0.0/8
ms bind msgr1 = false
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
auth allow insecure global id reclaim = false
keyring = $dir/keyring
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pgp num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon max pg per osd = 1000
mon warn on pool no redundancy = false
mon data = $dir/mon
mon data avail crit = 1
mon data avail warn = 2
osd data = $dir/osd
osd objectstore = memstore
memstore device bytes = 2147483648
osd class load list = *
osd class default list = *
run dir = $dir/run
admin socket = $dir/run/\$name.asok
pid file = $dir/run/\$name.daemon
log file = $dir/log/\$name.log
mon cluster log file = $dir/log/cluster.log
crash dir = $dir/log
rgw data = $dir/rgw
rgw frontends = beast endpoint=127.0.0.1:$port
rgw thread pool size = 16
CONF
    monmaptool --create --addv m "[v2:127.0.0.1:$mon_port]" --fsid "$fsid" "$dir/monmap"
    ceph-authtool -C "$dir/keyring" --gen-key -n mon. --cap mon 'allow *'
    ceph-authtool "$dir/keyring" --gen-key -n client.admin --cap mon 'allow *' --cap osd 'allow *' --cap mgr 'allow *'
    ceph-authtool "$dir/keyring" --gen-key -n osd.0 --cap mon 'allow profile osd' --cap osd 'allow *'
    ceph-mon -i m --mkfs --monmap "$dir/monmap" --keyring "$dir/keyring"
    start mon ceph-mon -f -i m
    wait_for 60 timeout 5 ceph --connect-timeout 2 -s
    ceph osd create
    ceph-osd -i 0 --mkfs
    start osd ceph-osd -f -i 0
    ceph osd crush add osd.0 1.0 host=h root=default
    wait_for 60 is_up
    gateway
    radosgw-admin user create --uid=tests --display-name=tests --access-key=testkey --secret-key=testsecret123
}

outlive() {
    while kill -0 "$owner" 2>/dev/null; do sleep 1; done
    down
}

down() {
    for name in rgw osd mon; do
        pid=$(cat "$dir/run/$name.pid" 2>/dev/null) || continue
        [[ $(ps -o args= -p "$pid") == *ceph* || $(ps -o args= -p "$pid") == *radosgw* ]] || continue
        kill "$pid" 2>/dev/null || continue
        for ((i = 0; i < 50; i++)); do kill -0 "$pid" 2>/dev/null || continue 2; sleep 0.1; done
        kill -9 "$pid" || true
    done
    rm -rf "$dir"
}

case $command in
up | gateway | down | outlive) "$command" ;;
*) echo "usage: rgw.sh up|gateway|down DIR [PORT [MON_PORT OWNER_PID]]" >&2; exit 2 ;;
esac
