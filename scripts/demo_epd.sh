#!/usr/bin/env bash
# Distil predictors of EPD-Solver for the built-in teacher, measure them beside plain solvers: bash scripts/demo_epd.sh [training flags]
# Needs no GPU and no download of models or data. Leaves the predictors and a report in outputs/demo_epd/.
# DEMO_OUT: another folder. DEMO_REPORT: flags for scripts/report_epd.py.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
EXTRA=
source scripts/setup.sh
source scripts/builtin_data.sh
OUT="${DEMO_OUT:-outputs/demo_epd}"
mkdir -p "$OUT"

train() { # NAME FLAGS: into OUT/NAME, each time anew
    rm -rf "${OUT:?}/$1"
    python train_epd.py --config tiny_digits --output_dir "$OUT/$1" --nosubdir "${@:2}"
}

echo "== 1/2 distil, two runs at a time on half of the cores each (log of the second: $OUT/second.log)"
export OMP_NUM_THREADS="$HALF"
(
    train plugin --sampler_stu ipndm --sampler_tea unipc --max_order 2 --M 5 "$@"
    # the other way to use the teacher: with captions and guidance, where its first direction is not that of the closed form
    train guided --guidance_type cfg --guidance_rate 2 --prompt_path configs/epd/tiny_digits.txt --afs False --batch 16 "$@"
) > "$OUT/second.log" 2>&1 &
SECOND=$!
trap 'pkill -P $SECOND || true; kill $SECOND 2>/dev/null || true' EXIT
train epd3 --num_steps 3 --M 5 "$@"
train epd5 "$@"
wait $SECOND || { echo "error: that run failed; the end of $OUT/second.log:" >&2; tail -5 "$OUT/second.log" >&2; exit 1; }

echo "== 2/2 sample and measure, on half of the cores: more threads do not help networks this small"
# shellcheck disable=SC2086
python scripts/report_epd.py --predictor "$OUT/epd3" --predictor "$OUT/epd5" --predictor "$OUT/plugin" \
    --predictor "$OUT/guided" --output_dir "$OUT" ${DEMO_REPORT:-}
echo "The predictors are in $OUT: sample by python sample_epd.py --predictor_path $OUT/epd5."
