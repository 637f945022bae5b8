# shellcheck shell=bash disable=SC2034,SC2154  # variables that those who source it read and set
# What the scripts of this folder share; sourced in the checkout's root, on the submitting machine and on the nodes.

say() { printf '%(%FT%T)T [job %s, restart %s] %s\n' -1 "${SLURM_JOB_ID:--}" "${SLURM_RESTART_COUNT:-0}" "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }
help() { sed -n 's/^## \{0,1\}//p' "$1"; exit 0; }

# Slurm runs a copy of this name. A shell may have SLURM_JOB_ID only because it is inside of an interactive job.
in_job() { [ "${0##*/}" = slurm_script ]; }

# check_number NAME VALUE SMALLEST
check_number() {
    case $2 in "" | *[!0-9]*) fail "$1=$2 is no number" ;; esac
    [ "$2" -ge "$3" ] || fail "$1=$2 is less than $3"
}

# Where `accelerate` and `python` come from: SETUP, a container, else the checkout's .venv, else what was active at sbatch.
prepare() {
    if [ -z "${CONTAINER:-}" ] && [ -d .venv/bin ]; then PATH=$PWD/.venv/bin:$PATH; fi
    if [ -n "${SETUP:-}" ]; then
        set +u  # conda and modules read variables that are not set
        # shellcheck disable=SC1090  # the user's file
        . "$SETUP" || fail "SETUP=$SETUP failed on ${SLURMD_NODENAME:-$(hostname)}"
    fi
    export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
}

# Whether the inputs can be checked on this machine, which need not have what is in CONTAINER.
can_check() {
    [ -z "${CONTAINER:-}" ] || (prepare; python -c "import accelerate, torch") 2>/dev/null || {
        echo "note: the inputs are not checked here, as this machine has only CONTAINER; the job will" >&2; return 1; }
}

# on_nodes SRUN_FLAGS... -- COMMAND...: one task a node, prepared; USR1 is for the trainer, launchers would die of it.
on_nodes() {
    local flags=()
    while [ "$1" != -- ]; do flags+=("$1"); shift; done
    shift
    [ -z "${CONTAINER:-}" ] || flags+=(--container-image="$CONTAINER" --container-workdir="$PWD"
        --container-mounts="$PWD:$PWD${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}")
    [ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK  # 22.05 forgets it
    # shellcheck disable=SC2016  # for the nodes' shells
    srun --export=ALL --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --kill-on-bad-exit=1 "${flags[@]}" bash -c '
        trap "" USR1
        trap "[ \$? = 0 ] || sleep 1" EXIT  # what was said must arrive before --kill-on-bad-exit cuts the line
        cd "$0" 2>/dev/null && . slurm/common.sh || {
            echo "error: node $SLURMD_NODENAME does not see the checkout $0; put it where all nodes do" >&2; exit 1; }
        prepare; "$@"' "$PWD" "$@"
}

# check_node ARGUMENTS...: whether this node can train; the first one writes down the plan. Reads `start`.
check_node() {
    local i
    for ((i = 0; i < 20; i++)); do [ "$(cat "$RUN_DIR/logs/.start" 2>/dev/null)" = "$start" ] && break; sleep 0.5; done
    [ "$i" -lt 20 ] || fail "RUN_DIR=$RUN_DIR is not the same directory on $SLURMD_NODENAME as on the first node; put it where all nodes see it"
    [ -x "$(command -v accelerate)" ] || fail "no accelerate on $SLURMD_NODENAME; \`make setup\` in a checkout that all nodes see, or set SETUP or CONTAINER"
    [ "$SLURM_NODEID" = 0 ] || return 0
    python launch/train.py "$@" --dry-run >"$RUN_DIR/logs/$SLURM_JOB_ID-plan.txt"
}

# launch ARGUMENTS...: this node's part of the training. Reads `start`, `processes`, `address`, `port`.
launch() {
    # The launcher kills ranks that long after SIGTERM. Slurm's own patience (KillWait, GraceTime) should end first.
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}
    echo "=== start $start on $SLURMD_NODENAME, rendezvous $address:$port"
    # Static: rank 0 is on the first node, and Slurm is what starts again, not the launcher.
    exec accelerate launch --config_file "$ACCELERATE_CONFIG" --num_machines "$SLURM_NNODES" --num_processes "$processes" \
        --machine_rank "$SLURM_NODEID" --main_process_ip "$address" --main_process_port "$port" --rdzv_backend static \
        --deepspeed_multinode_launcher standard --max_restarts 0 launch/train.py "$@"
}

# The step of the newest published checkpoint or snapshot in a directory, 0 without one, in `newest`.
find_newest() {
    local path; newest=0
    for path in "$1"/step-*; do
        path=${path##*/step-}
        case $path in *[!0-9]*) ;; *) newest=$((10#$path)) ;; esac
    done
}

# steps_of FILE: train.steps of a configuration that the trainer printed; no other key is called just `steps`.
steps_of() { sed -n 's/.*[{ ]steps: \([0-9]*\).*/\1/p' "$1" | head -n 1; }

# resolve CONFIG section.name=value...: checks it, without its data, and prints it whole.
resolve() {
    python -c '
import sys
from pipeline.config import ConfigError, load_config, to_yaml
try:
    print(to_yaml(load_config(sys.argv[1], sys.argv[2:])))
except ConfigError as error:
    sys.exit(f"error: {error}")' "$@"
}

# submit SBATCH_FLAGS... SCRIPT ARGUMENTS...: prints the job's id. What it waits for failed: it is cancelled.
submit() {
    local id name
    for name in "${!SLURM_@}"; do [ "$name" = SLURM_CONF ] || unset "$name"; done  # of an interactive job around this
    # shellcheck disable=SC2086  # several flags in one variable
    id=$(sbatch --parsable --kill-on-invalid-dep=yes ${SBATCH_FLAGS:-} "$@") || fail "sbatch refused the job; nothing is queued by it"
    echo "${id%%;*}"
}
