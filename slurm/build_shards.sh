#!/usr/bin/env bash
#SBATCH --job-name=sagan-build
#SBATCH --array=0-7
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=32G
#SBATCH --time=1-00:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.out
## Makes a set of shards: PARTS jobs of an array build a part each, one more merges them.
##
##   slurm/build_shards.sh [--check] SOURCE SHARDS [FLAGS]     checks the inputs, submits both, prints the merge job's id
##   sbatch --array=3 slurm/build_shards.sh SOURCE SHARDS [FLAGS]            part 3 again, by hand
##   sbatch --array=0 slurm/build_shards.sh --merge SOURCE SHARDS [FLAGS]    the merge again, by hand
##
## SOURCE is what `launch/shards.py build --source` takes, SHARDS a directory that all nodes see or s3://bucket/prefix,
## FLAGS the other flags of that command (default: --size 128). A part that fails or meets its time limit is requeued and
## goes on where it was, MAX_REQUEUES times (3); when it fails for good, all that waits for it is cancelled. Variables:
##   PARTS  8            MAX_REQUEUES  3           SETUP, CONTAINER, CONTAINER_MOUNTS  as in train_imagenet128.sh
##   SCRATCH  local disk for shards on their way to s3://, default TMPDIR            SBATCH_FLAGS  for both jobs
set -euo pipefail
script=$(realpath "$0")
[ "${0##*/}" = slurm_script ] || cd "${script%/*}/.."
. slurm/common.sh || { echo "error: $PWD is not the checkout; submit from its root: cd CHECKOUT && sbatch slurm/..." >&2; exit 1; }

mode=""
case ${1:-} in --help) help "$script" ;; --check | --merge) mode=$1; shift ;; esac
[ $# -ge 2 ] || fail "build_shards.sh takes SOURCE and SHARDS; --help tells more"
source=$1 shards=$2; shift 2
PARTS=${PARTS:-8} MAX_REQUEUES=${MAX_REQUEUES:-3}
check_number PARTS "$PARTS" 1
check_number MAX_REQUEUES "$MAX_REQUEUES" 0
[ -r "$source" ] || fail "SOURCE=$source cannot be read on $(hostname)"
case $shards in s3://?*) ;; *) { mkdir -p "$shards" && [ -w "$shards" ]; } || fail "SHARDS=$shards cannot be written" ;; esac

if ! in_job; then
    ! can_check || (prepare; python launch/shards.py --help >/dev/null) || fail "launch/shards.py does not start here; set SETUP"
    [ "$mode" = --check ] && exit 0
    export PARTS
    build=$(submit --array="0-$((PARTS - 1))" slurm/build_shards.sh "$source" "$shards" "$@") || exit 1
    merge=$(submit --array=0 --job-name=sagan-merge --dependency="afterok:$build" slurm/build_shards.sh --merge "$source" "$shards" "$@") || exit 1
    echo "job $build builds $shards from $source in $PARTS parts, job $merge merges them" >&2
    echo "$merge"
    exit
fi

task=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID what="part ${SLURM_ARRAY_TASK_ID} of $PARTS"
again() {  # REASON: what is finished stays, so the next start goes on from here
    if [ "${SLURM_RESTART_COUNT:-0}" -lt "$MAX_REQUEUES" ]; then
        say "requeued: $what: $1"; trap '' USR1; scontrol requeue "$task"; exit 0
    fi
    fail "$what: $1, and MAX_REQUEUES=$MAX_REQUEUES is reached. What waits for this job is cancelled; once the cause is gone, submit the same again: finished shards are kept"
}
trap 'again "time limit or preemption"' USR1

if [ "$mode" = --merge ]; then
    what=merge
    on_nodes -- python launch/shards.py merge "$shards" &
else
    # A flag of this command that is given twice counts the last time.
    on_nodes -- python launch/shards.py build --source "$source" --destination "$shards" --size 128 \
        --workers "${SLURM_CPUS_PER_TASK:-1}" ${SCRATCH:+--scratch "$SCRATCH"} "$@" --part "$SLURM_ARRAY_TASK_ID" --parts "$PARTS" &
fi
wait $! || again "it failed, see above"
say "$what is done"
