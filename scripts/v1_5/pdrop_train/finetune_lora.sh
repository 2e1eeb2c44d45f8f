#!/usr/bin/env bash
# LLaVA-1.5 stage 2 with PyramidDrop: low-rank adapters and the projector learn from instructions.
#
#   bash scripts/v1_5/pdrop_train/finetune_lora.sh [more flags]
#   llava convert checkpoints/llava-v1.5-7b-pdrop-lora OUT --to llava --model-base lmsys/vicuna-7b-v1.5
#
# Other variables: scripts/train_lib.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../train_lib.sh"

stage_2_of_1_5 -lora

run_stage_2 128 16 zero3 \
  --lora_enable True \
  --lora_r 128 \
  --lora_alpha 256 \
  --mm_projector_lr 2e-5 \
  --version v1 \
  --image_aspect_ratio pad \
  --group_by_modality_length True \
  --learning_rate 2e-4 \
  --model_max_length 2048 \
  "$@"
