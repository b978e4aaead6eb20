#!/usr/bin/env bash
# Distil the built-in teacher to a few steps and measure the result: bash scripts/quickstart.sh [training flags]
# Needs no GPU and no download of models or data. Leaves a pipeline and a report in outputs/quickstart/.
# QUICKSTART_OUT: another folder. QUICKSTART_EVALUATE: flags for evaluate.py.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
EXTRA=
source scripts/setup.sh
source scripts/builtin_data.sh
OUT="${QUICKSTART_OUT:-outputs/quickstart}"
builtin_data "$OUT"

echo "== 3/4 distil: SLAM here; beside it, on the other half of the cores, LCM with the same budget (log: $OUT/lcm.log)"
TRAIN=(python train_splam_distill_sd_wds.py --config tiny_digits --precomputed_shards "$OUT/latents")
export OMP_NUM_THREADS="$HALF"
"${TRAIN[@]}" --output_dir "$OUT/lcm" --subpath_param paper --gamma_one_prob 1 "$@" > "$OUT/lcm.log" 2>&1 &
LCM=$!
trap 'kill $LCM 2>/dev/null || true' EXIT
"${TRAIN[@]}" --output_dir "$OUT" "$@"
wait $LCM || { echo "error: the LCM run failed; the end of $OUT/lcm.log:" >&2; tail -5 "$OUT/lcm.log" >&2; exit 1; }

echo "== 4/4 sample and measure"
# shellcheck disable=SC2086
OMP_NUM_THREADS="$CORES" python evaluate.py --model "student=$OUT" --model "lcm=$OUT/lcm" --output_dir "$OUT" \
    ${QUICKSTART_EVALUATE:-}
echo "The distilled pipeline is in $OUT: DiffusionPipeline.from_pretrained(\"$OUT\"), guidance_scale=1."
