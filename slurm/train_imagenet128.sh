#!/usr/bin/env bash
#SBATCH --job-name=sagan128
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1          # one launcher a node; it starts one process per GPU
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=1-00:00:00
#SBATCH --signal=B:USR1@300          # to this script, up to 60 s earlier than that; it tells all processes
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
## Trains, survives time limits, preemption, requeue and node death, and ends when train.steps are done.
##
##   sbatch [FLAGS] slurm/train_imagenet128.sh [CONFIG] [section.name=value ...]    from the checkout's root
##   slurm/train_imagenet128.sh [--check] [CONFIG] [section.name=value ...]         checks the inputs, then submits
##
## sbatch flags replace the header's: --nodes=4 --gpus-per-node=4 --partition=gpu --time=12:00:00. Variables:
##   CONFIG     configs/imagenet128.yaml     RUN_DIR   runs/NAME_OF_CONFIG, where all nodes see it
##   SHARDS     what CONFIG says             SETUP     a shell file to source on each node: modules, environment
##   CONTAINER  image for srun (pyxis)       CONTAINER_MOUNTS   besides the checkout: /data:/data,...
##   PROCESSES_PER_NODE  the GPUs of a node  MAX_REQUEUES       8, after crashes and starts without progress
##   ACCELERATE_CONFIG   configs/accelerate/multi_node.yaml     SBATCH_FLAGS   for the second form
##   TORCH_ELASTIC_SHUTDOWN_TIMEOUT  120 s for a checkpoint after SIGTERM
## The run lives in RUN_DIR, its logs in RUN_DIR/logs. The same command again goes on. docs/slurm.md has the rest.
set -uo pipefail                     # no -e: exit codes are looked at
script=$(realpath "$0")
[ "${0##*/}" = slurm_script ] || cd "${script%/*}/.." || exit
. slurm/common.sh || { echo "error: $PWD is not the checkout; submit from its root: cd CHECKOUT && sbatch slurm/..." >&2; exit 1; }

check_only=""
case ${1:-} in --help) help "$script" ;; --check) check_only=1; shift ;; esac
case ${1:-} in "" | *=*) ;; *) CONFIG=$1; shift ;; esac
CONFIG=${CONFIG:-configs/imagenet128.yaml} name=${CONFIG##*/}
[ -f "$CONFIG" ] || fail "no configuration $CONFIG in $PWD; configs/ has some, CONFIG or the first argument names one"
for override; do
    case $override in
    run.dir=* | run.name=*) fail "$override: the run directory is RUN_DIR's to say: RUN_DIR=DIR/NAME sbatch ..." ;;
    run.expected_world_size=*) fail "$override: nodes and GPUs are sbatch's to say: --nodes, --gpus-per-node" ;;
    *=*) ;;
    *) fail "$override is not section.name=value" ;;
    esac
done
RUN_DIR=$(realpath -m "${RUN_DIR:-runs/${name%.*}}")
ACCELERATE_CONFIG=${ACCELERATE_CONFIG:-configs/accelerate/multi_node.yaml} MAX_REQUEUES=${MAX_REQUEUES:-8}
[ -f "$ACCELERATE_CONFIG" ] || fail "no file ACCELERATE_CONFIG=$ACCELERATE_CONFIG"
check_number MAX_REQUEUES "$MAX_REQUEUES" 0
[ -z "${PROCESSES_PER_NODE:-}" ] || check_number PROCESSES_PER_NODE "$PROCESSES_PER_NODE" 1
# On a node whose driver is broken `auto` would train on its CPU. Later values win.
arguments=("$CONFIG" run.device=cuda ${SHARDS:+"data.shards=$SHARDS"} "$@" "run.dir=${RUN_DIR%/*}" "run.name=${RUN_DIR##*/}")

if ! in_job; then
    ! can_check || (
        prepare
        case ${SBATCH_FLAGS:-} in
        *--dependency*) resolve "${arguments[@]}" ;;  # its shards may still have to be made
        *) python launch/train.py "${arguments[@]}" --dry-run ;;
        esac
    ) >/dev/null || exit 1
    [ -z "$check_only" ] || exit 0
    export CONFIG RUN_DIR
    submit slurm/train_imagenet128.sh "$@"
    exit
fi

usr1=0 term=0 hit=0 step=""
# shellcheck disable=SC2329  # by the trap
on_usr1() {  # again and again, as a trainer that is still importing does not hear it; no $(...) in what a trap may hit
    hit=1; [ "$usr1" = 0 ] || return; usr1=1
    say "SIGUSR1: time limit or preemption; the trainer is asked for a checkpoint"
    [ -z "$step" ] || ( trap - USR1 TERM; while kill -0 "$step" 2>/dev/null; do
        scancel --quiet --signal=USR1 "$SLURM_JOB_ID"; sleep 10; done ) &
}
trap on_usr1 USR1; trap 'hit=1 term=1' TERM

