#!/usr/bin/env bash
# LLaVA-1.5 stage 2 with PyramidDrop: adapters over a language model in 4 bits (bitsandbytes). Rank,
# scale and learning rate are those of LLaVA's own QLoRA script.
#
#   bash scripts/v1_5/pdrop_train/finetune_qlora.sh [more flags]
#
# Other variables: scripts/train_lib.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../train_lib.sh"

stage_2_of_1_5 -qlora

run_stage_2 128 16 zero2 \
  --bits 4 \
  --lora_enable True \
  --lora_r 64 \
  --lora_alpha 16 \
  --version v1 \
  --image_aspect_ratio pad \
  --group_by_modality_length True \
  --learning_rate 2e-5 \
  --model_max_length 2048 \
  "$@"
