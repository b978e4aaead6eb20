#!/usr/bin/env bash
# Tune a distilled predictor of EPD-Solver by a reward, measure before and after: bash scripts/demo_epd_rl.sh [training flags]
# Needs no GPU and no download of models or data. Leaves the predictors and a report in outputs/demo_epd_rl/.
# DEMO_OUT: another folder. DEMO_START: flags for train_epd.py. DEMO_REPORT: flags for scripts/report_epd_rl.py.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
EXTRA=
source scripts/setup.sh
source scripts/builtin_data.sh
OUT="${DEMO_OUT:-outputs/demo_epd_rl}"
mkdir -p "$OUT"
export OMP_NUM_THREADS="$HALF" # more threads do not help networks this small

echo "== 1/3 distil the start: 3 noise levels, captions, no guidance"
rm -rf "${OUT:?}/start"
# shellcheck disable=SC2086
python train_epd.py --config tiny_digits --num_steps 3 --afs False --guidance_type cfg --guidance_rate 1 \
    --prompt_path configs/epd/tiny_digits.txt --batch 16 --output_dir "$OUT/start" --nosubdir ${DEMO_START:-}

tune() { # NAME FLAGS: into OUT/NAME, each time anew
    rm -rf "${OUT:?}/$1"
    exec python train_epd_rl.py --config rl_tiny_digits --override "data.predictor_snapshot=$OUT/start" --output_dir "$OUT/$1" \
        --nosubdir "${@:2}"
}

echo "== 2/3 tune it; beside it, on the other half of the cores, without staying near the start (log: $OUT/free.log)"
(tune free --override ppo.kl_coef=0 "$@") > "$OUT/free.log" 2>&1 &
FREE=$!
trap 'kill $FREE 2>/dev/null || true' EXIT
(tune near "$@")
wait $FREE || { echo "error: that run failed; the end of $OUT/free.log:" >&2; tail -5 "$OUT/free.log" >&2; exit 1; }

echo "== 3/3 sample and measure, on captions and seeds that no training saw"
# shellcheck disable=SC2086
python scripts/report_epd_rl.py --start "$OUT/start" --run "$OUT/near" --run "$OUT/free" --output_dir "$OUT" ${DEMO_REPORT:-}
echo "The predictors are in $OUT: sample by python sample_epd.py --predictor_path $OUT/near."
