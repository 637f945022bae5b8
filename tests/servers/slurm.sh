#!/usr/bin/env bash
# A real Slurm for tests: one controller, two nodes with 8 pretended GPUs each, partitions `main` and `preempt`.
#   slurm.sh up DIR PORT OWNER_PID   starts it, waits until both nodes are idle, and writes DIR/layout and DIR/address;
#                      what is still running when the process OWNER_PID is gone is ended
#   slurm.sh node DIR I   starts node I again, after its first process (DIR/run/nodeI.pid) was killed
#   slurm.sh down DIR     ends all by the pids noted in DIR, deletes the links, and removes DIR
# Where root may make namespaces (layout `namespaces`), each node has its own network address, hostname, pids and mounts,
# and everything in it ends with its first process; DIR/address is the test host's address that the nodes reach. Elsewhere
# (layout `host`) both are daemons on 127.0.0.1. Needs, on Debian and Ubuntu:
#   apt-get install --no-install-recommends slurmctld slurmd slurm-client munge iproute2
set -euo pipefail
command=$1 dir=$2 port=${3:-} owner=${4:-}
export SLURM_CONF=$dir/slurm.conf
unset "${!SLURM_JOB@}" "${!SBATCH_@}"

idle_nodes() { sinfo -h -N -t idle -o %N 2>/dev/null | sort -u | wc -l; }
may_unshare() { unshare --net --uts --mount --pid --fork --mount-proc true && ip link add "${tag}t" type bridge && ip link del "${tag}t"; }
start() {  # NAME COMMAND...: in a session of its own, so that a Ctrl-C of the tests leaves it to `down`
    local name=$1; shift
    setsid nohup "$@" >>"$dir/log/$name.out" 2>&1 </dev/null &
    echo $! >"$dir/run/$name.pid"
}

