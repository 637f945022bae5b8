#!/usr/bin/env bash
# All that needs a GPU, as one command: `make gpu`. Writes everything into OUT; each part goes on if one before it failed.
#   OUT=gpu                 where to
#   DATA=../shared/data     holds cifar10_train.tar, one folder of images a class
#   DEVICE=cuda             cpu, to try this script itself, without the gpu tests and the compiled table
#   BATCH_SIZES=64,128,256  of the benchmark, REPEATS=5 of each; BENCHMARK_OVERRIDES: section.name=value ...
#   EPOCHS=10               of the classifier that scores the samples
#   PARTS="table baseline"  some of them; unset: all
#   TRAIN_SECONDS=900       of CIFAR-10, a third of it before a stop; TRAIN_OVERRIDES: section.name=value ...
set -uo pipefail
cd "$(dirname "$0")/../.."
OUT=${OUT:-gpu} DATA=${DATA:-../shared/data} DEVICE=${DEVICE:-cuda} TRAIN_SECONDS=${TRAIN_SECONDS:-900}
BATCH_SIZES=${BATCH_SIZES:-64,128,256} EPOCHS=${EPOCHS:-10} REPEATS=${REPEATS:-5}
read -ra benchmark_overrides <<<"${BENCHMARK_OVERRIDES:-}"; read -ra train_overrides <<<"${TRAIN_OVERRIDES:-}"
if [ "$DEVICE" = cuda ] && ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "error: torch sees no CUDA device here; DEVICE=cpu tries this script without one"; exit 1
fi
if [ ! -f "$DATA/cifar10_train.tar" ]; then echo "error: no $DATA/cifar10_train.tar; set DATA to its folder"; exit 1; fi
known="tests table compiled baseline shards classifier first resumed scores grid"
for name in ${PARTS:-}; do
    if [[ " $known " != *" $name "* ]]; then echo "error: PARTS: $name is none of: $known"; exit 1; fi
done
mkdir -p "$OUT"; failed=()
is_wanted() { [[ -z ${PARTS:-} || " $PARTS " == *" $1 "* ]]; }
part() {  # NAME COMMAND...: told, logged, and remembered if it fails
    local name=$1; shift
    is_wanted "$name" || return 0
    printf '\n== %s: %s\n' "$name" "$*"
    "$@" 2>&1 | tee "$OUT/$name.log" || failed+=("$name")
}
run=$OUT/runs/cifar10
train_for() {  # SECONDS: then it is told to save and stop
    timeout --preserve-status --signal=USR1 --kill-after=300 "$1" python launch/train.py configs/cifar10.yaml \
        "run.dir=$OUT/runs" "run.device=$DEVICE" "data.shards=$OUT/cifar10" \
        evaluation.num_images=10000 "${train_overrides[@]}"
}

[ "$DEVICE" = cpu ] || part tests python -m pytest -m gpu -s
benchmark=(python launch/benchmark.py) recipe=configs/imagenet128.yaml
options=(--device "$DEVICE" --repeats "$REPEATS" train.precision=bf16 "${benchmark_overrides[@]}")
part table "${benchmark[@]}" scaling $recipe --vary "batch-size=$BATCH_SIZES" "${options[@]}" --json "$OUT/table.json" --plot "$OUT/table.png"
[ "$DEVICE" = cpu ] || part compiled "${benchmark[@]}" scaling $recipe --vary "batch-size=$BATCH_SIZES" "${options[@]}" train.compile=true --json "$OUT/compiled.json"
part baseline "${benchmark[@]}" train $recipe --batch-size "${BATCH_SIZES%%,*}" "${options[@]}" --baseline --json "$OUT/baseline.json" --trace "$OUT/trace.json"

part shards python launch/shards.py build --source "$DATA/cifar10_train.tar" --destination "$OUT/cifar10" --size 32
part classifier python tests/gpu/classifier.py "$OUT/cifar10" "$OUT/classifier.pt" "$DEVICE" "$EPOCHS"
part first train_for $((TRAIN_SECONDS / 3))
part resumed train_for $((TRAIN_SECONDS * 2 / 3))
! is_wanted resumed || grep -q "resumed from" "$OUT/resumed.log" || failed+=(resume)
part scores python launch/evaluate.py "$run" "evaluation.features=$OUT/classifier.pt"
part grid python launch/sample.py "$run" --out "$OUT/pictures"

echo
if [ ${#failed[@]} -gt 0 ]; then echo "failed: ${failed[*]}; see $OUT/NAME.log"; exit 1; fi
echo "all done: figures and logs in $OUT, samples in $run/samples and $OUT/pictures"
