#!/usr/bin/env bash
#SBATCH --job-name=sagan-evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=1-00:00:00
#SBATCH --signal=B:USR1@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
## Scores a run on one GPU: its newest checkpoint, or each snapshot while a training job goes on.
##
##   sbatch [FLAGS] slurm/evaluate.sh RUN_DIR [FLAGS and overrides of launch/evaluate.py]     from the checkout's root
##   slurm/evaluate.sh [--check] RUN_DIR [FLAGS and overrides of launch/evaluate.py]          checks the inputs, then submits
##
## Such as --checkpoint best, --watch, --real, evaluation.num_images=10000; `python launch/evaluate.py --help` has all.
## A result that is there already is not made again, so the same command, or a requeue, goes on. Variables:
##   WATCH_JOB  id of the training job: score its snapshots as they come, until it has left the queue
##   SETUP, CONTAINER, CONTAINER_MOUNTS  as in train_imagenet128.sh            SBATCH_FLAGS   for the second form
set -euo pipefail
script=$(realpath "$0")
[ "${0##*/}" = slurm_script ] || cd "${script%/*}/.."
. slurm/common.sh || { echo "error: $PWD is not the checkout; submit from its root: cd CHECKOUT && sbatch slurm/..." >&2; exit 1; }

check_only=""
case ${1:-} in --help) help "$script" ;; --check) check_only=1; shift ;; esac
case ${1:-} in "" | -* | *=*) fail "the first argument of evaluate.sh is RUN_DIR; --help tells more" ;; esac
RUN_DIR=$1; shift

if ! in_job; then
    given=("$@")
    if [ -f "$RUN_DIR/config.yaml" ] || [[ ${SBATCH_FLAGS:-} != *--dependency* ]]; then  # else it has still to begin
        checked=()
        while [ $# -gt 0 ]; do  # --check goes without what else could be done
            case $1 in
            --watch | --real | --sync | --until-step=*) ;;
            --until-step) [ $# -gt 1 ] || fail "--until-step needs a number"; shift ;;
            *) checked+=("$1") ;;
            esac
            shift
        done
        ! can_check || (prepare; python launch/evaluate.py "$RUN_DIR" --check "${checked[@]}") >&2 || exit 1
    fi
    [ -z "$check_only" ] || exit 0
    submit slurm/evaluate.sh "$RUN_DIR" "${given[@]}"
    exit
fi

printf -v started '%(%s)T' -1
# shellcheck disable=SC2329  # by the trap
again() {  # no $(...) in what a trap may hit
    trap '' USR1
    if [ -n "${WATCH_JOB:-}" ] || find "$RUN_DIR/evaluations" -name '*.json' -newermt "@$started" 2>/dev/null | grep . >/dev/null; then
        say "requeued: time limit or preemption; what is scored stays"
        scontrol requeue "$SLURM_JOB_ID"
        exit 0
    fi
    fail "time limit or preemption, and nothing was scored since the start: give it more time (sbatch --time)"
}
trap again USR1
score() { on_nodes -- python launch/evaluate.py "$RUN_DIR" "$@"; }
is_over() { ! squeue --noheader --jobs="$WATCH_JOB" 2>&1 | grep -v "Invalid job id" | grep . >/dev/null; }  # not when Slurm is away
nap() { sleep 5 & wait $!; }  # a trap does not wait for its end

if [ -z "${WATCH_JOB:-}" ]; then score "$@" & wait $!; exit; fi

until [ -f "$RUN_DIR/config.yaml" ]; do
    ! is_over || fail "job $WATCH_JOB has left the queue, and $RUN_DIR holds no config.yaml: it did not begin to train"
    nap
done
is_unfinished() {
    local steps finished
    steps=$(steps_of "$RUN_DIR/config.yaml") finished=$(cat "$RUN_DIR/DONE" 2>/dev/null || echo 0)
    check_number train.steps "$steps" 1
    [ "$finished" -lt "$steps" ]
}
watch() { score --watch "$@" & step=$! num_steps=$((num_steps + 1)); }

step="" num_steps=0
until is_over; do
    if [ -n "$step" ] && ! kill -0 "$step" 2>/dev/null; then wait "$step"; step=""; fi
    # A watch ends with the steps of config.yaml. The job may be about to extend a run that was finished before.
    if [ -z "$step" ] && is_unfinished; then watch "$@"; fi
    nap
done
if is_unfinished; then
    # No more snapshots will come, so the watch would not end.
    [ -z "$step" ] || { scancel --quiet "$SLURM_JOB_ID.$((num_steps - 1))"; wait "$step" || true; }
    find_newest "$RUN_DIR/snapshots"
    [ "$newest" -gt 0 ] || fail "job $WATCH_JOB has left the queue before the first snapshot (evaluation.every_steps); slurm/evaluate.sh $RUN_DIR scores a checkpoint"
    say "job $WATCH_JOB has left the queue before the last step; its last snapshot is of step $newest"
    watch --until-step "$newest" "$@"
fi
[ -n "$step" ] || watch "$@"
wait "$step"
say "job $WATCH_JOB is over, all snapshots are scored"
