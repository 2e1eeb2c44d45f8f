#!/usr/bin/env bash
# LLaVA-1.5 stage 2 with PyramidDrop: low-rank adapters and the projector learn from instructions.
#
#   bash scripts/v1_5/pdrop_train/finetune_lora.sh [more flags]
#   llava convert checkpoints/llava-v1.5-7b-pdrop-lora OUT --to llava --model-base lmsys/vicuna-7b-v1.5
#
# Other variables: scripts/train_lib.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../train_lib.sh"

default SIZE 7b
one_of SIZE 7b 13b
default MODEL "lmsys/vicuna-$SIZE-v1.5"
default PROJECTOR "./checkpoints/llava-v1.5-$SIZE$(plan_suffix)-pretrain/mm_projector.bin"
default DATA_PATH ./playground/data/llava_v1_5_mix665k.json
default IMAGE_FOLDER ./playground/data
default OUTPUT_DIR "./checkpoints/llava-v1.5-$SIZE$(plan_suffix)-lora"

run_train 128 16 zero3 \
  --lora_enable True \
  --lora_r 128 \
  --lora_alpha 256 \
  --mm_projector_lr 2e-5 \
  --version v1 \
  --pretrain_mm_mlp_adapter "$PROJECTOR" \
  --image_aspect_ratio pad \
  --group_by_modality_length True \
  --learning_rate 2e-4 \
  --model_max_length 2048 \
  "$@"
