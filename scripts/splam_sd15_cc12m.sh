#!/usr/bin/env bash
# The published SLAM command: Stable Diffusion 1.5 on CC12M, streamed with curl, 1000 steps of 12 images, one GPU.
#   bash scripts/splam_sd15_cc12m.sh                                           # as published
#   bash scripts/splam_sd15_cc12m.sh --push_to_hub=False --report_to=tensorboard   # flags at the end win
# Needs a CUDA GPU, the network, `pip install bitsandbytes xformers wandb`, and being logged in to wandb and the hub.
# The published MODEL_NAME, runwayml/stable-diffusion-v1-5, is no longer on the hub; the default is its mirror.
# max_train_steps decides the length; max_train_samples would set the length of an epoch without it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -x .venv/bin/accelerate ]; then export PATH="$PWD/.venv/bin:$PATH"; fi
MODEL_NAME="${MODEL_NAME:-stable-diffusion-v1-5/stable-diffusion-v1-5}"
OUTPUT_DIR="${OUTPUT_DIR:-outputs/splam-sd15-cc12m}"

exec accelerate launch train_splam_distill_sd_wds.py \
    --pretrained_teacher_model="$MODEL_NAME" \
    --output_dir="$OUTPUT_DIR" \
    --mixed_precision=fp16 \
    --resolution=512 \
    --learning_rate=8e-6 --loss_type="huber" --ema_decay=0.95 --adam_weight_decay=0.0 \
    --max_train_steps=1000 \
    --max_train_samples=4000000 \
    --dataloader_num_workers=8 \
    --train_shards_path_or_url="pipe:curl -L -s https://huggingface.co/datasets/laion/conceptual-captions-12m-webdataset/resolve/main/data/{00000..01099}.tar?download=true" \
    --validation_steps=200 \
    --checkpointing_steps=200 --checkpoints_total_limit=10 \
    --train_batch_size=12 \
    --gradient_checkpointing --enable_xformers_memory_efficient_attention \
    --gradient_accumulation_steps=1 \
    --use_8bit_adam \
    --resume_from_checkpoint=latest \
    --report_to=wandb \
    --seed=453645634 \
    --push_to_hub \
    "$@"
