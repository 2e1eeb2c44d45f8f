#!/usr/bin/env bash
# LLaVA-1.5 stage 2 with PyramidDrop: language model and projector learn from instructions.
#
#   MODEL=/models/vicuna-7b-v1.5 bash scripts/v1_5/pdrop_train/finetune.sh [more flags]
#   PROJECTOR=mm_projector.bin REDUCTION=none bash scripts/v1_5/pdrop_train/finetune.sh
#
# Other variables: scripts/train_lib.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../train_lib.sh"

stage_2_of_1_5

run_stage_2 128 16 zero3 \
  --version v1 \
  --image_aspect_ratio pad \
  --group_by_modality_length True \
  --learning_rate 2e-5 \
  --model_max_length 2048 \
  "$@"
