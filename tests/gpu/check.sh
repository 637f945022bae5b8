#!/usr/bin/env bash
# All that needs a GPU, as one command: `make gpu`. Writes everything into OUT; each part goes on if one before it failed.
#   OUT=gpu            where to
#   DATA=../shared/data    holds cifar10_train.tar, one folder of images a class
#   DEVICE=cuda        cpu, to try this script itself
#   TRAIN_SECONDS=900  of CIFAR-10, a third of it before a stop
#   CONFIG_OVERRIDES   section.name=value ... for every benchmark, TRAIN_OVERRIDES for the training
set -uo pipefail
cd "$(dirname "$0")/../.."
OUT=${OUT:-gpu} DATA=${DATA:-../shared/data} DEVICE=${DEVICE:-cuda} TRAIN_SECONDS=${TRAIN_SECONDS:-900}
BATCH_SIZES=${BATCH_SIZES:-64,128,256} EPOCHS=${EPOCHS:-10} REPEATS=${REPEATS:-5}
read -ra benchmark <<<"${CONFIG_OVERRIDES:-}"; read -ra training <<<"${TRAIN_OVERRIDES:-}"
mkdir -p "$OUT"; failed=()
part() {  # NAME COMMAND...: told, logged, and remembered if it fails
    local name=$1; shift
    printf '\n== %s: %s\n' "$name" "$*"
    "$@" 2>&1 | tee "$OUT/$name.log" || failed+=("$name")
}
run=$OUT/runs/cifar10
train_for() {  # SECONDS: then it is told to save and stop
    timeout --preserve-status --signal=USR1 --kill-after=300 "$1" python launch/train.py configs/cifar10.yaml \
        "run.dir=$OUT/runs" "run.device=$DEVICE" "data.shards=$OUT/cifar10" "${training[@]}"
}

[ "$DEVICE" = cpu ] || part tests python -m pytest -m gpu -s
b=(python launch/benchmark.py); o=(--device "$DEVICE" --repeats "$REPEATS" train.precision=bf16 "${benchmark[@]}")
part table "${b[@]}" scaling configs/imagenet128.yaml --vary "batch-size=$BATCH_SIZES" "${o[@]}" --json "$OUT/table.json" --plot "$OUT/table.png"
part compiled "${b[@]}" scaling configs/imagenet128.yaml --vary "batch-size=$BATCH_SIZES" "${o[@]}" train.compile=true --json "$OUT/compiled.json"
part baseline "${b[@]}" train configs/imagenet128.yaml --batch-size "${BATCH_SIZES%%,*}" "${o[@]}" --baseline --json "$OUT/baseline.json" --trace "$OUT/trace.json"

part shards python launch/shards.py build --source "$DATA/cifar10_train.tar" --destination "$OUT/cifar10" --size 32
part classifier python tests/gpu/classifier.py "$OUT/cifar10" "$OUT/classifier.pt" "$DEVICE" "$EPOCHS"
part first train_for $((TRAIN_SECONDS / 3))
part resumed train_for $((TRAIN_SECONDS * 2 / 3))
grep -q "resumed from" "$OUT/resumed.log" || failed+=(resume)
part scores python launch/evaluate.py "$run" "evaluation.features=$OUT/classifier.pt" evaluation.num_images=10000
part grid python launch/sample.py "$run" --out "$OUT/pictures"

echo
if [ ${#failed[@]} -gt 0 ]; then echo "failed: ${failed[*]}; see $OUT/NAME.log"; exit 1; fi
echo "all done: figures and logs in $OUT, samples in $run/samples and $OUT/pictures"
