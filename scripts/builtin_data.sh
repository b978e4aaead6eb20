# builtin_data FOLDER: real handwritten digits in colours as WebDataset shards in FOLDER/shards, and their latents and
# captions, encoded once by the built-in teacher, in FOLDER/latents. Sourced after scripts/setup.sh; sets CORES and HALF.
# STAGES: of how many stages these are the first two.
CORES="$(nproc 2>/dev/null || sysctl -n hw.ncpu)"
HALF=$(( CORES > 1 ? CORES / 2 : 1 ))
builtin_data() {
    mkdir -p "$1"
    echo "== 1/${STAGES:-4} real data: handwritten digits in colours, as WebDataset shards"
    python scripts/make_tiny_teacher.py --shards "$1/shards"
    echo "== 2/${STAGES:-4} encode images and captions once"
    OMP_NUM_THREADS="$CORES" python scripts/precompute_latents.py --pretrained_teacher_model assets/tiny-teacher \
        --train_shards_path_or_url "$1/shards" --resolution 32 --batch_size 64 --output_dir "$1/latents"
}
# builtin_classes FOLDER: the same digits as pictures in FOLDER/images, a folder per digit, and their latents in FOLDER/latents.
builtin_classes() {
    mkdir -p "$1"
    echo "== 1/4 real data: handwritten digits in colours, a folder per digit"
    python scripts/make_tiny_teacher.py --images "$1/images"
    echo "== 2/4 encode them once"
    OMP_NUM_THREADS="$CORES" python scripts/precompute_latents.py --vae assets/tiny-teacher --train_data_dir "$1/images" \
        --class_labels --output_format arrays --mirror False --resolution 32 --batch_size 64 --output_dir "$1/latents"
}
