#!/usr/bin/env bash
# Chain methods on the built-in teacher: BK-SDM, then SLAM or EPD, and measure all: bash scripts/demo_stack.sh [training flags]
# Needs no GPU and no download of models or data. Leaves a pipeline, its parts and a report in outputs/demo_stack/.
# DEMO_OUT: another folder. DEMO_EPD: flags for train_epd.py alone. DEMO_EVALUATE: flags for evaluate.py.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
EXTRA=
source scripts/setup.sh
source scripts/builtin_data.sh
OUT="${DEMO_OUT:-outputs/demo_stack}"
STAGES=5
builtin_data "$OUT"

slam() { # TEACHER FOLDER FLAGS
    python train_splam_distill_sd_wds.py --config tiny_digits --pretrained_teacher_model "$1" --precomputed_shards "$OUT/latents" \
        --output_dir "$2" "${@:3}"
}
epd() { # MODEL FOLDER FLAGS: each time anew; 5 calls in turn, with captions and the guidance that the report draws with
    rm -rf "${2:?}"
    # shellcheck disable=SC2086
    python train_epd.py --config tiny_digits --pretrained_model_name_or_path "$1" --guidance_type cfg --guidance_rate 2 \
        --prompt_path configs/epd/tiny_digits.txt --batch 16 --max_train_steps 120 --output_dir "$2" --nosubdir "${@:3}" \
        ${DEMO_EPD:-}
}
beside() { # PID LOG: wait for what runs beside
    wait "$1" || { echo "error: that run failed; the end of $2:" >&2; tail -5 "$2" >&2; exit 1; }
}

echo "== 3/5 the parts: BK-SDM; beside it, on the other half of the cores, SLAM and EPD of the teacher (log: $OUT/parts.log)"
export OMP_NUM_THREADS="$HALF"
(
    slam assets/tiny-teacher "$OUT/slam" "$@"
    epd assets/tiny-teacher "$OUT/epd" "$@"
) > "$OUT/parts.log" 2>&1 &
OTHER=$!
trap 'pkill -P $OTHER || true; kill $OTHER 2>/dev/null || true' EXIT
python train_bksdm_distill.py --config tiny_digits --cached_latents "$OUT/latents" --output_dir "$OUT/student" "$@"
beside $OTHER "$OUT/parts.log"

echo "== 4/5 the stacks, on the student of BK-SDM: SLAM; beside it EPD (log: $OUT/student_epd.log)"
(epd "$OUT/student" "$OUT/student_epd" "$@") > "$OUT/student_epd.log" 2>&1 &
OTHER=$!
slam "$OUT/student" "$OUT" "$@"
beside $OTHER "$OUT/student_epd.log"

echo "== 5/5 sample and measure"
# shellcheck disable=SC2086
OMP_NUM_THREADS="$CORES" python evaluate.py --teacher "assets/tiny-teacher,nfe=25/5/4/2/1" \
    --model "bksdm=$OUT/student,nfe=25/5/4/2/1,scheduler=best" --model "slam=$OUT/slam" --model "bksdm+slam=$OUT" \
    --model "epd=$OUT/epd" --model "bksdm+epd=$OUT/student_epd" --output_dir "$OUT" ${DEMO_EVALUATE:-}
echo "The smaller pipeline of four steps is in $OUT: DiffusionPipeline.from_pretrained(\"$OUT\"), guidance_scale=1."
echo "Its sampler with parallel calls: python sample_epd.py --predictor_path $OUT/student_epd."