export RUN_DIR ACCELERATE_CONFIG start="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"
export processes=$((SLURM_NNODES * ${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}))
arguments+=("run.expected_world_size=$processes")
holder=$(sed -n 's/.*"slurm_job": "\([0-9]*\)".*/\1/p' "$RUN_DIR/training.lock" 2>/dev/null)  # while it trains
if [ "${holder:-$SLURM_JOB_ID}" != "$SLURM_JOB_ID" ] && ! flock --nonblock "$RUN_DIR/training.lock" true; then
    [ "$(squeue --noheader --format=%T --jobs="$holder" 2>/dev/null)" != RUNNING ] ||
        fail "RUN_DIR=$RUN_DIR is trained by job $holder, which runs; sbatch --dependency=afterany:$holder waits for its end, or choose another RUN_DIR"
fi
{ mkdir -p "$RUN_DIR/logs" && echo "$start" >"$RUN_DIR/logs/.start"; } || fail "RUN_DIR=$RUN_DIR cannot be written"
say "$SLURM_JOB_NODELIST, $processes processes, $RUN_DIR; logs: $RUN_DIR/logs/$SLURM_JOB_ID-node*.log"
on_nodes -- check_node "${arguments[@]}" || {
    [ "$term" = 0 ] || exit 143
    fail "nothing was started: the inputs are wrong or a node is not ready, see above"
}

steps=$(steps_of "$RUN_DIR/logs/$SLURM_JOB_ID-plan.txt")
check_number train.steps "$steps" 1
finished=$(cat "$RUN_DIR/DONE" 2>/dev/null)
[ "${finished:-0}" -lt "$steps" ] || { say "finished: $finished steps are done; a larger train.steps goes on"; exit 0; }
find_newest "$RUN_DIR/checkpoints"; before=$newest
say "from step $before to $steps"

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
export address=${address:-$first} port=$((20000 + SLURM_JOB_ID % 10000))
rc=0
if [ "$usr1$term" = 00 ]; then
    # One rank's failure ends all at once. Longer than SlurmdTimeout (mostly 300 s), so that a dead node is Slurm's to notice.
    on_nodes --wait=900 --output="$RUN_DIR/logs/%j-node%n.log" -- launch "${arguments[@]}" &
    step=$!
    while hit=0; wait "$step"; code=$?; [ "$code" = 127 ] || rc=$code; [ "$hit" = 1 ]; do :; done
fi
trap '' USR1; trap - TERM
find_newest "$RUN_DIR/checkpoints"
say "ended with status $rc at step $newest (USR1 $usr1, TERM $term)"

requeue() { say "requeued: $*"; scontrol requeue "$SLURM_JOB_ID"; exit 0; }
requeue_if_few() {  # counted in a file, as SLURM_RESTART_COUNT also counts preemptions
    echo "$start: $*" >>"$RUN_DIR/logs/$SLURM_JOB_ID.requeues"
    [ "$(wc -l <"$RUN_DIR/logs/$SLURM_JOB_ID.requeues")" -gt "$MAX_REQUEUES" ] || requeue "$@"
    fail "$*, and MAX_REQUEUES=$MAX_REQUEUES is reached; the same command goes on from step $newest"
}
finished=$(cat "$RUN_DIR/DONE" 2>/dev/null)
if [ "${finished:-0}" -ge "$steps" ]; then say "finished: $finished steps are done"; exit 0; fi
[ "$term" = 0 ] || exit 143  # scancel, admin requeue: Slurm has decided, and a requeue would undo a scancel
# Of a node's death srun hears before this script does.
if scontrol show job "$SLURM_JOB_ID" | grep JobState=PENDING >/dev/null; then say "requeued by Slurm: a node failed"; exit 143; fi
if [ "$usr1" = 1 ]; then
    [ "$newest" -gt "$before" ] && requeue "time limit or preemption, checkpoint $newest"
    requeue_if_few "time limit or preemption without a new checkpoint"
fi
# Without SlurmctldParameters=preempt_send_user_signal a preemption with a GraceTime is SIGTERM to the ranks alone.
if [[ $(scontrol show job "$SLURM_JOB_ID") =~ \ StartTime=([^ ]*).*\ PreemptTime=([0-9][^ $'\n']*) && ${BASH_REMATCH[2]} > ${BASH_REMATCH[1]} ]]; then
    requeue "preempted at ${BASH_REMATCH[2]}, checkpoint $newest"
fi
[ "$rc" != 0 ] || fail "stopped at step $newest by a signal to its processes; the same command goes on"
# What the trainer said since this start: its own message, or how the log ends.
noise='^[WEIF][0-9]\{4\} \|^Traceback\|^$'
for log in "$RUN_DIR/logs/$SLURM_JOB_ID"-node*.log; do
    sed -n "/^=== start $start /,\$p" "$log" | sed -n "/^\(\[rank [0-9]*\] \)\{0,1\}error: /,/$noise/p" | grep -v "$noise" | head -n 20
done | grep . || tail -n 6 "$RUN_DIR/logs/$SLURM_JOB_ID"-node*.log | head -n 60
[ "$newest" -gt "$before" ] && requeue_if_few "a crash, with a newer checkpoint ($newest) than at the start ($before)"
fail "the training ended with status $rc and no newer checkpoint than $before, so it is not tried again; see above and $RUN_DIR/logs"
