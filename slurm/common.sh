# What the scripts of this folder share; sourced in the checkout's root, on the submitting machine and on the nodes.

say() { printf '%(%FT%T)T [job %s, restart %s] %s\n' -1 "${SLURM_JOB_ID:--}" "${SLURM_RESTART_COUNT:-0}" "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }
help() { sed -n 's/^## \{0,1\}//p' "$1"; exit 0; }

# Where `accelerate` and `python` come from: SETUP, a container, else the checkout's .venv, else what was active at sbatch.
prepare() {
    if [ -n "${SETUP:-}" ]; then . "$SETUP" || fail "SETUP=$SETUP failed on ${SLURMD_NODENAME:-$(hostname)}"; fi
    if [ -z "${CONTAINER:-}" ] && [ -d .venv/bin ]; then PATH=$PWD/.venv/bin:$PATH; fi
    export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
}

# on_nodes SRUN_FLAGS... -- COMMAND...: one task a node, prepared; USR1 is for the trainer, launchers would die of it.
on_nodes() {
    local flags=()
    while [ "$1" != -- ]; do flags+=("$1"); shift; done
    shift
    [ -z "${CONTAINER:-}" ] || flags+=(--container-image="$CONTAINER" --container-workdir="$PWD"
        --container-mounts="$PWD:$PWD${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}")
    [ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK  # 22.05 forgets it
    srun --export=ALL --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --kill-on-bad-exit=1 "${flags[@]}" bash -c '
        trap "" USR1
        cd "$0" 2>/dev/null && . slurm/common.sh || {
            echo "error: node $SLURMD_NODENAME does not see the checkout $0; put it where all nodes do" >&2; exit 1; }
        prepare; "$@"' "$PWD" "$@"
}

# The step of the newest published checkpoint below RUN_DIR, 0 without one, in `newest`.
find_newest() {
    local path; newest=0
    for path in "$RUN_DIR"/checkpoints/step-*; do
        path=${path##*/step-}
        case $path in *[!0-9]*) ;; *) newest=$((10#$path)) ;; esac
    done
}

# check_config CONFIG section.name=value...: checks it, without its data, and prints train.steps.
check_config() {
    python -c '
import sys
from pipeline.config import ConfigError, load_config
try:
    print(load_config(sys.argv[1], sys.argv[2:]).train.steps)
except ConfigError as error:
    sys.exit(f"error: {error}")' "$@"
}

# submit SBATCH_FLAGS... SCRIPT ARGUMENTS...: prints the job's id. What it waits for failed: it is cancelled.
submit() {
    local id
    # shellcheck disable=SC2086  # several flags in one variable
    id=$(sbatch --parsable --kill-on-invalid-dep=yes ${SBATCH_FLAGS:-} "$@") || fail "sbatch refused the job; nothing is queued by it"
    echo "${id%%;*}"
}
