#!/usr/bin/env bash
# Train a DiT and an FPDM of equal width on handwritten digits by class, measure both: bash scripts/demo_fpdm.sh [training flags]
# Needs no GPU and no download of models or data. Leaves both pipelines and a report in outputs/demo_fpdm/.
# DEMO_OUT: another folder. DEMO_REPORT: flags for scripts/report_fpdm.py.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
EXTRA=
source scripts/setup.sh
source scripts/builtin_data.sh
OUT="${DEMO_OUT:-outputs/demo_fpdm}"
builtin_classes "$OUT"

echo "== 3/4 train the DiT; beside it, on the other half of the cores, the FPDM (log: $OUT/fpdm.log)"
TRAIN=(python train_fpdm.py --config tiny_digits --feature_path "$OUT/latents" --output_dir "$OUT")
export OMP_NUM_THREADS="$HALF"
# as all blocks of the DiT do, the outer blocks of this FPDM see the timestep
"${TRAIN[@]}" --name fpdm --fixed_point --fixed_point_pre_post_timestep_conditioning "$@" > "$OUT/fpdm.log" 2>&1 &
FPDM=$!
trap 'kill $FPDM 2>/dev/null || true' EXIT
"${TRAIN[@]}" --name dit "$@"
wait $FPDM || { echo "error: the FPDM run failed; the end of $OUT/fpdm.log:" >&2; tail -5 "$OUT/fpdm.log" >&2; exit 1; }

echo "== 4/4 sample and measure"
# shellcheck disable=SC2086
OMP_NUM_THREADS="$CORES" python scripts/report_fpdm.py --dit "$OUT/runs/dit" --fpdm "$OUT/runs/fpdm" --output_dir "$OUT" \
    ${DEMO_REPORT:-}
echo "The pipelines are in $OUT/runs: sample more by python sample_fpdm.py --ckpt $OUT/runs/fpdm --sample_index_end 20."