up() {
    rm -rf "$dir"; mkdir -p "$dir"/{munge,state,log,run,spool,dev}; chmod 755 "$dir" "$dir"/*
    setsid nohup "$0" outlive "$dir" "" "$owner" >/dev/null 2>&1 </dev/null &
    tag=sl$((owner % 100000)); subnet=10.$((64 + owner / 250 % 64)).$((owner % 250))
    echo "$tag" >"$dir/tag"; echo "$subnet" >"$dir/subnet"
    local host name gpu file=""
    if may_unshare 2>/dev/null; then
        echo namespaces >"$dir/layout"; echo "$subnet.254" >"$dir/address"; host="ctl($subnet.254)"
        ip link add "${tag}br" type bridge; ip addr add "$subnet.254/24" dev "${tag}br"; ip link set "${tag}br" up
        printf '127.0.0.1 localhost\n%s.254 ctl\n%s.1 node1\n%s.2 node2\n' "$subnet" "$subnet" "$subnet" >"$dir/hosts"
    else
        echo host >"$dir/layout"; echo 127.0.0.1 >"$dir/address"; host="$(hostname -s)(127.0.0.1)"
    fi
    # Slurm hands out CUDA_VISIBLE_DEVICES for device files alone; making these takes root.
    for gpu in 0 1 2 3 4 5 6 7; do mknod "$dir/dev/nvidia$gpu" c 1 3 2>/dev/null && file="File=$dir/dev/nvidia[0-7]"; done
    echo "NodeName=node[1-2] Name=gpu Type=h100 Count=8 $file" >"$dir/gres.conf"
    cat >"$SLURM_CONF" <<CONF
ClusterName=tests
SlurmctldHost=$host
SlurmctldPort=$port
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$dir/munge/socket
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/run/slurmctld.daemon
SlurmdPidFile=$dir/run/slurmd.%n.daemon
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MailProg=/bin/true
MpiDefault=none
SwitchType=switch/none
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SlurmctldTimeout=30
SlurmdTimeout=10
KillWait=20
MinJobAge=3600
InactiveLimit=0
GresTypes=gpu
SlurmdParameters=config_overrides
NodeName=DEFAULT Sockets=2 CoresPerSocket=32 ThreadsPerCore=1 RealMemory=512000 Gres=gpu:h100:8
$(for i in 1 2; do
    case $(cat "$dir/layout") in
    namespaces) echo "NodeName=node$i NodeAddr=$subnet.$i Port=$((port + 1))" ;;
    host) echo "NodeName=node$i NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=$((port + i))" ;;
    esac
done)
PartitionName=DEFAULT Nodes=node[1-2] MaxTime=INFINITE State=UP
PartitionName=main Default=YES PriorityTier=10 PreemptMode=OFF
PartitionName=preempt PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
CONF
    (umask 077; head -c 1024 /dev/urandom >"$dir/munge/key")
    start munged munged --foreground --force --key-file="$dir/munge/key" --socket="$dir/munge/socket" --num-threads=2 \
        --pid-file="$dir/run/munged.daemon" --log-file="$dir/log/munged.log" --seed-file="$dir/munge/seed"
    for ((i = 0; i < 50; i++)); do [[ -S $dir/munge/socket ]] && break; sleep 0.1; done
    if [[ $(cat "$dir/layout") == namespaces ]]; then
        # A hostname of its own, and an /etc/hosts that knows the nodes, without touching this machine's.
        start slurmctld unshare --uts --mount --propagation private bash -c '
            hostname ctl; mount --bind "$1/hosts" /etc/hosts; exec slurmctld -D -c -f "$1/slurm.conf"' - "$dir"
    else
        start slurmctld slurmctld -D -c -f "$SLURM_CONF"
    fi
    node 1; node 2
    for ((i = 0; i < 300; i++)); do [[ $(idle_nodes) == 2 ]] && return; sleep 0.1; done
    echo "error: the nodes are not idle after 30 s; the logs are in $dir/log" >&2
    tail -n 20 "$dir"/log/* >&2
    return 1
}

node() {
    local i=$1 tag subnet; tag=$(cat "$dir/tag"); subnet=$(cat "$dir/subnet")
    mkdir -p "$dir/spool/node$i"
    if [[ $(cat "$dir/layout") == host ]]; then start "node$i" slurmd -D -N "node$i" -f "$SLURM_CONF"; return; fi
    rm -f "$dir/run/node$i.linked"; mkfifo "$dir/run/node$i.linked"
    start "unshare$i" unshare --net --uts --mount --pid --fork --kill-child --mount-proc --propagation private bash -c '
        dir=$1 i=$2 subnet=$3
        hostname "node$i"; mount --bind "$dir/hosts" /etc/hosts
        read -r _ <"$dir/run/node$i.linked"
        ip link set lo up; ip link set veth name eth0; ip addr add "$subnet.$i/24" dev eth0; ip link set eth0 up
        ip route add default via "$subnet.254"
        slurmd -D -N "node$i" -f "$dir/slurm.conf" & wait $!' - "$dir" "$i" "$subnet"
    local outer=$! first=""
    for ((t = 0; t < 250; t++)); do
        first=$(tr -d ' ' </proc/$outer/task/$outer/children 2>/dev/null || true)
        [[ -n $first && $(readlink "/proc/$first/ns/net") != "$(readlink /proc/self/ns/net)" ]] && break
        sleep 0.02
    done
    echo "$first" >"$dir/run/node$i.pid"
    ip link del "${tag}v$i" 2>/dev/null || true  # a link can outlive its node
    ip link add "${tag}v$i" type veth peer name veth netns "$first"
    ip link set "${tag}v$i" master "${tag}br" up
    echo >"$dir/run/node$i.linked"
}

outlive() {
    while [[ -d $dir ]] && kill -0 "$owner" 2>/dev/null; do sleep 1; done
    down
}

down() {
    [[ -d $dir ]] || return 0
    scancel --quiet --user "$(id -un)" 2>/dev/null && [[ $(cat "$dir/layout") == host ]] && sleep 3
    local tag name pid link; tag=$(cat "$dir/tag")
    for name in node1 node2; do
        pid=$(cat "$dir/run/$name.pid" 2>/dev/null) && grep -q "$dir" "/proc/$pid/cmdline" 2>/dev/null && kill -9 "$pid"
    done
    for name in slurmctld munged; do
        pid=$(cat "$dir/run/$name.pid" 2>/dev/null) && grep -q "$dir" "/proc/$pid/cmdline" 2>/dev/null || continue
        kill "$pid"
        for ((i = 0; i < 50; i++)); do kill -0 "$pid" 2>/dev/null || continue 2; sleep 0.1; done
        kill -9 "$pid"
    done
    for link in "${tag}v1" "${tag}v2" "${tag}br"; do ip link del "$link" 2>/dev/null || true; done
    rm -rf "$dir"
}

case $command in
up | down | outlive) set +e; [[ $command == up ]] && set -e; "$command" ;;
node) node "$3" ;;
*) echo "usage: slurm.sh up|node|down DIR [PORT OWNER_PID | I]" >&2; exit 2 ;;
esac
