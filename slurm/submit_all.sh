#!/usr/bin/env bash
## From images to scores: build, merge, train and evaluate, each submitted to wait for the one before.
##
##   SOURCE=ILSVRC2012_img_train.tar SHARDS=data/imagenet128 slurm/submit_all.sh [CONFIG] [section.name=value ...]
##   SHARDS=s3://bucket/imagenet128 WATCH=1 slurm/submit_all.sh [CONFIG] [section.name=value ...]
##
## Checks the inputs, then prints each job's id and what it will do. When a job fails, those that wait for it are
## cancelled; the same command again goes on. Variables besides those of the three scripts:
##   SOURCE  images for build_shards.sh; unset: SHARDS is a set already     BUILD_ARGUMENTS     such as "--size 64"
##   WATCH   set: evaluate while training goes on, not once after it        EVALUATE_ARGUMENTS  such as "--checkpoint best"
##   BUILD_SBATCH, TRAIN_SBATCH, EVALUATE_SBATCH  sbatch flags for each, such as "--partition=cpu --time=4:00:00"
set -euo pipefail
script=$(realpath "$0")
cd "${script%/*}/.."
. slurm/common.sh
[ "${1:-}" != --help ] || help "$script"
! in_job || fail "submit_all.sh submits jobs and is none: run it without sbatch"

config=${CONFIG:-configs/imagenet128.yaml}
case ${1:-} in "" | *=*) ;; *) config=$1; shift ;; esac
name=${config##*/}
export RUN_DIR; RUN_DIR=$(realpath -m "${RUN_DIR:-runs/${name%.*}}")
[ -z "${SOURCE:-}" ] || [ -n "${SHARDS:-}" ] || fail "SOURCE is given, but not SHARDS, where to build: SHARDS=DIR_OR_S3"
read -ra build_arguments <<<"${BUILD_ARGUMENTS:-}"
read -ra evaluate_arguments <<<"${EVALUATE_ARGUMENTS:-}"
build() { SBATCH_FLAGS="${BUILD_SBATCH:-}" slurm/build_shards.sh "$@" "$SOURCE" "$SHARDS" "${build_arguments[@]}"; }
train() { local waits=$1; shift; SBATCH_FLAGS="${TRAIN_SBATCH:-} $waits" slurm/train_imagenet128.sh "$@"; }
evaluate() { local waits=$1; shift; SBATCH_FLAGS="${EVALUATE_SBATCH:-} $waits" slurm/evaluate.sh "$@" "${evaluate_arguments[@]}"; }

# All checks before anything is queued.
[ -z "${SOURCE:-}" ] || build --check || exit 1
train "${SOURCE:+--dependency=later}" --check "$config" "$@" || exit 1
if can_check 2>/dev/null; then
    like=$(mktemp -d)  # a run as it will be, for the evaluation to look at
    trap 'rm -rf "$like"' EXIT
    (prepare; resolve "$config" ${SHARDS:+"data.shards=$SHARDS"} "$@" "run.dir=$like" run.name=run) >"$like/config.yaml" || exit 1
    if ! evaluate "" --check "$like" 2>"$like/told"; then
        # Shards that have still to be made are no fault, nor is what needs them; a mistyped argument is.
        if [ -z "${SOURCE:-}" ] || grep -v "^FAIL shards: \|: not tried, because" "$like/told" | grep -q "^FAIL \|error: "; then
            cat "$like/told" >&2; exit 1
        fi
    fi
fi

waits=""
if [ -n "${SOURCE:-}" ]; then
    merge=$(build) || exit 1
    waits=--dependency=afterok:$merge
fi
train=$(train "$waits" "$config" "$@") || exit 1
echo "job $train trains ${config} in $RUN_DIR${merge:+ when job $merge has succeeded}" >&2
if [ -n "${WATCH:-}" ]; then
    score=$(WATCH_JOB=$train evaluate "--dependency=after:$train" "$RUN_DIR") || exit 1
    echo "job $score scores each snapshot while job $train runs" >&2
else
    score=$(evaluate "--dependency=afterok:$train" "$RUN_DIR") || exit 1
    echo "job $score scores the last checkpoint when job $train has succeeded" >&2
fi
echo "${merge:+$merge }$train $score"
