#!/usr/bin/env bash
#SBATCH --job-name=sagan-evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=1-00:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
## Scores a run on one GPU: its newest checkpoint, or every new one while a training job goes on.
##
##   sbatch [FLAGS] slurm/evaluate.sh RUN_DIR [evaluation.name=value ...]      from the checkout's root
##   slurm/evaluate.sh [--check] RUN_DIR [evaluation.name=value ...]           checks the inputs, then submits
##
## A result that is there already is not made again, so a requeued job goes on. Variables:
##   WATCH_JOB  id of a training job: score new checkpoints until it has left the queue   WATCH_SECONDS  60 between looks
##   SETUP, CONTAINER, CONTAINER_MOUNTS  as in train_imagenet128.sh                       SBATCH_FLAGS   for the second form
set -uo pipefail
[ -n "${SLURM_JOB_ID:-}" ] || { [ "${1:-}" != --help ] || { . "${0%/*}/common.sh"; help "$0"; }; cd "${0%/*}/.." || exit; }
. slurm/common.sh || { echo "error: $PWD is not the checkout; submit from its root: cd CHECKOUT && sbatch slurm/..." >&2; exit 1; }

check_only=""
case ${1:-} in --help) help "$0" ;; --check) check_only=1; shift ;; esac
[ $# -ge 1 ] || fail "evaluate.sh takes RUN_DIR; --help tells more"
RUN_DIR=$1; shift
for override; do
    case $override in
    run.* | evaluation.* | tracking.* | data.shards=* | data.num_workers=* | data.prefetch_batches=*) ;;
    *) fail "$override: an evaluation takes evaluation.*, data.shards, data.num_workers, run.* and tracking.*" ;;
    esac
done

if [ -z "${SLURM_JOB_ID:-}" ]; then
    case ${SBATCH_FLAGS:-} in
    *--dependency*) ;;  # the run may still have to begin
    *) [ -f "$RUN_DIR/config.yaml" ] || fail "$RUN_DIR is no run: it holds no config.yaml" ;;
    esac
    [ -z "$check_only" ] || exit 0
    submit slurm/evaluate.sh "$RUN_DIR" "$@"
    exit
fi

score() { on_nodes -- python launch/evaluate.py "$RUN_DIR" "$@"; }
if [ -z "${WATCH_JOB:-}" ]; then score "$@"; exit; fi

scored=0 over=""
while [ -z "$over" ]; do
    [ -n "$(squeue --noheader --jobs="$WATCH_JOB" 2>/dev/null)" ] || over=1  # before looking, so that nothing is missed
    find_newest
    if [ "$newest" -gt "$scored" ]; then
        say "step $newest"
        score "$@" || fail "the evaluation of step $newest failed, see above"
        scored=$newest
    elif [ -z "$over" ]; then
        sleep "${WATCH_SECONDS:-60}"
    fi
done
[ "$scored" -gt 0 ] || fail "job $WATCH_JOB ended, and $RUN_DIR holds no checkpoint"
say "job $WATCH_JOB has ended, the last score is of step $scored"
