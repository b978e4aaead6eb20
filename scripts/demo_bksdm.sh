#!/usr/bin/env bash
# Remove blocks from the built-in teacher's U-Net, distil what is left, measure it: bash scripts/demo_bksdm.sh [training flags]
# Needs no GPU and no download of models or data. Leaves a pipeline and a report in outputs/demo_bksdm/.
# DEMO_OUT: another folder. DEMO_EVALUATE: flags for evaluate.py.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
EXTRA=
source scripts/setup.sh
source scripts/builtin_data.sh
OUT="${DEMO_OUT:-outputs/demo_bksdm}"
builtin_data "$OUT"

echo "== 3/4 distil; beside it, on the other half of the cores, the same from random weights (log: $OUT/random.log)"
TRAIN=(python train_bksdm_distill.py --config tiny_digits --cached_latents "$OUT/latents")
export OMP_NUM_THREADS="$HALF"
"${TRAIN[@]}" --output_dir "$OUT/random" --no_copy_weight_from_teacher "$@" > "$OUT/random.log" 2>&1 &
RANDOM_RUN=$!
trap 'kill $RANDOM_RUN 2>/dev/null || true' EXIT
"${TRAIN[@]}" --output_dir "$OUT" "$@"
wait $RANDOM_RUN || { echo "error: that run failed; the end of $OUT/random.log:" >&2; tail -5 "$OUT/random.log" >&2; exit 1; }
# the student as it starts: one step with no learning rate
"${TRAIN[@]}" --output_dir "$OUT/before" "$@" --max_train_steps 1 --learning_rate 0 --report_to none > "$OUT/before.log" 2>&1

echo "== 4/4 sample and measure"
# shellcheck disable=SC2086
OMP_NUM_THREADS="$CORES" python evaluate.py --model "before=$OUT/before" --model "student=$OUT" \
    --model "random=$OUT/random" --nfe 25 --output_dir "$OUT" ${DEMO_EVALUATE:-}
echo "The smaller pipeline is in $OUT: DiffusionPipeline.from_pretrained(\"$OUT\")."
